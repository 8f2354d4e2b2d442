"""Builds mamba-ssm and causal-conv1d from their sdists, reduced to the code that the benchmarks use.

The kernels are unchanged. Their instantiations are reduced to one architecture and to real A, B and C that
vary over tokens, softplus, up to 256 tokens, and channels before tokens. A whole build takes far longer.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from arm_cuda import mamba_ssm

BUILT = Path(__file__).parent.parent / "build/peers"
"""Folder in which peers that were built here are installed."""
REDUCED = "reduced build: one architecture, up to 256 tokens, channels before tokens"

ONLY_TRUE = """
#define ONLY_TRUE(COND, CONST_NAME, ...)                                             \\
    [&] {                                                                            \\
        TORCH_CHECK(COND, "not in this reduced build: " #COND " is false");          \\
        constexpr bool CONST_NAME = true;                                            \\
        return __VA_ARGS__();                                                        \\
    }()
"""


def build_peers(sources: Path) -> str:
    """Build both packages in parallel, only for this machine's GPU; returns a sentence with the result.

    sources: a folder with `mamba_ssm-*.tar.gz` and `causal_conv1d-*.tar.gz`. Needs nvcc, not the network.
    """
    if BUILT.exists():
        sys.path.insert(0, str(BUILT))
    importlib.invalidate_caches()
    if mamba_ssm.unusable("cuda") is None:
        return REDUCED if BUILT.exists() else "installed"
    archives = [path for name in ("causal_conv1d", "mamba_ssm") for path in sources.glob(f"{name}-*.tar.gz")]
    if not archives or not torch.cuda.is_available():
        return f"nothing to build: {len(archives)} sdists in {sources}, {torch.cuda.device_count()} GPU(s)"
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
    with ExitStack() as stack:
        builds = []
        for archive in archives:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            (source,) = (path for path in folder.iterdir() if path.is_dir())
            reduce(source, f"{major}{minor}")
            builds.append(
                subprocess.Popen(
                    [*command, "--upgrade", "--target", str(BUILT), str(source)],
                    env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                )
            )  # fmt: skip
        # Only the first failure is reported; the other package can still be used.
        said = [build.communicate()[1] for build in builds]
    failed = [
        f"{archive.name} did not build: {(text.strip().splitlines() or ['no message'])[-1]}"
        for archive, build, text in zip(archives, builds, said, strict=True)
        if build.returncode
    ]
    sys.path.insert(0, str(BUILT))
    importlib.invalidate_caches()
    mamba_ssm._scan_unusable.cache_clear()
    mamba_ssm._conv_unusable.cache_clear()
    return "; ".join([REDUCED, *failed])


def environment() -> dict[str, str]:
    """Environment for nvcc: the toolkit's folder, and the headers of torch's CUDA libraries."""
    found = {**os.environ, "MAX_JOBS": str(max(1, (os.cpu_count() or 2) // 2))}
    found |= {f"{name}_FORCE_BUILD": "TRUE" for name in ("MAMBA", "CAUSAL_CONV1D")}
    if "CUDA_HOME" not in found and (nvcc := shutil.which("nvcc")):
        listed = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
        top = re.search(r"^#\$ TOP=(.*)$", listed.stderr, re.MULTILINE)  # nvcc may be a wrapper elsewhere
        found["CUDA_HOME"] = str(Path(top[1]).resolve()) if top else str(Path(nvcc).resolve().parents[1])
    headers = [str(path) for path in Path(torch.__file__).parents[1].glob("nvidia/cu*/include")]
    found["CPATH"] = os.pathsep.join([*headers, *filter(None, [found.get("CPATH")])])
    return found


def reduce(source: Path, architecture: str) -> None:
    """Edit an unpacked sdist. Raises ValueError for a version whose sources look different."""
    setup = source / "setup.py"
    setup.write_text(for_one_architecture(setup.read_text(), architecture))
    if (source / "csrc/selective_scan").is_dir():
        for path, edits in _mamba_edits(source / "csrc/selective_scan"):
            _edit(path, edits)
        _edit(setup, [(r' *"csrc/selective_scan/selective_scan_bwd_\w+_complex\.cu",\n', "")])
    else:
        for way in ("fwd", "bwd"):
            signature = rf"(void causal_conv1d_channellast_{way}_cuda"
            signature += r"\(ConvParams\w+ &params, cudaStream_t stream\) "
            body = r'\1    TORCH_CHECK(false, "channels-last kernels are not in this reduced build");\n}\n'
            _edit(source / f"csrc/causal_conv1d_{way}.cu", [(rf"(?s){signature}\{{\n).*?\n\}}\n", body)])


def _mamba_edits(folder: Path) -> Iterator[tuple[Path, list[tuple[str, str]]]]:
    yield folder / "static_switch.h", [(r"\Z", ONLY_TRUE.replace("\\", r"\\"))]
    for way in ("fwd", "bwd"):
        lengths = rf"(?s)(<= 256\) \{{\s*selective_scan_{way}_launch<32, 8[^\n]*\n\s*\}}) else if "
        lengths += r"\(params\.seqlen <= 512\).*?(\n    #else)"
        refused = r'\1 else { TORCH_CHECK(false, "this reduced build takes up to 256 tokens"); }\2'
        edits = [(r"BOOL_SWITCH\(params\.is_variable_", "ONLY_TRUE(params.is_variable_"), (lengths, refused)]
        if way == "bwd":
            edits.append((r"BOOL_SWITCH\(params\.delta_softplus", "ONLY_TRUE(params.delta_softplus"))
        yield folder / f"selective_scan_{way}_kernel.cuh", edits
    for kind in ("bf16", "fp16", "fp32"):
        pattern = r"template void selective_scan_fwd_cuda<[^>]*complex_t>[^\n]*\n?"
        yield folder / f"selective_scan_fwd_{kind}.cu", [(pattern, "")]
    pattern = r"(?s)\} else if \(WTYPE == at::ScalarType::ComplexFloat\) \{ *\\\n.*?__VA_ARGS__\(\); *\\\n"
    yield folder / "selective_scan.cpp", [(pattern, "")]


def _edit(path: Path, edits: list[tuple[str, str]]) -> None:
    text = path.read_text()
    for pattern, replacement in edits:
        changed = re.sub(pattern, replacement, text)
        if changed == text:
            raise ValueError(f"{path.name}: expected {pattern!r}; this version's sources look different")
        text = changed
    path.write_text(text)


def for_one_architecture(setup: str, architecture: str) -> str:
    """Their setup.py lists the architectures one by one; with a single one, the build is ten times faster."""
    pattern = r'(?m)^(\s*)cc_flag\.append\("-gencode"\)\n\s*cc_flag\.append\("arch=compute_(\d+),.*\n'

    def keep(found: re.Match[str]) -> str:
        return found[0] if found[2] == architecture else f"{found[1]}pass\n"

    return re.sub(pattern, keep, setup)
