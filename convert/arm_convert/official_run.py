"""An official checkpoint as a run that can be resumed: AdamW's moments, the step, and the recipe.

The official optimizer numbers its parameters by group and stores no names. The groups are rebuilt as in
the official code, from the order of the state dict, and the shape of every moment is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from arm_convert.checkpoint_source import CheckpointSource
from arm_convert.importing import Resolved, watch_finite
from arm_convert.layouts import to_canonical
from arm_convert.official import FROZEN, MASK, official_table
from arm_convert.pickle_machine import brief
from arm_core.data.augment import RandAugment
from arm_core.data.mixing import Mixing
from arm_core.data.transforms import TrainTransform
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Array, Precision, TrainingState
from arm_core.files.atomic import new_folder
from arm_core.files.errors import located, reading
from arm_core.files.model_folder import check_new
from arm_core.files.safetensors import Tensor
from arm_core.model.parameters import parameter_table
from arm_core.model.spec import DIRECTIONS, ModelSpec, PretrainSpec
from arm_core.recipe.recipe import Recipe, Stage, fingerprint
from arm_core.recipe.sections import (
    ClassifierModel,
    DataSettings,
    PretrainModel,
    ScheduleSettings,
    TrainingSettings,
)
from arm_core.recipe.toml import Span
from arm_core.training.checkpoint import Checkpoint, Progress, save_checkpoint
from arm_core.training.run_folder import start_run

OFFICIAL_RAND_AUGMENT = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's moments by our names, read on demand."""

    step: int
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def optimizer_state(source: CheckpointSource, spec: ModelSpec) -> OptimizerState:
    """The optimizer state of an official checkpoint; ValueError if it does not match the model."""
    optimizer = source.entries.get("optimizer")
    if not isinstance(optimizer, dict):
        raise ValueError(f"{source.path}: has no optimizer state; import it without --with-optimizer")
    state, groups = optimizer.get("state"), optimizer.get("param_groups")
    if not isinstance(state, dict) or not state or not isinstance(groups, list):
        raise ValueError(f"{source.path}: its optimizer state is empty; import it without --with-optimizer")
    expected = official_groups(source, spec)
    if [len(_numbers(source, group)) for group in groups] != [len(names) for names in expected]:
        raise ValueError(
            f"{source.path}: optimizer: expected groups of {[len(names) for names in expected]} parameters, "
            f"found {[len(_numbers(source, group)) for group in groups]}"
        )
    named: dict[str, dict[str, Any]] = {}
    for names, group in zip(expected, groups, strict=True):
        found = [state.get(i) for i in _numbers(source, group)]
        named |= {n: e if isinstance(e, dict) else {} for n, e in zip(names, found, strict=True)}
    parameters = parameter_table(spec)
    rows = [row for row in official_table(spec) if parameters[row.name].trainable]
    moments = {}
    for kind in ("exp_avg", "exp_avg_sq"):
        tensors = {name: entry[kind] for name, entry in named.items() if isinstance(entry.get(kind), Tensor)}
        try:
            moments[kind] = to_canonical(rows, tensors)
        except ValueError as error:
            raise ValueError(f"{source.path}: optimizer {kind}: {error}") from None
    steps = {_step(entry.get("step")) for entry in named.values()}
    step = steps.pop()
    if steps or step is None:
        raise ValueError(f"{source.path}: optimizer: expected one step count for all parameters")
    betas, eps = groups[0].get("betas"), groups[0].get("eps")
    decay = max((group.get("weight_decay") for group in groups), key=_number)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{source.path}: optimizer: expected two betas, found {brief(betas)}")
    return OptimizerState(
        step=step,
        exp_avg=moments["exp_avg"],
        exp_avg_sq=moments["exp_avg_sq"],
        betas=(_number(betas[0]), _number(betas[1])),
        eps=_number(eps),
        weight_decay=_number(decay),
    )


