"""The CPU kernels against the float64 reference: values, gradients, repeatability, refusals."""

import hashlib
import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba as nb
import numpy as np
import pytest

from arm_core import cpu_kernels
from arm_core.cpu_kernels import conv, influence, scan, swiglu
from arm_core.cpu_kernels.functions import exp2
from arm_core.cpu_kernels.simd import LANES, load, store
from arm_core.model.reference import scan as reference

TOLERANCE = 2e-6
"""Tolerances relative to each tensor's largest value; a float32 rounding is 6e-8."""


class Case(NamedTuple):
    """Sizes: directions, images, tokens, channels, states, convolution width."""

    K: int
    B: int
    L: int
    D: int
    N: int
    W: int

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in self._asdict().items())


# Lengths around chunks of 16 and 32 tokens, widths around vectors of 64 and groups of 256 channels, states
# around 16, sizes of one.
CASES = [
    Case(1, 1, 1, 1, 1, 1),
    Case(1, 2, 2, 5, 16, 4),
    Case(2, 1, 7, 32, 8, 4),
    Case(4, 2, 16, 40, 16, 4),
    Case(1, 3, 17, 96, 16, 2),
    Case(2, 2, 37, 33, 1, 3),
    Case(2, 3, 33, 128, 16, 4),
    Case(4, 1, 64, 64, 17, 4),
    Case(2, 2, 34, 300, 1, 4),
    Case(4, 2, 197, 40, 16, 4),
]
SMALL = [Case(1, 1, 5, 3, 2, 4), Case(2, 2, 4, 2, 1, 1), Case(4, 1, 3, 2, 2, 2)]
REGIMES = ["mild", "large steps", "vanishing steps"]

Arrays = dict[str, np.ndarray]


def inputs(case: Case, regime: str = "mild") -> tuple[Arrays, Arrays]:
    """Inputs of the convolution and of the scan, sliced from longer rows as in a model."""
    rng = np.random.default_rng(7)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    both = normal(case.B, case.L, 2 * case.D)
    order = np.stack([rng.permutation(case.L) for _ in range(case.K)]).astype(np.int32)
    conv = {
        "x": both[..., : case.D],
        "weight": normal(case.K, case.D, case.W, scale=0.5),
        "bias": normal(case.K, case.D),
        "order": order,
    }
    projected = normal(case.K, case.B, case.L, 3 + 2 * case.N)
    dt = normal(case.K, case.B, case.L, case.D)
    match regime:
        case "large steps":
            dt = np.linspace(-50, 20, dt.size, dtype=np.float32)[rng.permutation(dt.size)].reshape(dt.shape)
        case "vanishing steps":
            dt = dt - 50
    dt = np.round(8 * dt) / 8  # like dt_bias: their sum is exact, so that the test measures softplus
    scan = {
        "u": normal(case.K, case.B, case.L, case.D),
        "dt": dt,
        "A": -np.exp(normal(case.K, case.D, case.N)),
        "B": projected[..., 3 : 3 + case.N],
        "C": projected[..., 3 + case.N :],
        "D": normal(case.K, case.D),
        "dt_bias": np.round(8 * normal(case.K, case.D)) / 8,
        "z": both[..., case.D :],
        "order": order,
    }
    return conv, scan


