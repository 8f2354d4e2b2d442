"""From any source to the parameter table: which model it is, what fits, what is left over.

`resolve` decides and explains; nothing is read but names, shapes and the decoder's mask. `import_model`
then streams the tensors into a model folder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from arm_convert.card import model_card, run_recipe
from arm_convert.checkpoint_source import CheckpointSource, Layout
from arm_convert.layouts import to_canonical
from arm_convert.official import MASK, official_mask, official_table, pooling_from_args, spec_from_official
from arm_convert.pickle_machine import brief
from arm_convert.plain import Framework, plain_table
from arm_core.files.errors import BadFileError
from arm_core.files.metadata import HISTORY, RESULTS, TRAINING_ARGS, with_history
from arm_core.files.model_folder import check_new, write_model
from arm_core.files.quantized import QuantizedTensor
from arm_core.files.safetensors import FLOATS, AnyArray, Tensor
from arm_core.model.parameters import initial_value, parameter_table
from arm_core.model.spec import ModelSpec, Pooling, PretrainSpec, kind_of
from arm_core.training.checkpoint import step_name
from arm_core.training.model_source import Weights
from arm_core.training.records import read_rows
from arm_core.training.run_folder import METRICS


@dataclass(frozen=True)
class Resolved:
    """A source understood: a model by our names, and everything there is to say about it."""

    spec: ModelSpec
    tensors: dict[str, Tensor]
    """By the names of the parameter table, read on demand."""
    metadata: dict[str, str]
    choices: list[str]
    """What was decided, and from what; one sentence each."""
    left_out: list[str]
    """What the file holds beyond the model."""


def resolve(
    source: CheckpointSource,
    *,
    weights: Weights = Weights.RAW,
    kind: str = "auto",
    pooling: Pooling | None = None,
    image_size: tuple[int, int] | None = None,
) -> Resolved:
    """Match a source with the parameter table.

    kind: `auto`, or `pretrain` or `classifier` to insist.  pooling, image_size: for official files, where
    weights cannot tell.  Raises ValueError naming file, tensor, expected and found.
    """
    tensors = source.tensors
    if weights is Weights.EMA:
        if source.average is None:
            raise ValueError(f"{source.path}: holds no moving average of the weights; pass --weights raw")
        tensors = source.average
    try:
        if source.layout is Layout.OFFICIAL:
            resolved = _resolve_official(source, tensors, weights, pooling, image_size)
        else:
            if pooling is not None or image_size is not None:
                raise ValueError("says its own pooling and image size; leave out --pooling and --image-size")
            resolved = _resolve_ours(source, tensors, weights)
    except ValueError as error:
        message = str(error)
        located = message if message.startswith(str(source.path)) else f"{source.path}: {message}"
        raise BadFileError(located) from None
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
        raise ValueError("holds the tensors of a model folder; pass that folder, with its config.json")
    spec = source.spec or spec_from_official(shapes, source.args, pooling=pooling, image_size=image_size)
    choices = [] if source.spec else _choices(spec, source, pooling)
    if source.prefix:
        choices.append(f"names: without the prefix {source.prefix!r} that all of them carry")
    rows = official_table(spec)
    held = dict(tensors)
    parameters = parameter_table(spec)
    for row in rows:
        if not parameters[row.name].trainable and row.names[0] not in held:
            table = row.split(initial_value(parameters[row.name], 0))
            held[row.names[0]] = Tensor.of(table[row.names[0]])
            choices.append(f"{row.names[0]}: missing in the file; computed, since it is a fixed table")
    if isinstance(spec, PretrainSpec):
        _check_mask(spec, held.pop(MASK, None), choices)
    known = {name for row in rows for name in row.names}
    left_out = [f"tensor {name} {tensor.shape}" for name, tensor in held.items() if name not in known]
    metadata = dict(source.metadata) if source.spec else _new_metadata(source, weights)
    return Resolved(spec, to_canonical(rows, held), metadata, choices, left_out)


def _choices(spec: ModelSpec, source: CheckpointSource, pooling: Pooling | None) -> list[str]:
    """How everything was decided that names and shapes do not say."""
    if isinstance(spec, PretrainSpec):
        return [
            f"target: {spec.target} pixels, as the official code always takes",
            f"prediction order: {spec.prediction_order}, decoder heads: {spec.decoder_heads}, as there",
        ]
    if pooling is not None:
        why = "by --pooling"
    elif pooling_from_args(source.args) is not None:
        why = f"from the checkpoint's args (global_pool={source.args['global_pool']})"
    else:
        why = "assumed, for the file does not say; pass --pooling cls if it reads the class token"
    return [f"pooling: {spec.pooling}, {why}"]


def _check_mask(spec: PretrainSpec, mask: Tensor | None, choices: list[str]) -> None:
    """The mask is not stored by us: it follows from the spec, so it must be the one that follows."""
    if mask is None:
        choices.append("mask: missing in the file; not needed, it follows from the clusters")
    elif mask.shape != (spec.tokens, spec.tokens) or not np.array_equal(mask.read(), official_mask(spec)):
        raise ValueError(f"mask: expected blocks of {spec.patches_per_cluster} tokens, lower triangular")


def _resolve_ours(source: CheckpointSource, tensors: dict[str, Tensor], weights: Weights) -> Resolved:
    assert source.spec is not None  # every other layout states it
    spec = source.spec
    if source.layout is not Layout.CANONICAL:
        rows = plain_table(spec, Framework(source.layout))
        known = {name for row in rows for name in row.names}
        left_out = [f"tensor {name} {tensor.shape}" for name, tensor in tensors.items() if name not in known]
        return Resolved(spec, to_canonical(rows, tensors), dict(source.metadata), [], left_out)
    count = sum(isinstance(tensor, QuantizedTensor) for tensor in tensors.values())
    choices = [f"{count} quantized matrices: as the float32 values that they stand for"] if count else []
    metadata = dict(source.metadata) if source.run is None else _run_metadata(source, source.run, weights)
    return Resolved(spec, dict(tensors), metadata, choices, [])


def _run_metadata(source: CheckpointSource, run: Path, weights: Weights) -> dict[str, str]:
    """A run's metadata with where it stands, and what it measured at that step."""
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
"""Training arguments that a card tells; the rest are paths and machines, which are nobody's business."""


