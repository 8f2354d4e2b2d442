"""`arm demo`: the method of the paper at small scale in two minutes, with a report."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arm_cli.options import EngineChoice, announce, engine_options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from arm_cli.demo.report.demonstration import Comparison, Parity
    from arm_cli.demo.runs import Job, Rows
    from arm_core.data.sources import ImageSource
    from arm_core.engine.protocol import Array, Engine
    from arm_core.recipe.recipe import Recipe

LABELS = (20, 50)
"""Labelled images per class in the two comparisons."""

ARMS = {"pretrained": "finetune-digits", "from scratch": "scratch-digits"}
"""Starting points, and the recipe of each, chosen on validation images (`benchmarks/tune_demo.py`)."""

PICTURES = 12
"""Number of test images in the report."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell reports it."""

PARITY_IMAGES = 64
"""Number of test images in the comparison of the engines."""


@click.command()
@click.option("--out", default="demo", show_default=True, help="Folder for the runs and the report.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each kind.")
@engine_options
def demo(out: str, seeds: int, engine: EngineChoice) -> None:
    """Pretrain a small ARM on digits, finetune it, compare it with the same network from scratch.

    Takes about two minutes on two CPU cores, needs no network, and writes OUT/report.html. If
    onnxruntime-web is available (make browser-runtime), OUT/try.html is a page to draw digits on. If the
    folder OUT already exists, OUT-2, OUT-3, ... is used instead.
    """
    began = time.monotonic()
    folder, interrupted = _unused(Path(out)), list[bool]()
    # Registered before all others, so called after them.
    atexit.register(lambda: _leave() if interrupted else None)
    try:
        _Demo(folder, engine, seeds).run(began)
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


@contextmanager
def _stage(text: str) -> Iterator[None]:
    """Print the name of a stage, and its duration at the end."""
    click.secho(text, bold=True)
    began = time.monotonic()
    yield
    click.echo(f"  {time.monotonic() - began:.0f} s")


