"""The torch scans: the reference loop against the NumPy reference, every other one against the loop."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from arm_core.model.reference import scan as reference

torch = pytest.importorskip("torch")
pytest.importorskip("numba", reason="needs Numba for the CPU scan")

from torch import Tensor  # noqa: E402
from torch_scans import (  # noqa: E402
    CONV,
    REGIMES,
    SCAN,
    TOLERANCE,
    assert_close,
    in_float64,
    inputs,
    label,
    run,
)

from arm_core import cpu_kernels  # noqa: E402
from arm_cuda import scan as scans  # noqa: E402

# K, B, L, D, N, W: lengths around the CPU's chunks of 16, widths around its 64 channels, sizes of one.
CASES = [
    (1, 1, 1, 1, 1, 1),
    (1, 2, 2, 5, 16, 4),
    (2, 1, 7, 32, 8, 4),
    (4, 2, 16, 40, 16, 4),
    (1, 3, 17, 96, 16, 2),
    (2, 2, 37, 33, 1, 3),
    (2, 3, 33, 128, 17, 4),
    (4, 2, 197, 40, 16, 4),
]


def usable(device: str = "cpu") -> list[str]:
    return [name for name, reason in scans.scans(device).items() if reason is None]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_reference_loop_equals_the_numpy_reference(case: tuple[int, ...], regime: str) -> None:
    values = inputs(case, regime, torch.float64)
    arrays = {name: value.detach().numpy() for name, value in values.items()}
    for operator, names in (("directional_conv", CONV), ("selective_scan", SCAN)):
        tensors = [values[name] for name in (*names, "order")]
        found = getattr(scans, operator)(*tensors, impl="reference")
        expected = getattr(reference, operator)(*(arrays[name] for name in (*names, "order")))
        assert_close(found.detach(), torch.from_numpy(expected), operator, TOLERANCE[torch.float64])


@pytest.mark.parametrize("impl", usable())
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_results_and_gradients_match_the_float64_loop(case: tuple[int, ...], regime: str, impl: str) -> None:
    values = inputs(case, regime)
    expected = run("reference", in_float64(values))
    for name, found in run(impl, values).items():
        assert found.dtype == torch.float32
        assert_close(found, expected[name], name, TOLERANCE[torch.float32])


@pytest.mark.parametrize("impl", usable())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_inputs_give_half_precision_results(dtype: torch.dtype, impl: str) -> None:
    values = inputs(CASES[2], dtype=dtype)
    expected = run("reference", in_float64(values))
    for name, found in run(impl, values).items():
        assert found.dtype == dtype
        assert_close(found, expected[name], name, TOLERANCE[dtype])


@pytest.mark.parametrize("impl", usable())
def test_halves_of_one_projection_get_the_gradients_of_copies(impl: str) -> None:
    """x and z are slices of one tensor, B and C of another, as in the model."""
    values = inputs(CASES[3])
    joined = torch.cat([values["x"], values["z"]], dim=-1).detach().requires_grad_()
    low = torch.cat([values["B"], values["C"]], dim=-1).detach().requires_grad_()
    (x, z), (B, C) = joined.chunk(2, -1), low.chunk(2, -1)
    u = scans.directional_conv(x, values["weight"], values["bias"], values["order"], impl=impl)
    rest = [values[n] for n in ("D", "dt_bias")]
    out = scans.selective_scan(u, values["dt"], values["A"], B, C, *rest, z, values["order"], impl=impl)
    found = torch.autograd.grad(out.square().sum(), [joined, low])

    u = scans.directional_conv(*(values[n] for n in (*CONV, "order")), impl=impl)
    tensors = [values[n] for n in SCAN[1:]]
    out = scans.selective_scan(u, *tensors, values["order"], impl=impl)
    gx, gz, gB, gC = torch.autograd.grad(out.square().sum(), [values[n] for n in ("x", "z", "B", "C")])
    assert_close(found[0], torch.cat([gx, gz], -1), "x and z", TOLERANCE[torch.float32])
    assert_close(found[1], torch.cat([gB, gC], -1), "B and C", TOLERANCE[torch.float32])


def test_cpu_scan_without_gradients_gives_the_same_bits_and_keeps_no_states(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = inputs(CASES[3])
    tensors = [values[name] for name in (*SCAN, "order")]
    with_grad = scans.selective_scan(*tensors, impl="cpu")
    kept = []
    forward = cpu_kernels.scan_forward
    monkeypatch.setattr(
        cpu_kernels,
        "scan_forward",
        lambda *a, save_for_backward, **o: (
            kept.append(save_for_backward) or forward(*a, save_for_backward=save_for_backward, **o)
        ),
    )
    with torch.no_grad():
        assert torch.equal(scans.selective_scan(*tensors, impl="cpu"), with_grad)
    assert torch.equal(scans.selective_scan(*(t.detach() for t in tensors), impl="cpu"), with_grad)
    assert kept == [False, False]


@pytest.fixture
def _one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_torch_thread")
def test_cpu_scan_uses_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    seen = []
    set_threads = numba.set_num_threads
    monkeypatch.setattr(numba, "set_num_threads", lambda n: seen.append(n) or set_threads(n))
    run("cpu", inputs(CASES[2]))
    assert seen[::2] == [1] * 4  # every second call restores the number


def test_cpu_backward_from_a_second_thread_gives_the_same_bits() -> None:
    expected = run("cpu", inputs(CASES[3]))
    found: list[dict[str, Tensor]] = []
    workers = [threading.Thread(target=lambda: found.append(run("cpu", inputs(CASES[3])))) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == len(workers)
    for results in found:
        assert all(torch.equal(results[name], value) for name, value in expected.items())


def test_a_second_derivative_of_the_cpu_scan_is_refused() -> None:
    values = inputs(CASES[2])
    u = scans.directional_conv(*(values[n] for n in (*CONV, "order")), impl="cpu")
    (gradient,) = torch.autograd.grad(u.square().sum(), values["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("operator", ["directional_conv", "selective_scan"])
def test_an_unknown_scan_is_refused_with_the_known_names(operator: str) -> None:
    values = inputs(CASES[2])
    names = CONV if operator == "directional_conv" else SCAN
    with pytest.raises(
        ValueError, match="unknown scan 'fast'; expected cpu, triton, cuda, mamba-ssm, reference"
    ):
        getattr(scans, operator)(*(values[n] for n in (*names, "order")), impl="fast")


def test_cpu_scan_refuses_float64_and_other_devices() -> None:
    tensors = [inputs(CASES[2], dtype=torch.float64)[n] for n in (*CONV, "order")]
    with pytest.raises(ValueError, match="expected float32, found"):
        scans.directional_conv(*tensors, impl="cpu")
    with pytest.raises(ValueError, match="expected tensors on the CPU, found meta"):
        scans.directional_conv(*(t.to("meta") for t in tensors), impl="cpu")


def test_scans_of_a_device_are_listed_with_the_reason_against_each() -> None:
    assert next(iter(scans.scans("cpu").items())) == ("cpu", None)
    on_gpu = scans.scans("cuda:0")
    assert on_gpu["cpu"] == "its kernels run on the CPU"
    assert on_gpu["reference"] is None


def test_cpu_views_are_not_copies() -> None:
    x = torch.randn(2, 5, 8)
    (array,) = scans._arrays(x[..., 4:])
    assert np.shares_memory(array, x.numpy())
