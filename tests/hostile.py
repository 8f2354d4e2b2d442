"""Runs `arm` on hostile files: bombs, false sizes, special files, links and unusual metadata.

A case creates files in its own folder and names the `arm` command to run on them. `run_cases` runs each
case in a child process with a limit on memory and time, and returns the results.
`python tests/hostile.py [NAME...]` runs the cases and prints a JSON line for each.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import hostile_checkpoints  # noqa: F401  # registers its cases
import hostile_places  # noqa: F401
from hostile_cases import CASES, Words

from arm_cli.main import main as arm

ADDRESS_SPACE = 6 * 2**30
"""Limit on the address space of a child, bytes; thread pools and memory maps take 2 GB of it."""
RESIDENT = 700 * 2**20
"""Largest resident memory of a child that passes, bytes; starting takes 100 MB."""
SECONDS = 60
MAX_OUTPUT = 20_000
"""Largest output that passes, bytes."""

LONG = {
    "a_header_of_the_largest_size",
    "config.json with a million directions",
    "metrics of millions of rows",
}
"""Cases that take several seconds; `make test` skips them."""


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    code: int
    """Exit code; minus the signal that ended it."""
    seconds: float
    resident: int
    """Largest resident memory, bytes."""
    output: str

    @property
    def problem(self) -> str | None:
        """The reason why this is not a refusal in one line, or None."""
        lines = [line for line in self.output.splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("Warning: ")]
        if "Traceback" in self.output:
            return "a traceback"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if self.code == 2 and (len(lines) != 1 or not lines[0].startswith("Error: ")):
            return "not one line"
        if len(self.output) > MAX_OUTPUT:
            return f"output of {len(self.output)} characters"
        if any(not (c.isprintable() or c == "\n") for c in self.output):
            return "control characters in the output"
        if self.resident > RESIDENT:
            return f"{self.resident >> 20} MiB of memory"
        return f"{self.seconds:.0f} s" if self.seconds > SECONDS else None


def run_cases(names: list[str], folder: Path) -> dict[str, Outcome]:
    """Run cases, each in a process forked from this one; for a process that has no threads."""
    outcomes = {}
    for number, name in enumerate(names):
        place = folder / str(number)
        place.mkdir()
        words = CASES[name](place)
        outcomes[name] = _run(words, place / "output")
    return outcomes


def _run(words: Words, output: Path) -> Outcome:
    started = time.monotonic()
    child = os.fork()
    if not child:
        descriptor = os.open(output, os.O_CREAT | os.O_WRONLY)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(2 * SECONDS)
        code = 70
        try:
            arm(words, prog_name="arm")
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status, usage = os.wait4(child, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    return Outcome(
        os.waitstatus_to_exitcode(status),
        time.monotonic() - started,
        usage.ru_maxrss * unit,
        output.read_bytes().decode(errors="replace"),
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run_cases(sys.argv[1:] or list(CASES), Path(scratch))
    for name, found in outcomes.items():
        cost = f"{found.seconds:.1f} s, {found.resident >> 20} MiB"
        print(json.dumps([name, found.problem, cost, found.output[:400]]))


if __name__ == "__main__":
    main()
