"""The machine and the versions of a measurement, in two lines."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path


def machine() -> str:
    """Processor, the cores this process may use, operating system."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        if cpuinfo.exists()
        else []
    )
    name = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {platform.system()} {platform.release().split('-')[0]}"


def commit() -> str:
    """The checkout's commit; with "-dirty" if files differ from it."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def header(*packages: str) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"machine   {machine()}\nversions  Python {platform.python_version()}, {versions}; commit {commit()}"
    )
