"""Tests that need a GPU: full-sized shapes, half precision, memory, a training run, compute-sanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="needs Triton")

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

from arm_core.engine.optimizer import OptimizerSettings  # noqa: E402
from arm_core.engine.protocol import Batch, Compile, EngineOptions, TrainingState  # noqa: E402
from arm_core.engine.scans import choose_scan  # noqa: E402
from arm_core.model.parameters import initial_parameters  # noqa: E402
from arm_core.model.spec import ClassifierSpec, EncoderSpec, PretrainSpec  # noqa: E402
from arm_cuda import scan as scans  # noqa: E402
from arm_cuda.engine import TorchEngine  # noqa: E402
from arm_cuda.nvrtc import launch as native  # noqa: E402

# K, B, L, D, N, W: both shapes of the paper, 384 pixels, widths of the large and huge models.
CASES = [
    (4, 4, 197, 768, 16, 4),
    (1, 8, 128, 768, 16, 4),
    (4, 1, 577, 1024, 16, 4),
    (1, 2, 128, 1536, 16, 4),
    (2, 2, 63, 200, 8, 4),
    (2, 2, 63, 200, 32, 4),
    (2, 2, 63, 200, 64, 4),
    (1, 1, 3001, 40, 16, 4),
]
FLOAT32 = 3e-5
"""Relative to each tensor's largest value, for up to 3001 tokens; see `test_triton_kernels.FLOAT32`."""
CURVE = 2e-3
"""Relative tolerance for the losses of two float32 runs: training amplifies rounding differences."""


def usable(scan: str, *, states: int = 16) -> None:
    """Skip if the scan cannot run here or does not take the state size."""
    if reason := scans.scans("cuda")[scan]:
        pytest.skip(reason)
    if scan == "cuda" and states not in native.STATES:
        pytest.skip(f"scan 'cuda' does not take {states} states")


@pytest.mark.gpu
@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=label)
@pytest.mark.parametrize("scan", ["triton", "cuda"])
def test_full_sized_shapes_match_the_float64_loop(
    scan: str, case: tuple[int, ...], dtype: torch.dtype
) -> None:
    usable(scan, states=case[4])
    for regime in REGIMES[:2] if dtype == torch.float32 else REGIMES[:1]:
        values = inputs(case, regime, dtype, "cuda")
        expected = run("reference", in_float64(values))
        for name, found in run(scan, values).items():
            assert_close(found, expected[name], name, FLOAT32 if dtype == torch.float32 else TOLERANCE[dtype])


@pytest.mark.gpu
def test_auto_selects_triton_on_this_gpu() -> None:
    assert choose_scan(scans.scans("cuda"), "auto") == "triton"


@pytest.mark.gpu
def test_a_second_gpu_gives_the_same_bits() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    first = run("triton", inputs(CASES[4], device="cuda:0"))
    second = run("triton", inputs(CASES[4], device="cuda:1"))
    assert all(torch.equal(second[name].to("cuda:0"), value) for name, value in first.items())


@pytest.mark.gpu
def test_memory_stays_under_ten_volumes_of_the_activations() -> None:
    """A volume is (K, B, L, D) in bfloat16. The loop under autograd keeps hundreds."""
    values = inputs((4, 16, 197, 768, 16, 4), dtype=torch.bfloat16, device="cuda")
    for operator, names in ((scans.directional_conv, CONV), (scans.selective_scan, SCAN)):
        tensors = [values[name] for name in names]
        operator(*tensors, values["order"], impl="triton").sum().backward()  # compiles
        for tensor in tensors:
            tensor.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        operator(*tensors, values["order"], impl="triton").sum().backward()
        volumes = (torch.cuda.max_memory_allocated() - before) / (2 * values["u"].numel())
        assert volumes < 10, f"{operator.__name__}: {volumes:.1f}"


