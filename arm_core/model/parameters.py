"""The parameter table: every tensor of a model, by name, and its initial value.

Backends, checkpoints, optimizer groups and converters are checked against `parameter_table(spec)`. Shapes
in comments: D width, N states, R dt rank, K directions, W convolution kernel size.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from arm_core.model.presets import PRESETS
from arm_core.model.rng import KeyedRng
from arm_core.model.spec import TAP_DEPTHS, ClassifierSpec, EncoderSpec, ModelSpec, PretrainSpec
from arm_core.model.tokens import sincos_positions

Array = npt.NDArray[np.float32]
Arrays = Mapping[str, npt.NDArray[np.generic]]

HEAD_STD = 0.02
"""Initial standard deviation of tokens, learned positions and a head trained from scratch."""

DT_RANGE, DT_FLOOR = (1e-3, 0.1), 1e-4
"""Range of the initial step size dt (log-uniform), and its lower bound."""


Shape = tuple[int, ...]
Initializer = Callable[[KeyedRng, Shape], npt.NDArray[np.floating]]


def _constant(value: float, rng: KeyedRng, shape: Shape) -> npt.NDArray[np.floating]:
    return np.full(shape, value, np.float32)


def _uniform(bound: float, rng: KeyedRng, shape: Shape) -> npt.NDArray[np.floating]:
    return ((2.0 * rng.uniform(math.prod(shape)) - 1.0) * bound).reshape(shape)


def _normal(std: float, rng: KeyedRng, shape: Shape) -> npt.NDArray[np.floating]:
    return (rng.normal(math.prod(shape)) * std).reshape(shape)


def _lecun_normal(fan_in: int, rng: KeyedRng, shape: Shape) -> npt.NDArray[np.floating]:
    # 0.8796...: standard deviation of a normal cut at two; the quotient restores variance 1 / fan_in.
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    return (rng.truncated_normal(math.prod(shape), 2.0) * std).reshape(shape)


def _log_states(rng: KeyedRng, shape: Shape) -> npt.NDArray[np.floating]:
    """A_log = log(1..N) for every channel: A = -1, -2, ..., -N (S4D-real, Mamba section 3.6)."""
    return np.broadcast_to(np.log(np.arange(1, shape[-1] + 1, dtype=np.float64)), shape)


def _dt_bias(rng: KeyedRng, shape: Shape) -> npt.NDArray[np.floating]:
    """Inverse softplus of a log-uniform step size, so that softplus(bias) lies in `DT_RANGE`."""
    low, high = np.log(DT_RANGE)
    dt = np.maximum(np.exp(low + rng.uniform(math.prod(shape)) * (high - low)), DT_FLOOR)
    return np.asarray(dt + np.log(-np.expm1(-dt))).reshape(shape)


def _sincos(grid: tuple[int, int], rng: KeyedRng, shape: Shape) -> npt.NDArray[np.floating]:
    return sincos_positions(grid, shape[-1])


ZEROS, ONES = partial(_constant, 0.0), partial(_constant, 1.0)


def _kaiming(fan_in: int, scale: float = 1.0) -> Initializer:
    """Kaiming-uniform with a = sqrt(5), the default of torch's Linear and Conv1d: +-1/sqrt(fan_in)."""
    return partial(_uniform, scale / math.sqrt(fan_in))


