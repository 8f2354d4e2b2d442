"""Compares an exported file with its model: outputs, answers, latency, size."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from arm_core.data.decode import Pixels
from arm_core.data.sources import Item
from arm_core.data.transforms import EvalTransform
from arm_core.engine.protocol import Array
from arm_core.model.rng import KeyedRng
from arm_core.model.spec import ModelSpec, to_json

TOLERANCES = {"float32": 1e-4, "float16": 0.1}
"""Largest difference of an output, relative to its largest value; an int8 file has no bound."""

ROUNDED_PIXELS = 1e-2
"""The same for a file that resizes pixels itself: onnxruntime may round one to the neighbouring value."""

LATENCY_RUNS = 7
"""Timed runs of one image each, of the file and of the engine in turn."""


class ExportedFile(Protocol):
    """A file that computes outputs of a model."""

    path: Path
    outputs: tuple[str, ...]
    """Names, as in `Engine.forward`; a classifier's may also hold `tokens`, the last norm's output."""
    raw_pixels: bool
    """Whether it takes uint8 pixels of any size and prepares them itself."""
    spec: ModelSpec
    precision: str
    """`float32`, `float16` or `int8`."""
    facts: dict[str, Any]
    """Further facts for the report: size, nodes, seconds to load."""

    def run(self, images: npt.NDArray[Any]) -> dict[str, Array]:
        """images: (B, H, W, 3), normalised float32, or uint8 with `raw_pixels`."""
        ...


class ProgramBackend(Protocol):
    """Functions of the torch backend beyond `arm_core.engine.protocol.Backend`."""

    def write_program(
        self, spec: ModelSpec, parameters: Mapping[str, Array], path: Path, **options: Any
    ) -> int:
        """Write a .pt2 file; returns its number of nodes."""
        ...

    def open_program(self, path: Path) -> ExportedFile: ...


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results of a file compared with those of the model."""

    images: int
    differences: dict[str, float]
    """Largest difference of each output, relative to the model's largest value of it."""
    same_answers: float | None
    """Fraction of the images with the same class from both; None without logits."""
    accuracy: tuple[float, float] | None
    """Top-1 accuracy of the file and of the model, if the images have labels."""
    latency: tuple[float, float]
    """Seconds for one image, median: the file's and the engine's."""
    precision: str
    tolerance: float
    """Tolerance of the differences; infinite for an int8 file."""
    facts: dict[str, Any]

    @property
    def within(self) -> bool:
        """Whether every difference is within the tolerance."""
        return all(difference <= self.tolerance for difference in self.differences.values())


def noise_images(spec: ModelSpec, count: int, seed: int = 0) -> list[Pixels]:
    """Noise images, larger than the model's input and not square: identical on every machine."""
    height, width = spec.image_size
    shape = (height + height // 3 + 1, width + width // 2 + 2, 3)
    rng = KeyedRng(seed, "export")
    # Coarse and fine noise, so that resizing has an effect and does not average everything to grey.
    coarse = rng.uniform(count * 8 * 8 * 3).reshape(count, 8, 8, 3)
    rows, columns = (np.arange(side) * 8 // side for side in shape[:2])
    fine = rng.uniform(count * int(np.prod(shape))).reshape(count, *shape)
    mixed = 0.7 * coarse[:, rows][:, :, columns] + 0.3 * fine
    return [np.asarray(image * 255, np.uint8) for image in mixed]


def compare(
    file: ExportedFile,
    forward: Callable[[Array], dict[str, Array]],
    images: Sequence[Pixels],
    *,
    spec: ModelSpec,
    transform: EvalTransform,
    labels: Sequence[int] | None = None,
) -> Comparison:
    """Run images through a file and through a model.

    forward: the model's outputs for (B, H, W, 3) normalised images.  images: 8-bit RGB pictures of any
    size.  labels: their classes.
    Raises ValueError if the file's model has another spec.
    """
    if file.spec != spec:
        raise ValueError(
            f"{file.path}: exported from another model; they differ in {_unequal(file.spec, spec)}"
        )
    size = spec.image_size
    prepared = [transform(Item(image=image, label=-1, name="image"), size)[None] for image in images]
    given = [image[None] for image in images] if file.raw_pixels else prepared
    found = [file.run(image) for image in given]
    expected = [forward(image) for image in prepared]
    common = [name for name in file.outputs if name in expected[0]]
    assert common, f"no output in common: {file.outputs} and {tuple(expected[0])}"
    pairs = {
        name: tuple(np.concatenate([r[name] for r in rs]) for rs in (found, expected)) for name in common
    }
    answers = [array.argmax(1) for array in pairs["logits"]] if "logits" in pairs else None
    accuracy = None
    if answers is not None and labels is not None:
        accuracy = _top1(answers[0], labels), _top1(answers[1], labels)
    limit = TOLERANCES.get(file.precision, np.inf)
    return Comparison(
        images=len(images),
        differences={name: _difference(*pair) for name, pair in pairs.items()},
        same_answers=None if answers is None else float((answers[0] == answers[1]).mean()),
        accuracy=accuracy,
        latency=_latencies(lambda: file.run(given[0]), lambda: forward(prepared[0])),
        precision=file.precision,
        tolerance=max(limit, ROUNDED_PIXELS) if file.raw_pixels else limit,
        facts=file.facts,
    )


def _top1(answers: npt.NDArray[np.integer], labels: Sequence[int]) -> float:
    return float((answers == np.array(labels)).mean())


def _unequal(first: ModelSpec, second: ModelSpec) -> str:
    """Names of the fields that differ in two specs: `kind, image_size, encoder`."""
    a, b = to_json(first), to_json(second)
    return ", ".join(key for key in {**a, **b} if a.get(key) != b.get(key))


def _difference(found: Array, expected: Array) -> float:
    """NaN if either has a NaN, so that NaN results are never within the tolerance."""
    largest = np.abs(expected.astype(np.float64)).max()
    return float(np.abs(found.astype(np.float64) - expected).max() / (largest or 1.0))


def _latencies(*calls: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of two calls, timed in turn so that a busy machine slows both."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(LATENCY_RUNS):
        for call, own in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            own.append(time.perf_counter() - began)
    first, second = (float(np.median(own)) for own in seconds)
    return first, second
