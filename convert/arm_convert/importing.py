"""Imports: from a `CheckpointSource` to the parameter table.

`resolve` finds the specification, the tensors that belong to it and those that do not, and explains each
choice. It only reads names, shapes and the decoder's mask. `import_model` then copies the tensors into a
model folder, one at a time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from arm_convert.card import model_card, run_recipe
from arm_convert.checkpoint_source import CheckpointSource, Layout
from arm_convert.layouts import Row, to_canonical
from arm_convert.official import MASK, official_mask, official_table, pooling_from_args, spec_from_official
from arm_convert.pickle_machine import brief
from arm_convert.plain import Framework, plain_table
from arm_core.data.imagenet import CLASSES as IMAGENET_CLASSES
from arm_core.data.imagenet import imagenet_names, imagenet_synsets
from arm_core.files.errors import BadFileError, located, reading
from arm_core.files.metadata import CLASS_NAMES, CLASSES, HISTORY, RESULTS, TRAINING_ARGS, with_history
from arm_core.files.model_folder import check_new, write_model
from arm_core.files.quantized import QuantizedTensor
from arm_core.files.safetensors import FLOATS, AnyArray, Tensor
from arm_core.model.parameters import Parameter, initial_value, parameter_table
from arm_core.model.spec import ClassifierSpec, ModelSpec, Pooling, PretrainSpec, kind_of
from arm_core.training.checkpoint import step_name
from arm_core.training.model_source import Weights
from arm_core.training.records import read_rows
from arm_core.training.run_folder import METRICS

MAX_MASK = 2**30
"""Largest attention mask that is read, bytes: over 16,000 tokens."""


@dataclass(frozen=True)
class Resolved:
    """A source as a model of the parameter table, with a list of the choices."""

    spec: ModelSpec
    tensors: dict[str, Tensor]
    """By the names of the parameter table, read on demand."""
    metadata: dict[str, str]
    choices: list[str]
    """A sentence for each choice and its reason."""
    left_out: list[str]
    """Contents of the file that do not belong to the model."""


def resolve(
    source: CheckpointSource,
    *,
    weights: Weights = Weights.RAW,
    kind: str = "auto",
    pooling: Pooling | None = None,
    image_size: tuple[int, int] | None = None,
) -> Resolved:
    """Match a source with the parameter table.

    kind: `pretrain` or `classifier` to require that kind, else `auto`.  pooling, image_size: for official
    files, whose tensors do not determine them.  ValueErrors name file, tensor, expected and found.
    """
    tensors = source.tensors
    if weights is Weights.EMA:
        if source.average is None:
            raise ValueError(f"{source.path}: holds no moving average of the weights; pass --weights raw")
        tensors = source.average
    try:
        with reading(source.path):
            if source.layout is Layout.OFFICIAL:
                resolved = _resolve_official(source, tensors, weights, pooling, image_size)
            elif pooling is not None or image_size is not None:
                raise ValueError("states its pooling and image size; leave out --pooling and --image-size")
            else:
                resolved = _resolve_ours(source, tensors, weights)
    except ValueError as error:
        raise located(source.path, error) from None
    if kind not in ("auto", kind_of(resolved.spec)):
        raise ValueError(f"{source.path}: expected a {kind} model, found a {kind_of(resolved.spec)} model")
    stored = {name: _as_float(source.path, name, tensor) for name, tensor in resolved.tensors.items()}
    left_out = [
        *resolved.left_out,
        *(f"{brief(name)}: {brief(value)}" for name, value in source.entries.items()),
    ]
    if weights is Weights.RAW and source.average is not None:
        left_out.append("the moving average of the weights (--weights ema takes it)")
    return replace(resolved, tensors=stored, left_out=left_out)


def _resolve_official(
    source: CheckpointSource,
    tensors: dict[str, Tensor],
    weights: Weights,
    pooling: Pooling | None,
    image_size: tuple[int, int] | None,
) -> Resolved:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if "layers.0.mixer.conv.weight" in shapes:
        raise ValueError("this is a file of a model folder; pass the folder, which holds config.json too")
    spec = source.spec or spec_from_official(shapes, source.args, pooling=pooling, image_size=image_size)
    choices = [] if source.spec else _choices(spec, source, pooling)
    if source.prefix:
        choices.append(f"names: the common prefix {source.prefix!r} was removed")
    rows = official_table(spec)
    held = dict(tensors)
    parameters = parameter_table(spec)
    for row in rows:
        if not parameters[row.name].trainable and row.names[0] not in held:
            # Computed when it is read: a hostile file could claim a size beyond any memory.
            held[row.names[0]] = Tensor(row.foreign_shape, "F32", partial(_table, row, parameters[row.name]))
            choices.append(f"{row.names[0]}: missing in the file; computed, since it is a fixed table")
    canonical = to_canonical(rows, held)
    if isinstance(spec, PretrainSpec):
        _check_mask(spec, held.pop(MASK, None), choices)
    known = {name for row in rows for name in row.names}
    left_out = [f"tensor {name} {tensor.shape}" for name, tensor in held.items() if name not in known]
    metadata = dict(source.metadata) if source.spec else _new_metadata(source, weights, spec)
    return Resolved(spec, canonical, metadata, choices, left_out)


def _table(row: Row, parameter: Parameter) -> AnyArray:
    """The fixed table of a parameter in the official layout."""
    return row.split(initial_value(parameter, 0))[row.names[0]]


def _choices(spec: ModelSpec, source: CheckpointSource, pooling: Pooling | None) -> list[str]:
    """The choices that names and shapes do not determine."""
    if isinstance(spec, PretrainSpec):
        return [
            f"target: {spec.target} pixels, as in the official code",
            f"prediction order: {spec.prediction_order}, decoder heads: {spec.decoder_heads}, "
            "as in the official code",
        ]
    if pooling is not None:
        why = "by --pooling"
    elif pooling_from_args(source.args) is not None:
        why = f"from the checkpoint's args (global_pool={source.args['global_pool']})"
    else:
        why = "assumed, since the file does not state it; pass --pooling cls if the class token is pooled"
    return [f"pooling: {spec.pooling}, {why}"]


def _check_mask(spec: PretrainSpec, mask: Tensor | None, choices: list[str]) -> None:
    """The mask is derived from the spec and not stored: the file's mask must be equal to it."""
    if mask is None:
        choices.append("mask: missing in the file; not needed, since it is derived from the clusters")
    elif mask.nbytes > MAX_MASK:
        raise ValueError(f"mask: expected at most {MAX_MASK:,} bytes, found {mask.nbytes:,}")
    elif mask.shape != (spec.tokens, spec.tokens) or not np.array_equal(mask.read(), official_mask(spec)):
        raise ValueError(f"mask: expected blocks of {spec.patches_per_cluster} tokens, lower triangular")


