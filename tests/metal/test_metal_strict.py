"""clang's strict check of every kernel's generated source, in every type, and of planted mistakes."""

from dataclasses import replace
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX")

import problems  # noqa: E402
from accuracy import TOLERANCE, run  # noqa: E402
from emulator import Launch  # noqa: E402
from emulator.strict import NEEDED, compiler, complaints  # noqa: E402
from problems import Case  # noqa: E402

from arm_mlx.metal import sources  # noqa: E402

pytestmark = pytest.mark.skipif(compiler() is None, reason=f"the strict pass {NEEDED}")


def generated(emulator: Any, dtype: Any, states: int = 16) -> dict[str, Launch]:
    """Every kernel's launch, by the name in `sources.KERNELS`."""
    values = problems.inputs(Case(directions=2, length=26, channels=40, states=states))
    for operator in ("directional_conv", "selective_scan"):
        run(operator, values, values["u" if operator == "directional_conv" else "z"], dtype)
    found = {}
    for launch in emulator.launches:
        name = launch.name.removeprefix("custom_kernel_arm_").split("__")[0]
        found[name] = launch
    return found


@pytest.mark.parametrize("standard", ["c++14", "c++17"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_clang_accepts_every_kernel(dtype: Any, standard: str, emulator: Any) -> None:
    launches = generated(emulator, dtype)
    assert set(launches) == set(sources.KERNELS) - {
        "scan_forward",
        "gate_forward",
    }  # parts of the saving ones
    for name, launch in launches.items():
        assert complaints(launch, standard) == "", name


@pytest.mark.parametrize("states", [1, 8, 64])
def test_clang_accepts_other_state_sizes(states: int, emulator: Any) -> None:
    for name, launch in generated(emulator, mx.float32, states).items():
        assert complaints(launch) == "", name


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        ("device float* other = A;", "cannot initialize"),
        ("thread float* other = sums[0][0];", "cannot initialize"),
        ("const constant float* other = A;", "cannot initialize"),
        ("u[0] = T(0.0f);", "read-only|const"),
        ("const float other = A[0] * 2.0;", "double"),
        ("float other; grad_D = other;", "uninitialized"),
        ("const short other = path;", "implicit conversion"),
        ("int skip = 0; grad_D += float(skip);", "shadow|redefinition"),
    ],
)
def test_clang_rejects_code_that_metal_would_reject(mistake: str, complaint: str, emulator: Any) -> None:
    launch = generated(emulator, mx.float32)["scan_backward"]
    place = "float grad_D = 0.0f, grad_bias = 0.0f;"
    assert place in launch.source
    text = complaints(replace(launch, source=launch.source.replace(place, f"{place} {mistake}")))
    assert any(part in text for part in complaint.split("|")), text
