"""The mixer in ONNX: causal convolution and selective scan over stacked directions.

Sizes in comments: K directions, T tokens, B images, D channels, N states, R dt rank, W convolution width.
Tokens are the first axis everywhere (T, B, D), so that a direction is one `Gather` along it. The tensors of
K directions are (K, T, B, ...). The recurrence is the standard `Scan` operator, one for all directions, with
the state as (K, B, N, D): channels innermost, so that each step is a few long vector operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from arm_convert.onnx_model.builder import FLOAT, TYPES, Builder, value
from arm_core.model.reference.model import Weights
from arm_core.model.spec import EncoderSpec

if TYPE_CHECKING:
    import onnx


Float = type[np.float32] | type[np.float16]
"""Type of weights and activations outside the recurrence."""


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Values shared by the mixers of all layers."""

    encoder: EncoderSpec
    order: npt.NDArray[np.int32]
    """(K, T): the token that each direction reads at each step."""
    state: str
    """Name of the initial state, (K, B, N, D) float32 zeros."""
    batch: int | str
    dtype: Float
    """Type of everything except the recurrence, which is float32."""

    @property
    def count(self) -> int:
        return len(self.order)

    @property
    def trivial(self) -> bool:
        """Whether the only direction reads the tokens in their order."""
        return self.count == 1 and bool((self.order[0] == np.arange(self.order.shape[1])).all())


def silu(g: Builder, x: str) -> str:
    return g("Mul", x, g("Sigmoid", x))


@dataclass(frozen=True)
class Recorded:
    """Tensors of a mixer that its influence map reads; (K, T, ...) are in the order of each direction."""

    output: str
    """(T, B, D), as are the two below."""
    z: str
    x: str
    opening: str
    """(K, T, B, D): sigmoid of the convolution."""
    dt: str
    """(K, T, B, 1, D)."""
    B: str
    """(K, T, B, N, 1)."""
    C: str
    """(K, T, B, 1, N)."""


def mixer(
    g: Builder, w: Weights, x: str, directions: Directions, name: str, record: list[Recorded] | None = None
) -> str:
    """Mamba-1 with K directions that share in_proj, gate and out_proj. x: (T, B, D); returns the same.

    record: the tensors of this mixer are appended to it.
    """
    encoder, k, dtype = directions.encoder, directions.count, directions.dtype
    tokens, width, state = directions.order.shape[1], encoder.width, encoder.state

    def weight(suffix: str, array: npt.NDArray[np.float64], to: Float = dtype) -> str:
        return g.constant(f"{name}.{suffix}", array.astype(to))

    projected = g("MatMul", x, weight("in_proj", w["in_proj.weight"].T), name=f"{name}.in_proj.matmul")
    x, z = g.several("Split", projected, outputs=2, axis=-1, num_outputs=2)
    conv = convolution(g, w, x, directions, name)  # (K, T, B, D)
    opening = g("Sigmoid", conv)
    u = g("Mul", conv, opening)
    flat = g("Reshape", u, g.ints(k, -1, width))  # one matrix product per direction
    projected = g(
        "MatMul", flat, weight("x_proj", w["x_proj.weight"].swapaxes(1, 2)), name=f"{name}.x_proj.matmul"
    )
    sizes = (encoder.dt_rank, state, state)
    low, B, C = g.several("Split", projected, g.ints(*sizes), outputs=3, axis=-1)
    dt = g(
        "MatMul", low, weight("dt_proj", w["dt_proj.weight"].swapaxes(1, 2)), name=f"{name}.dt_proj.matmul"
    )

    def to_float(x: str) -> str:
        return x if dtype is np.float32 else g("Cast", x, to=FLOAT)

    u32, dt = to_float(u), to_float(dt)
    dt = g("Softplus", g("Add", dt, weight("dt_bias", w["dt_proj.bias"][:, None], np.float32)))
    dt = g("Reshape", dt, g.ints(k, tokens, -1, 1, width))
    u_rows = g("Reshape", u32, g.ints(k, tokens, -1, 1, width))
    B = g("Reshape", to_float(B), g.ints(k, tokens, -1, state, 1))
    C = g("Reshape", to_float(C), g.ints(k, tokens, -1, 1, state))
    A = weight("A", -np.exp(w["A_log"]).swapaxes(1, 2)[:, None], np.float32)  # (K, 1, N, D)
    body = scan_body(f"{name}.scan.", A, directions)
    _, y = g.several(
        "Scan", directions.state, dt, g("Mul", dt, u_rows), B, C,
        outputs=2, name=f"{name}.scan", body=body, num_scan_inputs=4,
        scan_input_axes=[1, 1, 1, 1], scan_output_axes=[1],
    )  # fmt: skip
    y = g("Add", y, g("Mul", u_rows, weight("D", w["D"][:, None, None, None], np.float32)))
    mean = g("ReduceMean", to_tokens(g, g("Reshape", y, g.ints(k, tokens, -1, width)), directions),
             g.ints(0), keepdims=0)  # fmt: skip
    if dtype is not np.float32:
        mean = g("Cast", mean, to=TYPES[np.dtype(dtype)])
    out = g("Mul", silu(g, z), mean)
    out = g("MatMul", out, weight("out_proj", w["out_proj.weight"].T), name=f"{name}.out_proj.matmul")
    if record is not None:
        record.append(Recorded(output=out, z=z, x=x, opening=opening, dt=dt, B=B, C=C))
    return out


