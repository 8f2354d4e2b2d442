"""The influence of every patch on a classifier's pooled features in one mixer, in ONNX.

The map of `arm_core.explain.influence` for the target `class`, as the mean over the directions:

    I[s] = mean_k sum_t p_t <c_k(t <- s), o_t> / |o_t|^2        p: share of token t in the pooled features

Only this sum over the targets is needed, so one scan in the reverse order computes it: the adjoint of the
recurrence applied to q_t = p_t silu(z_t) W_out^T o_t / |o_t|^2. Sizes are those of `mixer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from arm_convert.onnx_model.builder import FLOAT, Builder, value
from arm_convert.onnx_model.mixer import Directions, Recorded, silu, to_tokens
from arm_core.model.reference.model import Weights

if TYPE_CHECKING:
    import onnx


def influence_on(
    g: Builder,
    w: Weights,
    recorded: Recorded,
    directions: Directions,
    pooled: npt.NDArray[np.floating],
    name: str,
) -> str:
    """(T, B): influence of each token on the pooled output of a float32 mixer.

    w: the mixer's weights, which are constants of the graph already.  pooled: (T,), the shares p.
    """
    k, tokens = directions.order.shape
    width = directions.encoder.width
    square = g("ReduceSum", g("Mul", recorded.output, recorded.output), g.ints(-1))
    square = g("Max", square, g.shared(np.array(np.finfo(np.float32).tiny)))
    towards = g("MatMul", g("Div", recorded.output, square), g("Transpose", f"{name}.out_proj", perm=[1, 0]))
    q = g("Mul", g("Mul", silu(g, recorded.z), towards), g.shared(pooled.astype(np.float32)[:, None, None]))
    read = g.shared(directions.order.astype(np.int64))
    q = g("Reshape", g("Gather", q, read, axis=0), g.ints(k, tokens, -1, 1, width))
    body = adjoint_body(f"{name}.adjoint.", f"{name}.A", directions)
    _, y = g.several(
        "Scan", directions.state, recorded.dt, q, recorded.B, recorded.C,
        outputs=2, name=f"{name}.adjoint", body=body, num_scan_inputs=4,
        scan_input_axes=[1] * 4, scan_output_axes=[1],
        scan_input_directions=[1] * 4, scan_output_directions=[1],
    )  # fmt: skip
    y = g("Add", g("Mul", recorded.dt, y), g("Mul", f"{name}.D", q))
    y = g("Mul", g("Reshape", y, g.ints(k, tokens, -1, width)), recorded.opening)
    # The convolution's transpose: a token is read by its own step and the W - 1 steps after it.
    taps = directions.encoder.conv_width
    padded = g("Pad", y, g.ints(0, 0, 0, 0, 0, taps - 1, 0, 0))
    terms = [
        g("Mul", g("Slice", padded, g.ints(j), g.ints(j + tokens), g.ints(1)),
          f"{name}.conv.weight.{taps - 1 - j}")
        for j in range(taps)
    ]  # fmt: skip
    rows = g("Mul", g("Sum", *terms), g("Gather", recorded.x, read, axis=0))
    by_token = to_tokens(g, rows, directions)  # (K, T, B, D)
    return g("ReduceMean", g("ReduceSum", by_token, g.ints(-1), keepdims=0), g.ints(0), keepdims=0)


def adjoint_body(prefix: str, A: str, directions: Directions) -> onnx.GraphProto:
    """One step backwards: l = h + C q, y = B l, h = exp(dt A) l; state (K, B, N, D)."""
    from onnx import helper

    g = Builder(prefix)
    k, b, n, d = directions.count, directions.batch, directions.encoder.state, directions.encoder.width
    h, dt, q, B, C = (f"{prefix}{name}" for name in ("h", "dt", "q", "B", "C"))
    total = g("Add", h, g("Mul", g("Transpose", C, perm=[0, 1, 3, 2]), q))
    y = g("MatMul", g("Transpose", B, perm=[0, 1, 3, 2]), total, name="y")
    new = g("Mul", g("Exp", g("Mul", dt, A)), total, name="h_new")
    inputs = [
        value(h, FLOAT, (k, b, n, d)), value(dt, FLOAT, (k, b, 1, d)), value(q, FLOAT, (k, b, 1, d)),
        value(B, FLOAT, (k, b, n, 1)), value(C, FLOAT, (k, b, 1, n)),
    ]  # fmt: skip
    outputs = [value(new, FLOAT, (k, b, n, d)), value(y, FLOAT, (k, b, 1, d))]
    return helper.make_graph(g.nodes, f"{prefix}body", inputs, outputs)
