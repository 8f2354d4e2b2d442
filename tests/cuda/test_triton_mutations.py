"""Planted mistakes in the Triton kernels: the comparison with the float64 loop detects each one."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="needs Triton")

from torch import Tensor  # noqa: E402
from torch_scans import in_float64, inputs, run  # noqa: E402

from arm_cuda.triton import launch  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="plants mistakes only in the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, for the NaN that some mistakes cause
    pytest.mark.usefixtures("unwritten_is_nan", "short_chunks"),
]

TOLERANCE = 5e-5
TINY = (1, 1, 3, 4, 8, 2)
"""One program of each kernel."""
SMALL = (2, 1, 3, 33, 8, 3)
"""Two directions, two channel blocks, one chunk."""
LONG = (1, 1, 6, 4, 8, 2)
"""Two chunks of four, the second of two tokens."""
TILES = (1, 1, 18, 4, 8, 2)
"""Two tiles of the convolution."""
IMAGES = (2, 2, 2, 4, 8, 2)


@dataclass(frozen=True, kw_only=True)
class Mutation:
    breaks: str
    module: str
    old: str
    new: str
    case: tuple[int, ...] = TINY
    every: bool = False
    """Whether every occurrence is changed, or the single one."""


SCAN, CONV, GATE, MATHS = "scan_kernels", "conv_kernels", "gate_kernels", "arithmetic"
MUTATIONS = [
    Mutation(
        breaks="the order of tokens",
        case=SMALL,
        module=SCAN,
        old="order += k * length",
        new="order += 0",
        every=True,
    ),
    Mutation(
        breaks="B read as C", case=SMALL, module=SCAN, old="C += k.to", new="C = B + 0 * k.to", every=True
    ),
    Mutation(
        breaks="the second image reads the first one's B",
        module=SCAN,
        case=IMAGES,
        every=True,
        old="image.to(tl.int64) * B_image",
        new="image.to(tl.int64) * 0",
    ),
    Mutation(
        breaks="directions and images swapped in a row",
        module=SCAN,
        case=IMAGES,
        every=True,
        old="row = (k * images + image)",
        new="row = (image * directions + k)",
    ),
    Mutation(breaks="the skip D", module=SCAN, old="+ skip * x\n", new="\n"),
    Mutation(
        breaks="the state before a chunk",
        module=SCAN,
        case=LONG,
        old="saved += N * channels",
        new="saved += 0 * channels",
    ),
    Mutation(
        breaks="the tokens of the last chunk",
        module=SCAN,
        case=LONG,
        old="chunk * CHUNK + CHUNK, length)",
        new="chunk * CHUNK + CHUNK, chunk * CHUNK + 1)",
    ),
    Mutation(
        breaks="the look-ahead by one token",
        module=SCAN,
        case=LONG,
        old="t + 2, length - 1",
        new="t + 1, length - 1",
    ),
    Mutation(
        breaks="the scale of the exponent",
        module=SCAN,
        old=".to(tl.float32) * LOG2_E",
        new=".to(tl.float32)",
        every=True,
    ),
    Mutation(breaks="what later tokens add to a gradient", module=SCAN, old="+ carried\n", new="\n"),
    Mutation(
        breaks="the state that a token found",
        module=SCAN,
        old="h = before[i]\n",
        new="h = before[0]\n",
        case=LONG,
    ),
    Mutation(
        breaks="a group's first state",
        module=SCAN,
        case=LONG,
        old="scratch + (groups - 1 - back_group)",
        new="scratch + back_group",
    ),
    Mutation(
        breaks="gradients past the end",
        module=SCAN,
        old="mask=mask, other=0.0)",
        new="mask=mask, other=1.0)",
    ),
    Mutation(
        breaks="the channel block of a partial",
        case=SMALL,
        module=SCAN,
        old="block.to(tl.int64) * directions",
        new="0 * directions",
    ),
    Mutation(
        breaks="the slope of softplus",
        module=SCAN,
        old="grad_step * sigmoid(raws[i] + bias)",
        new="grad_step",
    ),
    Mutation(breaks="the drive's share of dt", module=SCAN, old="* LN_2 + grad_drive * x", new="* LN_2"),
    Mutation(breaks="the factor of base 2", module=SCAN, old="axis=0) * LN_2", new="axis=0)"),
    Mutation(
        breaks="D's share of u", module=SCAN, old="grad_drive * step + skip * dy", new="grad_drive * step"
    ),
    Mutation(
        breaks="the step of a weight",
        case=SMALL,
        module=CONV,
        old="at = step + (j - W + 1)",
        new="at = step - j",
        every=True,
    ),
    Mutation(
        breaks="tokens before the first",
        module=CONV,
        old="mask=mask, other=0.0).to(tl.float32)\n        w",
        new="mask=mask, other=1.0).to(tl.float32)\n        w",
    ),
    Mutation(
        breaks="the derivative of SiLU",
        module=CONV,
        old="1.0 + total * (1.0 - gate)",
        new="1.0 + total * gate",
    ),
    Mutation(breaks="steps that read a token", module=CONV, old="W - 1 - i", new="i"),
    Mutation(
        breaks="readers past the end",
        module=CONV,
        old="mask=mask, other=0.0)\n            w",
        new="mask=mask, other=1.0)\n            w",
    ),
    Mutation(
        breaks="the sum over tiles",
        module=CONV,
        old="(sums[j] + grad * values[j],)",
        new="(grad * values[j],)",
        case=TILES,
    ),
    Mutation(
        breaks="the bias of each direction",
        module=CONV,
        old="sum_bias += grad\n",
        new="sum_bias = grad\n",
        case=TILES,
    ),
    Mutation(
        breaks="the mean over directions",
        case=SMALL,
        module=GATE,
        old="total *= 1.0 / directions",
        new="total *= 1.0",
    ),
    Mutation(breaks="the gate's own slope", module=GATE, old="slope = opening *", new="slope = gate *"),
    Mutation(breaks="z's rows", module=GATE, old="token * z_token", new="token", every=True),
    Mutation(breaks="digits of small steps", module=MATHS, old="p * q + 2.0\n", new="p * q + 2.001\n"),
    Mutation(breaks="D's gradient", module=SCAN, old="sum_D += dy * x", new="sum_D += dy * step"),
    Mutation(
        breaks="grad_y of each image",
        module=SCAN,
        case=IMAGES,
        old="grad_y += image.to(tl.int64) * length * channels",
        new="grad_y += row * 0",
    ),
    Mutation(
        breaks="the sum of A's gradient",
        module=SCAN,
        old="sum_A += grad_exponent",
        new="sum_A = grad_exponent",
    ),
    Mutation(
        breaks="x of each image",
        module=CONV,
        case=IMAGES,
        every=True,
        old="image.to(tl.int64) * x_image",
        new="image.to(tl.int64) * 0",
    ),
    Mutation(
        breaks="the mean that is kept",
        module=GATE,
        case=SMALL,
        old="channel, total.to(mean",
        new="channel, result.to(mean",
    ),
]


def mutated(mutation: Mutation, folder: Path) -> ModuleType:
    """The kernels' module with the mistake, as a file for Triton. No mistake reads outside memory."""
    source = Path(launch.__file__).with_name(f"{mutation.module}.py").read_text()
    assert source.count(mutation.old) == 1 or (mutation.every and mutation.old in source), mutation.old
    path = folder / f"mutated_{mutation.module}.py"
    path.write_text(source.replace(mutation.old, mutation.new))
    return load(path)


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest of all errors relative to the tensors' largest values; infinite for NaN."""
    errors = [
        ((value.double() - expected[name]).abs().max() / expected[name].abs().max()).item()
        for name, value in found.items()
    ]
    return max(e if e == e else float("inf") for e in errors)


@pytest.mark.parametrize(
    "case", [TINY, SMALL, LONG, TILES, IMAGES], ids=["tiny", "small", "long", "tiles", "images"]
)
def test_without_a_mistake_nothing_is_detected(case: tuple[int, ...], device: str) -> None:
    values = inputs(case, device=device)
    assert error(run("triton", values), run("reference", in_float64(values))) < TOLERANCE


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.breaks)
def test_a_planted_mistake_is_detected(
    mutation: Mutation, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read where a kernel is defined
    kernels = mutated(mutation, tmp_path)
    if mutation.module == MATHS:  # the scan's kernels, with the mistake in a module that they import
        monkeypatch.setitem(sys.modules, "arm_cuda.triton.arithmetic", kernels)
        source = Path(launch.__file__).with_name(f"{SCAN}.py").read_text()
        (tmp_path / "scan_on_mutated.py").write_text(source)
        monkeypatch.setattr(launch, SCAN, load(tmp_path / "scan_on_mutated.py"))
    else:
        monkeypatch.setattr(launch, mutation.module, kernels)
    values = inputs(mutation.case, device=device)
    assert error(run("triton", values), run("reference", in_float64(values))) > TOLERANCE
