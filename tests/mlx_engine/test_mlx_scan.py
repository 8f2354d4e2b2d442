"""The MLX scans: every implementation against the float64 reference, values and gradients."""

import shutil
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from arm_core.model.reference import scan as exact

mx = pytest.importorskip("mlx.core", reason="needs MLX")

from arm_mlx import scan as scans  # noqa: E402

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
"""Tolerances relative to each tensor's largest value; bfloat16 results are rounded to 8 bits."""

CONV = ("x", "weight", "bias")
SCAN = ("u", "dt", "A", "B", "C", "D", "dt_bias", "z")
OPERATORS = {"directional_conv": CONV, "selective_scan": SCAN}

# K, B, L, D, N, W: lengths around a chunk, widths around a block, sizes of one.
SMALL = [(1, 1, 5, 3, 2, 4), (2, 2, 4, 2, 1, 1), (4, 1, 3, 2, 2, 2)]
CASES = [
    (1, 1, 1, 1, 1, 1),
    (1, 2, 2, 5, 16, 4),
    (4, 2, 16, 40, 16, 4),
    (2, 2, 37, 33, 1, 3),
    (1, 3, 63, 32, 16, 4),
]
REGIMES = ["mild", "large steps", "vanishing steps"]

Case = tuple[int, ...]
Arrays = dict[str, np.ndarray]


def label(case: Case) -> str:
    return "-".join(f"{name}{size}" for name, size in zip("KBLDNW", case, strict=True))


def usable() -> list[str]:
    """Scans that a device of this machine can run."""
    devices = ["gpu", "cpu"] if mx.metal.is_available() else ["cpu"]
    return [name for name in scans.IMPLEMENTATIONS if any(scans.scans(d)[name] is None for d in devices)]


def inputs(case: Case, regime: str = "mild") -> Arrays:
    directions, batch, length, channels, states, width = case
    rng = np.random.default_rng(3)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    dt = normal(directions, batch, length, channels)
    if regime == "large steps":
        dt = np.linspace(-50, 20, dt.size, dtype=np.float32)[rng.permutation(dt.size)].reshape(dt.shape)
    if regime == "vanishing steps":
        dt = dt - 50
    return {
        "x": normal(batch, length, channels),
        "weight": normal(directions, channels, width),
        "bias": normal(directions, channels),
        "u": normal(directions, batch, length, channels),
        # Eighths, like dt_bias: their sum is exact, so that the test measures softplus.
        "dt": np.round(8 * dt) / 8,
        "A": -np.exp(normal(directions, channels, states)),
        "B": normal(directions, batch, length, states),
        "C": normal(directions, batch, length, states),
        "D": normal(directions, channels),
        "dt_bias": np.round(8 * normal(directions, channels)) / 8,
        "z": normal(batch, length, channels),
        "order": np.stack([rng.permutation(length) for _ in range(directions)]).astype(np.int32),
    }


def weights_of(shape: tuple[int, ...]) -> np.ndarray:
    """The weights of the results, for a scalar function to differentiate."""
    return np.random.default_rng(4).standard_normal(shape).astype(np.float32)


def call(operator: str, values: Arrays, impl: str) -> np.ndarray:
    arrays = [mx.array(values[name]) for name in (*OPERATORS[operator], "order")]
    return np.array(getattr(scans, operator)(*arrays, impl=impl))


def reference(operator: str, values: Arrays) -> np.ndarray:
    return getattr(exact, operator)(*(values[name] for name in (*OPERATORS[operator], "order")))


def weighted(operator: str, values: Arrays, impl: str) -> Callable[..., Any]:
    order, shape = mx.array(values["order"]), reference(operator, values).shape
    return lambda *a: (getattr(scans, operator)(*a, order, impl=impl) * mx.array(weights_of(shape))).sum()


def gradients(operator: str, values: Arrays, impl: str) -> Arrays:
    names = OPERATORS[operator]
    function = mx.grad(weighted(operator, values, impl), argnums=tuple(range(len(names))))
    found = function(*(mx.array(values[name]) for name in names))
    return {name: np.array(g) for name, g in zip(names, found, strict=True)}


def slope(operator: str, values: Arrays, name: str, way: np.ndarray) -> float:
    """Derivative of the weighted sum when one input moves along `way`: float64, central differences."""
    plus, minus = (reference(operator, {**values, name: values[name] + step * way}) for step in (1e-4, -1e-4))
    return float(np.sum(weights_of(plus.shape) * (plus - minus)) / 2e-4)


