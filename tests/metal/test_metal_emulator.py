"""Tests of the emulator itself: kernels with errors, and some without."""

import os
import signal
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX")

from emulator import Emulator, KernelError, Schedule, missing  # noqa: E402

pytestmark = pytest.mark.skipif(missing() is not None, reason=missing() or "")

RIGHT = """
uint i = thread_position_in_grid.x;
y[i] = x[i];
"""
COUNT = 70


def launch(
    source: str, emulator: Emulator, *, threads: int = COUNT, group: int = 64, dtype: Any = None
) -> Any:
    """One kernel from x (COUNT values, 0 1 2 ...) to y (COUNT values)."""
    kernel = mx.fast.metal_kernel(name="probe", input_names=["x"], output_names=["y"], source=source)
    dtype = dtype or mx.float32
    (y,) = emulator.execute(
        kernel,
        inputs=[mx.arange(COUNT).astype(dtype)],
        grid=(threads, 1, 1),
        threadgroup=(group, 1, 1),
        output_shapes=[(COUNT,)],
        output_dtypes=[dtype],
    )
    return np.asarray(y.astype(mx.float32))


def everywhere(source: str, **options: Any) -> str:
    """The messages of the errors that the three schedules raise."""
    messages = []
    for schedule in Schedule:
        try:
            launch(source, Emulator(schedule), **options)
        except KernelError as error:
            messages.append(str(error))
    return "; ".join(messages)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16, mx.int32], ids=str)
def test_a_copy_kernel_works_in_every_schedule(dtype: Any) -> None:
    for schedule in Schedule:
        np.testing.assert_array_equal(launch(RIGHT, Emulator(schedule), dtype=dtype), np.arange(COUNT))


@pytest.mark.parametrize(
    ("index", "place"),
    [
        ("i + 1", "input 0 at byte 280 of 280"),
        ("int(i) - 1", "input 0 at byte -4 of 280"),
        ("i + 900000u", "out of bounds"),
    ],
)
def test_reading_out_of_bounds_is_an_error_and_not_a_crash(index: str, place: str) -> None:
    assert place in everywhere(RIGHT.replace("x[i]", f"x[{index}]"))


@pytest.mark.parametrize("index", ["i + 1", "int(i) - 1"])
def test_writing_out_of_bounds_is_an_error_and_not_a_crash(index: str) -> None:
    assert "output 0" in everywhere(RIGHT.replace("y[i]", f"y[{index}]"))


def test_python_keeps_its_own_handler_of_faults() -> None:
    everywhere(RIGHT.replace("x[i]", "x[i + 1]"))
    assert signal.getsignal(signal.SIGSEGV) == signal.SIG_DFL
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSEGV)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_an_unwritten_element_is_an_error() -> None:
    message = everywhere("uint i = thread_position_in_grid.x; if (i != 5) y[i] = x[i];")
    assert message.endswith("1 elements of output 0 are not written")


def test_a_computed_nan_is_not_an_error() -> None:
    assert np.isnan(
        launch("uint i = thread_position_in_grid.x; y[i] = (x[i] - x[i]) / 0.0f;", Emulator())
    ).all()


def test_a_simd_operation_that_some_lanes_do_not_reach_is_an_error() -> None:
    source = "uint i = thread_position_in_grid.x; float v = x[i];\n{} y[i] = v;"
    apart = source.format("if (i != 3) v += simd_shuffle_xor(v, ushort(1));")
    assert "a SIMD-group operation at generated line" in everywhere(apart, threads=64)
    together = source.format("v += simd_shuffle_xor(v, ushort(1));")
    assert "are not written" in everywhere(together, threads=64)  # 6 of 70: nothing else is wrong


def test_a_simd_operation_of_a_partial_simd_group_is_an_error() -> None:
    source = "uint i = thread_position_in_grid.x; y[i] = simd_shuffle_xor(x[i], ushort(1));"
    assert "not all threads reach: 6 at a SIMD-group operation" in everywhere(source)


def test_a_barrier_that_some_threads_do_not_reach_is_an_error() -> None:
    source = (
        "uint i = thread_position_in_grid.x;\n"
        "if (i % 64 < 32) threadgroup_barrier(mem_flags::mem_threadgroup);\ny[i] = x[i];"
    )
    assert "a barrier at generated line" in everywhere(source)


def test_two_barriers_are_not_the_same_barrier() -> None:
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    source = f"uint i = thread_position_in_grid.x;\nif (i < 32) {barrier} else {barrier} y[i] = x[i];"
    assert "a barrier at generated line" in everywhere(source)


