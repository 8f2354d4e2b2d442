"""Inputs for the kernels, and the exact gradients: the reference's formulas differentiated by hand.

Sizes: K directions, B images, L tokens, D channels, N states, W convolution width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arm_core.model.reference.scan import F64, silu, softplus

CONV = ("x", "weight", "bias")
SCAN = ("u", "dt", "A", "B", "C", "D", "dt_bias", "z")
BY_TOKEN = {"x", "u", "dt", "B", "C", "z"}
"""Arrays that may have 16 bits; the others are always float32."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Case:
    directions: int = 1
    batch: int = 1
    length: int
    channels: int
    states: int = 16
    width: int = 4

    def __str__(self) -> str:
        sizes = (self.directions, self.batch, self.length, self.channels, self.states, self.width)
        return "-".join(f"{name}{size}" for name, size in zip("KBLDNW", sizes, strict=True))


def inputs(case: Case, *, large_steps: bool = False, seed: int = 3) -> Arrays:
    """float32 arrays by name, and `order`; orders are permutations, ascending if there is only one.

    Step sizes are those of a fresh model, 0.001 to 0.1; with `large_steps` they range from 0 to 20.
    """
    rng = np.random.default_rng(seed)
    K, B, L, D, N = case.directions, case.batch, case.length, case.channels, case.states

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    step = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), (K, B, L, D)))
    dt_bias = np.round(8 * normal(K, D)) / 8
    raw = rng.uniform(-50, 20, step.shape) if large_steps else np.log(np.expm1(step)) - dt_bias[:, None, None]
    orders = [np.arange(L), np.arange(L)[::-1]] + [rng.permutation(L) for _ in range(K)]
    return {
        "x": normal(B, L, D),
        "weight": normal(K, D, case.width),
        "bias": normal(K, D),
        "u": normal(K, B, L, D),
        "dt": raw.astype(np.float32),
        "A": -(np.arange(1, N + 1) * np.exp(0.1 * normal(K, D, N))).astype(np.float32),
        "B": normal(K, B, L, N),
        "C": normal(K, B, L, N),
        "D": 1 + 0.1 * normal(K, D),
        "dt_bias": dt_bias.astype(np.float32),
        "z": normal(B, L, D),
        "order": np.stack(orders[:K]).astype(np.int32),
    }


def sigmoid(x: F64) -> F64:
    """With all its digits where it is tiny, unlike the form by tanh."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, e) / (1.0 + e)


def conv(values: Arrays, grad: np.ndarray | None = None) -> tuple[F64, dict[str, F64]]:
    """u of the directional convolution and, given its gradient, those of x, weight and bias, in float64."""
    x, weight, bias = (values[name].astype(np.float64) for name in CONV)
    width, length = weight.shape[-1], x.shape[1]
    u = np.empty((len(weight), *x.shape))
    grads = {name: np.zeros(a.shape) for name, a in zip(CONV, (x, weight, bias), strict=True)}
    for k, path in enumerate(values["order"]):
        padded = np.concatenate([np.zeros((len(x), width - 1, x.shape[2])), x[:, path]], axis=1)
        total = sum((padded[:, j : j + length] * weight[k, :, j] for j in range(width)), start=bias[k])
        u[k][:, path] = silu(total)
        if grad is None:
            continue
        s = sigmoid(total)
        inner = grad[k][:, path] * s * (1 + total * (1 - s))
        back = np.zeros_like(padded)
        for j in range(width):
            back[:, j : j + length] += inner * weight[k, :, j]
            grads["weight"][k, :, j] = (inner * padded[:, j : j + length]).sum((0, 1))
        grads["bias"][k] = inner.sum((0, 1))
        grads["x"][:, path] += back[:, width - 1 :]
    return u, grads


def scan(values: Arrays, grad: np.ndarray | None = None) -> tuple[F64, dict[str, F64]]:
    """Result of the selective scan and, given its gradient, those of all inputs, in float64."""
    u, dt, A, B, C, D, dt_bias, z = (values[name].astype(np.float64) for name in SCAN)
    mean = np.zeros(z.shape)
    grads = {name: np.zeros(values[name].shape) for name in SCAN}
    gate = None if grad is None else grad * silu(z) / len(u)
    for k, path in enumerate(values["order"]):
        raw = dt[k] + dt_bias[k]
        step = softplus(raw)
        h = np.zeros((len(z), *A[k].shape))  # (B, D, N)
        states = [h]
        for p in path:
            h = (
                np.exp(step[:, p, :, None] * A[k]) * h
                + (step[:, p] * u[k, :, p])[..., None] * B[k, :, p, None]
            )
            states.append(h)
            mean[:, p] += (np.einsum("bdn,bn->bd", h, C[k, :, p]) + D[k] * u[k, :, p]) / len(u)
        if gate is None:
            continue
        carried = np.zeros_like(h)
        for t in reversed(range(len(path))):
            p = path[t]
            g, decay = gate[:, p], np.exp(step[:, p, :, None] * A[k])
            grad_h = carried + g[..., None] * C[k, :, p, None]
            carried = grad_h * decay
            exponent = carried * states[t]
            drive = np.einsum("bdn,bn->bd", grad_h, B[k, :, p])
            grad_step = np.einsum("bdn,dn->bd", exponent, A[k]) + drive * u[k, :, p]
            grads["u"][k, :, p] = drive * step[:, p] + D[k] * g
            grads["dt"][k, :, p] = grad_step * sigmoid(raw[:, p])
            grads["A"][k] += np.einsum("bdn,bd->dn", exponent, step[:, p])
            grads["B"][k, :, p] = np.einsum("bdn,bd->bn", grad_h, step[:, p] * u[k, :, p])
            grads["C"][k, :, p] = np.einsum("bdn,bd->bn", states[t + 1], g)
            grads["D"][k] += (g * u[k, :, p]).sum(0)
        grads["dt_bias"][k] = grads["dt"][k].sum((0, 1))
    if grad is not None:
        s = sigmoid(z)
        grads["z"] = grad * mean * s * (1 + z * (1 - s))
    return silu(z) * mean, grads
