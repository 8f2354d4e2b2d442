"""Settings that a run fixes and records, so that its bits do not depend on the number of cores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from arm_core.engine.protocol import EngineOptions

DETERMINISTIC, THREADS = "deterministic", "threads"
"""Keys of a session's record."""


def pin(options: EngineOptions, recorded: Mapping[str, str]) -> EngineOptions:
    """Options of a deterministic run with a fixed number of CPU threads; other options are unchanged.

    recorded: the record of the run's last session, empty for a new run. A deterministic run stays so,
    with the number of threads at its start; ValueError if the options request another number.
    """
    resumed = recorded.get(DETERMINISTIC) == str(True)
    if not (options.deterministic or resumed):
        return options
    threads = options.threads or os.cpu_count() or 1
    if resumed:
        fixed = int(recorded[THREADS])
        if options.threads not in (None, fixed):
            raise ValueError(
                f"--threads {options.threads}: this run is deterministic with {fixed} threads; "
                f"pass --threads {fixed} or drop the option"
            )
        threads = fixed
    return replace(options, deterministic=True, threads=threads)
