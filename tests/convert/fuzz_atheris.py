"""Fuzz a file reader, guided by coverage (needs atheris).

python tests/convert/fuzz_atheris.py FORMAT [-runs=N]
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["arm_convert", "arm_core"]):
    import test_convert_fuzz as fuzz


def main() -> None:
    name = sys.argv[1]
    path, corpus = Path(tempfile.mkdtemp()) / "file", Path(tempfile.mkdtemp())
    (corpus / "seed").write_bytes(fuzz.SEEDS[name])

    def one(data: bytes) -> None:
        path.write_bytes(fuzz.WRAPPED.get(name, bytes)(data))
        fuzz.try_to_read(path)

    atheris.Setup([sys.argv[0], str(corpus), *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
