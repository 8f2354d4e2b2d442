"""The two sequence operators of the mixer as plain float64 loops: the reference for every kernel.

K directions, B images, L tokens, D channels, N states, W convolution width. For each direction,
`order` (K, L) holds the token read at each step. Everything else is indexed by token, so results need no
reordering.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.floating]
Orders = npt.NDArray[np.integer]


def sigmoid(x: F64) -> F64:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))


def silu(x: F64) -> F64:
    return np.asarray(x * sigmoid(x))


def softplus(x: F64) -> F64:
    return np.asarray(np.logaddexp(0.0, x))


def directional_conv(x: Floats, weight: Floats, bias: Floats, order: Orders) -> F64:
    """Depthwise causal convolution along each direction's order, then SiLU.

    u[k, b, p_t] = silu(bias_k + sum_j weight_k[:, j] x[b, p_(t - W + 1 + j)]) with p = order[k];
    tokens before the first count as 0.

    x: (B, L, D).  weight: (K, D, W).  bias: (K, D).  order: (K, L).  Returns u: (K, B, L, D) float64.
    """
    directions, channels, taps = weight.shape
    batch, length, _ = x.shape
    u = np.empty((directions, batch, length, channels))
    for k in range(directions):
        padded = np.concatenate([np.zeros((batch, taps - 1, channels)), x[:, order[k]]], axis=1)
        total = sum(padded[:, j : j + length] * weight[k, :, j].astype(np.float64) for j in range(taps))
        u[k][:, order[k]] = silu(np.asarray(total + bias[k], np.float64))
    return u


def selective_scan(
    u: Floats,
    dt: Floats,
    A: Floats,
    B: Floats,
    C: Floats,
    D: Floats,
    dt_bias: Floats,
    z: Floats,
    order: Orders,
) -> F64:
    """Selective scan over K directions, their mean, and the gate.

    Along p = order[k], with step = softplus(dt[k, b, p] + dt_bias_k) and h = 0 before the first token:

        h = exp(step A_k) h + step B[k, b, p] u[k, b, p]          h: (D, N)
        y_k[p] = <C[k, b, p], h> + D_k u[k, b, p]
        out[b, p] = silu(z[b, p]) mean_k y_k[p]

    Mamba, arXiv:2312.00752, eq. 2; Euler B and skip D as in its official kernel.
    u, dt: (K, B, L, D); dt before bias and softplus.  A: (K, D, N), negative.  B, C: (K, B, L, N).
    D, dt_bias: (K, D).  z: (B, L, D).  order: (K, L).  Returns out: (B, L, D) float64.
    """
    directions, batch, length, channels = u.shape
    u, A, B, C = (np.asarray(a, np.float64) for a in (u, A, B, C))
    mean = np.zeros((batch, length, channels))
    for k in range(directions):
        step = softplus(np.asarray(dt[k], np.float64) + dt_bias[k])
        h = np.zeros((batch, channels, A.shape[-1]))
        for p in order[k]:
            decay = np.exp(step[:, p, :, None] * A[k])
            h = decay * h + (step[:, p] * u[k, :, p])[..., None] * B[k, :, p, None, :]
            mean[:, p] += np.einsum("bdn,bn->bd", h, C[k, :, p]) + D[k] * u[k, :, p]
    return np.asarray(silu(np.asarray(z, np.float64)) * mean / directions)
