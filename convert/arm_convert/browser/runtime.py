"""The files of onnxruntime-web for a page: found on this machine, never downloaded.

`make browser-runtime` puts them into this package from their npm package, so that a wheel built
afterwards has them; `--runtime FOLDER` names an unpacked npm package instead.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

VENDORED = Path(__file__).parent / "vendor"
"""Folder of the files from `make browser-runtime`; not part of the repository."""

SCRIPT, WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
"""The self-contained script, and the CPU build for WebAssembly."""

LICENSE = """\
This page contains onnxruntime-web {version} (https://onnxruntime.ai), under the MIT License:

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without
limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of
the Software, and to permit persons to whom the Software is furnished to do so, subject to the following
conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial
portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO
EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN
AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE
OR OTHER DEALINGS IN THE SOFTWARE.
"""


@dataclass(frozen=True)
class Runtime:
    """onnxruntime-web on this machine."""

    script: Path
    wasm: Path
    version: str

    @property
    def license(self) -> str:
        return LICENSE.format(version=self.version)


def find_runtime(folder: str | None = None) -> Runtime:
    """The runtime in `folder`, an unpacked npm package, else the one in this package.

    Raises ValueError if the files are missing; the message says how to get them.
    """
    root = VENDORED if folder is None else Path(folder)
    for base in (root, root / "package", root / "node_modules/onnxruntime-web"):
        for files in (base, base / "dist"):
            found = Runtime(files / SCRIPT, files / WASM, _version(base))
            if found.script.is_file() and found.wasm.is_file():
                return found
    if folder is not None:
        raise ValueError(
            f"{folder}: expected an unpacked onnxruntime-web package, found no {SCRIPT} and {WASM}"
        )
    raise ValueError(
        "a web page needs onnxruntime-web, which this installation does not contain; "
        "run `make browser-runtime` in the repository, or `npm pack onnxruntime-web`, unpack it and pass "
        "--runtime FOLDER"
    )


def _version(base: Path) -> str:
    try:
        return str(json.loads((base / "package.json").read_text())["version"])
    except (OSError, ValueError, KeyError):
        return "of unknown version"