def gradient_of_output(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(8).standard_normal(shape).astype(np.float32)


def scan_gradients(grad_out: np.ndarray, scan: Arrays, **options: Any) -> cpu_kernels.ScanGradients:
    _, residuals = cpu_kernels.scan_forward(**scan, save_for_backward=True, **options)
    assert residuals is not None
    return cpu_kernels.scan_backward(grad_out, residuals, **scan, **options)


def assert_close(found: np.ndarray, expected: np.ndarray, name: str = "") -> None:
    assert found.shape == expected.shape, name
    assert np.isfinite(found).all(), name
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error < TOLERANCE, f"{name}: {error:.1e} of the largest value"


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the operators allocate is filled with NaN, so that an unwritten element is detected."""

    monkeypatch.setattr(cpu_kernels, "new", lambda shape: np.full(shape, np.nan, np.float32))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_matches_the_reference(case: Case) -> None:
    conv, _ = inputs(case)
    assert_close(cpu_kernels.conv_forward(**conv), reference.directional_conv(**conv))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan_matches_the_reference(case: Case, regime: str) -> None:
    _, scan = inputs(case, regime)
    out, _ = cpu_kernels.scan_forward(**scan, save_for_backward=False)
    assert_close(out, reference.selective_scan(**scan))


def differences(
    function: Callable[..., np.ndarray], arrays: Arrays, name: str, grad: np.ndarray
) -> np.ndarray:
    """Gradient of <grad, function> for one input, by central differences in float64, element by element."""
    base = arrays[name].astype(np.float64)
    found = np.empty_like(base)
    for index in np.ndindex(base.shape):
        sides = []
        for step in (1e-4, -1e-4):
            moved = base.copy()
            moved[index] += step
            sides.append(np.sum(grad * function(**{**arrays, name: moved})))
        found[index] = (sides[0] - sides[1]) / 2e-4
    return found


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_convolution_gradients_match_finite_differences(case: Case) -> None:
    conv, _ = inputs(case)
    grad = gradient_of_output((case.K, case.B, case.L, case.D))
    gradients = cpu_kernels.conv_backward(grad, **conv)
    for name, found in gradients._asdict().items():
        assert_close(found, differences(reference.directional_conv, conv, name, grad), name)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_scan_gradients_match_finite_differences(case: Case) -> None:
    _, scan = inputs(case)
    grad = gradient_of_output((case.B, case.L, case.D))
    for name, found in scan_gradients(grad, scan)._asdict().items():
        assert_close(found, differences(reference.selective_scan, scan, name, grad), name)


def slope(
    function: Callable[..., np.ndarray], arrays: Arrays, name: str, grad: np.ndarray, way: np.ndarray
) -> Any:
    """Derivative of <grad, function> when one input moves along `way`."""
    sides = [function(**{**arrays, name: arrays[name].astype(np.float64) + s * way}) for s in (1e-4, -1e-4)]
    return np.sum(grad * (sides[0] - sides[1])) / 2e-4


def assert_slopes(
    function: Callable[..., np.ndarray], arrays: Arrays, gradients: Any, grad: np.ndarray
) -> None:
    for name, found in gradients._asdict().items():
        assert np.isfinite(found).all(), name
        way = np.random.default_rng(9).uniform(-1, 1, found.shape)
        expected = slope(function, arrays, name, grad, way)
        size = np.abs(found * way).sum()
        assert abs(np.sum(found.astype(np.float64) * way) - expected) < 2 * TOLERANCE * max(size, 1e-12), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution_gradients_match_the_slope_of_the_reference(case: Case) -> None:
    conv, _ = inputs(case)
    grad = gradient_of_output((case.K, case.B, case.L, case.D))
    assert_slopes(reference.directional_conv, conv, cpu_kernels.conv_backward(grad, **conv), grad)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scan_gradients_match_the_slope_of_the_reference(case: Case, regime: str) -> None:
    _, scan = inputs(case, regime)
    grad = gradient_of_output((case.B, case.L, case.D))
    assert_slopes(reference.selective_scan, scan, scan_gradients(grad, scan), grad)


@pytest.mark.parametrize("case", [CASES[3], CASES[5], CASES[8]], ids=str)
def test_results_are_the_same_bits_on_every_run_and_thread_count(case: Case) -> None:
    conv, scan = inputs(case)
    grad_u = gradient_of_output((case.K, case.B, case.L, case.D))

    def everything(threads: int | None) -> list[np.ndarray]:
        u = cpu_kernels.conv_forward(**conv, threads=threads)
        out, _ = cpu_kernels.scan_forward(**scan, save_for_backward=False, threads=threads)
        gradients = scan_gradients(grad_u[0], scan, threads=threads)
        return [u, out, *gradients, *cpu_kernels.conv_backward(grad_u, **conv, threads=threads)]

    first = everything(None)
    for threads in (None, 1, 2, 64):
        for a, b in zip(first, everything(threads), strict=True):
            np.testing.assert_array_equal(a, b)


def test_forward_without_residuals_gives_the_same_bits() -> None:
    _, scan = inputs(CASES[3])
    kept, residuals = cpu_kernels.scan_forward(**scan, save_for_backward=True)
    plain, nothing = cpu_kernels.scan_forward(**scan, save_for_backward=False)
    assert residuals is not None
    assert nothing is None
    np.testing.assert_array_equal(kept, plain)


def test_an_image_does_not_depend_on_the_batch_around_it() -> None:
    _, scan = inputs(CASES[3])
    alone = {**scan, **{n: scan[n][:, 1:] for n in ("u", "dt", "B", "C")}, "z": scan["z"][1:]}
    whole = cpu_kernels.scan_forward(**scan, save_for_backward=False)[0]
    np.testing.assert_array_equal(whole[1:], cpu_kernels.scan_forward(**alone, save_for_backward=False)[0])


def test_inputs_are_not_modified_and_may_be_read_only() -> None:
    conv, scan = inputs(CASES[3])
    before = {name: array.copy() for name, array in {**conv, **scan}.items()}
    for array in (*conv.values(), *scan.values()):
        array.flags.writeable = False
    grad = gradient_of_output((4, 2, 16, 40))
    cpu_kernels.conv_backward(grad, **conv)
    scan_gradients(grad[0], scan)
    for name, array in {**conv, **scan}.items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    "layout",
    ["transposed", "every other channel", "every other token", "every other image", "broadcast"],
)
def test_any_memory_layout_gives_the_same_bits(layout: str) -> None:
    _, scan = inputs(CASES[3])

    def laid_out(array: np.ndarray) -> np.ndarray:
        match layout:
            case "transposed":
                return np.ascontiguousarray(array.swapaxes(-1, -2)).swapaxes(-1, -2)
            case "every other channel":
                return np.repeat(array, 2, axis=-1)[..., ::2]
            case "every other token":
                return np.repeat(array, 2, axis=-2)[..., ::2, :]
            case "every other image":  # of what has no images, every other direction
                axis = 1 if array.ndim == 4 else 0
                others = np.stack([array, array + 1], axis=axis + 1)
                doubled = others.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])
                return doubled[:, ::2] if axis else doubled[::2]
        return np.broadcast_to(array[..., :1, :], array.shape)

    arrays = {name: laid_out(a) if name != "order" else a for name, a in scan.items()}
    dense = {name: np.ascontiguousarray(a) for name, a in arrays.items()}
    grad = gradient_of_output((2, 16, 40))
    for a, b in zip(scan_gradients(grad, arrays), scan_gradients(grad, dense), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("u", "dt", "B", "C", "D", "dt_bias", "z") for value in (np.nan, np.inf)]
    + [("A", np.nan)],
)
def test_values_that_are_not_finite_propagate(name: str, value: float) -> None:
    _, scan = inputs(CASES[2])
    broken = scan[name].copy()
    broken.flat[-1] = value
    out, _ = cpu_kernels.scan_forward(**{**scan, name: broken}, save_for_backward=False)
    assert not np.isfinite(out).all()


def test_a_call_from_a_second_thread_gives_the_same_bits() -> None:
    _, scan = inputs(CASES[3])
    grad = gradient_of_output((2, 16, 40))
    expected = scan_gradients(grad, scan)
    found: list[cpu_kernels.ScanGradients] = []
    workers = [threading.Thread(target=lambda: found.append(scan_gradients(grad, scan))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == len(workers)
    for a, b in itertools.product(found, [expected]):
        for one, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(one, other)


def test_the_thread_count_of_other_numba_code_does_not_change() -> None:
    import numba

    _, scan = inputs(CASES[2])
    before = numba.get_num_threads()
    cpu_kernels.set_threads(1)
    try:
        cpu_kernels.scan_forward(**scan, save_for_backward=False)
        cpu_kernels.scan_forward(**scan, save_for_backward=False, threads=1)
    finally:
        cpu_kernels.set_threads(None)
    assert numba.get_num_threads() == before


@pytest.mark.parametrize("threads", [0, -1])
def test_zero_threads_are_refused(threads: int) -> None:
    conv, _ = inputs(CASES[2])
    with pytest.raises(ValueError, match="threads: expected 1 or more"):
        cpu_kernels.set_threads(threads)
    with pytest.raises(ValueError, match="threads: expected 1 or more"):
        cpu_kernels.conv_forward(**conv, threads=threads)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("u", np.zeros((2, 7, 32), np.float32), r"u: expected 4 axes \(K, B, L, D\)"),
        ("dt", np.zeros((2, 1, 7, 31), np.float32), r"dt: expected float32 \(2, 1, 7, 32\)"),
        ("A", np.zeros((2, 32, 8)), "A: expected float32 .* found float64"),
        ("B", np.zeros((2, 1, 7, 9), np.float32), r"B: expected float32 \(2, 1, 7, 8\)"),
        ("z", np.zeros((2, 7, 32), np.float32), r"z: expected float32 \(1, 7, 32\)"),
        ("order", np.zeros((2, 7), np.int64), "order: expected int32"),
        ("order", np.full((2, 7), 7, np.int32), "order: expected each row to be a permutation of 0..6"),
        ("order", np.zeros((2, 7), np.int32), "order: expected each row to be a permutation of 0..6"),
        ("order", np.full((2, 7), -1, np.int32), "order: expected each row to be a permutation of 0..6"),
    ],
)
def test_a_wrong_shape_or_type_is_refused_by_name(name: str, value: np.ndarray, sentence: str) -> None:
    _, scan = inputs(CASES[2])
    with pytest.raises(ValueError, match=sentence):
        cpu_kernels.scan_forward(**{**scan, name: value}, save_for_backward=False)


def test_gradient_of_another_shape_is_refused() -> None:
    conv, scan = inputs(CASES[2])
    with pytest.raises(ValueError, match="grad_out: expected float32"):
        scan_gradients(np.zeros((1, 7, 31), np.float32), scan)
    with pytest.raises(ValueError, match="grad_u: expected float32"):
        cpu_kernels.conv_backward(np.zeros((1, 1, 7, 32), np.float32), **conv)
    with pytest.raises(ValueError, match="L: expected sizes of 1 or more"):
        cpu_kernels.conv_forward(
            np.zeros((1, 0, 32), np.float32), conv["weight"], conv["bias"], conv["order"]
        )


def test_files_of_kernels_change_with_the_code_compiled_into_them() -> None:
    """Otherwise Numba's cache would silently use the old code after an edit or an upgrade."""
    folder = Path(cpu_kernels.__file__).parent
    helpers = b"".join((folder / name).read_bytes() for name in ("functions.py", "simd.py"))
    digest = hashlib.sha256(helpers).hexdigest()[:12]
    for kernels in (conv, influence, scan, swiglu):
        assert digest == kernels.HELPERS, f'{kernels.__file__}: set HELPERS = "{digest}"'


def test_decays_end_where_their_products_would_become_subnormal() -> None:
    """Arithmetic with subnormal numbers takes a hundred times longer; it occurred with large steps."""

    @nb.njit
    def powers(x, out):
        for i in range(0, x.size, LANES):
            store(out, (i,), exp2(load(x, (i,))))

    x = -np.linspace(0, 80, 64 * 512, dtype=np.float32)
    found = np.empty_like(x)
    powers(x, found)
    assert np.abs(found / np.exp2(x.astype(np.float64)) - 1).max() < 2e-7
    beyond = np.repeat(np.float32([-80, -81, -127, -140, -1e3, -1e30, -np.inf, np.nan]), 8)
    found = np.empty_like(beyond)
    powers(beyond, found)
    assert (found[:-8] == np.float32(2.0**-80)).all()
    assert np.isnan(found[-8:]).all()


def test_an_empty_batch_gives_an_empty_result() -> None:
    _, scan = inputs(Case(2, 0, 7, 32, 8, 4))
    assert cpu_kernels.scan_forward(**scan, save_for_backward=False)[0].shape == (0, 7, 32)
    assert scan_gradients(np.zeros((0, 7, 32), np.float32), scan).A.shape == (2, 32, 8)
