"""The mixer's two sequence operators in MLX, by implementation.

`IMPLEMENTATIONS` is the table that `--scan` chooses from. Every implementation computes what
`arm_core.model.reference.scan` defines, with all gradients. Sizes: K directions, B images, L tokens,
D channels, N states, W convolution width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from arm_core import cpu_kernels
from arm_core.engine.scans import Implementation, Implementations, check_axes
from arm_mlx import metal

Gradients = tuple[mx.array | None, ...]


def directional_conv(
    x: mx.array, weight: mx.array, bias: mx.array, order: mx.array, *, impl: str
) -> mx.array:
    """Depthwise causal convolution along each direction's order, then SiLU.

    u[k, b, p_t] = silu(bias_k + sum_j weight_k[:, j] x[b, p_(t - W + 1 + j)]) with p = order[k];
    tokens before the first count as 0.

    x: (B, L, D) float32, float16 or bfloat16.  weight: (K, D, W) and bias: (K, D) float32.
    order: (K, L) int32.  impl: see `IMPLEMENTATIONS`.  Returns u: (K, B, L, D) in x.dtype.
    Raises ValueError on an unknown impl, and on a shape that does not fit.
    """
    check_axes(x=(x, "BLD"), weight=(weight, "KDW"), bias=(bias, "KD"), order=(order, "KL"))
    implementation = IMPLEMENTATIONS[impl]
    dtype = x.dtype if implementation.half_precision else mx.float32
    weights = (a.astype(mx.float32) for a in (weight, bias))
    return implementation.directional_conv(x.astype(dtype), *weights, order).astype(x.dtype)


def selective_scan(
    u: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, D: mx.array, dt_bias: mx.array,
    z: mx.array, order: mx.array, *, impl: str, save_for_backward: bool = True,
) -> mx.array:  # fmt: skip
    """Selective scan over K directions, their mean, and the gate.

    Along p = order[k], with step = softplus(dt[k, b, p] + dt_bias_k) and h = 0 before the first token:

        h = exp(step A_k) h + step B[k, b, p] u[k, b, p]          h: (D, N) float32
        y_k[p] = <C[k, b, p], h> + D_k u[k, b, p]
        out[b, p] = silu(z[b, p]) mean_k y_k[p]

    u, dt: (K, B, L, D); dt before bias and softplus.  B, C: (K, B, L, N).  z: (B, L, D).  All of these
    float32, float16 or bfloat16.  A: (K, D, N), negative.  D, dt_bias: (K, D).  order: (K, L) int32.
    impl: see `IMPLEMENTATIONS`.  save_for_backward: whether gradients can be taken.
    Returns out: (B, L, D) in u.dtype; the state stays float32.
    Raises ValueError on an unknown impl, on a shape that does not fit, and when a gradient is taken
    without `save_for_backward`.
    """
    check_axes(
        u=(u, "KBLD"), dt=(dt, "KBLD"), A=(A, "KDN"), B=(B, "KBLN"), C=(C, "KBLN"), D=(D, "KD"),
        dt_bias=(dt_bias, "KD"), z=(z, "BLD"), order=(order, "KL"),
    )  # fmt: skip
    implementation = IMPLEMENTATIONS[impl]
    by_token = (u, dt, B, C, z)
    dtype = mx.result_type(*by_token) if implementation.half_precision else mx.float32
    run: Callable[..., mx.array] = partial(implementation.selective_scan, save_for_backward=save_for_backward)
    if not save_for_backward:
        run = _without_gradients(run)
    u_, dt_, B_, C_, z_ = (a.astype(dtype) for a in by_token)
    A_, D_, bias_ = (a.astype(mx.float32) for a in (A, D, dt_bias))
    return run(u_, dt_, A_, B_, C_, D_, bias_, z_, order).astype(u.dtype)


def scans(device: str) -> dict[str, str | None]:
    """Implementations in order of preference: None if usable on the device, else the reason."""
    return IMPLEMENTATIONS.usable(device)


def _without_gradients(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """The function, with a gradient that raises ValueError."""
    forward = mx.custom_function(lambda *inputs: function(*inputs))

    @forward.vjp
    def _(*_: Any) -> Gradients:
        raise ValueError("selective_scan: gradients need save_for_backward=True, found False")

    return cast(Callable[..., mx.array], forward)


def silu(x: mx.array) -> mx.array:
    return x * mx.sigmoid(x)


# reference: plain MLX operations, any device, eager or compiled


def _reference_conv(x: mx.array, weight: mx.array, bias: mx.array, order: mx.array) -> mx.array:
    length, width = x.shape[1], weight.shape[2]
    steps = mx.pad(x[:, order], [(0, 0), (0, 0), (width - 1, 0), (0, 0)]).swapaxes(
        0, 1
    )  # (K, B, W - 1 + L, D)
    total = bias[:, None, None]
    for j in range(width):
        total = total + steps[:, :, j : j + length] * weight[:, None, None, :, j]
    return _reorder(silu(total), mx.argsort(order, axis=1))


def _reference_scan(
    u: mx.array,
    dt: mx.array,
    A: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt_bias: mx.array,
    z: mx.array,
    order: mx.array,
    *,
    save_for_backward: bool,
) -> mx.array:
    step = mx.logaddexp(dt + dt_bias[:, None, None], 0.0)  # softplus
    y = _first(_recurrence(A, *(_reorder(tokens, order) for tokens in (step, step * u, B, C))))
    y = _reorder(y, mx.argsort(order, axis=1)) + D[:, None, None] * u
    return silu(z) * y.mean(0)


@mx.custom_function
def _recurrence(A: mx.array, step: mx.array, x: mx.array, B: mx.array, C: mx.array) -> tuple[mx.array, ...]:
    """h_t = exp(step_t A) h_{t-1} + x_t B_t;  y_t = <C_t, h_t>, all in scan order.

    A: (K, D, N).  step, x: (K, B, L, D).  B, C: (K, B, L, N).  Returns y: (K, B, L, D), then the state
    (K, B, D, N) after each token, which the backward reads.
    """
    h, states, ys = mx.zeros((1,)), [], []
    for t in range(x.shape[2]):
        h = mx.exp(step[:, :, t, :, None] * A[:, None]) * h + x[:, :, t, :, None] * B[:, :, t, None]
        ys.append((h @ C[:, :, t, :, None]).squeeze(-1))
        states.append(h)
    return mx.stack(ys, axis=2), *states


@_recurrence.vjp
def _recurrence_vjp(
    inputs: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
) -> Gradients:
    """The loop backwards in time: autodiff through the slices `[:, :, t]` is quadratic in L."""
    A, step, x, B, C = inputs
    grad_y, states = cotangents[0], outputs[1:]
    grad_A = carried = mx.zeros_like(states[0])  # carried: what the later tokens add to the gradient of h_t
    by_token: list[tuple[mx.array, ...]] = []
    for t in reversed(range(x.shape[2])):
        grad_h = carried + grad_y[:, :, t, :, None] * C[:, :, t, None]
        carried = mx.exp(step[:, :, t, :, None] * A[:, None]) * grad_h
        grad_exponent = carried * states[t - 1] if t else mx.zeros_like(carried)
        grad_A = grad_A + grad_exponent * step[:, :, t, :, None]
        by_token.append(
            (
                (grad_exponent * A[:, None]).sum(-1),
                (grad_h @ B[:, :, t, :, None]).squeeze(-1),
                (x[:, :, t, None] @ grad_h).squeeze(-2),
                (grad_y[:, :, t, None] @ states[t]).squeeze(-2),
            )
        )
    step_x_B_C = (mx.stack(list(gradient), axis=2) for gradient in zip(*reversed(by_token), strict=True))
    return grad_A.sum(1), *step_x_B_C


def _reorder(x: mx.array, order: mx.array) -> mx.array:
    """Tokens of (K, B, L, ...), put into each direction's order."""
    return mx.take_along_axis(x, order[:, None, :, None], axis=2)


