"""`arm report RUN`: curves, evaluations, sample predictions, environment and recipe of a run, as one file."""

from __future__ import annotations

from pathlib import Path

import click

from arm_cli.options import EngineChoice, engine_options
from arm_cli.show import echo


@click.command(short_help="Write a page about a run.")
@click.argument("run")
@click.option("--out", metavar="FILE", help="The page; by default RUN/report.html.")
@click.option(
    "--samples",
    type=click.IntRange(min=0, max=48),
    default=12,
    show_default=True,
    help="Images with predictions; 0 for a page without, which needs neither images nor an engine.",
)
@engine_options
def report(run: str, out: str | None, samples: int, engine: EngineChoice) -> None:
    """Write a page about RUN: one HTML file without network requests.

    It shows loss, learning rate, gradient norm and throughput over steps and over hours, the evaluations,
    sample predictions on images of the run, the environment, the recipe with its differences from the one
    that the run was started from, and the commands that repeat the run. The samples of a pretraining run are
    its predicted clusters at each saved step (training.keep_every keeps more of them), those of a classifier
    are right and wrong answers.
    """
    from arm_cli.report.page import write_up
    from arm_cli.report.samples import Samples, take_samples
    from arm_cli.runs.facts import open_run
    from arm_core.files.atomic import new_file, write_text
    from arm_core.training.run_folder import REPORT

    history = open_run(run)
    found = Samples(note="Samples were not requested (--samples 0).")
    if samples:
        try:
            found = take_samples(history, samples, engine)
        except (ValueError, OSError) as error:  # the rest of the page needs neither images nor checkpoints
            found = Samples(note=f"No samples: {error}.")
            echo(f"Warning: the page has no samples: {error}", err=True)
    text = write_up(history, found)
    target = Path(out) if out is not None else history.path / REPORT
    with new_file(target, force=True) as draft:
        write_text(draft, text)
    echo(f"wrote {target}", err=True)