def convolution(g: Builder, w: Weights, x: str, directions: Directions, name: str) -> str:
    """Depthwise causal convolution along each direction. x: (T, B, D); returns (K, T, B, D).

    Each direction reads W - 1 rows of zeros and then its tokens; weight j multiplies the rows from j on.
    """
    tokens, taps = directions.order.shape[1], directions.encoder.conv_width
    # Row 0 is the row of zeros.
    table = np.pad(directions.order.astype(np.int64) + 1, ((0, 0), (taps - 1, 0)))
    padded = g("Pad", x, g.ints(1, 0, 0, 0, 0, 0))
    read = g("Gather", padded, g.shared(table), axis=0)  # (K, W - 1 + T, B, D)
    terms = []
    for j in range(taps):
        weight = w["conv.weight"][:, None, None, :, j].astype(directions.dtype)  # (K, 1, 1, D)
        rows = g("Slice", read, g.ints(j), g.ints(j + tokens), g.ints(1))
        terms.append(g("Mul", rows, g.constant(f"{name}.conv.weight.{j}", weight)))
    bias = g.constant(f"{name}.conv.bias", w["conv.bias"][:, None, None].astype(directions.dtype))
    return g("Sum", *terms, bias)


def scan_body(prefix: str, A: str, directions: Directions) -> onnx.GraphProto:
    """One step: h = exp(dt A) h + B (dt u), y = C h; state (K, B, N, D), A of the outer graph."""
    from onnx import helper

    g = Builder(prefix)
    k, b, n, d = directions.count, directions.batch, directions.encoder.state, directions.encoder.width
    h, dt, du, B, C = (f"{prefix}{name}" for name in ("h", "dt", "du", "B", "C"))
    decay = g("Exp", g("Mul", dt, A))
    new = g("Add", g("Mul", decay, h), g("Mul", B, du), name="h_new")
    y = g("MatMul", C, new, name="y")
    inputs = [
        value(h, FLOAT, (k, b, n, d)), value(dt, FLOAT, (k, b, 1, d)), value(du, FLOAT, (k, b, 1, d)),
        value(B, FLOAT, (k, b, n, 1)), value(C, FLOAT, (k, b, 1, n)),
    ]  # fmt: skip
    outputs = [value(new, FLOAT, (k, b, n, d)), value(y, FLOAT, (k, b, 1, d))]
    return helper.make_graph(g.nodes, f"{prefix}body", inputs, outputs)


def to_tokens(g: Builder, y: str, directions: Directions) -> str:
    """(K, T, B, D) in the order of each direction's steps -> the same by token."""
    if directions.trivial:
        return y
    k, tokens = directions.order.shape
    step = directions.order.argsort(1) + tokens * np.arange(k)[:, None]
    rows = g("Reshape", y, g.ints(k * tokens, -1, directions.encoder.width))
    return g("Gather", rows, g.shared(step.astype(np.int64)), axis=0)
