"""If the GPU scans cannot run, one sentence gives the reason and a remedy."""

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from arm_core.engine.scans import choose_scan  # noqa: E402
from arm_cuda import mamba_ssm, scan  # noqa: E402
from arm_cuda.nvrtc import compiler  # noqa: E402
from arm_cuda.triton import availability  # noqa: E402


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine that meets all requirements of the Triton scan; each test removes one."""
    machine = SimpleNamespace(triton="3.7.1", cuda="13.0", present=True, capability=(9, 0), broken=None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(availability, "version", lambda name: machine.triton)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.present)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine.capability)
    monkeypatch.setattr(availability, "_broken", lambda device: machine.broken)
    return machine


def test_a_machine_that_meets_all_requirements_can_run_triton(gpu: SimpleNamespace) -> None:
    assert availability.unusable("cuda") is None


def test_a_cpu_cannot_run_triton(gpu: SimpleNamespace) -> None:
    assert availability.unusable("cpu") == "its kernels run on NVIDIA GPUs"


def test_a_gpu_that_is_too_old_is_named_with_its_compute_capability(gpu: SimpleNamespace) -> None:
    gpu.capability = (7, 0)
    expected = "needs compute capability 8.0 (Ampere) or newer; Tesla V100 has 7.0"
    assert availability.unusable("cuda") == expected


def test_the_requested_gpu_is_probed(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []
    monkeypatch.setattr(availability, "_broken", lambda device: probed.append(str(device)))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (7, 0) if device.index == 2 else (9, 0)
    )
    assert availability.unusable("cuda:1") is None
    assert "needs compute capability 8.0" in str(availability.unusable("cuda:2"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert scan.scans("cuda")["triton"] is None
    assert scan.scans("cuda:0")["triton"] is None
    assert list(dict.fromkeys(probed)) == ["cuda:1", "cuda:3", "cuda:0"]


def test_the_native_backward_pass_needs_the_triton_kernels_and_the_bindings(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    found = scan.scans("cuda")["cuda"]
    assert found == "cuda-bindings is not installed; pip install cuda-bindings"
    monkeypatch.setattr(compiler, "find_spec", lambda name: name)
    assert scan.scans("cuda")["cuda"] is None
    gpu.broken = "Triton 3.6.0 cannot run here"
    assert scan.scans("cuda")["cuda"] == gpu.broken


def test_the_engine_loads_numba_only_for_scans_on_the_cpu(fresh_python: Callable[[str], str]) -> None:
    """A machine whose scans run on its GPU needs no Numba."""
    printed = fresh_python(
        "import sys\nsys.modules['numba'] = None\n"
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'numba' else find(name, *more)\n"
        "import arm_cuda.engine, arm_cuda.library\n"
        "from arm_cuda.scan import scans\n"
        "print(scans('cuda')['triton'], scans('cpu')['cpu'], sep='|')\n"
    )
    gpu, cpu = printed.strip().split("|")
    assert "Numba" not in gpu
    assert cpu == "Numba is not installed; run: pip install numba"


def test_a_missing_gpu_is_reported(gpu: SimpleNamespace) -> None:
    gpu.present = False
    assert availability.unusable("cuda") == "torch finds no NVIDIA GPU here"


def test_a_torch_without_cuda_is_reported(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA; install torch for CUDA" in str(availability.unusable("cuda"))


@pytest.mark.parametrize("found", ["3.5.1", "2.3.0", "3.0.0+git1234"])
def test_a_triton_that_is_too_old_is_named(found: str, gpu: SimpleNamespace) -> None:
    gpu.triton = found
    assert availability.unusable("cuda") == f"needs Triton 3.6 or newer, found {found}"


@pytest.mark.parametrize("found", ["3.6.0", "3.10.0", "4.0.0"])
def test_newer_versions_of_triton_are_accepted(found: str, gpu: SimpleNamespace) -> None:
    gpu.triton = found
    assert availability.unusable("cuda") is None


def test_the_message_about_missing_triton_says_what_to_install(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(availability, "version", missing)
    assert availability.unusable("cuda") == "Triton is not installed; pip install 'triton>=3.6'"


def test_the_interpreter_is_refused_outside_of_tests(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    expected = "TRITON_INTERPRET is set, and Triton's interpreter is for tests; unset it"
    assert [availability.unusable(device) for device in ("cuda", "cpu")] == [expected] * 2


def test_a_triton_that_cannot_compile_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual case: no C compiler. Found by running a kernel, not by importing Triton."""

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    monkeypatch.setattr(availability, "version", lambda name: "3.7.1")
    monkeypatch.setattr(torch, "ones", broken)
    expected = "Triton 3.7.1 cannot run here: RuntimeError: Failed to find C compiler."
    assert availability._broken.__wrapped__(torch.device("cuda")) == expected