def assert_close(found: np.ndarray, expected: np.ndarray, name: str, tolerance: float) -> None:
    assert found.shape == expected.shape, name
    assert np.isfinite(found).all(), name
    error = np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)
    assert error < tolerance, f"{name}: {error:.1e} of the largest value"


@pytest.mark.parametrize("impl", usable())
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_results_match_the_float64_reference(case: Case, regime: str, impl: str) -> None:
    values = inputs(case, regime)
    for operator in OPERATORS:
        expected = reference(operator, values)
        assert_close(call(operator, values, impl), expected, operator, TOLERANCE["float32"])


@pytest.mark.parametrize("impl", usable())
@pytest.mark.parametrize("case", SMALL, ids=label)
def test_gradients_match_finite_differences_element_by_element(case: Case, impl: str) -> None:
    values = inputs(case)
    for operator in OPERATORS:
        for name, found in gradients(operator, values, impl).items():
            expected = np.empty(found.shape)
            for index in np.ndindex(found.shape):
                way = np.zeros(found.shape)
                way[index] = 1.0
                expected[index] = slope(operator, values, name, way)
            assert_close(found, expected, name, TOLERANCE["float32"])


@pytest.mark.parametrize("impl", usable())
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_gradients_match_the_slope_of_the_reference(case: Case, regime: str, impl: str) -> None:
    values = inputs(case, regime)
    for operator in OPERATORS:
        for name, found in gradients(operator, values, impl).items():
            assert np.isfinite(found).all(), name
            way = np.random.default_rng(9).uniform(-1, 1, found.shape)
            error = np.sum(found.astype(np.float64) * way) - slope(operator, values, name, way)
            assert abs(error) < 2 * TOLERANCE["float32"] * max(np.abs(found * way).sum(), 1e-12), name


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_all_scans_give_the_same_gradients(case: Case, regime: str) -> None:
    values = inputs(case, regime)
    for operator in OPERATORS:
        expected = gradients(operator, values, "reference")
        for impl in set(usable()) - {"reference"}:
            for name, found in gradients(operator, values, impl).items():
                assert_close(found, expected[name], f"{impl} {name}", 2 * TOLERANCE["float32"])


@pytest.mark.parametrize("impl", usable())
def test_bfloat16_inputs_give_bfloat16_results_and_gradients(impl: str) -> None:
    values = inputs(CASES[2])
    low = {"x", "u", "dt", "B", "C", "z"}
    arrays = {n: mx.array(v).astype(mx.bfloat16) if n in low else mx.array(v) for n, v in values.items()}
    rounded = {n: np.array(v.astype(mx.float32)) if n in low else values[n] for n, v in arrays.items()}
    for operator, names in OPERATORS.items():
        leaves = [arrays[name] for name in names]
        out = getattr(scans, operator)(*leaves, arrays["order"], impl=impl)
        assert out.dtype == mx.bfloat16
        expected = reference(operator, rounded)
        assert_close(np.array(out.astype(mx.float32)), expected, operator, TOLERANCE["bfloat16"])

        function = mx.grad(weighted(operator, values, impl), argnums=tuple(range(len(leaves))))
        wanted = gradients(operator, rounded, impl)
        for name, leaf, found in zip(names, leaves, function(*leaves), strict=True):
            assert found.dtype == leaf.dtype, name
            assert_close(np.array(found.astype(mx.float32)), wanted[name], name, TOLERANCE["bfloat16"])


@pytest.mark.parametrize("impl", usable())
def test_halves_of_one_projection_get_the_gradients_of_copies(impl: str) -> None:
    """x and z are slices of one array, B and C of another, as in the model."""
    values = {name: mx.array(value) for name, value in inputs(CASES[2]).items()}

    def loss(xz: Any, BC: Any) -> Any:
        (x, z), (B, C) = mx.split(xz, 2, axis=-1), mx.split(BC, 2, axis=-1)
        v = {**values, "x": x, "z": z, "B": B, "C": C}
        u = scans.directional_conv(*(v[n] for n in (*CONV, "order")), impl=impl)
        out = scans.selective_scan(u, *(v[n] for n in (*SCAN[1:], "order")), impl=impl)
        return out.square().sum()

    def joined(a: str, b: str) -> Any:
        return mx.concatenate([values[a], values[b]], axis=-1)

    found = mx.grad(loss, argnums=(0, 1))(joined("x", "z"), joined("B", "C"))
    apart = mx.grad(
        lambda x, z, B, C: loss(mx.concatenate([x, z], axis=-1), mx.concatenate([B, C], axis=-1)),
        argnums=(0, 1, 2, 3),
    )(values["x"], values["z"], values["B"], values["C"])
    for i, whole in enumerate(found):
        expected = np.concatenate([np.array(g) for g in apart[2 * i : 2 * i + 2]], axis=-1)
        assert_close(np.array(whole), expected, ("xz", "BC")[i], TOLERANCE["float32"])


