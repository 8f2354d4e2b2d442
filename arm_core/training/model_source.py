"""Models on disk: a model folder, a run, or one checkpoint of a run.

    MODEL/config.json                            a model folder
    RUN/checkpoints/step-00001000/               a run; its newest intact checkpoint is the model
    RUN/checkpoints/step-00001000/manifest.json  one checkpoint

`open_folder` is the only place that distinguishes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from arm_core.engine.protocol import Array
from arm_core.files.model_folder import Model, read_model
from arm_core.files.safetensors import Tensor
from arm_core.model.checks import shortened
from arm_core.training.checkpoint import EMA, FOLDER, MANIFEST, Warn, newest_folder, read_average, verify


class Weights(StrEnum):
    """Which weights of a checkpoint are used."""

    RAW = "raw"
    """The weights that the optimizer updates."""
    EMA = "ema"
    """Their exponential moving average."""

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise ValueError(f"weights: expected {' or '.join(cls)}, found {shortened(value)}")


@dataclass(frozen=True)
class ModelSource:
    """An opened model; its tensors are read on demand."""

    model: Model
    """The model; for a run, that of its newest intact checkpoint."""
    kind: str
    """Human-readable: `model folder`, `run, step-00001000` or `checkpoint step-00001000`."""
    average: dict[str, Tensor] | None = None
    """The moving average of all weights (fixed tables from the model), if the run kept one."""
    run: Path | None = None
    """The folder of the run, unless this is a plain model folder."""

    def tensors(self, weights: Weights = Weights.RAW) -> dict[str, Tensor]:
        """The selected weights by name; ValueError if no average was kept."""
        if weights is Weights.RAW:
            return self.model.arrays
        if self.average is None:
            raise ValueError(
                f"{self.model.path}: has no moving average of the weights "
                "(optimizer.ema_decay was not set); pass --weights raw"
            )
        return self.average

    def load(self, weights: Weights = Weights.RAW) -> dict[str, Array]:
        """The selected weights as float32 arrays; `Quantized` matrices for a quantized model."""
        loaded = self.model.load() if weights is Weights.RAW else {}
        return loaded or {n: np.asarray(t.read(), np.float32) for n, t in self.tensors(weights).items()}


def open_folder(path: Path, *, warn: Warn) -> ModelSource:
    """Open a model folder, a run or a checkpoint; a checkpoint's files are compared with its manifest.

    warn: receives a sentence for each newer checkpoint of a run that is corrupt and skipped.
    Raises ValueError if the folder holds no model, BadFileError (a ValueError) if it is corrupt.
    """
    folder, kind, run = path, "model folder", None
    if (path / FOLDER).is_dir():
        newest = newest_folder(path, warn)
        if newest is None:
            raise ValueError(f"{path}: this run has not saved a checkpoint yet")
        folder, kind, run = newest, f"run, {newest.name}", path
    elif (path / MANIFEST).is_file():
        verify(path)
        kind, run = f"checkpoint {path.name}", path.absolute().parent.parent
    model = read_model(folder)
    average = None
    if run is not None and (folder / EMA).is_file():
        average = {**model.arrays, **read_average(folder, model.spec)}
    return ModelSource(model, kind, average, run)
