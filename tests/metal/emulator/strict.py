"""The strict pass: clang reads the generated source with address spaces as attributes and warnings as errors.

Metal is C++14 with address spaces; g++ cannot tell `device` from `thread` memory, and does not mind a
double literal, which Metal does not have. clang can and does.
"""

from __future__ import annotations

import platform
import re
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


OLDEST = 17
"""The first clang whose __bf16 computes."""
NEEDED = f"needs Linux and clang++ {OLDEST} or newer"


@cache
def compiler() -> str | None:
    """The system's clang++, or None if it is missing or too old."""
    if platform.system() != "Linux":
        return None  # Apple's clang numbers its versions otherwise and has one target
    names = ("clang++", *(f"clang++-{version}" for version in range(30, OLDEST - 1, -1)))
    for found in filter(None, map(shutil.which, names)):
        words = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        version = re.search(r"clang version (\d+)", words)
        if version and int(version[1]) >= OLDEST:
            return found
    return None


def complaints(launch: Launch, standard: str = "c++14") -> str:
    """The errors and warnings of clang for the source of a launch; empty if there are none."""
    command = [str(compiler()), f"-std={standard}", "-fsyntax-only", *WARNINGS, f"-I{HERE / 'include'}"]
    text = strict_program(launch)
    done = subprocess.run(
        [*command, "-x", "c++", "-"], input=text, capture_output=True, text=True, check=False
    )
    return done.stderr