class _Demo:
    """The stages of the demonstration, in order; each prints its results."""

    def __init__(self, folder: Path, choice: EngineChoice, seeds: int) -> None:
        from arm_cli.demo.runs import Job, training_digits
        from arm_core.data.digits import Digits
        from arm_core.recipe.recipe import load_recipe

        self.folder, self.choice, self.seeds = folder, choice, range(seeds)
        self.backend = choice.find()
        self.pretraining = Job(folder=folder / "pretrain", recipe=load_recipe("pretrain-digits"))
        self.train = training_digits(self.pretraining.recipe)
        self.test = Digits("test", size=self.pretraining.recipe.spec(None).image_size)

    def run(self, began: float) -> None:
        from arm_cli.demo.report.demonstration import Demonstration, write_up
        from arm_core.engine.ranks import ALONE
        from arm_core.model.spec import PretrainSpec

        jobs = [self._job(*key) for key in self._keys()]
        text = f"Pretraining on {len(self.train)} digits without labels, and {len(jobs)} finetuning runs"
        with _stage(f"{text}: {len(self.seeds)} seeds, {' and '.join(map(str, LABELS))} labels per class"):
            rows = self._run_all(jobs)
        with _stage("Predicting the next clusters of test images"):
            model = self._engine(self.pretraining.folder)
            announce(self.backend, model, ALONE)
            every = range(0, len(self.test), len(self.test) // PICTURES)[:PICTURES]
            images = _images(self.test, self.pretraining.recipe, every)[0]
            prediction = model.forward(images)["prediction"]
        with _stage("Measuring simple methods on the same pixels"):
            comparisons = [self._compare(labels, rows) for labels in LABELS]
        with _stage("Comparing the two engines"):
            parity = self._parity()
        with _stage("Writing a page to draw digits on"):
            self._write_try_page()
        losses = [row for row in rows[self.pretraining.folder] if "loss" in row]
        assert isinstance(model.spec, PretrainSpec)
        page = write_up(
            Demonstration(
                spec=model.spec,
                loss_steps=[row["step"] for row in losses],
                losses=[row["loss"] for row in losses],
                images=images,
                prediction=prediction,
                mean=self.pretraining.recipe.augmentation.mean,
                std=self.pretraining.recipe.augmentation.std,
                comparisons=comparisons,
                rates={arm: _rates(self._job(arm, LABELS[0], 0).recipe) for arm in ARMS},
                parity=parity,
                facts=self._facts(began, model),
            )
        )
        report = self.folder / "report.html"
        page.write(report)
        click.echo(f"\n{time.monotonic() - began:.0f} s in total. Report: ", nl=False)
        click.secho(str(report.resolve()), bold=True)
        click.echo(f"To classify an image: arm predict {self._classifier()} IMAGE")

    def _write_try_page(self) -> None:
        """Write `try.html` if onnx and onnxruntime-web are installed; else print which one is missing."""
        from arm_cli.export import write_drawing_page
        from arm_cli.opening import open_model

        page = self.folder / "try.html"
        try:
            write_drawing_page(open_model(str(self._classifier())), page, "Draw a digit")
        except ValueError as error:
            click.echo(f"  skipped: {error}")
        else:
            click.echo(f"  {page}: open it in a browser")

    def _keys(self) -> list[tuple[str, int, int]]:
        """Arm, labels per class and seed of every finetuning run."""
        return [(arm, labels, seed) for labels in LABELS for seed in self.seeds for arm in ARMS]

    def _job(self, arm: str, labels: int, seed: int) -> Job:
        from arm_cli.demo.runs import Job
        from arm_core.recipe.recipe import load_recipe, override

        changes = [f"data.labels_per_class={labels}", f"training.seed={seed}"]
        return Job(
            folder=self.folder / f"{arm.replace(' ', '-')}-{labels}-labels-seed-{seed}",
            recipe=override(load_recipe(ARMS[arm]), changes),
            start=self.pretraining.folder if arm == "pretrained" else None,
            evaluate_on="test",
        )

    def _run_all(self, jobs: list[Job]) -> dict[Path, Rows]:
        from arm_cli.demo.runs import run_all

        def done(job: Job, rows: Rows) -> None:
            last = rows[-1]
            if job is self.pretraining:
                text = f"loss {rows[0]['loss']:.3f} -> {last['loss']:.3f}"
            else:
                text = f"{100 * last['eval_top1']:.1f} % of the test images after {last['step']} steps"
            click.echo(f"  {job.folder.name}: {text}")

        return run_all(self.pretraining, jobs, self.backend.name, self.choice.options(), done)

    def _compare(self, labels: int, rows: dict[Path, Rows]) -> Comparison:
        """Curves of both starting points for one number of labels, and the baselines on the same images."""
        import numpy as np

        from arm_cli.demo.report.demonstration import Comparison
        from arm_cli.demo.runs import training_digits

        curves = {
            arm: [
                {
                    r["step"]: 100 * r["eval_top1"]
                    for r in rows[self._job(arm, labels, seed).folder]
                    if "eval_top1" in r
                }
                for seed in self.seeds
            ]
            for arm in ARMS
        }
        steps = list(next(iter(curves.values()))[0])
        baselines = []
        for seed in self.seeds:
            recipe = self._job("pretrained", labels, seed).recipe
            train = training_digits(recipe)
            visits = max(1, recipe.training.batch_size * steps[-1] // len(train))
            baselines.append(_baselines(train, self.test, recipe, visits))
        for arm, runs in curves.items():
            accuracy = np.mean([run[steps[-1]] for run in runs])
            click.echo(f"  {labels} labels per class, {arm}: {accuracy:.1f} % after {steps[-1]} steps")
        means = {name: np.mean([found[name] for found in baselines]) for name in baselines[0]}
        text = ", ".join(f"{name} {mean:.1f} %" for name, mean in means.items())
        click.echo(f"  {labels} labels per class, raw pixels: {text}")
        return Comparison(
            labels=labels,
            steps=steps,
            arms={arm: np.array([list(run.values()) for run in runs]) for arm, runs in curves.items()},
            baselines={name: np.array([found[name] for found in baselines]) for name in baselines[0]},
        )

    def _engine(self, folder: Path) -> Engine:
        from arm_cli.opening import open_model
        from arm_core.engine.protocol import TrainingState

        opened = open_model(str(folder))
        state, options = TrainingState(parameters=opened.parameters), self.choice.options()
        return self.backend.create_engine(opened.spec, state, options=options)

    def _classifier(self) -> Path:
        return self._job("pretrained", LABELS[-1], 0).folder

    def _parity(self) -> Parity | None:
        """Compare a finetuned classifier in the other engine: logits, gradients, classes."""
        import numpy as np

        from arm_cli.demo.report.demonstration import Parity
        from arm_core.engine.protocol import Batch
        from arm_core.engine.registry import installed_backends

        others = [b for n, b in installed_backends().items() if n != self.backend.name and not b.missing()]
        if not others:
            click.echo("  only one engine is installed; nothing to compare")
            return None
        recipe = self._job("pretrained", LABELS[-1], 0).recipe
        images, labels = _images(self.test, recipe, range(PARITY_IMAGES))
        batch = Batch(images=images, targets=np.eye(10, dtype=np.float32)[labels])
        engine = self._engine(self._classifier())
        other = others[0].create_engine(engine.spec, engine.export_state())
        logits, other_logits = engine.forward(images)["logits"], other.forward(images)["logits"]
        gradients, other_gradients = engine.loss_and_gradients(batch)[1], other.loss_and_gradients(batch)[1]
        parity = Parity(
            engines=(self.backend.version(), others[0].version()),
            logits=_difference(logits, other_logits),
            gradient=max(_difference(g, other_gradients[name]) for name, g in gradients.items()),
            same_class=float((logits.argmax(1) == other_logits.argmax(1)).mean()),
        )
        click.echo(
            f"  {' and '.join(parity.engines)}: largest relative difference of a logit "
            f"{parity.logits:.1e}, of a gradient {parity.gradient:.1e}"
        )
        return parity

    def _facts(self, began: float, engine: Engine) -> dict[str, str]:
        import os
        import platform

        return {
            "engine": f"{self.backend.version()}, {engine.device}, scan {engine.scan}",
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
            "Python": platform.python_version(),
            "time": f"{time.monotonic() - began:.0f} s",
            "data": "handwritten digits of scikit-learn (UCI Optical Recognition of Handwritten Digits, "
            "CC BY 4.0), distorted by seed; training, validation and test digits do not overlap",
            "runs and recipes": str(self.folder),
        }


def _difference(a: Array, b: Array) -> float:
    """Largest difference, relative to the largest value."""
    return float(abs(a - b).max() / max(abs(a).max(), 1e-30))


def _images(source: ImageSource, recipe: Recipe, indices: range) -> tuple[Array, npt.NDArray[np.int64]]:
    """Images as the evaluation prepares them, (B, H, W, 3), and their labels."""
    import numpy as np

    size = recipe.spec(len(source.classes)).image_size
    items = [source.item(index) for index in indices]
    images = np.stack([recipe.eval_transform(item, size) for item in items])
    return images, np.array([item.label for item in items])


def _baselines(train: ImageSource, test: ImageSource, recipe: Recipe, visits: int) -> dict[str, float]:
    """Accuracy in percent of methods on raw pixels, with `visits` random variants of every training image."""
    import numpy as np

    from arm_cli.demo.baselines import nearest_class_mean, nearest_neighbour

    size = recipe.spec(len(train.classes)).image_size
    items = [train.item(index, epoch) for epoch in range(visits) for index in range(len(train))]
    images = np.stack([recipe.eval_transform(item, size) for item in items])
    labels = np.array([item.label for item in items])
    queries, truth = _images(test, recipe, range(len(test)))
    return {
        "nearest neighbour": 100 * float((nearest_neighbour(images, labels, queries) == truth).mean()),
        "nearest class mean": 100 * float((nearest_class_mean(images, labels, queries) == truth).mean()),
    }


def _rates(recipe: Recipe) -> str:
    decay = recipe.optimizer.layer_decay
    return f"{recipe.lr:.2g}" + (f" with layer decay {decay:g}" if decay < 1 else "")