@pytest.mark.skipif(
    sys.platform == "linux" and shutil.which("g++") is None, reason="mx.compile needs g++ on Linux"
)
def test_the_reference_runs_compiled() -> None:
    values = {name: mx.array(value) for name, value in inputs((1, 1, 2, 2, 2, 2)).items()}

    def loss(x: Any, A: Any, dt: Any) -> Any:
        v = {**values, "x": x, "A": A, "dt": dt}
        u = scans.directional_conv(*(v[n] for n in (*CONV, "order")), impl="reference")
        out = scans.selective_scan(u, *(v[n] for n in (*SCAN[1:], "order")), impl="reference")
        return out.square().sum()

    leaves = [values[name] for name in ("x", "A", "dt")]
    function = mx.grad(loss, argnums=(0, 1, 2))
    for found, expected in zip(mx.compile(function)(*leaves), function(*leaves), strict=True):
        assert_close(np.array(found), np.array(expected), "gradient", TOLERANCE["float32"])


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_cpu_scan_refuses_to_be_compiled(operator: str) -> None:
    values = inputs(SMALL[0])
    with pytest.raises(ValueError, match=r"cannot run inside mx\.compile"):
        mx.compile(weighted(operator, values, "cpu"))(*(mx.array(values[n]) for n in OPERATORS[operator]))


def test_training_through_the_cpu_scan_runs_its_backward_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel whose gradient silently comes from elsewhere would pass every comparison."""
    called = []
    for name in ("conv_forward", "conv_backward", "scan_forward", "scan_backward"):
        function = getattr(scans.cpu_kernels, name)
        spy = lambda *a, _name=name, _function=function, **o: called.append(_name) or _function(*a, **o)  # noqa: E731
        monkeypatch.setattr(scans.cpu_kernels, name, spy)
    for operator in OPERATORS:
        gradients(operator, inputs(SMALL[0]), "cpu")
    assert called == ["conv_forward", "conv_backward", "scan_forward", "scan_backward"]


def test_cpu_views_are_not_copies() -> None:
    x = mx.random.normal((2, 5, 8))
    (half,) = scans.evaluated(mx.split(x, 2, axis=-1)[1])
    assert half.strides == (5 * 8 * 4, 8 * 4, 4)
    (whole,), (again,) = scans.evaluated(x), scans.evaluated(x)
    assert np.shares_memory(whole, again)


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_unknown_scan_is_refused_with_the_known_names(operator: str) -> None:
    with pytest.raises(ValueError, match="unknown scan 'fast'; expected metal, cpu, reference"):
        call(operator, inputs(SMALL[0]), "fast")


@pytest.mark.parametrize("impl", usable())
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_shape_that_does_not_fit_is_refused_by_name(operator: str, impl: str) -> None:
    values = inputs(SMALL[0])
    name = OPERATORS[operator][-1]
    with pytest.raises(ValueError, match=rf"^{name}: expected \(.*D=3.*\), found \("):
        call(operator, {**values, name: values[name][..., :2]}, impl)


@pytest.mark.parametrize("impl", usable())
def test_a_scan_that_saves_nothing_gives_the_same_result_and_refuses_gradients(impl: str) -> None:
    values = inputs(CASES[2])
    arrays = [mx.array(values[name]) for name in (*SCAN, "order")]
    found = scans.selective_scan(*arrays, impl=impl, save_for_backward=False)
    assert np.array_equal(np.array(found), call("selective_scan", values, impl))
    with pytest.raises(ValueError, match="gradients need save_for_backward=True"):
        mx.grad(lambda u: scans.selective_scan(u, *arrays[1:], impl=impl, save_for_backward=False).sum())(
            arrays[0]
        )


def test_scans_of_a_device_are_listed_with_the_reason_against_each() -> None:
    assert scans.scans("cpu") == {"metal": "its kernels run on Apple GPUs", "cpu": None, "reference": None}
    metal = None if mx.metal.is_available() else "MLX finds no Metal GPU here"
    on_gpu = {"metal": metal, "cpu": "its kernels run on the CPU", "reference": None}
    assert scans.scans("gpu") == on_gpu
    assert list(on_gpu) == list(scans.scans("gpu"))
