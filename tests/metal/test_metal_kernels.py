"""The Metal kernels against float64, on an Apple GPU or emulated: values, gradients, repeatability."""

import os
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX")

import problems  # noqa: E402
from accuracy import TOLERANCE, errors, relative, rounded, run, sweep  # noqa: E402
from problems import CONV, SCAN, Case  # noqa: E402

CASES = [
    Case(length=1, channels=1, width=1),
    Case(length=7, channels=40, directions=2),
    Case(length=37, channels=40, directions=4, batch=2),
    Case(length=128, channels=192),
    Case(length=197, channels=72, directions=4),
]
FULL = os.environ.get("ARM_METAL_SWEEP") == "1"

COUNTERPARTS = {"directional_conv": problems.conv, "selective_scan": problems.scan}


def check(case: Case, dtype: Any, **options: Any) -> None:
    found = errors(case, dtype, **options)
    wrong = {name: f"{error:.1e}" for name, error in found.items() if not error < TOLERANCE[dtype]}
    assert not wrong, f"{case}: {wrong}"


@pytest.mark.parametrize("large_steps", [False, True], ids=["steps of a fresh model", "steps up to 20"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_those_of_float64(case: Case, large_steps: bool, metal: Any) -> None:
    check(case, mx.float32, large_steps=large_steps)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_errors_of_16_bit_arrays_are_within_their_rounding(dtype: Any, metal: Any) -> None:
    check(CASES[2], dtype)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_16_bit_results_are_float32_results_rounded_once(dtype: Any, metal: Any) -> None:
    """On the same inputs, bit for bit: nothing is rounded before the last store. Two threadgroups.

    The test skips out and z's gradient, since y is stored in 16 bits before, and x's gradient, which is
    summed over directions.
    """
    values = rounded(problems.inputs(Case(length=21, channels=76, directions=2)), dtype)
    rng = np.random.default_rng(1)
    for operator, names in (("directional_conv", CONV), ("selective_scan", SCAN)):
        shape = values["u" if operator == "directional_conv" else "z"].shape
        grad = np.asarray(mx.array(rng.standard_normal(shape)).astype(dtype).astype(mx.float32))
        (u, exact), (low_u, low) = (run(operator, values, grad, kind) for kind in (mx.float32, dtype))
        pairs = [(n, *pair) for n, *pair in zip(names, exact, low, strict=True) if n not in ("x", "z")]
        if operator == "directional_conv":
            pairs.append(("u", u, low_u))
        for name, wide, narrow in pairs:
            assert mx.array_equal(narrow, wide.astype(narrow.dtype)).item(), f"{operator}: {name}"


@pytest.mark.parametrize("states", [1, 2, 8, 32, 64])
def test_every_state_size_is_correct(states: int, metal: Any) -> None:
    check(Case(length=13, channels=40, directions=2, states=states), mx.float32)


def test_vanishing_steps_keep_their_digits(metal: Any) -> None:
    """softplus(-50) is 2e-22: 1 + e^x would lose all of its digits."""
    case = Case(length=13, channels=40, directions=2)
    values = problems.inputs(case)
    values["dt"] = np.round(8 * values["dt"]) / 8 - np.float32(40)
    grad = np.random.default_rng(1).standard_normal(values["z"].shape).astype(np.float32)
    expected, grads = problems.scan(values, grad)
    result, found = run("selective_scan", values, grad, mx.float32)
    for name, a, b in zip(("out", *SCAN), (result, *found), (expected, *grads.values()), strict=True):
        assert relative(a, b) < TOLERANCE[mx.float32], name


def test_seven_directions_work_like_four(metal: Any) -> None:
    check(Case(length=9, channels=8, directions=7), mx.float32)


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="takes minutes; set ARM_METAL_SWEEP=1")
@pytest.mark.parametrize(("case", "dtype"), list(sweep()) if FULL else [], ids=str)
def test_the_full_sweep(case: Case, dtype: Any, metal: Any) -> None:
    check(case, dtype)


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="takes minutes; set ARM_METAL_SWEEP=1")
def test_thousands_of_tokens_have_the_same_accuracy(metal: Any) -> None:
    check(Case(length=4099, channels=16, directions=2), mx.float32)


def bits(case: Case) -> list[bytes]:
    values = problems.inputs(case)
    found = []
    for operator, exact in COUNTERPARTS.items():
        grad = np.random.default_rng(1).standard_normal(exact(values)[0].shape).astype(np.float32)
        result, grads = run(operator, values, grad, mx.float32)
        found += [np.asarray(a).tobytes() for a in (result, *grads)]
    return found


def test_results_are_repeatable_to_the_last_bit(metal: Any) -> None:
    first = bits(CASES[2])
    schedules = range(3)  # of the emulator; on a GPU the schedule is unknown
    for schedule in schedules:
        if metal is not None:
            metal.schedule = type(metal.schedule)(schedule)
        assert bits(CASES[2]) == first


def test_the_order_of_tokens_is_followed(metal: Any) -> None:
    """Shuffling the tokens in memory and the order in the same way only changes their positions."""
    case = Case(length=11, channels=8, directions=2, batch=2)
    values = problems.inputs(case)
    shuffle = np.random.default_rng(2).permutation(case.length)
    axis = {"x": 1, "z": 1, "u": 2, "dt": 2, "B": 2, "C": 2}
    moved = {n: np.take(a, shuffle, axis[n]) if n in axis else a for n, a in values.items()}
    moved["order"] = np.argsort(shuffle)[values["order"]].astype(np.int32)
    for operator in COUNTERPARTS:
        grad = np.ones(values["u" if operator == "directional_conv" else "z"].shape, np.float32)
        results = [np.asarray(run(operator, v, grad, mx.float32)[0]) for v in (values, moved)]
        np.testing.assert_array_equal(np.take(results[0], shuffle, -2), results[1])


@pytest.mark.parametrize("operator", COUNTERPARTS)
def test_the_exact_gradients_follow_the_reference(operator: str) -> None:
    """The exact values and slopes equal those of arm_core's loop."""
    from arm_core.model.reference import scan as reference

    names = CONV if operator == "directional_conv" else SCAN
    values = problems.inputs(Case(length=5, channels=3, directions=2, batch=2, states=2, width=3))
    values = {name: a.astype(np.float64) if name != "order" else a for name, a in values.items()}
    loop = getattr(reference, operator)

    def total(**changed: np.ndarray) -> float:
        return float((loop(*({**values, **changed}[n] for n in (*names, "order"))) * weights).sum())

    weights = np.random.default_rng(5).standard_normal(loop(*(values[n] for n in (*names, "order"))).shape)
    result, grads = COUNTERPARTS[operator](values, weights)
    np.testing.assert_allclose((result * weights).sum(), total(), rtol=1e-12)
    for name in names:
        way = np.random.default_rng(6).standard_normal(values[name].shape)
        slope = (
            total(**{name: values[name] + 1e-5 * way}) - total(**{name: values[name] - 1e-5 * way})
        ) / 2e-5
        np.testing.assert_allclose((grads[name] * way).sum(), slope, rtol=1e-6, err_msg=name)
