"""Refusals of the Metal scan, the choice of its constants, and when `auto` selects it."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX")

import problems  # noqa: E402
from problems import CONV, SCAN, Case  # noqa: E402

from arm_core.engine.scans import choose_scan  # noqa: E402
from arm_mlx import scan as scans  # noqa: E402
from arm_mlx.metal import launch, sources, tuning  # noqa: E402
from arm_mlx.metal.tuning import TABLE, Tuning, tuning_for  # noqa: E402

GOOD = TABLE["any"][16]


def call(case: Case, operator: str = "selective_scan") -> Any:
    values = problems.inputs(case)
    names = CONV if operator == "directional_conv" else SCAN
    return getattr(scans, operator)(*(mx.array(values[n]) for n in (*names, "order")), impl="metal")


@pytest.mark.parametrize("states", [3, 12, 48, 128])
def test_an_unsupported_state_size_is_refused(states: int) -> None:
    with pytest.raises(ValueError, match=f"state size of 1, 2, 4, 8, 16, 32 or 64, found {states}; choose"):
        call(Case(length=2, channels=8, states=states))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lanes": 8}, "expected 1, 2 or 4 lanes that divide 16 states and chunks of 8 tokens, found 8"),
        ({"chunk": 6}, "chunks of 6 tokens, found 4"),
        ({"states": 2}, "divide 2 states"),
        ({"simdgroups": 0}, "expected tuning constants of 1 or more"),
        ({"simdgroups": 9}, "at most 256 threads in a threadgroup, found 288; take at most 8 SIMD groups"),
        ({"states": 64, "chunk": 12}, "at most 32768 bytes of threadgroup memory, found 49152; take fewer"),
    ],
)
def test_constants_that_do_not_fit_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(GOOD, **change)


def test_arrays_that_32_bits_cannot_index_are_refused() -> None:
    zeros = {n: mx.zeros((1,)) for n in ("u", "dt")}  # the values are not read: the shapes are enough
    shapes = {"u": (4, 2**12, 2**10, 256), "dt": (4, 2**12, 2**10, 256)}
    big = [mx.broadcast_to(zeros[n], shapes[n]) for n in zeros]
    values = problems.inputs(Case(length=1, channels=1))
    rest = [mx.array(values[n]) for n in ("A", "B", "C", "D", "dt_bias", "order")]
    with pytest.raises(
        ValueError, match=r"at most 2147483647 elements .* in u \(4, 4096, 1024, 256\); take a"
    ):
        launch.scan_forward(launch.ScanInputs(*big, *rest), GOOD, save=False)


@pytest.mark.parametrize("architecture", TABLE)
def test_every_entry_of_the_table_is_valid_and_names_its_origin(architecture: str) -> None:
    for states, entry in TABLE[architecture].items():
        assert entry.states == states
        assert entry.chosen_by != Tuning.chosen_by
    assert set(TABLE["any"]) == set(tuning.STATES)


def test_a_gpu_with_an_entry_gets_this_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    own = replace(GOOD, simdgroups=2)
    monkeypatch.setitem(TABLE, "applegpu_x", {16: own})
    assert tuning_for(16, "applegpu_x") is own
    assert tuning_for(8, "applegpu_x") is TABLE["any"][8]
    assert tuning_for(16, "applegpu_y") is GOOD


@pytest.mark.parametrize(
    "changed",
    [
        {"lanes": 1, "chunk": 4},
        {"lanes": 2, "chunk": 8},
        {"lanes": 4, "chunk": 16, "simdgroups": 2},
        {"simdgroups": 1},
        {"keep_decays": True},
    ],
    ids=str,
)
def test_other_constants_give_the_same_results(changed: dict[str, int], emulator: Any) -> None:
    from accuracy import relative

    from arm_mlx.metal.operators import scan_function

    values = problems.inputs(Case(directions=2, length=21, channels=24))
    arrays = [mx.array(values[n]) for n in SCAN]
    order = mx.array(values["order"])
    function = scan_function(replace(GOOD, **changed))
    grad = np.random.default_rng(0).standard_normal(values["z"].shape).astype(np.float32)
    expected, grads = problems.scan(values, grad)
    (out,), found = mx.vjp(lambda *a: function(*a, order)[0], arrays, [mx.array(grad)])
    for a, b in zip([out, *found], [expected, *grads.values()], strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize("states", [8, 16, 32, 64])
def test_threadgroup_memory_matches_the_table(states: int, emulator: Any) -> None:
    entry = TABLE["any"][states]
    values = problems.inputs(Case(length=3, channels=entry.simdgroups * 32 // entry.lanes, states=states))
    u, *rest = (mx.array(values[name]) for name in (*SCAN, "order"))
    mx.grad(lambda u: scans.selective_scan(u, *rest, impl="metal").sum())(u)
    assert max(emulator.threadgroup_bytes.values()) == entry.threadgroup_bytes


def test_arrays_of_a_few_elements_are_in_device_memory_like_all_others(emulator: Any) -> None:
    for operator in ("directional_conv", "selective_scan"):
        call(Case(length=1, channels=1, states=1, width=2), operator)
    for traced in emulator.launches:
        signature = traced.source.split("[[kernel]]")[1].split(") {")[0]
        arrays = re.findall(r"const (\w+) \w+\* (\w+) \[\[buffer", signature)
        assert {space for space, name in arrays if not name.endswith("_strides")} == {"device"}


def test_no_comment_reaches_mlx() -> None:
    assert "//" not in sources.text("scan_setup")
    assert "threadgroup_position_in_grid" in sources.text("scan_setup")


@pytest.mark.parametrize(("available", "expected"), [(True, "metal"), (False, "reference")])
def test_auto_selects_the_kernels_exactly_if_metal_is_available(
    available: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: available)
    assert choose_scan(scans.scans("gpu"), "auto") == expected
    assert choose_scan(scans.scans("cpu"), "auto") == "cpu"
    if not available:
        with pytest.raises(ValueError, match="scan 'metal' cannot run here: MLX finds no Metal GPU"):
            choose_scan(scans.scans("gpu"), "metal")
    with pytest.raises(ValueError, match="scan 'metal' cannot run here: its kernels run on Apple GPUs"):
        choose_scan(scans.scans("cpu"), "metal")
