"""The Triton kernels against the float64 loop: results and every gradient."""

import math
import mmap
import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="needs Triton")

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

from arm_cuda import scan as scans  # noqa: E402
from arm_cuda.triton import launch, operators  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp2:RuntimeWarning"  # NumPy in the interpreter; 1 / inf is intended
)

FLOAT32 = 2e-5 if torch.cuda.is_available() else 5e-6
"""Relative to each tensor's largest value; a GPU's exponential has 2 bits less than NumPy's."""

# K, B, L, D, N, W: around the 16 tokens of a chunk, the 32 channels of a program, 1 to 4 warps, sizes of one.
CASES = [
    (1, 1, 1, 1, 16, 1),
    (1, 2, 2, 5, 16, 4),
    (2, 1, 7, 32, 8, 4),
    (4, 1, 9, 8, 16, 4),
    (1, 1, 17, 40, 16, 2),
    (3, 1, 16, 3, 32, 3),
    (1, 1, 33, 32, 64, 5),
]
CHUNKS = (2, 1, 35 if torch.cuda.is_available() else 9, 8, 8, 4)
"""Three chunks of a scan; the interpreter takes chunks of 4 (`short_chunks`)."""
MORE_CASES = [
    (1, 2, 37, 96, 16, 4),
    (4, 2, 33, 40, 16, 4),
    (8, 1, 7, 32, 8, 4),
    (2, 3, 31, 65, 32, 4),
    (4, 1, 197, 64, 16, 4),
]
if os.environ.get("ARM_LONG_TESTS") or torch.cuda.is_available():
    CASES += MORE_CASES


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_results_and_gradients_match_the_float64_loop(
    case: tuple[int, ...], regime: str, device: str
) -> None:
    values = inputs(case, regime, device=device)
    expected = run("reference", in_float64(values))
    for name, found in run("triton", values).items():
        assert found.dtype == torch.float32
        assert found.is_contiguous(), name
        assert_close(found, expected[name], name, FLOAT32)


@pytest.mark.usefixtures("unwritten_is_nan", "short_chunks")
def test_a_gate_of_several_channel_blocks_matches_the_float64_loop(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "GATE_BLOCK", 16)
    values = inputs((3, 2, 3, 40, 8, 2), device=device)
    expected = run("reference", in_float64(values))
    for name, found in run("triton", values).items():
        assert_close(found, expected[name], name, FLOAT32)


