"""Compiling a translated kernel with g++, once for each text."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from emulator.trace import Launch
from emulator.translate import HERE, program

FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-w",
    "-ffp-contract=off",  # a fused product is one only where the source says fma
    "-ftrivial-auto-var-init=pattern",  # uninitialised registers are huge numbers and not random
    "-U_FORTIFY_SOURCE",  # its longjmp refuses to leave a fiber's stack
)  # fmt: skip


def missing() -> str | None:
    """The reason why kernels cannot be emulated here, or None."""
    if platform.system() != "Linux":
        return "the Metal emulator needs Linux"
    if shutil.which("g++") is None:
        return "the Metal emulator needs g++"
    return None


@cache
def _folder() -> Path:
    folder = Path(tempfile.gettempdir(), f"arm-vision-metal-emulator-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


@cache
def build(launch: Launch, flags: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The launch as a loaded library. Raises RuntimeError with g++'s message if it does not compile."""
    options = [*FLAGS, *flags, *_native()]
    shim = (HERE / "include/metal_stdlib").read_text()
    runtime = _compiled((HERE / "runtime.cpp").read_text(), shim, [*options, "-c"], "o")
    link = [*options, "-shared", "-Wl,-Bsymbolic", str(runtime)]
    return ctypes.CDLL(str(_compiled(program(launch), shim, link, "so")))


def _compiled(text: str, shim: str, options: list[str], suffix: str) -> Path:
    """The file that g++ compiles from a text; `shim` is the header that it includes."""
    key = hashlib.sha256("\0".join([text, shim, *options]).encode()).hexdigest()[:24]
    result = _folder() / f"{key}.{suffix}"
    if not result.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            source, compiled = Path(folder, "source.cpp"), Path(folder, "compiled")
            source.write_text(text)
            command = ["g++", f"-I{HERE / 'include'}", str(source), *options, "-o", str(compiled)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the kernel does not compile:\n{done.stderr[:4000]}")
            compiled.rename(result)
    return result


def _native() -> list[str]:
    """With a hardware fused multiply-add, the emulated one does not call the C library."""
    return ["-mfma"] if platform.machine() == "x86_64" and " fma " in _cpuinfo() else []


@cache
def _cpuinfo() -> str:
    return Path("/proc/cpuinfo").read_text()