def _number(value: object, owner: str = "optimizer") -> float:
    # NaN and infinity compare as False.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15:
        return float(value)
    raise ValueError(f"{owner}: expected a number, found {brief(value)}")


def official_groups(source: CheckpointSource, spec: ModelSpec) -> list[list[str]]:
    """Official parameter names by optimizer group, in the order of the file.

    Pretraining: without decay, then with. Finetuning: by (layer, decay), as they first appear.
    """
    parameters = parameter_table(spec)
    rows = {name: parameters[row.name] for row in official_table(spec) for name in row.names}
    frozen = FROZEN if isinstance(spec, PretrainSpec) else ()
    names = [name for name in source.tensors if name in rows and name != MASK and name not in frozen]
    if isinstance(spec, PretrainSpec):
        return [[name for name in names if rows[name].decay is decay] for decay in (False, True)]
    groups: dict[tuple[int, bool], list[str]] = {}
    for name in names:
        groups.setdefault((rows[name].layer, rows[name].decay), []).append(name)
    return list(groups.values())


def _numbers(source: CheckpointSource, group: object) -> list[int]:
    numbers = group.get("params") if isinstance(group, dict) else None
    if not isinstance(numbers, list) or not all(type(i) is int for i in numbers):
        raise ValueError(f"{source.path}: optimizer: expected groups with lists of parameter numbers")
    return numbers


def _step(value: object) -> int | None:
    if isinstance(value, Tensor) and value.shape == ():
        value = value.read().item()
    whole = isinstance(value, (int, float)) and 0 <= value < 2**53 and value == int(value)
    return int(cast(float, value)) if whole else None


def official_recipe(source: CheckpointSource, spec: ModelSpec, state: OptimizerState) -> Recipe:
    """The recipe in the checkpoint's training arguments; ValueError names one that is missing."""
    args = _Arguments(source)
    micro_batches = args.count("accum_iter", 1) * args.count("world_size", 1)
    batch = args.count("batch_size") * micro_batches
    stage = Stage.PRETRAIN if isinstance(spec, PretrainSpec) else Stage.FINETUNE
    return Recipe(
        stage=stage,
        model=_model(spec),
        data=DataSettings(path=args.text("data_path")),
        augmentation=TrainTransform() if stage is Stage.PRETRAIN else _finetune_transform(args),
        mixing=Mixing() if stage is Stage.PRETRAIN else _mixing(args),
        optimizer=OptimizerSettings(
            betas=state.betas,
            eps=state.eps,
            weight_decay=state.weight_decay,
            clip=args.optional("clip_grad"),
            layer_decay=args.number("layer_decay", 1.0),
            ema_decay=args.optional("ema_decay") if source.average is not None else None,
        ),
        schedule=ScheduleSettings(
            base_lr=args.number("lr") * 256 / batch,
            min_lr=args.number("min_lr", 0.0),
            warmup=Span(args.number("warmup_epochs", 0), "epochs"),
        ),
        training=TrainingSettings(
            length=Span(args.number("epochs"), "epochs"),
            batch_size=batch,
            accumulation=micro_batches,
            drop_path=args.number("drop_path", 0.0),
            precision=Precision.BFLOAT16,  # the official code always autocasts
            seed=args.count("seed", 0, low=0),
        ),
    )


class _Arguments:
    """Training arguments; each is checked when it is read."""

    def __init__(self, source: CheckpointSource) -> None:
        self._source = source

    def optional(self, name: str) -> float | None:
        value = self._source.args.get(name)
        return None if value is None else _number(value, f"{self._source.path}: args.{name}")

    def number(self, name: str, default: float | None = None) -> float:
        value = self.optional(name)
        if value is None and default is None:
            raise ValueError(f"{self._source.path}: args.{name} is missing; import without --with-optimizer")
        return cast(float, default if value is None else value)

    def count(self, name: str, default: int | None = None, *, low: int = 1) -> int:
        value = float(self.number(name, default))
        if not value.is_integer() or not low <= value < 2**31:
            raise ValueError(
                f"{self._source.path}: args.{name}: expected a whole number, {low} or more, found {value:g}"
            )
        return int(value)

    def text(self, name: str) -> str | None:
        value = self._source.args.get(name)
        return value if isinstance(value, str) and value else None