def _xavier(fan_in: int, fan_out: int) -> Initializer:
    return partial(_uniform, math.sqrt(6.0 / (fan_in + fan_out)))


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of a model."""

    name: str
    shape: Shape
    init: Initializer
    trainable: bool = True
    """False for the fixed position tables, which are saved and converted but never updated."""
    decay: bool = False
    """Whether AdamW's weight decay applies. As in the official code, it applies to `A_log` (whose
    `_no_weight_decay` attribute is not used there) and to the decoder's `ar_token`."""
    layer: int = 0
    """Layer for learning-rate scales: 0 for the embedding, i + 1 for block i, depth + 1 after the blocks."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def _linear(
    name: str, fan_in: int, fan_out: int, layer: int, init: Initializer | None = None, *, bias: bool = True
) -> Iterator[Parameter]:
    weight = init or _kaiming(fan_in)
    yield Parameter(name=f"{name}.weight", shape=(fan_out, fan_in), init=weight, decay=True, layer=layer)
    if bias:
        yield Parameter(name=f"{name}.bias", shape=(fan_out,), init=ZEROS, layer=layer)


def _norm(name: str, width: int, layer: int) -> Iterator[Parameter]:
    yield Parameter(name=f"{name}.weight", shape=(width,), init=ONES, layer=layer)
    yield Parameter(name=f"{name}.bias", shape=(width,), init=ZEROS, layer=layer)


def _mixer(name: str, spec: EncoderSpec, directions: int, layer: int) -> Iterator[Parameter]:
    """in_proj, gate and out_proj are shared; the scan's parameters have a leading direction axis K."""
    width, rank, k = spec.width, spec.dt_rank, directions

    def tensor(suffix: str, shape: Shape, init: Initializer, *, decay: bool) -> Parameter:
        return Parameter(name=f"{name}.{suffix}", shape=shape, init=init, decay=decay, layer=layer)

    yield from _linear(f"{name}.in_proj", width, 2 * width, layer, bias=False)
    yield tensor("conv.weight", (k, width, spec.conv_width), _kaiming(spec.conv_width), decay=True)
    yield tensor("conv.bias", (k, width), _kaiming(spec.conv_width), decay=False)
    yield tensor("x_proj.weight", (k, rank + 2 * spec.state, width), _kaiming(width), decay=True)
    yield tensor("dt_proj.weight", (k, width, rank), _kaiming(rank), decay=True)
    # The official classifier sets this bias to 0 except in the first direction; here all K are initialised.
    yield tensor("dt_proj.bias", (k, width), _dt_bias, decay=False)
    yield tensor("A_log", (k, width, spec.state), _log_states, decay=True)
    yield tensor("D", (k, width), ONES, decay=False)
    # Residual branches are scaled down with depth (GPT-2's rule, as in Mamba's official code).
    scaled = _kaiming(width, 1.0 / math.sqrt(spec.depth))
    yield from _linear(f"{name}.out_proj", width, width, layer, scaled, bias=False)


def _trunk(spec: EncoderSpec, directions: int) -> Iterator[Parameter]:
    embed = partial(_lecun_normal, spec.patch_values)
    yield from _linear("patch_embed", spec.patch_values, spec.width, 0, embed)
    for i in range(spec.depth):
        name, layer = f"layers.{i}", i + 1
        yield from _norm(f"{name}.norm1", spec.width, layer)
        yield from _mixer(f"{name}.mixer", spec, directions, layer)
        yield from _norm(f"{name}.norm2", spec.width, layer)
        yield from _linear(f"{name}.mlp.w1", spec.width, spec.mlp_width, layer)
        yield from _linear(f"{name}.mlp.w2", spec.width, spec.mlp_width, layer)
        yield from _linear(f"{name}.mlp.w3", spec.mlp_width, spec.width, layer)


def _decoder_block(name: str, width: int, layer: int) -> Iterator[Parameter]:
    def linear(suffix: str, fan_in: int, fan_out: int) -> Iterator[Parameter]:
        return _linear(f"{name}.{suffix}", fan_in, fan_out, layer, _xavier(fan_in, fan_out))

    yield from _norm(f"{name}.norm_query", width, layer)
    yield from _norm(f"{name}.norm_latent", width, layer)
    yield from linear("attention.query", width, width)
    yield from linear("attention.key_value", width, 2 * width)
    yield from linear("attention.proj", width, width)
    yield from _norm(f"{name}.norm_mlp", width, layer)
    yield from linear("mlp.fc1", width, 4 * width)
    yield from linear("mlp.fc2", 4 * width, width)


