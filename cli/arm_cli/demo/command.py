"""`arm demo`: the method of the paper at small scale in a few minutes, with a report."""

from __future__ import annotations

import atexit
import os
import sys
import time
from pathlib import Path

import click

from arm_cli.options import EngineChoice, engine_options

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell reports it."""


@click.command()
@click.option("--out", default="demo", show_default=True, help="Folder for the runs and the report.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each kind.")
@engine_options
def demo(out: str, seeds: int, engine: EngineChoice) -> None:
    """Pretrain a small ARM on digits, finetune it, compare it with the same network from scratch.

    Takes two to three minutes on two CPU cores, needs no network, and writes OUT/report.html. If
    onnxruntime-web is available (make browser-runtime), OUT/try.html is a page to draw digits on. If the
    folder OUT already exists, OUT-2, OUT-3, ... is used instead.
    """
    from arm_cli.demo.stages import Stages

    began = time.monotonic()
    folder, interrupted = _unused(Path(out)), list[bool]()
    # Registered before all others, so called after them.
    atexit.register(lambda: _leave() if interrupted else None)
    try:
        Stages(folder, engine, seeds).run(began)
    except KeyboardInterrupt:
        kept = f"; {folder} holds incomplete runs and can be deleted" if folder.exists() else ""
        click.echo(f"Stopped{kept}.", err=True)
        interrupted.append(True)
        raise SystemExit(INTERRUPTED) from None


def _leave() -> None:
    """Exit without unloading the engine, which takes seconds on a busy machine."""
    sys.stdout.flush()
    os._exit(INTERRUPTED)


def _unused(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
