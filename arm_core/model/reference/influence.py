"""Token-to-token contributions of one mixer in float64: the reference for the fast influence maps.

One mixer maps tokens x_s to outputs o_t. With the recorded values of dt, B, C, the gate silu(z) and the
sigmoid inside the convolution's SiLU held fixed, it is an affine map: o_t = sum_s c_(t<-s) + b_t with

    c_k(t<-s) = W_out ( silu(z_t) * sum_i G_k(t, i) * sigmoid(conv_k)_i * w_k[lag(s, i)] * (W_x x_s) )
    G_k(t, i) = dt_i <C_t, exp(A sum of dt over (i, t]) B_i> + D [t = i]

where i runs over the scan steps up to t that the convolution connects with token s, and `*` acts per
channel. The map of the mixer is the mean over the K directions. The same freezing is described in "The Hidden
Attention of Mamba Models" (arXiv:2403.01590) and "A Unified Implicit Attention Formulation for Gated-Linear
Recurrent Sequence Models" (arXiv:2405.16504).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from arm_core.model.reference.model import Weights
from arm_core.model.reference.scan import F64, Orders, sigmoid, silu, softplus
from arm_core.model.spec import EncoderSpec


class Contributions(NamedTuple):
    """Additive parts of a mixer's output; T tokens, D channels, K directions."""

    tokens: F64
    """(K, T, T, D): [k, t, s] is the contribution of token s to token t if k were the only direction."""
    bias: F64
    """(K, T, D): the contribution of the convolution's bias."""

    @property
    def output(self) -> F64:
        """(T, D), the mixer's output: the sum of all parts."""
        return np.asarray((self.tokens.sum(2) + self.bias).mean(0))


def contributions(spec: EncoderSpec, w: Weights, x: F64, order: Orders) -> Contributions:
    """Contributions of every token to every other. x: (T, D), one image, after the block's first norm."""
    length, width = x.shape
    inner, z = np.split(x @ w["in_proj.weight"].T, 2, axis=-1)
    gate, taps, A, D = silu(z), w["conv.weight"], -np.exp(w["A_log"]), w["D"]
    count = taps.shape[-1]
    tokens = np.empty((len(order), length, length, width))
    bias = np.empty((len(order), length, width))
    for k, steps in enumerate(order):
        along = inner[steps]  # (T, D) in scan order, like everything below
        padded = np.concatenate([np.zeros((count - 1, width)), along])
        conv = w["conv.bias"][k] + sum(padded[j : j + length] * taps[k, :, j] for j in range(count))
        opening = sigmoid(conv)
        low, B, C = np.split(
            (opening * conv) @ w["x_proj.weight"][k].T, [spec.dt_rank, spec.dt_rank + spec.state], axis=-1
        )
        dt = softplus(low @ w["dt_proj.weight"][k].T + w["dt_proj.bias"][k])

        scan = partial(_frozen_scan, dt=dt, A=A[k], B=B, C=C, D=D[k])
        outputs = w["out_proj.weight"].T
        bias[k][steps] = (gate[steps] * scan(opening * w["conv.bias"][k])) @ outputs
        for place, s in enumerate(steps):
            v = np.zeros((length, width))
            for i in range(place, min(place + count, length)):
                v[i] = opening[i] * taps[k, :, count - 1 - (i - place)] * along[place]
            tokens[k, steps, s] = (gate[steps] * scan(v)) @ outputs
    return Contributions(tokens, bias)


def _frozen_scan(v: F64, *, dt: F64, A: F64, B: F64, C: F64, D: F64) -> F64:
    """The scan of inputs v (T, D) with given coefficients, everything in scan order. Returns (T, D)."""
    h, y = np.zeros(A.shape), np.empty(v.shape)
    for t in range(len(v)):
        h = np.exp(dt[t, :, None] * A) * h + (dt[t] * v[t])[:, None] * B[t]
        y[t] = h @ C[t] + D * v[t]
    return y


def influence_shares(parts: Contributions) -> F64:
    """(K, T, T): <c_k(t<-s), o_t> / |o_t|^2, the signed share of o_t that token s contributes; 0 where o_t
    is 0.

    Over all s, with the bias's share, the mean over k is 1 for every t.
    """
    output = parts.output
    square = (output**2).sum(-1)
    shares = np.einsum("ktsd,td->kts", parts.tokens, output)
    return np.asarray(
        np.divide(shares, square[:, None], out=np.zeros_like(shares), where=square[:, None] > 0)
    )
