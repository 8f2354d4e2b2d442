"""The Triton operators inside torch: compiled, exported, checkpointed, and a model that trains on them."""

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="needs Triton")

from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_scans import CONV, SCAN, assert_close, inputs  # noqa: E402

from arm_core.model.parameters import initial_parameters  # noqa: E402
from arm_core.model.spec import ClassifierSpec, EncoderSpec, ModelSpec, PretrainSpec  # noqa: E402
from arm_cuda.model import build_model  # noqa: E402
from arm_cuda.triton import operators  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("short_chunks"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

ENCODER = EncoderSpec(width=32, depth=1, patch=8)
CLASSIFIER = ClassifierSpec(encoder=ENCODER, classes=3, image_size=(16, 8))  # 3 tokens, 4 directions
PRETRAIN = PretrainSpec(
    encoder=EncoderSpec(width=32, depth=6, patch=4), image_size=(12, 12), cluster=(1, 1),
    decoder_width=16, decoder_depth=2, decoder_heads=2,
)  # fmt: skip
CASE = (2, 1, 3, 5, 8, 2)


def model_on(spec: ModelSpec, scan: str, device: str) -> nn.Module:
    model = build_model(spec, scan, torch.device(device))
    values = initial_parameters(spec, seed=0)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()}, strict=False)
    return model


def images(spec: ModelSpec, device: str) -> Tensor:
    values = torch.randn((1, *spec.image_size, 3), generator=torch.Generator().manual_seed(5))
    return values.to(device)


def loss_of(outputs: dict[str, Tensor]) -> Tensor:
    return outputs["loss"] if "loss" in outputs else outputs["logits"].square().sum()


def gradients(
    model: nn.Module, forward: Callable[[Tensor], dict[str, Tensor]], x: Tensor
) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(forward(x)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("operator", ["conv", "conv_backward", "scan", "scan_backward"])
def test_registration_passes_the_checks_of_torch(operator: str, device: str) -> None:
    values = inputs(CASE, device=device)
    for name in ("weight", "A"):  # channels last, as the kernels read them
        values[name] = values[name].detach().mT.contiguous().requires_grad_()
    plain = {name: value.detach() for name, value in values.items()}
    order = values["order"]
    if operator == "conv":
        arguments = [*(values[n] for n in CONV), order]
    elif operator == "conv_backward":
        u = operators.conv(*(plain[n] for n in CONV), order)
        arguments = [torch.ones_like(u), *(plain[n] for n in CONV), order]
    elif operator == "scan":
        arguments = [*(values[n] for n in SCAN), order, True, "triton"]
    else:
        scanned = [plain[n] for n in SCAN]
        out, mean, states = operators.scan(*scanned, order, True, "triton")
        arguments = [torch.ones_like(out), mean, states, *scanned, order, "triton"]
    name = {"conv": "directional_conv", "scan": "selective_scan"}.get(operator.split("_")[0])
    suffix = "_backward" if operator.endswith("backward") else ""
    registered = getattr(torch.ops.arm_cuda, f"{name}{suffix}").default
    torch.library.opcheck(registered, arguments)


@pytest.mark.parametrize("spec", [PRETRAIN, CLASSIFIER], ids=["pretraining", "classifier"])
def test_a_whole_model_compiles_without_a_break(spec: ModelSpec, device: str) -> None:
    model, x = model_on(spec, "triton", device), images(spec, device)
    expected = gradients(model, model, x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(model, compiled, x)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], name, 1e-5)


@pytest.mark.parametrize("spec", [PRETRAIN, CLASSIFIER], ids=["pretraining", "classifier"])
def test_a_model_has_the_gradients_of_the_reference_scan(spec: ModelSpec, device: str) -> None:
    x = images(spec, device)
    model, reference = (model_on(spec, scan, device) for scan in ("triton", "reference"))
    expected = gradients(reference, reference, x)
    found = gradients(model, model, x)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], name, 1e-4)


def test_a_model_exports_with_the_operators_in_it(device: str) -> None:
    model, x = model_on(CLASSIFIER, "triton", device).eval(), images(CLASSIFIER, device)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        found = program.module()(x)
        expected = model(x)
    assert_close(found["logits"], expected["logits"], "logits", 1e-5)
    called = {str(node.target) for node in program.graph.nodes}
    assert {"arm_cuda.directional_conv.default", "arm_cuda.selective_scan.default"} <= called


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, device: str) -> None:
    model, x = model_on(CLASSIFIER, "triton", device), images(CLASSIFIER, device)
    expected = gradients(model, model, x)
    forward = model.layers[0].mixer.forward
    model.layers[0].mixer.forward = lambda *args: checkpoint(forward, *args, use_reentrant=reentrant)
    found = gradients(model, model, x)
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_autocast_keeps_the_state_in_float32(device: str) -> None:
    """bfloat16 products around float32 scans: gradients of parameters stay float32 and finite."""
    model, x = model_on(CLASSIFIER, "triton", device), images(CLASSIFIER, device)
    with torch.autocast(device, torch.bfloat16):
        found = gradients(model, model, x)
    exact = gradients(model, model, x)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert_close(gradient, exact[name], name, 0.1)
