"""Limits on the cost of the kernels; docs/performance.md has the figures."""

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX")

from cost import CYCLES, Shape, kind, work  # noqa: E402
from emulator.strict import NEEDED, compiler  # noqa: E402
from registers import LIMIT, fit  # noqa: E402

from arm_mlx.metal import sources  # noqa: E402

pytestmark = pytest.mark.skipif(compiler() is None, reason=f"counting {NEEDED}")

PRETRAINING, FINETUNING = Shape(1, 128), Shape(4, 197)
MOST = {
    "scan_forward": 285,
    "scan_forward_saving": 295,
    "scan_backward": 785,
    "conv_forward": 35,
    "conv_backward": 60,
    "gate_forward": 40,
    "gate_backward": 47,
}
"""Lane-cycles for each token, channel and direction at 16 states, slightly above the current cost."""


def test_no_kernel_costs_more_than_before() -> None:
    found = work(PRETRAINING)
    assert set(found) == set(MOST)
    for name, cost in found.items():
        assert 0.8 * MOST[name] < cost.lane_cycles < MOST[name], name


def test_every_instruction_is_known() -> None:
    for shape in (PRETRAINING, FINETUNING, Shape(1, 128, dtype=mx.bfloat16)):
        for name, cost in work(shape).items():
            assert set(cost.counts) <= set(CYCLES), name
    assert set(work(PRETRAINING)) | set(work(FINETUNING)) == set(sources.KERNELS)


def test_each_state_takes_one_exponential_forward_and_two_backward() -> None:
    found = work(PRETRAINING)
    assert found["scan_forward"].exponentials == 16 + 1  # one more for softplus
    assert found["scan_backward"].exponentials <= 2 * 16 + 1


def test_gate_and_mean_are_computed_once_for_all_directions() -> None:
    one, four = work(PRETRAINING), work(FINETUNING)
    assert 4 * four["gate_backward"].lane_cycles == pytest.approx(one["gate_backward"].lane_cycles, rel=0.1)


def test_no_local_array_stays_in_memory() -> None:
    """A shifted window once became a memmove, and its array could not be kept in registers."""
    for name, cost in work(PRETRAINING).items():
        assert cost.code.stack_arrays == 0, name


def test_the_scan_fits_the_registers() -> None:
    from cost import traced_calls

    from arm_mlx.metal.tuning import TABLE

    calls = traced_calls(Shape(1, 1024), TABLE["any"][16])
    for name, spilled in {"scan_forward_saving": 0, "scan_backward": 16}.items():
        found = fit(calls[name][0])
        assert found.registers <= LIMIT, name
        assert found.spilled_bytes <= spilled, name
        assert found.code_bytes < 12 * 1024, name  # Apple's instruction cache


def test_kinds_of_instructions_are_distinguished() -> None:
    assert kind("  %5 = fmul float %a, %b") == "arithmetic"
    assert kind("  %6 = tail call float @llvm.fma.f32(float %a, float %b, float %c)") == "arithmetic"
    assert kind("  %7 = tail call noundef float @_ZN5metal4exp2Ef(float noundef %a) #5") == "exp2"
    assert kind("  br i1 %c, label %a, label %b") == "branch"
    assert kind("  store float %a, ptr addrspace(1) %b, align 4") == "store"
    assert kind("  %9 = call float @nobody(float %a)").startswith("call")