def _model(spec: ModelSpec) -> PretrainModel | ClassifierModel:
    encoder = spec.encoder
    size: dict[str, Any] = {
        **{name: getattr(encoder, name) for name in ("width", "depth", "patch", "state", "conv_width")},
        "image_size": spec.image_size,
    }
    if isinstance(spec, PretrainSpec):
        names = ("cluster", "prediction_order", "decoder_width", "decoder_depth", "decoder_heads", "target")
        return PretrainModel(**size, **{name: getattr(spec, name) for name in names})
    if spec.scan_directions != DIRECTIONS[spec.directions]:
        raise ValueError(f"a recipe cannot express the directions {', '.join(spec.scan_directions)}")
    return ClassifierModel(**size, classes=spec.classes, directions=spec.directions, pooling=spec.pooling)


def _finetune_transform(args: _Arguments) -> TrainTransform:
    wanted = args.text("aa")
    if wanted not in (None, OFFICIAL_RAND_AUGMENT):
        raise ValueError(f"args.aa: expected {OFFICIAL_RAND_AUGMENT!r} or none, found {wanted!r}")
    return TrainTransform(
        crop_scale=(0.08, 1.0),
        rand_augment=RandAugment() if wanted else None,
        erase=args.number("reprob", 0.0),
    )


def _mixing(args: _Arguments) -> Mixing:
    return Mixing(
        mixup=args.number("mixup", 0.0),
        cutmix=args.number("cutmix", 0.0),
        cutmix_probability=args.number("mixup_switch_prob", 0.5),
        smoothing=args.number("smoothing", 0.0),
    )


def import_run(source: CheckpointSource, resolved: Resolved, out: Path) -> Recipe:
    """Write a run folder, atomically, that `arm pretrain|finetune --resume OUT` resumes.

    The official data order is not reproduced: the data starts at the position that a run of this package
    has after the same number of micro-batches.
    """
    spec = resolved.spec
    try:
        with reading(source.path):
            state = optimizer_state(source, spec)
            recipe = official_recipe(source, spec, state)
    except ValueError as error:
        raise located(source.path, error) from None
    watched = {
        "parameters": resolved.tensors,
        "exp_avg": state.exp_avg,
        "exp_avg_sq": state.exp_avg_sq,
        "ema": _average(source, spec) if recipe.optimizer.ema_decay is not None else {},
    }
    arrays = {kind: _refusing_nan(source.path, kind, tensors) for kind, tensors in watched.items()}
    progress = Progress(
        step=state.step,
        position=state.step * recipe.training.accumulation,
        recipe=fingerprint(recipe),
        engine={"backend": "official code", "checkpoint": source.path.name},
    )
    # Tensors are passed as arrays: the checkpoint writes them one at a time.
    training = TrainingState(**cast(dict[str, dict[str, Array]], arrays))
    checkpoint = Checkpoint(spec=spec, progress=progress, state=training, metadata=resolved.metadata)
    check_new(out, force=False)
    with new_folder(out) as draft, start_run(draft, recipe, spec):
        save_checkpoint(draft, checkpoint)
    return recipe


def _average(source: CheckpointSource, spec: ModelSpec) -> dict[str, Tensor]:
    average = to_canonical(official_table(spec), source.average or {})
    return {name: average[name] for name, row in parameter_table(spec).items() if row.trainable}


def _refusing_nan(path: Path, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: watch_finite(tensor.cast("F32"), f"{path}: {kind} {name}", [], refuse=True)
        for name, tensor in tensors.items()
    }
