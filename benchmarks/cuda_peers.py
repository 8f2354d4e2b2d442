"""What the CUDA benchmarks are held against: the mixer as the official code arranges it, on mamba-ssm.

The official code keeps channels before tokens. For each direction it flips or permutes the projected
tokens, convolves them, projects dt, B and C, scans with the gate inside, and turns the result back; the
directions are averaged at the end. `official_mixer` does the same on the parameters of our mixer.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the field's name for it)
from torch import Tensor

from arm_cuda import layers, mamba_ssm

BUILT = Path(__file__).parent.parent / "build/peers"
"""Where peers that were built here are installed."""

ScanFunction = Callable[..., Tensor]


def plain_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = True,
) -> Tensor:  # fmt: skip
    """mamba-ssm's public signature as a torch loop, for runs of the benchmark without it."""
    assert delta_bias is not None
    assert delta_softplus
    step = F.softplus(delta.float() + delta_bias[:, None])
    per_group = u.shape[1] // B.shape[1]
    B, C = (t.float().repeat_interleave(per_group, dim=1) for t in (B, C))
    h, ys = torch.zeros(*u.shape[:2], A.shape[1], device=u.device), []
    for s, x, b, c in zip(step.unbind(-1), u.float().unbind(-1), B.unbind(-1), C.unbind(-1), strict=True):
        h = torch.exp(s[..., None] * A) * h + (s * x)[..., None] * b
        ys.append((h * c).sum(-1))
    y = torch.stack(ys, -1) + D[:, None] * u.float()
    return (y if z is None else y * F.silu(z.float())).to(u.dtype)


def plain_conv(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "silu") -> Tensor:
    assert activation == "silu"
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))


def peer_functions(device: str) -> tuple[ScanFunction, ScanFunction, str]:
    """Scan and convolution of the peers, or loops in torch; and in words which."""
    if reason := mamba_ssm.unusable(device):
        return plain_scan, plain_conv, f"torch loops in place of mamba-ssm: {reason}"
    if reason := mamba_ssm._conv_unusable():
        return mamba_ssm._selective_scan_fn(), plain_conv, f"mamba-ssm; torch's conv1d: {reason}"
    return mamba_ssm._selective_scan_fn(), mamba_ssm._causal_conv1d(), "mamba-ssm and causal-conv1d"


def official_mixer(
    mixer: layers.Mixer, x: Tensor, order: Tensor, *, scan: ScanFunction, conv: ScanFunction
) -> Tensor:
    """The mixer's result, (B, T, D), one direction after the other; see the module's text.

    Directions come in pairs, the second of each being the first one backwards.
    """
    batch, length, width = x.shape
    rank, states, _ = mixer.split
    tokens = F.linear(x, mixer.in_proj.weight).transpose(1, 2).contiguous()  # (B, 2 D, T)
    path, total = tokens, torch.zeros((), device=x.device)
    for k in range(mixer.D.shape[0]):
        if k % 2:
            path = path.flip(-1)
        elif k:
            path = tokens[:, :, order[k].long()]
        u, z = path.chunk(2, dim=1)
        weight, bias = mixer.conv.weight[k].to(u.dtype), mixer.conv.bias[k].to(u.dtype)
        u = conv(u, weight, bias, activation="silu")
        low = F.linear(u.transpose(1, 2).reshape(batch * length, width), mixer.x_proj.weight[k])
        dt = (mixer.dt_proj.weight[k].to(low.dtype) @ low[:, :rank].t()).view(width, batch, length)
        B, C = (
            part.view(batch, length, states).transpose(1, 2).unsqueeze(1).contiguous()
            for part in low[:, rank:].split(states, dim=1)
        )
        A = -torch.exp(mixer.A_log[k].float())
        y = scan(
            u, dt.transpose(0, 1).contiguous(), A, B, C, mixer.D[k].float(), z=z,
            delta_bias=mixer.dt_proj.bias[k].float(), delta_softplus=True,
        )  # fmt: skip
        y = y.flip(-1) if k % 2 else y
        total = total + (y if k < 2 else y[:, :, order[k - k % 2].long().argsort()])
    return F.linear((total / mixer.D.shape[0]).transpose(1, 2), mixer.out_proj.weight)


@contextmanager
def officially_arranged(device: str) -> Iterator[None]:
    """Models run inside use `official_mixer`."""
    scan, conv, _ = peer_functions(device)
    ours = layers.Mixer.forward

    def forward(self: layers.Mixer, x: Tensor, order: Tensor) -> Tensor:
        return official_mixer(self, x, order, scan=scan, conv=conv)

    layers.Mixer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        layers.Mixer.forward = ours  # type: ignore[method-assign]


def build_peers(sources: Path) -> str:
    """Build mamba-ssm and causal-conv1d from sdists, for this machine's GPU alone; says what came of it.

    sources: a folder with `mamba_ssm-*.tar.gz` and `causal_conv1d-*.tar.gz`. Needs nvcc, not the network.
    """
    if BUILT.exists():
        sys.path.insert(0, str(BUILT))
    importlib.invalidate_caches()
    if mamba_ssm.unusable("cuda") is None:
        return "mamba-ssm was there"
    archives = [path for name in ("causal_conv1d", "mamba_ssm") for path in sources.glob(f"{name}-*.tar.gz")]
    if not archives or not torch.cuda.is_available():
        return f"nothing to build: {len(archives)} sdists in {sources}, {torch.cuda.device_count()} GPU(s)"
    major, minor = torch.cuda.get_device_capability()
    for archive in archives:
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(archive) as tar:
                tar.extractall(folder, filter="data")
            (source,) = Path(folder).iterdir()
            setup = source / "setup.py"
            setup.write_text(for_one_architecture(setup.read_text(), f"{major}{minor}"))
            command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
            forced = {f"{name}_FORCE_BUILD": "TRUE" for name in ("MAMBA", "CAUSAL_CONV1D")}
            done = subprocess.run(
                [*command, "--no-index", "--upgrade", "--target", str(BUILT), str(source)],
                env={**os.environ, **forced, "MAX_JOBS": str(os.cpu_count())},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                return f"{archive.name} did not build: {done.stderr.strip().splitlines()[-1]}"
    sys.path.insert(0, str(BUILT))
    importlib.invalidate_caches()
    mamba_ssm._scan_unusable.cache_clear()
    mamba_ssm._conv_unusable.cache_clear()
    return f"built {', '.join(archive.name for archive in archives)}"


def for_one_architecture(setup: str, architecture: str) -> str:
    """Their setup.py lists the architectures one by one; without all but one it builds ten times faster."""
    pattern = r'(?m)^(\s*)cc_flag\.append\("-gencode"\)\n\s*cc_flag\.append\("arch=compute_(\d+),.*\n'

    def keep(found: re.Match[str]) -> str:
        return found[0] if found[2] == architecture else f"{found[1]}pass\n"

    return re.sub(pattern, keep, setup)


def versions() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "mamba-ssm", "causal-conv1d", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
