"""The strict pass: clang reads the generated source with address spaces as attributes and warnings as errors.

Metal is C++14 with address spaces; g++ cannot tell `device` from `thread` memory, and does not mind a
double literal, which Metal has not. clang can and does.
"""

from __future__ import annotations

import shutil
import subprocess
from functools import cache

from emulator.trace import Launch
from emulator.translate import HERE, strict_program

WARNINGS = (
    "-Wall", "-Wextra", "-Werror", "-Wconditional-uninitialized", "-Wdouble-promotion",
    "-Wimplicit-int-conversion", "-Wshorten-64-to-32", "-Wshadow",
    "-Wno-unknown-attributes", "-Wno-ignored-attributes",  # Metal's own, such as [[buffer(0)]]
    "-Wno-c++17-extensions", "-Wno-unused-parameter",
)  # fmt: skip


@cache
def compiler() -> str | None:
    """A clang++ of the system that is recent enough to know __bf16 on this machine."""
    return next(
        filter(None, map(shutil.which, ("clang++", *(f"clang++-{v}" for v in range(30, 16, -1))))), None
    )


def complaints(launch: Launch, standard: str = "c++14") -> str:
    """What clang has against the source of a launch; empty where it has nothing."""
    command = [str(compiler()), f"-std={standard}", "-fsyntax-only", *WARNINGS, f"-I{HERE / 'include'}"]
    text = strict_program(launch)
    done = subprocess.run(
        [*command, "-x", "c++", "-"], input=text, capture_output=True, text=True, check=False
    )
    return done.stderr
