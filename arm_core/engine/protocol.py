"""The protocol of engines and backends, and the values that they exchange with the core.

A backend is a pure function of (parameters, batch, settings): order, augmentation, mixing, drop-path
masks, schedules and initial values are computed in `arm_core` and passed as NumPy arrays. Two backends
can therefore be compared step by step, and a run can move between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from arm_core.engine.byte_images import ByteImages
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.ranks import ALONE, Ranks
from arm_core.engine.scan_timing import ScanTimer
from arm_core.model.parameters import check_parameters, parameter_table
from arm_core.model.spec import ModelSpec

Array = npt.NDArray[np.float32]
Images = Array | ByteImages
"""(B, H, W, 3): normalised float32 values, or bytes that the engine normalises on its device."""


class Precision(StrEnum):
    """Type of the matrix products; master weights, scan state, A, D and dt stay float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Compile(StrEnum):
    """The part of a model that a backend compiles."""

    AUTO = "auto"
    """MLX compiles its whole step on an Apple GPU; torch compiles the blocks on an NVIDIA GPU with scan
    `triton`; otherwise nothing is compiled."""
    NONE = "none"
    BLOCKS = "blocks"
    """Each block of the encoder and the decoder separately; one compilation serves all blocks of a kind."""
    MODEL = "model"
    """The whole forward and backward pass."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a backend runs a model; nothing here changes the maths.

    A backend raises ValueError for options that it does not support.
    """

    device: str = "auto"
    """`auto`, `cpu`, or a device name of the backend (`gpu` for MLX, `cuda` or `cuda:1` for torch)."""
    scan: str = "auto"
    """Name of the scan implementation; `auto` lets the backend decide once."""
    precision: Precision = Precision.FLOAT32
    threads: int | None = None
    """CPU threads; None keeps the libraries' defaults."""
    compile: Compile = Compile.AUTO
    recompute: bool = False
    """Save memory: keep only the input of each block, and recompute the rest in the backward pass."""
    shard: bool = False
    """Shard weights, gradients and optimizer state over the ranks instead of replicating them."""
    deterministic: bool = False
    """Use deterministic algorithms on a GPU. On a CPU the caller also fixes `threads`."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch as a backend sees it."""

    images: Images
    """(B, H, W, 3)"""
    targets: Array | None = None
    """(B, classes) probabilities for a classifier (smoothing and mixing included), None in pretraining."""
    drop_path_scale: Array | None = None
    """(depth, 2, B) factors of the mixer and MLP branches: 0 for a dropped path, else 1 / (1 - rate).
    None for no drop path."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of a training step."""

    loss: float
    """Mean over the micro-batches, before the update."""
    grad_norm: float
    """L2 norm over all trainable gradients, before clipping."""

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss) and np.isfinite(self.grad_norm))


class OutOfMemory(ValueError):  # noqa: N818
    """The device has too little memory for a batch; the state is unchanged.

    available: bytes of the device.  shape: of the images.  fitting: images that fit in training by the cost
    model; None for a pass without gradients, which takes little memory and is not modelled.
    """

    def __init__(
        self, device: str, available: int, shape: tuple[int, ...], *, fitting: int | None = None
    ) -> None:
        images, height, width = shape[:3]
        self.fitting = fitting
        words = (
            f"{device}: out of memory ({available / 2**30:.3g} GiB) with {images} images of {height}x{width}"
        )
        if fitting is None:
            words += " at a time; choose a smaller batch"
        elif fitting < images:
            words += f" at a time; by the cost model about {fitting} fit"
        else:
            words += (
                f" at a time, though by the cost model {fitting} fit; is another process using the device?"
            )
        super().__init__(words)


class StepStopped(Exception):  # noqa: N818
    """A training step ended between two micro-batches because `stop` requested it; the state is unchanged."""


def check_towards(output: str, shapes: Mapping[str, tuple[int, ...]], towards: Array) -> None:
    """Check the arguments of `Engine.input_gradient` against the shapes of the outputs of `forward`."""
    if output not in shapes:
        raise ValueError(f"unknown output {output!r}; known are {', '.join(shapes)}")
    if towards.shape != shapes[output]:
        raise ValueError(f"towards: expected {shapes[output]} for output {output!r}, found {towards.shape}")


class PendingStep(Protocol):
    """A training step in progress; `result()` waits for the device."""

    def result(self) -> StepResult: ...


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a step changes, by parameter name; moments and EMA only for trainable parameters."""

    parameters: Mapping[str, Array]
    exp_avg: Mapping[str, Array] = field(default_factory=dict)
    exp_avg_sq: Mapping[str, Array] = field(default_factory=dict)
    ema: Mapping[str, Array] = field(default_factory=dict)
    """Empty unless an EMA is kept."""

    def check(self, spec: ModelSpec) -> None:
        """Compare names and shapes with the parameter table of `spec`, without reading arrays from files.

        Raises ValueError that lists the differences.
        """
        check_parameters(spec, described(self.parameters))
        trainable = {name: row.shape for name, row in parameter_table(spec).items() if row.trainable}
        for kind in ("exp_avg", "exp_avg_sq", "ema"):
            arrays = described(getattr(self, kind))
            shapes = {name: tuple(arrays[name].shape) for name in arrays}
            if shapes and (different := sorted(n for n, _ in shapes.items() ^ trainable.items())):
                names = ", ".join(list(dict.fromkeys(different))[:5])
                raise ValueError(f"{kind}: expected the trainable parameters; differs in {names}")


def described(arrays: Mapping[str, Array]) -> Mapping[str, Any]:
    """The objects with the arrays' shapes: the arrays, or the `tensors` of a file that is not read yet."""
    found: Mapping[str, Any] = getattr(arrays, "tensors", arrays)
    return found


