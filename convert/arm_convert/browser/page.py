"""The page: its template, the runtime and the model in one HTML file."""

from __future__ import annotations

import base64
import gzip
import html
import json
import re
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from arm_convert.browser.runtime import Runtime
from arm_convert.onnx_model.file import OnnxModel
from arm_convert.onnx_model.quantize import write_int8
from arm_core.files.atomic import new_file
from arm_core.model.spec import ModelSpec

LARGEST_MODEL = 380_000_000
"""Largest model in a page, bytes: as base64 it must fit into a string of the browser (512 MiB)."""


@dataclass(frozen=True, kw_only=True)
class PageSettings:
    """Contents and options of a page."""

    title: str
    classes: tuple[str, ...]
    crop_fraction: float = 1.0
    """Part of a photo's side that the model reads: the map covers only this part."""
    draw: bool = False
    """A square to draw in instead of photos and the camera."""
    int8: bool = False
    """int8 weights of the matrix products: a smaller page."""


def write_page(
    path: Path, model: OnnxModel, spec: ModelSpec, settings: PageSettings, runtime: Runtime, *, force: bool
) -> None:
    """Write a page that classifies images in the browser.

    model: a classifier that takes uint8 pixels (`OnnxOptions.preprocess`).
    Raises ValueError for a model that is too large for a page, and if a file exists and `force` is not
    set.
    """
    size = sum(array.nbytes for array in model.constants.values())
    if size > LARGEST_MODEL and not settings.int8:
        raise ValueError(
            f"{path}: expected a model of at most {LARGEST_MODEL / 1e6:.0f} MB for a page, found "
            f"{size / 1e6:.0f} MB; pass --quantize int8, or export .onnx"
        )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        if settings.int8:
            write_int8(model, file, force=False)
        else:
            model.write(file, force=False)
        content = file.read_bytes()
    height, width = spec.image_size
    config = {
        "classes": settings.classes,
        "draw": settings.draw,
        "size": [height, width],
        "covered": [int(side / settings.crop_fraction) for side in (height, width)],
    }
    megabytes = f"{len(content) / 1e6:.1f} MB"
    values = {
        "TITLE": html.escape(settings.title),
        "LEAD": f"Vision Mamba of ARM, {len(settings.classes)} classes, {height}x{width} pixels. Everything "
        "runs in this page: no image leaves your device.",
        "HINT": "Draw with the mouse, a finger, or arrow keys and Space."
        if settings.draw
        else "Drop photos here, paste one, or choose them.",
        "CANVAS": "Square to draw in" if settings.draw else "The photo",
        "ABOUT": f"Written by arm-vision. The page holds the model as an ONNX file of {megabytes} and runs "
        "it with onnxruntime-web on the CPU.",
        "LICENSE": html.escape(runtime.license),
        # In a script element only `<` could end it.
        "CONFIG": json.dumps(config).replace("<", "\\u003c"),
        "RUNTIME": base64.b64encode(runtime.script.read_bytes()).decode(),
        "WASM": _packed(runtime.wasm.read_bytes()),
        "MODEL": _packed(content),
        "WORKER": _asset("worker.js"),
        "SCRIPT": _asset("page.js"),
    }
    text = re.sub("@([A-Z]+)@", lambda found: values[found[1]], _asset("page.html"))
    with new_file(path, force=force) as draft:
        draft.write_text(text, encoding="utf-8")


def _asset(name: str) -> str:
    return resources.files("arm_convert.browser").joinpath(name).read_text(encoding="utf-8")


def _packed(content: bytes) -> str:
    """gzip, then base64. The same bytes give the same text."""
    return base64.b64encode(gzip.compress(content, compresslevel=6, mtime=0)).decode()