def _resolve_ours(source: CheckpointSource, tensors: dict[str, Tensor], weights: Weights) -> Resolved:
    assert source.spec is not None  # all other layouts state it
    spec = source.spec
    if source.layout is not Layout.CANONICAL:
        rows = plain_table(spec, Framework(source.layout))
        known = {name for row in rows for name in row.names}
        left_out = [f"tensor {name} {tensor.shape}" for name, tensor in tensors.items() if name not in known]
        return Resolved(spec, to_canonical(rows, tensors), dict(source.metadata), [], left_out)
    count = sum(isinstance(tensor, QuantizedTensor) for tensor in tensors.values())
    choices = [f"{count} quantized matrices: read as float32 values"] if count else []
    metadata = dict(source.metadata) if source.run is None else _run_metadata(source, source.run, weights)
    return Resolved(spec, dict(tensors), metadata, choices, [])


def _run_metadata(source: CheckpointSource, run: Path, weights: Weights) -> dict[str, str]:
    """The metadata of a run's checkpoint: its step, and the results of the evaluation at that step."""
    metadata = with_history(
        source.metadata, f"taken from run {run.name}, {source.path.name} ({_ENTRIES[weights]})"
    )
    prefix = "ema" if weights is Weights.EMA else "eval"
    for row in read_rows(run / METRICS):
        if step_name(row.get("step", -1)) == source.path.name and f"{prefix}_loss" in row:
            found = {"loss on the evaluation images": row[f"{prefix}_loss"]}
            if f"{prefix}_top1" in row:
                found["top-1 accuracy on the evaluation images, %"] = 100 * row[f"{prefix}_top1"]
            metadata[RESULTS] = json.dumps(found)
    return metadata