def _first(outputs: object) -> mx.array:
    """The first output of a `custom_function`; the other outputs are for its backward pass."""
    return cast(tuple[mx.array, ...], outputs)[0]


# cpu: the Numba kernels of the core, eager only


def _cpu_conv(*inputs: mx.array) -> mx.array:
    return cast(mx.array, _cpu_conv_function(*inputs))


def _cpu_scan(*inputs: mx.array, save_for_backward: bool) -> mx.array:
    if save_for_backward:
        return _first(_cpu_scan_function(*inputs))
    out, _ = cpu_kernels.scan_forward(*evaluated(*inputs), save_for_backward=False)
    return mx.array(out)


@mx.custom_function
def _cpu_conv_function(*inputs: mx.array) -> mx.array:
    return mx.array(cpu_kernels.conv_forward(*evaluated(*inputs)))


@_cpu_conv_function.vjp
def _cpu_conv_vjp(inputs: Sequence[mx.array], grad_u: mx.array, u: mx.array) -> Gradients:
    gradients = cpu_kernels.conv_backward(*evaluated(grad_u, *inputs))
    return *map(mx.array, gradients), None


@mx.custom_function
def _cpu_scan_function(*inputs: mx.array) -> tuple[mx.array, ...]:
    out, residuals = cpu_kernels.scan_forward(*evaluated(*inputs), save_for_backward=True)
    assert residuals is not None
    return mx.array(out), mx.array(residuals.mean), mx.array(residuals.states)


@_cpu_scan_function.vjp
def _cpu_scan_vjp(
    inputs: Sequence[mx.array], cotangents: Sequence[mx.array], outputs: Sequence[mx.array]
) -> Gradients:
    grad, mean, states, *arrays = evaluated(cotangents[0], *outputs[1:], *inputs)
    gradients = cpu_kernels.scan_backward(grad, cpu_kernels.ScanResiduals(mean, states), *arrays)
    return *map(mx.array, gradients), None


def evaluated(*arrays: mx.array) -> list[npt.NDArray[Any]]:
    """Zero-copy views; MLX computes the values here."""
    try:
        mx.eval(*arrays)
    except ValueError as error:
        raise ValueError(
            "scan 'cpu' leaves MLX's graph and cannot run inside mx.compile or mx.vmap; scan 'reference' can"
        ) from error
    return [np.asarray(array) for array in arrays]


def _no_metal(device: str) -> str | None:
    if device == "cpu":
        return "its kernels run on Apple GPUs"
    return None if mx.metal.is_available() else "MLX finds no Metal GPU here"


IMPLEMENTATIONS: Implementations[mx.array] = Implementations(
    {
        "metal": Implementation(
            directional_conv=metal.directional_conv,
            selective_scan=metal.selective_scan,
            unusable=_no_metal,
        ),
        "cpu": Implementation(
            directional_conv=_cpu_conv,
            selective_scan=_cpu_scan,
            half_precision=False,
            unusable=lambda device: None if device == "cpu" else "its kernels run on the CPU",
        ),
        "reference": Implementation(
            directional_conv=_reference_conv, selective_scan=_reference_scan, half_precision=False
        ),
    }
)
"""The choices of `--scan`; `auto` takes the first usable one."""