@pytest.mark.usefixtures("unwritten_is_nan", "short_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_inputs_give_half_precision_results(dtype: torch.dtype, device: str) -> None:
    values = inputs(CHUNKS, dtype=dtype, device=device)
    expected = run("reference", in_float64(values))
    for name, found in run("triton", values).items():
        assert found.dtype == dtype
        assert_close(found, expected[name], name, TOLERANCE[dtype])


@pytest.mark.usefixtures("unwritten_is_nan", "short_chunks")
def test_each_gradient_has_the_type_of_its_tensor(device: str) -> None:
    """As under autocast: bfloat16 activations, float32 parameters."""
    values = inputs(CHUNKS, device=device)
    for name in ("x", "u", "dt", "B", "C", "z"):
        values[name] = values[name].detach().bfloat16().requires_grad_()
    expected = run("reference", in_float64(values))
    for name, found in run("triton", values).items():
        activation = not name.startswith("gradient") or name.split()[-1] in ("x", "u", "dt", "B", "C", "z")
        assert found.dtype == (torch.bfloat16 if activation else torch.float32), name
        assert_close(found, expected[name], name, TOLERANCE[torch.bfloat16])


@pytest.mark.usefixtures("unwritten_is_nan", "short_chunks")
def test_halves_of_one_projection_get_the_gradients_of_copies(device: str) -> None:
    """x and z are slices of one tensor, B and C of another, as in the model; nothing is copied."""
    values = inputs(CASES[2], device=device)
    joined = torch.cat([values["x"], values["z"]], dim=-1).detach().requires_grad_()
    low = torch.cat([values["dt"][..., :3], values["B"], values["C"]], dim=-1).detach().requires_grad_()
    (x, z), (_, B, C) = joined.chunk(2, -1), low.split([3, 8, 8], -1)
    u = scans.directional_conv(x, values["weight"], values["bias"], values["order"], impl="triton")
    rest = [values[n] for n in ("D", "dt_bias")]
    out = scans.selective_scan(u, values["dt"], values["A"], B, C, *rest, z, values["order"], impl="triton")
    found = torch.autograd.grad(out.square().sum(), [joined, low])

    u = scans.directional_conv(*(values[n] for n in (*CONV, "order")), impl="triton")
    tensors = [values[n] for n in SCAN[1:]]
    out = scans.selective_scan(u, *tensors, values["order"], impl="triton")
    gx, gz, gB, gC = torch.autograd.grad(out.square().sum(), [values[n] for n in ("x", "z", "B", "C")])
    assert torch.equal(found[0], torch.cat([gx, gz], -1))
    assert torch.equal(found[1][..., 3:], torch.cat([gB, gC], -1))


@pytest.mark.usefixtures("unwritten_is_nan", "short_chunks")
def test_b_and_c_are_read_from_tensors_of_different_widths(device: str) -> None:
    values = inputs(CHUNKS, device=device)
    expected = run("triton", values)
    wider = torch.nn.functional.pad
    sliced = {
        "B": wider(values["B"].detach(), (3, 2), value=9.0)[..., 3:-2],
        "C": wider(values["C"].detach(), (1, 9, 0, 4), value=9.0)[..., :-4, 1:-9],
    }
    assert sliced["B"].stride() != sliced["C"].stride()
    found = run("triton", {**values, **{name: value.requires_grad_() for name, value in sliced.items()}})
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.usefixtures("unwritten_is_nan", "short_chunks")
@pytest.mark.parametrize("wanted", [*CONV, *SCAN])
def test_a_single_tensor_that_needs_a_gradient_gets_it(wanted: str, device: str) -> None:
    values = inputs((2, 1, 3, 4, 8, 2), device=device)
    expected = run("triton", values)
    detached = {name: value.detach() for name, value in values.items()}
    detached[wanted].requires_grad_()
    operator, names = (scans.directional_conv, CONV) if wanted in CONV else (scans.selective_scan, SCAN)
    out = operator(*(detached[n] for n in (*names, "order")), impl="triton")
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    (found,) = torch.autograd.grad(out, [detached[wanted]], seed)
    assert torch.equal(found, expected[f"gradient of {wanted}"])


def test_a_bfloat16_scan_sums_steps_that_bfloat16_would_lose(device: str) -> None:
    """256 steps of 0.01 make 2.5; above 2, bfloat16 cannot represent a difference of 0.01."""
    values = inputs((1, 1, 256, 1, 8, 2), dtype=torch.bfloat16, device=device)
    values = {name: value.detach() for name, value in values.items()}
    for name, value in {"u": 1, "B": 1, "C": 1, "A": -0.01, "dt": -4.6, "D": 0, "dt_bias": 0, "z": 1}.items():
        values[name].fill_(value)
    expected = call({n: v.float() if n != "order" else v for n, v in values.items()}, impl="reference")
    assert_close(call(values).float(), expected, "out", 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_saved_states_are_float32(dtype: torch.dtype, device: str) -> None:
    values = inputs((2, 1, 3, 4, 8, 2), dtype=dtype, device=device)
    values["A"] = values["A"].mT.contiguous()
    _, _, states = launch.scan_forward(*(values[n].detach() for n in (*SCAN, "order")), True)
    assert states.dtype == torch.float32


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("length", [1, 3])
def test_steps_past_the_last_token_do_not_overflow(length: int, device: str) -> None:
    """A state of 3e38 at the last token is finite; another input would make it infinite."""
    values = inputs((1, 1, length, 32, 8, 2), device=device)
    values = {name: value.detach() for name, value in values.items()}
    constants = {
        "u": 3e38 / length,
        "B": 1,
        "A": -1e-9,
        "C": 1e-38,
        "dt": 0.54,
        "D": 0,
        "dt_bias": 0,
        "z": 1e-3,
    }
    for name, value in constants.items():
        values[name].fill_(value)
    values = {n: v.requires_grad_() if n != "order" else v for n, v in values.items()}
    expected = run("reference", in_float64(values))
    for name, found in run("triton", values).items():
        assert_close(found, expected[name], name, 1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter, and memory that is not touched")
def test_saved_states_can_be_beyond_2_to_the_31_elements(device: str) -> None:
    """One program of a scan so wide that the states of its third chunk start at element 2^31."""
    directions, images, length, channels, states = 1, 1, 40, 2**24, 64
    wide = {
        name: virtual(*shape)
        for name, shape in {
            "u": (length, channels), "dt": (length, channels), "grad_y": (length, channels),
            "A": (states, channels), "D": (channels,), "dt_bias": (channels,), "saved": (3, states, channels),
            "y": (length, channels), "grad_u": (length, channels), "grad_dt": (length, channels),
            "grad_A": (states, channels), "grad_D": (channels,), "grad_bias": (channels,),
        }.items()
    }  # fmt: skip
    values = inputs((directions, images, length, launch.LANES, states, 2), device=device)
    narrow = {name: value.detach() for name, value in values.items()}
    seed = torch.ones(1, length, launch.LANES)
    for name in ("u", "dt", "D", "dt_bias"):
        wide[name][..., : launch.LANES] = narrow[name].squeeze()
    wide["A"][:, : launch.LANES] = narrow["A"][0].mT
    wide["grad_y"][:, : launch.LANES] = seed[0]
    B, C, order = narrow["B"], narrow["C"], narrow["order"]
    sizes = {"directions": 1, "channels": channels, "N": states, "BLOCK": launch.LANES, "CHUNK": 16}
    strides = (*B.stride()[:3], *C.stride()[:3])
    inputs_of_both = (wide["u"], wide["dt"], wide["A"], B, C, wide["D"], wide["dt_bias"], order)
    launch.scan_kernels.scan_forward[(1,)](
        *inputs_of_both, wide["y"], wide["saved"], length, *strides, **sizes, SAVE=True
    )
    scratch, grad_B, grad_C = torch.empty(16, states, 32), torch.empty(length, 64), torch.empty(length, 64)
    launch.scan_kernels.scan_backward[(1,)](
        *inputs_of_both, wide["saved"], scratch, wide["grad_y"],
        *(wide[n] for n in ("grad_u", "grad_dt", "grad_A")), grad_B, grad_C, wide["grad_D"],
        wide["grad_bias"], length, *strides, **sizes, GROUP=1,
    )  # fmt: skip
    tensors = [narrow[name].double().requires_grad_() for name in SCAN[:-1]]
    one = torch.full((1, length, launch.LANES), 1.2784645427610738, dtype=torch.float64)  # its silu is 1
    out = scans.selective_scan(*tensors, one, order, impl="reference")
    expected = torch.autograd.grad(out, tensors, seed.double())
    assert_close(wide["y"][:, : launch.LANES], out[0].detach(), "y", FLOAT32)
    assert_close(wide["grad_u"][:, : launch.LANES], expected[0][0, 0], "u", FLOAT32)
    assert_close(wide["grad_A"][:, : launch.LANES].mT, expected[2][0], "A", FLOAT32)
    assert_close(grad_B, expected[3][0, 0], "B", FLOAT32)


def virtual(*shape: int) -> Tensor:
    """Zeros in memory that the system only allocates when it is accessed."""
    size = 4 * math.prod(shape)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.float32).view(shape)


def test_a_scan_without_gradients_gives_the_same_bits_and_keeps_no_states(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = inputs(CASES[2], device=device)
    tensors = [values[name] for name in (*SCAN, "order")]
    with_grad = scans.selective_scan(*tensors, impl="triton")
    kept = []
    forward = launch.scan_forward

    def watched(*arguments: object, **options: bool) -> tuple[Tensor, Tensor, Tensor]:
        results = forward(*arguments, **options)
        kept.append([tensor.numel() for tensor in results[1:]])
        return results

    monkeypatch.setattr(launch, "scan_forward", watched)
    with torch.no_grad():
        assert torch.equal(scans.selective_scan(*tensors, impl="triton"), with_grad)
    assert torch.equal(scans.selective_scan(*(t.detach() for t in tensors), impl="triton"), with_grad)
    assert kept == [[0, 0], [0, 0]]


def test_an_expanded_gradient_is_accepted(device: str) -> None:
    """`sum().backward()` passes a gradient whose strides are 0."""
    values = inputs(CASES[2], device=device)
    tensors = [values[n] for n in SCAN]
    out = scans.selective_scan(*tensors, values["order"], impl="triton")
    found = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    expected = torch.autograd.grad(out, tensors, torch.ones_like(out))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_an_empty_batch_gives_empty_results_and_no_gradients(device: str) -> None:
    results = run("triton", inputs((2, 0, 5, 8, 16, 4), device=device))
    assert results["selective_scan"].shape == (0, 5, 8)
    for name in ("weight", "bias", "A", "D", "dt_bias"):
        assert not results[f"gradient of {name}"].any()


def test_twenty_runs_give_the_same_bits(device: str) -> None:
    values = inputs(CASES[2] if device == "cpu" else (4, 8, 197, 192, 16, 4), device=device)
    first = run("triton", values)
    for _ in range(1 if device == "cpu" else 19):  # the interpreter runs one program at a time
        again = run("triton", values)
        assert all(torch.equal(again[name], value) for name, value in first.items())


# inputs that the operators refuse


def call(
    values: dict[str, Tensor], operator: str = "selective_scan", impl: str = "triton", **changed: Tensor
) -> Tensor:
    values = {**values, **changed}
    names = CONV if operator == "directional_conv" else SCAN
    return getattr(scans, operator)(*(values[n] for n in (*names, "order")), impl=impl)


def test_tensors_with_an_accepted_layout_are_not_checked_again(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks take longer than a launch; another shape, type or stride is checked like the first."""
    monkeypatch.setattr(operators, "_accepted", set())
    values = inputs((1, 1, 2, 4, 8, 2), device=device)
    call(values)
    checked = []
    check = operators._check_scan
    monkeypatch.setattr(operators, "_check_scan", lambda *tensors: (checked.append(1), check(*tensors)))
    call({name: value.clone() for name, value in values.items()})
    assert checked == []
    call(values, B=values["B"].half())
    call(values, z=torch.nn.functional.pad(values["z"], (0, 3))[..., :-3])
    assert checked == [1, 1]
    with pytest.raises(ValueError, match="dt_bias: expected"):
        call(values, dt_bias=values["dt_bias"][..., 1:])


def test_an_inverse_order_is_computed_once_for_each_order_table(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    compute = launch._inverse
    monkeypatch.setattr(launch, "_inverse", lambda order: (computed.append(1), compute(order))[1])
    order = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    expected = torch.tensor([[1, 2, 0]], dtype=torch.int32, device=device)
    assert torch.equal(launch.inverse(order), expected)
    assert torch.equal(launch.inverse(order), expected)
    assert torch.equal(launch.inverse(order.clone()), expected)
    assert len(computed) == 2
    order.copy_(expected)
    assert launch.inverse(order).tolist() == [[2, 0, 1]]


def test_a_state_size_without_a_kernel_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="state size 12; its kernels take 8, 16, 32, 64, scan 'reference'"):
        call(inputs((1, 1, 3, 4, 12, 2), device=device))


def test_a_type_without_a_kernel_is_refused(device: str) -> None:
    values = inputs(CASES[2], device=device)
    with pytest.raises(ValueError, match=r"dt: expected float32, bfloat16 or float16, found torch.float64"):
        call(values, dt=values["dt"].double())
    with pytest.raises(ValueError, match=r"order: expected int32, found torch.int64; call .int\(\)"):
        call(values, "directional_conv", order=values["order"].long())


def test_a_wrong_shape_is_refused(device: str) -> None:
    values = inputs(CASES[2], device=device)
    with pytest.raises(ValueError, match=r"B: expected \(K=2, B=1, L=7, N=8\), found \(2, 1, 7, 7\)"):
        call(values, B=values["B"][..., 1:])
    with pytest.raises(ValueError, match=r"bias: expected \(K=2, D=32\), found \(2, 1, 32\)"):
        call(values, "directional_conv", bias=values["bias"][:, None])
    with pytest.raises(ValueError, match="expected at least one token"):
        call(inputs((1, 1, 0, 4, 16, 2), device=device))


def test_memory_that_is_not_contiguous_is_refused(device: str) -> None:
    values = inputs(CASES[2], device=device)
    with pytest.raises(ValueError, match=r"u: expected a contiguous tensor, found strides .* call .contig"):
        call(values, u=values["u"].mT.contiguous().mT)
    with pytest.raises(ValueError, match=r"z: expected the last axis in one piece \(stride 1\), found"):
        call(values, z=values["z"].mT.contiguous().mT)


def test_rows_too_far_apart_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "LARGEST_OFFSET", 7 * 32 - 1)
    monkeypatch.setattr(operators, "_accepted", set())
    with pytest.raises(ValueError, match="x: 7 tokens of 32 elements exceed the 223 that its kernels count"):
        call(inputs(CASES[2], device=device), "directional_conv")


def test_tensors_on_other_devices_are_refused(device: str) -> None:
    values = inputs(CASES[2], device=device)
    with pytest.raises(ValueError, match="expected tensors on an NVIDIA GPU, found meta; move the model"):
        call({name: value.to("meta") for name, value in values.items()})
    with pytest.raises(ValueError, match=f"A is on meta, order on {values['order'].device}; move one"):
        call(values, A=values["A"].to("meta"))


def test_a_second_derivative_is_refused(device: str) -> None:
    values = inputs(CASES[2], device=device)
    for operator, name in (("directional_conv", "x"), ("selective_scan", "u")):
        out = call(values, operator)
        (gradient,) = torch.autograd.grad(out.square().sum(), values[name], create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative; use scan 'reference' to different"):
            gradient.sum().backward()