@pytest.mark.gpu
def test_saved_states_can_be_beyond_2_to_the_31_elements() -> None:
    """The last channels of a long and wide scan with 64 states equal those of a narrow scan."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs a GPU with 40 GB")
    length, channels, few = 2**14, 2**15, 32
    r = torch.Generator(device="cuda").manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=r, device="cuda")

    B, C = normal(1, 1, length, 64).bfloat16(), normal(1, 1, length, 64).bfloat16()
    A = -torch.arange(1, 65, device="cuda").float().expand(1, channels, 64).contiguous()
    u, dt = normal(1, 1, length, channels).bfloat16(), (normal(1, 1, length, channels) - 4).bfloat16()
    z = normal(1, length, channels).bfloat16()
    skip, bias = normal(1, channels), normal(1, channels)
    order = torch.arange(length, dtype=torch.int32, device="cuda")[None]
    found = []
    for part in (slice(None), slice(-few, None)):
        some = [t[..., part].contiguous().requires_grad_() for t in (u, dt, skip, bias, z)]
        rate = A[:, part].contiguous().requires_grad_()
        out = scans.selective_scan(*some[:2], rate, B, C, *some[2:], order, impl="triton")
        gradients = torch.autograd.grad(out, [*some, rate], torch.ones_like(out))
        found.append(
            [out[..., -few:].detach(), *(g[..., -few:] for g in gradients[:-1]), gradients[-1][:, -few:]]
        )
    for wide, narrow in zip(*found, strict=True):
        assert torch.equal(wide, narrow)


def losses(device: str, scan: str, steps: int, compiled: Compile = Compile.NONE) -> list[float]:
    """Losses of a training run, pretraining and then a classifier, on the same images."""
    encoder = EncoderSpec(width=64, depth=6, patch=4)
    pretrain = PretrainSpec(
        encoder=encoder, image_size=(24, 24), cluster=(2, 2), decoder_width=32, decoder_depth=2,
        decoder_heads=2,
    )  # fmt: skip
    found = []
    for spec in (pretrain, ClassifierSpec(encoder=encoder, classes=10, image_size=(24, 24))):
        rng = np.random.default_rng(7)
        engine = TorchEngine(
            spec,
            TrainingState(parameters=initial_parameters(spec, seed=0)),
            optimizer=OptimizerSettings(clip=3.0),
            options=EngineOptions(device=device, scan=scan, compile=compiled),
        )
        for step in range(1, steps + 1):
            images = rng.standard_normal((8, 24, 24, 3)).astype(np.float32)
            classes = np.eye(10, dtype=np.float32)[rng.integers(0, 10, 8)]
            targets = classes if isinstance(spec, ClassifierSpec) else None
            batch = Batch(images=images, targets=targets)
            found.append(engine.train_step([batch], step=step, lr=1e-3).result().loss)
    return found


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_fifty_training_steps_follow_the_losses_of_the_cpu() -> None:
    pytest.importorskip("numba", reason="needs Numba for the CPU's run")
    expected, found = losses("cpu", "cpu", 50), losses("cuda", "triton", 50)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, rtol=CURVE)


@pytest.mark.gpu
def test_a_native_backward_pass_gives_the_same_bits_twice() -> None:
    usable("cuda")
    first, second = (run("cuda", inputs(CASES[1], device="cuda")) for _ in range(2))
    assert all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("scan", ["triton", "cuda"])
def test_compiled_blocks_follow_the_same_losses(scan: str) -> None:
    usable(scan)
    expected = losses("cuda", "triton", 3, Compile.NONE)
    found = losses("cuda", scan, 3, Compile.BLOCKS)
    np.testing.assert_allclose(found, expected, rtol=CURVE)


@pytest.mark.usefixtures("one_torch_thread")
def test_losses_of_two_cpu_scans_agree_within_the_gpu_tolerance() -> None:
    np.testing.assert_allclose(losses("cpu", "reference", 2), losses("cpu", "cpu", 2), rtol=CURVE)


SANITIZED = """
import torch
from torch_scans import inputs, run
for case in ((2, 1, 19, 33, 8, 4), (1, 1, 5, 40, 16, 3), (1, 1, 17, 3, 32, 4), (1, 2, 18, 32, 64, 2)):
    for dtype in (torch.float32, torch.bfloat16):
        for scan in ("triton", "cuda"):
            if scan == "triton" or case[4] < 64:
                run(scan, inputs(case, dtype=dtype, device="cuda"))
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    root = Path(__file__).parents[2]
    paths = [str(root / part) for part in ("", "backends/cuda", "tests")]
    done = subprocess.run(
        [
            "compute-sanitizer",
            f"--tool={tool}",
            "--report-api-errors=no",
            "--error-exitcode=9",
            sys.executable,
            "-c",
            SANITIZED,
        ],
        # Without torch's cache each tensor has its own bounds.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