THROUGH_THREADGROUP = """
threadgroup float held[64];
uint i = thread_position_in_grid.x, own = thread_index_in_threadgroup;
held[own] = x[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
y[i] = held[min(63u - own, 63u)];
"""


def test_threadgroup_memory_is_shared_after_a_barrier() -> None:
    kernel = THROUGH_THREADGROUP + "if (i < 6) y[64 + i] = 0.0f;"
    for schedule in Schedule:
        result = launch(kernel, Emulator(schedule), threads=64)
        np.testing.assert_array_equal(result[:64], np.arange(64)[::-1])


def test_without_the_barrier_the_schedules_differ() -> None:
    kernel = THROUGH_THREADGROUP + "if (i < 6) y[64 + i] = 0.0f;"
    kernel = kernel.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    results = [launch(kernel, Emulator(schedule), threads=64) for schedule in Schedule]
    assert not all(np.array_equal(results[0], result) for result in results)


def test_uninitialised_threadgroup_memory_is_nan() -> None:
    kernel = THROUGH_THREADGROUP.replace("held[own] = x[i];", "if (own != 7) held[own] = x[i];")
    kernel += "if (i < 6) y[64 + i] = 0.0f;"
    assert np.isnan(launch(kernel, Emulator(), threads=64)).sum() == 1


def test_uninitialised_registers_are_not_zero() -> None:
    source = "uint i = thread_position_in_grid.x; float v[4]; for (int j = i; j < 4; j++) v[j] = 1.0f;"
    found = launch(source + "y[i] = x[i] + v[0];", Emulator())
    assert (np.abs(found[1:]) > 1e30).all()


def test_leaving_threadgroup_memory_is_an_error() -> None:
    kernel = THROUGH_THREADGROUP.replace("held[min(63u - own, 63u)]", "held[own + 1]")
    assert "out of bounds of threadgroup memory" in everywhere(kernel, threads=64)


def test_too_much_threadgroup_memory_is_an_error() -> None:
    kernel = THROUGH_THREADGROUP.replace("held[64]", "held[8193]") + "if (i < 6) y[64 + i] = 0.0f;"
    assert everywhere(kernel, threads=64).endswith(
        "32772 bytes of threadgroup memory, expected at most 32768"
    )


def test_too_many_threads_are_an_error() -> None:
    assert "1056 threads in a threadgroup" in everywhere(RIGHT, group=1056, threads=1056)


def test_threadgroups_that_need_each_others_order_differ_by_schedule() -> None:
    source = "uint i = thread_position_in_grid.x; y[i] = x[i]; if (i == 69) y[0] = 9.0f;"
    results = [launch(source, Emulator(schedule), group=32) for schedule in Schedule]
    assert not all(np.array_equal(results[0], result) for result in results)


def test_code_that_does_not_compile_is_reported_with_its_line() -> None:
    with pytest.raises(RuntimeError, match=r"generated\.metal:\d+.*nothing"):
        launch("y[0] = nothing;", Emulator())


def test_the_portable_fibers_do_the_same() -> None:
    kernel = THROUGH_THREADGROUP + "if (i < 6) y[64 + i] = 0.0f;"
    plain = launch(kernel, Emulator(), threads=64)
    np.testing.assert_array_equal(launch(kernel, Emulator(flags=("-DEMULATOR_UCONTEXT",)), threads=64), plain)


@pytest.mark.parametrize(("dtype", "bits"), [(mx.bfloat16, 8), (mx.float16, 11)], ids=str)
def test_16_bit_floats_round_like_mlx(dtype: Any, bits: int) -> None:
    values = mx.array(np.random.default_rng(bits).standard_normal(COUNT).astype(np.float32))
    kernel = mx.fast.metal_kernel(
        name="cast",
        input_names=["x"],
        output_names=["y"],
        source="uint i = thread_position_in_grid.x; y[i] = T(x[i]);",
    )
    (found,) = Emulator().execute(
        kernel,
        inputs=[values],
        template=[("T", dtype)],
        grid=(COUNT, 1, 1),
        threadgroup=(COUNT, 1, 1),
        output_shapes=[(COUNT,)],
        output_dtypes=[dtype],
    )
    np.testing.assert_array_equal(
        np.asarray(found.astype(mx.float32)), np.asarray(values.astype(dtype).astype(mx.float32))
    )
