"""The scan on mamba-ssm: our layouts and gradients, around a stand-in with its public signature.

On a machine where mamba-ssm is installed and usable, the same tests run on the real kernels.
"""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402, N812 (the field's name for it)
from torch import Tensor  # noqa: E402
from torch_scans import REGIMES, TOLERANCE, assert_close, in_float64, inputs, label, run  # noqa: E402

from arm_cuda import mamba_ssm, scan  # noqa: E402

CASES = [(1, 2, 5, 8, 16, 4), (4, 2, 9, 8, 16, 4), (2, 3, 7, 16, 8, 2), (3, 1, 1, 8, 16, 5)]


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:  # fmt: skip
    """The documented function of mamba-ssm: channels before tokens, groups of channels that share B and C."""
    calls.append(tuple(u.shape))
    batch, channels, length = u.shape
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == torch.float32
    assert A.shape == (channels, B.shape[-2])
    assert B.shape == C.shape
    assert B.ndim == 4
    assert channels % B.shape[1] == 0
    assert u.stride(-1) == 1 or length == 1
    assert delta.shape == u.shape
    assert D is not None
    assert delta_bias is not None
    assert D.shape == delta_bias.shape == (channels,)
    assert D.dtype == delta_bias.dtype == torch.float32
    assert z is None
    assert delta_softplus
    assert not return_last_state
    step = F.softplus(delta.float() + delta_bias[:, None])
    per_group = channels // B.shape[1]
    B, C = (t.float().repeat_interleave(per_group, dim=1) for t in (B, C))  # (B, channels, N, L)
    h = torch.zeros(batch, channels, A.shape[1], device=u.device)
    ys = []
    for t in range(length):
        s = step[:, :, t, None]
        h = torch.exp(s * A) * h + s * B[..., t] * u[:, :, t, None].float()
        ys.append((h * C[..., t]).sum(-1))
    return (torch.stack(ys, -1) + D[:, None] * u.float()).to(u.dtype)


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """x: (B, channels, L).  weight: (channels, 2 to 4)."""
    assert activation == "silu"
    assert bias is not None
    assert weight.shape[1] in (2, 3, 4)
    conv_calls.append(tuple(x.shape))
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))


calls: list[tuple[int, ...]] = []
conv_calls: list[tuple[int, ...]] = []


@pytest.fixture(autouse=True)
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of the tests: a GPU with mamba-ssm itself, or a CPU with the stand-in."""
    calls.clear()
    conv_calls.clear()
    if mamba_ssm.unusable("cuda") is None:
        yield "cuda"
        return
    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    convolution = ModuleType("causal_conv1d")
    convolution.causal_conv1d_fn = causal_conv1d_fn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm", ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", ModuleType("mamba_ssm.ops"))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setitem(sys.modules, convolution.__name__, convolution)
    yield "cpu"


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_results_and_gradients_match_the_float64_loop(case: tuple[int, ...], regime: str, peer: str) -> None:
    values = inputs(case, regime, device=peer)
    expected = run("reference", in_float64(values))
    # The kernels of mamba-ssm take softplus as a plain logarithm, which loses digits of small steps.
    tolerance = TOLERANCE[torch.float32] if peer == "cpu" else 1e-3
    for name, found in run("mamba-ssm", values).items():
        assert found.dtype == torch.float32
        assert_close(found, expected[name], name, 5 * tolerance)


def test_all_directions_are_one_call(peer: str) -> None:
    if peer == "cuda":
        pytest.skip("counts the calls of the stand-in")
    run("mamba-ssm", inputs(CASES[1]))
    assert calls == [(2, 4 * 8, 9)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_activations_keep_their_type(dtype: torch.dtype, peer: str) -> None:
    values = inputs(CASES[1], device=peer)
    for name in ("x", "u", "dt", "B", "C", "z"):
        values[name] = values[name].detach().to(dtype).requires_grad_()
    expected = run("reference", in_float64(values))
    for name, found in run("mamba-ssm", values).items():
        activation = not name.startswith("gradient") or name.split()[-1] in ("x", "u", "dt", "B", "C", "z")
        assert found.dtype == (dtype if activation else torch.float32), name
        assert_close(found, expected[name], name, 2 * TOLERANCE[torch.bfloat16])


def test_causal_conv1d_is_used_for_the_widths_it_supports(monkeypatch: pytest.MonkeyPatch, peer: str) -> None:
    if peer == "cuda":
        pytest.skip("counts the calls of the stand-in")
    monkeypatch.setattr(mamba_ssm, "_conv_unusable", lambda: None)
    monkeypatch.setattr(mamba_ssm, "on_gpu", lambda tensor: True)
    for case in CASES:
        values = inputs(case)
        conv_calls.clear()
        expected = run("reference", in_float64(values))
        for name, found in run("mamba-ssm", values).items():
            assert_close(found, expected[name], name, 1e-5)
        assert conv_calls == ([(case[1], case[0] * case[3], case[2])] if case[5] <= 4 else [])


def test_unsupported_types_are_refused(peer: str) -> None:
    values = inputs(CASES[1], device=peer)
    arguments = [values[name] for name in ("u", "dt", "A", "B", "C", "D", "dt_bias", "z", "order")]
    doubled = [a.double() if a.dtype == torch.float32 else a for a in arguments]
    with pytest.raises(ValueError, match=r"scan 'mamba-ssm': u, dt, B and C: expected one of .*float64"):
        scan.selective_scan(*doubled, impl="mamba-ssm")
    arguments[1] = arguments[1].bfloat16()
    with pytest.raises(ValueError, match=r"for all, found torch\.bfloat16, torch\.float32"):
        scan.selective_scan(*arguments, impl="mamba-ssm")
    with pytest.raises(ValueError, match=r"expected u and dt \(K, B, L, D\) and order \(K, L\), found"):
        scan.selective_scan(*arguments[:1], arguments[0][..., :3], *arguments[2:], impl="mamba-ssm")
