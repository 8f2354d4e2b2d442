"""Every planted mistake is detected: by an error of the emulator, a wrong result, or a result that depends on
the schedule."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX")

import problems  # noqa: E402
from accuracy import TOLERANCE, relative, run  # noqa: E402
from emulator import KernelError, Schedule  # noqa: E402
from mutations import MUTATIONS, Mutation  # noqa: E402
from problems import Case  # noqa: E402

from arm_mlx.metal import sources  # noqa: E402

# Idle lanes, two threadgroups of channels, a last chunk and a last run that are not full.
CASE = Case(directions=2, batch=2, length=37, channels=76)
EXACT = {"directional_conv": problems.conv, "selective_scan": problems.scan}


@pytest.fixture(autouse=True)
def fresh_kernels() -> Iterator[None]:
    """Kernels are loaded once per process: discard those with mistakes."""
    sources.load.cache_clear()
    yield
    sources.load.cache_clear()


def noticed(emulator: Any, operators: tuple[str, ...]) -> str:
    """The effect of a mistake, or an empty string."""
    for operator in operators:
        first: list[bytes] = []
        # With large steps as well, which are critical for softplus and sigmoid.
        for values in (problems.inputs(CASE), problems.inputs(CASE, large_steps=True)):
            grad = np.random.default_rng(1).standard_normal(values["u"].shape).astype(np.float32)
            grad = grad if operator == "directional_conv" else grad[0]
            expected, grads = EXACT[operator](values, grad)
            for schedule in Schedule:
                emulator.schedule = schedule
                try:
                    result, found = run(operator, values, grad, mx.float32)
                except KernelError as error:
                    return str(error)
                for a, b in zip([result, *found], [expected, *grads.values()], strict=True):
                    if not relative(a, b) < TOLERANCE[mx.float32]:
                        return f"error of {relative(a, b):.1e}"
                bits = [np.asarray(a).tobytes() for a in (result, *found)]
                if schedule is Schedule.ASCENDING:
                    first = bits
                if bits != first:
                    return "depends on the schedule"
    return ""


def operators_of(mutation: Mutation) -> tuple[str, ...]:
    if mutation.file == "helpers":
        return tuple(EXACT)
    return ("directional_conv",) if mutation.file.startswith("conv") else ("selective_scan",)


def test_without_a_mistake_nothing_is_detected(emulator: Any) -> None:
    assert noticed(emulator, tuple(EXACT)) == ""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_planted_mistake_is_detected(
    mutation: Mutation, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = sources.text

    def planted(name: str) -> str:
        if name != mutation.file:
            return text(name)
        assert mutation.old in text(name), "the mistake no longer fits the kernel"
        return text(name).replace(mutation.old, mutation.new, 1)

    monkeypatch.setattr(sources, "text", planted)
    found = noticed(emulator, operators_of(mutation))
    assert bool(found) != bool(mutation.equivalent), found or "not detected"