_ENTRIES = {Weights.RAW: "model", Weights.EMA: "ema"}
"""How histories name the weights; equal models must keep giving equal files."""


def _new_metadata(source: CheckpointSource, weights: Weights) -> dict[str, str]:
    """What the card will say of an official checkpoint."""
    step = f"imported from {source.path.name} ({source.format}, weights: {_ENTRIES[weights]})"
    metadata = {HISTORY: json.dumps([step])}
    told = {k: source.args[k] for k in _TOLD_ARGS if k in source.args}
    plain = {k: v for k, v in told.items() if isinstance(v, (str, int, float, bool, type(None)))}
    if plain:
        metadata[TRAINING_ARGS] = json.dumps(plain)
    best = source.entries.get("ema_max_accuracy" if weights is Weights.EMA else "max_accuracy")
    if isinstance(best, (int, float)):
        metadata[RESULTS] = json.dumps({"best top-1 accuracy during its training, %": best})
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

    Returns a sentence for each tensor with NaN or infinite values, which are refused (ValueError) unless
    `allow_nonfinite`.
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
    """The same tensor, which reports or refuses values that are not finite when it is read."""
    return Tensor(tensor.shape, tensor.dtype, partial(_fetch_finite, tensor, owner, reports, refuse))


def _fetch_finite(tensor: Tensor, owner: str, reports: list[str], refuse: bool) -> AnyArray:
    bits = tensor.bits()
    values = Tensor(tensor.shape, tensor.dtype, lambda: bits).read()
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()  # one quick pass: finite unless a value is not, or the sum overflows
    if not np.isfinite(total) and (count := int(values.size - np.isfinite(values).sum())):
        report = f"{owner}: {count} of {values.size} values are NaN or infinite"
        if refuse:
            raise BadFileError(f"{report}; was this run diverging? Pass --allow-nonfinite to take it anyway")
        reports.append(report)
    return bits
