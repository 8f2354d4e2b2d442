"""The scan's backward pass in CUDA C++ against the float64 loop: on a GPU, else emulated on the CPU."""

from dataclasses import dataclass
from typing import Any

import cuda_emulator as emulator
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402
from torch_scans import REGIMES, SCAN, TOLERANCE, assert_close, inputs, label  # noqa: E402

from arm_cuda import scan as scans  # noqa: E402
from arm_cuda.nvrtc import launch  # noqa: E402

FLOAT32 = 2e-5 if torch.cuda.is_available() else 5e-6
SILU_IS_ONE = 1.2784645427610738
CHUNK = 16
NAMES = SCAN[:-1]

# K, B, L, D, N, W: around the 8 tokens of a span, the 16 of a chunk, the 32 channels of a warp, sizes of one.
CASES = [
    (1, 1, 1, 1, 16, 1),
    (2, 2, 7, 5, 16, 1),
    (1, 2, 8, 32, 16, 1),
    (3, 1, 17, 64, 16, 1),
    (1, 1, 37, 33, 8, 1),
    (2, 1, 27, 32, 8, 1),
    (2, 2, 33, 40, 32, 1),
    (1, 1, 16, 32, 32, 1),
    (4, 1, 49, 96, 16, 1),
]


@pytest.fixture
def native(device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The device; without a GPU, launches are emulated."""
    if device == "cpu":
        if reason := emulator.missing():
            pytest.skip(reason)
        monkeypatch.setattr(launch, "execute", emulator.execute)
    return device


@dataclass(frozen=True)
class Problem:
    values: dict[str, Tensor]
    grad_y: Tensor
    expected: dict[str, Tensor]
    states: Tensor


def problem(case: tuple[int, ...], regime: str, dtype: torch.dtype, device: str) -> Problem:
    """Inputs, and the gradients of the float64 loop; the gate is 1."""
    values = inputs(case, regime, dtype, device)
    values["z"] = torch.full_like(values["z"].detach().double(), SILU_IS_ONE)
    r = torch.Generator().manual_seed(5)
    grad_y = torch.randn(values["x"].shape, generator=r).to(device, dtype)
    exact = {n: values[n].detach().double().requires_grad_() for n in NAMES}
    order = values["order"]
    out = scans.selective_scan(*exact.values(), values["z"], order, impl="reference")
    found = torch.autograd.grad(out, list(exact.values()), len(order) * grad_y.double())
    with torch.no_grad():
        states = states_before_chunks(*list(exact.values())[:4], exact["dt_bias"], order)
    return Problem(values, grad_y, dict(zip(NAMES, found, strict=True)), states.float())


def states_before_chunks(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor, order: Tensor
) -> Tensor:
    """(K, B, chunks, N, D), what the forward pass saves."""
    step = torch.nn.functional.softplus(dt + dt_bias[:, None, None], threshold=40)
    kept, h = [], A.new_zeros(*u.shape[:2], A.shape[2], A.shape[1])
    tokens = order.long()[:, None, :, None]
    step, x, b = (torch.take_along_dim(t, tokens, 2) for t in (step, u, B))
    for t in range(u.shape[2]):
        if t % CHUNK == 0:
            kept.append(h)
        decay = torch.exp(step[:, :, t, None] * A.mT[:, None])
        h = decay * h + b[:, :, t, :, None] * (step * x)[:, :, t, None]
    return torch.stack(kept, 2).contiguous()


def gradients(task: Problem) -> dict[str, Tensor]:
    """Of the kernel, with partial sums added."""
    u, dt, A, B, C, D, dt_bias = (task.values[name].detach() for name in NAMES)
    directions, batch, length, channels = u.shape
    states = A.shape[2]
    blocks = -(-channels // launch.LANES)

    def unwritten(*shape: int, like: Tensor | None = None) -> Tensor:
        kind = torch.float32 if like is None else like.dtype
        return torch.full(shape, torch.nan, dtype=kind, device=u.device)

    grad_u, grad_dt = unwritten(*u.shape, like=u), unwritten(*u.shape, like=dt)
    grad_A = unwritten(directions, batch, states, channels)
    grad_B, grad_C = (unwritten(blocks, directions, batch, length, states) for _ in range(2))
    grad_D, grad_bias = (unwritten(directions, batch, channels) for _ in range(2))
    launch.scan_backward(
        u, dt, A.mT.contiguous(), B, C, D, dt_bias, task.values["order"], task.states, task.grad_y,
        grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_bias, chunk=CHUNK,
    )  # fmt: skip
    return {
        "u": grad_u, "dt": grad_dt, "A": grad_A.sum(1).mT, "B": grad_B.sum(0), "C": grad_C.sum(0),
        "D": grad_D.sum(1), "dt_bias": grad_bias.sum(1),
    }  # fmt: skip


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_gradients_match_the_float64_loop(case: tuple[int, ...], regime: str, native: str) -> None:
    task = problem(case, regime, torch.float32, native)
    for name, found in gradients(task).items():
        assert_close(found, task.expected[name], name, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_inputs_give_half_precision_gradients(dtype: torch.dtype, native: str) -> None:
    task = problem((2, 1, 21, 40, 16, 1), "mild", dtype, native)
    found = gradients(task)
    assert found["u"].dtype == found["dt"].dtype == dtype
    for name in NAMES:
        # Sums stay in float32: only u and dt are rounded.
        assert_close(
            found[name], task.expected[name], name, TOLERANCE[dtype] if name in ("u", "dt") else 5e-5
        )


def test_mixed_types_are_computed_in_float32(native: str) -> None:
    task = problem((1, 2, 19, 32, 16, 1), "mild", torch.bfloat16, native)
    task.values["dt"] = task.values["dt"].float()
    found = gradients(task)
    assert found["dt"].dtype == torch.float32
    assert found["u"].dtype == torch.bfloat16
    assert_close(found["dt"], task.expected["dt"], "dt", 5e-5)


def test_slices_of_wider_rows_give_the_same_bits(native: str) -> None:
    """B and C are columns of one tensor in a model, with different strides here."""
    task = problem((2, 2, 11, 32, 16, 1), "mild", torch.float32, native)
    expected = gradients(task)
    for name, extra in (("B", 3), ("C", 8)):
        wide = torch.full((*task.values[name].shape[:3], 16 + extra), torch.nan, device=native)
        wide[..., extra:] = task.values[name].detach()
        task.values[name] = wide[..., extra:]
    for name, found in gradients(task).items():
        assert torch.equal(found, expected[name]), name


def test_a_state_size_that_it_does_not_take_is_refused(native: str) -> None:
    values = inputs((1, 1, 2, 4, 64, 1), device=native)
    from arm_cuda.triton import operators

    with pytest.raises(ValueError, match="state size 64; its kernel takes 8, 16, 32; use scan 'triton'"):
        operators.selective_scan(*(values[n] for n in SCAN), values["order"], kernel="cuda")


def test_the_operator_passes_the_choice_to_its_backward_pass(native: str, monkeypatch: Any) -> None:
    from arm_cuda.triton import operators

    calls = []
    kernel = launch.scan_backward
    monkeypatch.setattr(launch, "scan_backward", lambda *t, **k: (calls.append(1), kernel(*t, **k)))
    values = inputs((2, 1, 3, 33, 8, 1), device=native)
    leaves = [values[n] for n in SCAN]
    found = {}
    for kind in ("triton", "cuda"):
        out = operators.selective_scan(*leaves, values["order"], kernel=kind)
        found[kind] = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert len(calls) == (kind == "cuda")
    for name, a, b in zip(SCAN, found["triton"], found["cuda"], strict=True):
        assert_close(b, a, name, FLOAT32)


MUTATIONS = {
    "the order of directions": ("order + k * length", "order + 0"),
    "C read as B": ("column / STATES % 2 ? of_C : of_B", "of_B"),
    "the second image's B": ("(long long)image * B_image", "0"),
    "the skip": ("step[lane] + skip * own_dy", "step[lane]"),
    "the state before a chunk": (
        "read_tile(saved + (long long)chunk * (STATES * channels), h)",
        "read_tile(saved, h)",
    ),
    "earlier spans of a chunk": ("earlier < part", "earlier < 0"),
    "the carried gradient": ("dy.at[c] * c_ + carried[s][c]", "dy.at[c] * c_"),
    "decay of the carried gradient": ("= decay[i][s][c] * grad_h", "= grad_h"),
    "the state before the token": ("carried[s][c] * before[i][s][c]", "carried[s][c] * h[s][c]"),
    "the gradient of C after the token": ("h[s][c] * dy.at[c];", "before[i][s][c] * dy.at[c];"),
    "ln 2 of the step": ("of_channels[1] * LN_2", "of_channels[1]"),
    "the step through u": ("+ of_channels[0] * own_x", ""),
    "sigmoid": ("grad_step * span.at[t].sigmoid[lane]", "grad_step"),
    "sigmoid below 0": ("x < 0 ? e * r : r", "r"),
    "the last term of softplus": ("p = p * q + 2.0f / 3;", ""),
    "an exchange over channels": ("halve<2, 1>(pairs, lane);", ""),
    "an exchange over states": ("if (TILE > 2) halve<TILE / 4, 4>(of_states, lane);", "if (TILE > 2) {}"),
    "the sum over two lanes of 8 states": (" 4);\n", " 0);\n"),
    "the sum of A over tokens": ("sum_A[s][c] += grad_exponent", "sum_A[s][c] = grad_exponent"),
    "the last group": ("for (int group = groups - 1", "for (int group = groups - 2"),
    "zeros past the end": ("GRADIENTS && start + i < length && (", "GRADIENTS && ("),
    "the sum for the bias": ("sum_bias += grad_raw", "sum_bias = grad_raw"),
    "the rows of an image": (
        "row = (long long)k * images + image",
        "row = (long long)image * directions + k",
    ),
    "partial sums of a channel block": ("((long long)block * directions * images + row)", "row"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_mistake_is_detected(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device != "cpu":
        pytest.skip("plants mistakes only in the emulator")
    if reason := emulator.missing():
        pytest.skip(reason)
    monkeypatch.setattr(launch, "execute", emulator.execute)
    old, new = MUTATIONS[name]
    text = launch.source()
    assert text.count(old) == 1, f"{text.count(old)} times: {old}"
    monkeypatch.setattr(launch, "source", lambda: text.replace(old, new))
    for case in ((2, 2, 25, 40, 16, 1), (2, 1, 9, 33, 8, 1)):
        task = problem(case, "mild", torch.float32, "cpu")
        for found, expected in ((gradients(task)[n], task.expected[n]) for n in NAMES):
            error = (found.double() - expected).abs().max() / expected.abs().max()
            if not error < 5e-5:
                return
    raise AssertionError(f"not detected: {name}")