class Engine(Protocol):
    """One model on one device, or on one device of each rank of a job (`arm_core.engine.ranks`).

    All ranks call every method at the same point of their work. Since sharded weights are gathered for a
    pass, all ranks call `forward` and `loss_and_gradients` equally often. Each rank passes its own batches.
    """

    spec: ModelSpec
    device: str
    """The name that is printed and recorded."""
    scan: str
    """The scan implementation in use, never `auto`; with a note if another kernel runs part of it."""
    compile: Compile
    """What is compiled; never `AUTO`."""

    def forward(self, images: Images, *, intermediates: bool = False) -> dict[str, Array]:
        """Inference on (B, H, W, 3) images, as float32 arrays.

        A classifier returns `features` (B, D), the pooled vector before the head, and `logits`
        (B, classes). A pretraining model returns `decoder_input` (B, tokens, decoder width, decoder depth),
        `prediction` (B, tokens, patch values), `loss_per_token` (tokens,) and `loss` ().
        `intermediates` adds the tensors named in `arm_core.model.reference.model`.
        """

    def input_gradient(self, images: Array, output: str, towards: Array) -> Array:
        """Gradient of sum(output * towards) with respect to the normalised images, (B, H, W, 3).

        output: a name among the outputs and intermediate tensors of `forward`.  towards: of the same shape.
        Raises ValueError for an unknown name or a wrong shape.
        """

    def loss_and_gradients(self, batch: Batch) -> tuple[float, dict[str, Array]]:
        """Loss and the gradient of every trainable parameter, by name; nothing is updated.

        With several ranks the gradients may be the mean over their batches.
        """

    def train_step(
        self,
        batches: Sequence[Batch],
        *,
        step: int,
        lr: float,
        total_micro_batches: int | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> PendingStep:
        """One AdamW update from the mean gradient of the micro-batches of all ranks.

        step: number of this update, from 1 (bias correction).  lr: before layer-wise scales.
        total_micro_batches: the sum over all ranks; None means len(batches). Ranks can have different
        numbers, each at least one. Loss and gradient norm are those of the whole update, on every rank.
        stop: called before each micro-batch except the first; True raises StepStopped, and the state does not
        change. For a job of one process.
        If the loss or the gradient norm is not finite, the state does not change.
        Raises ValueError if the engine was created for inference.
        """

    def swap_ema(self) -> None:
        """Swap the trainable weights with their moving average; a second call swaps them back."""

    def export_state(self) -> TrainingState:
        """Copies in host memory: everything on rank 0; other ranks may return nothing."""

    def load_state(self, state: TrainingState) -> None:
        """Replace parameters, moments and EMA; every rank passes all of them. Reads each array once.

        Empty moments become zeros, and an empty EMA becomes a copy of the weights. An engine for inference
        only loads the parameters. Raises ValueError on names or shapes that differ from the parameter table.
        """


class Backend(Protocol):
    """A framework, found through its entry point; importing the backend must not import the framework."""

    name: str

    def missing(self) -> str | None:
        """None if the framework can be used, else a sentence: what is missing and what to install."""

    def version(self) -> str: ...

    def devices(self) -> list[str]:
        """Device names; `auto` takes the first one."""

    def cpu_products(self) -> tuple[str, str | None]:
        """The library of matrix products on the CPU, and how to make them faster (None if not possible)."""

    def bfloat16_units(self) -> str | None:
        """The units of this CPU with which bfloat16 products are faster than float32 ones, such as AMX."""

    def scans(self, device: str) -> Mapping[str, str | None]:
        """Scan implementations in order of preference: None if usable on the device, else the reason."""

    def scan_timer(self, device: str) -> ScanTimer:
        """A timer for the scans on a device. Raises ValueError if the device is not available."""

    def join(self, device: str) -> Ranks:
        """The job to which a launcher assigned this process, else `ALONE`; once per process.

        device: as in `EngineOptions`; the communication library depends on it. Raises ValueError if the
        launcher's description of the job is invalid, or the device is not available for this rank.
        """

    def create_engine(
        self,
        spec: ModelSpec,
        state: TrainingState,
        *,
        optimizer: OptimizerSettings | None = None,
        options: EngineOptions | None = None,
        ranks: Ranks = ALONE,
    ) -> Engine:
        """An engine that holds `state`; see `Engine.load_state`.

        optimizer: None creates an engine for inference and gradients, which holds no moments and no EMA.
        ranks: from `join`, if the engine trains together with those of other ranks.
        Raises ValueError on a state of another model and on options that the backend does not support.
        """

    def create_module(
        self, spec: ModelSpec, parameters: Mapping[str, Array], config: Any, **options: Any
    ) -> Any:
        """The framework's module for use as a library (`arm_vision.load_model`), in evaluation mode.

        config: an `arm_core.data.model_config.ModelConfig`.  options: device and dtype of the framework,
        scan, dynamic_image_size, drop_path_rate.
        """