def _pretrain(spec: PretrainSpec) -> Iterator[Parameter]:
    encoder, width = spec.encoder, spec.decoder_width
    last = encoder.depth + 1
    table = partial(_sincos, spec.grid)
    yield Parameter(name="pos_embed", shape=(spec.patches, encoder.width), init=table, trainable=False)
    yield from _trunk(encoder, spec.directions)
    for j in range(len(TAP_DEPTHS)):
        yield from _norm(f"tap_norms.{j}", encoder.width, last)
    # Every decoder block reads all taps; slice j of the output (the fastest axis) belongs to block j.
    yield from _linear("taps_to_decoder", len(TAP_DEPTHS) * encoder.width, width * spec.decoder_depth, last)
    yield Parameter(
        name="decoder_pos_embed", shape=(spec.patches, width), init=table, trainable=False, layer=last
    )
    token = partial(_normal, HEAD_STD)
    yield Parameter(name="query_token", shape=(width,), init=token, decay=True, layer=last)
    for j in range(spec.decoder_depth):
        yield from _decoder_block(f"decoder.{j}", width, last)
    yield from _norm("prediction_norm", width, last)
    yield from _linear("prediction", width, encoder.patch_values, last)


def _classifier(spec: ClassifierSpec) -> Iterator[Parameter]:
    encoder, last = spec.encoder, spec.encoder.depth + 1
    token = partial(_normal, HEAD_STD)
    yield Parameter(name="cls_token", shape=(encoder.width,), init=token)
    yield Parameter(name="pos_embed", shape=(spec.tokens, encoder.width), init=token)
    yield from _trunk(encoder, spec.directions)
    yield from _norm("norm_f", encoder.width, last)
    yield from _linear("head", encoder.width, spec.classes, last, token)


def parameter_table(spec: ModelSpec) -> dict[str, Parameter]:
    """Every tensor of the model by name, in the order of the data flow."""
    rows = _pretrain(spec) if isinstance(spec, PretrainSpec) else _classifier(spec)
    return {row.name: row for row in rows}


def count_parameters(spec: ModelSpec, *, trainable_only: bool = True) -> int:
    """Number of values in the table; by default without the fixed position tables."""
    return sum(row.size for row in parameter_table(spec).values() if row.trainable or not trainable_only)


def initial_value(row: Parameter, seed: int) -> Array:
    """The tensor's initial value, float32; depends only on seed, name and shape."""
    return np.ascontiguousarray(row.init(KeyedRng(seed, row.name), row.shape), dtype=np.float32)


def initial_parameters(spec: ModelSpec, seed: int) -> dict[str, Array]:
    """Initial values of the whole model, with identical bits for every backend.

    Raises ValueError if they exceed the memory of this machine.
    """
    size, memory = 4 * count_parameters(spec, trainable_only=False), _machine_memory()
    if size > memory:
        raise ValueError(
            f"the weights of this model take {size / 2**30:,.0f} GiB, more than the memory of this machine, "
            f"{memory / 2**30:,.0f} GiB; choose a smaller width or depth"
        )
    return {name: initial_value(row, seed) for name, row in parameter_table(spec).items()}


def _machine_memory() -> int:
    """Bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_parameters(
    spec: ModelSpec, arrays: Arrays, *, source: str = "parameters", trainable_only: bool = False
) -> None:
    """Compare names and shapes with the table, strictly; a ValueError lists every difference.

    trainable_only: for moments and averages, which the fixed tables do not have.
    """
    table = {name: row for name, row in parameter_table(spec).items() if row.trainable or not trainable_only}
    problems = [f"missing {name} {table[name].shape}" for name in table if name not in arrays]
    problems += [f"unexpected {name} {tuple(arrays[name].shape)}" for name in arrays if name not in table]
    problems += [
        f"{name}: expected {row.shape}, found {tuple(arrays[name].shape)}"
        for name, row in table.items()
        if name in arrays and tuple(arrays[name].shape) != row.shape
    ]
    if problems:
        raise ValueError(f"{source}: {_first(problems)}{_likely_preset(arrays)}")


def _first(problems: Iterable[str], limit: int = 5) -> str:
    listed = list(problems)
    more = f"; and {len(listed) - limit} more" if len(listed) > limit else ""
    return "; ".join(listed[:limit]) + more


def _likely_preset(arrays: Arrays) -> str:
    """A hint if the arrays have the size of another preset."""
    embed = arrays.get("patch_embed.weight")
    depth = sum(name.endswith(".mixer.D") for name in arrays)
    for name, size in PRESETS.items():
        if embed is not None and (embed.shape[0], depth) == (size.width, size.depth):
            return f" (the file has the size of '{name}')"
    return ""
