"""The fused CPU functions against float64, alone and in torch: the MLP's gate, a shared projection."""

import numpy as np
import pytest

from arm_core import cpu_kernels
from arm_core.model.reference.scan import silu

TOLERANCE = 5e-7
"""Tolerances relative to each tensor's largest value; a float32 rounding is 6e-8."""
SIZES = [(5,), (63,), (64,), (3, 5, 7), (1, 4096), (2, 4097), (3, 4, 1031)]  # around vectors and tasks


def values(shape: tuple[int, ...], scale: float = 4.0) -> list[np.ndarray]:
    """grad, a, b"""
    rng = np.random.default_rng(3)
    return [(scale * rng.standard_normal(shape)).astype(np.float32) for _ in range(3)]


def float64_gate(grad: np.ndarray, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """The value, and the gradients of a and b."""
    grad, a, b = (t.astype(np.float64) for t in (grad, a, b))
    sigmoid = 1 / (1 + np.exp(-a))
    return [silu(a) * b, grad * b * sigmoid * (1 + a * (1 - sigmoid)), grad * silu(a)]


def worst(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("scale", [4.0, 60.0], ids=["mild", "saturated"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_value_and_gradients_agree_with_float64(shape: tuple[int, ...], scale: float) -> None:
    grad, a, b = values(shape, scale)
    found = [cpu_kernels.swiglu_forward(a, b), *cpu_kernels.swiglu_backward(grad, a, b)]
    for ours, expected in zip(found, float64_gate(grad, a, b), strict=True):
        assert worst(ours, expected) < TOLERANCE


def test_the_gate_and_its_gradients_agree_in_torch_in_every_precision() -> None:
    torch = pytest.importorskip("torch")
    from arm_cuda.gate import swiglu

    rng = np.random.default_rng(5)
    shapes = {"grad": (3, 5, 67), "x": (3, 5, 31), "w1": (67, 31), "b1": (67,), "w2": (67, 31), "b2": (67,)}
    grad, x, *parameters = (rng.standard_normal(shape) for shape in shapes.values())
    w1, b1, w2, b2 = parameters
    out, grad_a, grad_b = float64_gate(grad, x @ w1.T + b1, x @ w2.T + b2)
    expected = [out, grad_a @ w1 + grad_b @ w2]
    for g in (grad_a, grad_b):
        expected += [np.einsum("bto,bti->oi", g, x), g.sum((0, 1))]
    for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.float64, 1e-14), (torch.bfloat16, 2e-2)):
        tensor = torch.from_numpy(x).to(dtype).requires_grad_()
        layers = [torch.nn.Linear(31, 67, dtype=dtype) for _ in range(2)]
        leaves = [p for layer in layers for p in (layer.weight, layer.bias)]
        with torch.no_grad():
            for leaf, value in zip(leaves, parameters, strict=True):
                leaf.copy_(torch.from_numpy(value))
        found = swiglu(tensor, *layers)
        assert found.dtype == dtype
        found.backward(torch.from_numpy(grad).to(dtype).mT.contiguous().mT)  # not contiguous
        for ours, reference in zip((found, tensor.grad, *(p.grad for p in leaves)), expected, strict=True):
            assert worst(ours.detach().double().numpy(), reference) < tolerance


def test_both_gradients_of_a_shared_input_are_added() -> None:
    torch = pytest.importorskip("torch")
    from arm_cuda.layers import project_and_pass

    rng = np.random.default_rng(4)
    shapes = {"x": (3, 2, 7, 5), "weight": (3, 4, 5), "grad_x": (3, 2, 7, 5), "grad": (3, 2, 7, 4)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    expected = {
        "product": np.einsum("kbti,koi->kbto", arrays["x"], arrays["weight"]),
        "grad_x": arrays["grad_x"] + np.einsum("kbto,koi->kbti", arrays["grad"], arrays["weight"]),
        "grad_weight": np.einsum("kbto,kbti->koi", arrays["grad"], arrays["x"]),
    }
    for dtype, tolerance in ((torch.float32, TOLERANCE), (torch.float64, 1e-14)):
        for contiguous in (True, False):
            x, weight, grad_x, grad = (torch.from_numpy(a).to(dtype) for a in arrays.values())
            if not contiguous:
                grad_x, grad = (g.transpose(1, 2).contiguous().transpose(1, 2) for g in (grad_x, grad))
            x, weight = x.requires_grad_(), weight.requires_grad_()
            product, passed = project_and_pass(x, weight)
            torch.autograd.backward([product, passed * 1], [grad, grad_x])
            found = {"product": product, "grad_x": x.grad, "grad_weight": weight.grad}
            for name, value in found.items():
                assert worst(value.detach().double().numpy(), expected[name]) < tolerance, name


def test_a_nan_stays_in_its_element() -> None:
    _, a, b = values((130,))
    a[17] = np.nan
    assert np.flatnonzero(np.isnan(cpu_kernels.swiglu_forward(a, b))).tolist() == [17]


def test_arrays_of_different_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"b: expected float32 \(3,\), found float32 \(4,\)"):
        cpu_kernels.swiglu_forward(np.zeros(3, np.float32), np.zeros(4, np.float32))
