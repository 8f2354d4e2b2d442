"""An ONNX file in onnxruntime, as an `ExportedFile`."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arm_convert.onnx_model.file import IMAGE
from arm_core.engine.protocol import Array
from arm_core.model.spec import from_json


def require() -> None:
    """Raise a ValueError that says what to install if ONNX files cannot be created or run."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(
            f"ONNX files need {' and '.join(missing)}, which {verb} not installed; "
            "install the extra: pip install 'arm-vision[onnx]'"
        )


class OnnxFile:
    """An `ExportedFile` on the CPU.

    threads: of onnxruntime; None for its default, all cores.
    Raises ValueError for a file that onnxruntime cannot load, or that `arm export` did not write.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        require()
        import onnxruntime

        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; warnings are about its own optimisations
        if threads is not None:
            options.intra_op_num_threads = threads
        began = time.perf_counter()
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a separate exception class for each failure
            raise ValueError(f"{path}: onnxruntime cannot load this file ({error})") from error
        seconds = time.perf_counter() - began
        strings = self._session.get_modelmeta().custom_metadata_map
        if "spec" not in strings:
            raise ValueError(f"{path}: holds no model specification; expected a file of `arm export`")
        self.path = path
        self.spec = from_json(json.loads(strings["spec"]))
        self.precision = strings.get("precision", "float32")
        self.outputs = tuple(output.name for output in self._session.get_outputs())
        (entry,) = self._session.get_inputs()
        self._entry, self.raw_pixels = entry.name, entry.name == IMAGE
        data = path.with_name(f"{path.name}.data")
        size = path.stat().st_size + (data.stat().st_size if data.exists() else 0)
        self.facts: dict[str, Any] = {"bytes": size, "load_seconds": seconds}
        self.runtime = f"onnxruntime {onnxruntime.__version__}"

    def run(self, images: npt.NDArray[Any]) -> dict[str, Array]:
        """images: (B, H, W, 3), normalised float32, or uint8 with `raw_pixels`."""
        given = images if self.raw_pixels else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        results = self._session.run(None, {self._entry: given})
        return dict(zip(self.outputs, results, strict=True))