def test_the_probe_itself_passes_where_kernels_run(device: str) -> None:
    """A failure of the probe is then caused by the machine and not by the probe."""
    assert availability._broken.__wrapped__(torch.device(device)) is None


def test_auto_prefers_triton_then_mamba_ssm_then_the_loop(gpu: SimpleNamespace) -> None:
    def usable(*names: str) -> dict[str, str | None]:
        return {name: None if name in names else "not here" for name in scan.scans("cuda")}

    assert choose_scan(scan.scans("cuda"), "auto") == "triton"
    assert choose_scan(usable("mamba-ssm", "reference"), "auto") == "mamba-ssm"
    assert choose_scan(usable("reference"), "auto") == "reference"
    gpu.capability = (7, 5)
    with pytest.raises(ValueError, match=r"scan 'triton' cannot run here: needs compute capability 8.0"):
        choose_scan(scan.scans("cuda"), "triton")


def test_listing_the_scans_of_a_cpu_does_not_import_triton(fresh_python: Callable[[str], str]) -> None:
    printed = fresh_python(
        "import sys; from arm_cuda.scan import scans; scans('cpu'); print('triton' in sys.modules)"
    )
    assert printed.split() == ["False"]


def test_the_request_for_the_interpreter_reaches_no_other_process() -> None:
    code = "import os; print(os.environ.get('TRITON_INTERPRET'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["None"]


# mamba-ssm


@pytest.fixture
def no_verdicts(gpu: SimpleNamespace) -> Any:
    """The result for one stand-in is not valid for the next."""
    mamba_ssm._scan_unusable.cache_clear()
    mamba_ssm._conv_unusable.cache_clear()
    yield
    mamba_ssm._scan_unusable.cache_clear()
    mamba_ssm._conv_unusable.cache_clear()


@pytest.mark.usefixtures("no_verdicts")
def test_the_message_about_missing_mamba_ssm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda name: None)
    reason = mamba_ssm.unusable("cuda")
    assert reason is not None
    assert reason.startswith("mamba-ssm is not installed; build it for this torch: MAMBA_FORCE_BUILD=TRUE")
    assert mamba_ssm.unusable("cpu") == "its kernels run on NVIDIA GPUs"


@pytest.mark.usefixtures("no_verdicts")
def test_a_mamba_ssm_that_imports_but_cannot_be_called_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*args: object, **kwargs: object) -> None:
        raise TypeError("'NoneType' object is not callable\nwhile scanning")

    monkeypatch.setattr(mamba_ssm, "find_spec", lambda name: object())
    monkeypatch.setattr(mamba_ssm, "_selective_scan_fn", lambda: call)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device=None, **options: ones(*size, **options))
    reason = mamba_ssm.unusable("cuda")
    assert reason is not None
    assert reason.startswith(
        "mamba-ssm is installed but cannot run (TypeError: 'NoneType' object is not callable)"
    )
    assert "\n" not in reason


@pytest.mark.usefixtures("no_verdicts")
def test_the_name_of_the_scan_says_that_the_convolution_runs_in_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mamba_ssm, "find_spec", lambda name: None)
    expected = "mamba-ssm (convolution by torch: causal-conv1d is not installed)"
    assert scan.IMPLEMENTATIONS.label("mamba-ssm", 4) == expected
    monkeypatch.setattr(mamba_ssm, "_conv_unusable", cache(lambda: None))
    assert scan.IMPLEMENTATIONS.label("mamba-ssm", 4) == "mamba-ssm"
    expected = "mamba-ssm (convolution by torch: causal-conv1d takes widths 2, 3, 4, not 5)"
    assert scan.IMPLEMENTATIONS.label("mamba-ssm", 5) == expected
    assert scan.IMPLEMENTATIONS.label("reference", 5) == "reference"