def _as_float(path: Path, name: str, tensor: Tensor) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise BadFileError(f"{path}: {name}: expected floating-point numbers, found {tensor.dtype}")
    return tensor.cast("F32") if tensor.dtype == "F64" else tensor


_TOLD_ARGS = (
    *("model", "input_size", "nb_classes", "global_pool", "norm_pix_loss", "seed"),
    *("batch_size", "accum_iter", "world_size", "epochs", "warmup_epochs", "lr", "blr", "min_lr"),
    *("weight_decay", "layer_decay", "clip_grad", "drop_path", "ema_decay"),
    *("aa", "reprob", "smoothing", "mixup", "cutmix"),
)
"""Training arguments for the model card, without paths and machine settings."""


_ENTRIES = {Weights.RAW: "model", Weights.EMA: "ema"}
"""Names of the weights in histories; do not change them, since equal models must give equal files."""


def _new_metadata(source: CheckpointSource, weights: Weights, spec: ModelSpec) -> dict[str, str]:
    """Metadata of an official checkpoint: class names, and the facts for its model card."""
    step = f"imported from {source.path.name} ({source.format}, weights: {_ENTRIES[weights]})"
    metadata = {HISTORY: json.dumps([step])}
    told = {k: source.args[k] for k in _TOLD_ARGS if k in source.args}
    plain = {k: v for k, v in told.items() if isinstance(v, (str, int, float, bool, type(None)))}
    if plain:
        metadata[TRAINING_ARGS] = json.dumps(plain)
    best = source.entries.get("ema_max_accuracy" if weights is Weights.EMA else "max_accuracy")
    if isinstance(best, (int, float)):
        metadata[RESULTS] = json.dumps({"best top-1 accuracy during its training, %": best})
    if isinstance(spec, ClassifierSpec) and spec.classes == IMAGENET_CLASSES:
        metadata[CLASSES] = json.dumps(imagenet_synsets())
        metadata[CLASS_NAMES] = json.dumps(imagenet_names())
    return metadata


def import_model(
    source: CheckpointSource,
    resolved: Resolved,
    out: Path,
    *,
    force: bool = False,
    shard_size: int | None = None,
    allow_nonfinite: bool = False,
) -> list[str]:
    """Write a resolved source as a model folder, one tensor at a time.

    Returns a sentence for each tensor with NaN or infinite values. They raise ValueError unless
    `allow_nonfinite` is set.
    """
    check_new(out, force=force)
    reports: list[str] = []
    watched = {
        name: watch_finite(tensor, f"{source.path}: {name}", reports, refuse=not allow_nonfinite)
        for name, tensor in resolved.tensors.items()
    }
    write_model(
        out,
        resolved.spec,
        watched,
        metadata=resolved.metadata,
        force=force,
        shard_size=shard_size,
        card=model_card(resolved.spec, resolved.metadata, recipe=run_recipe(source)),
    )
    return reports


def watch_finite(tensor: Tensor, owner: str, reports: list[str], *, refuse: bool) -> Tensor:
    """The same tensor; reading it reports or refuses values that are not finite."""
    return Tensor(tensor.shape, tensor.dtype, partial(_fetch_finite, tensor, owner, reports, refuse))


def _fetch_finite(tensor: Tensor, owner: str, reports: list[str], refuse: bool) -> AnyArray:
    bits = tensor.bits()
    values = Tensor(tensor.shape, tensor.dtype, lambda: bits).read()
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()  # one fast pass: finite unless a value is not finite or the sum overflows
    if not np.isfinite(total) and (count := int(values.size - np.isfinite(values).sum())):
        report = f"{owner}: {count} of {values.size} values are NaN or infinite"
        if refuse:
            raise BadFileError(f"{report}; did the run diverge? Pass --allow-nonfinite to import it anyway")
        reports.append(report)
    return bits
