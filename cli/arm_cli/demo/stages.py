"""The stages of the demonstration: training, measuring and writing the report."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arm_cli.options import EngineChoice, announce

if TYPE_CHECKING:
    from arm_cli.demo.report.contents import Comparison, Demonstration, Parity
    from arm_cli.sweep.folder import Result
    from arm_cli.sweep.members import Member
    from arm_core.engine.protocol import Engine
    from arm_core.recipe.recipe import Recipe

LABELS = (10, 20)
"""Labelled images per class in the two comparisons."""

ARMS = {"pretrained": "finetune-digits", "from scratch": "scratch-digits"}
"""Starting points, and the recipe of each, chosen on validation images (`benchmarks/tune_demo.py`)."""

PICTURES = 6
"""Number of test images whose clusters are predicted."""

FILES = 20
"""Number of test digits that are saved as PNG files."""

PARITY_IMAGES = 64
"""Number of test images in the comparison of the engines."""

MOST_JOBS = 4
"""More would only wait for the pretraining run."""


@contextmanager
def _stage(text: str) -> Iterator[None]:
    """Print the name of a stage, and its duration at the end."""
    click.secho(text, bold=True)
    began = time.monotonic()
    yield
    click.echo(f"  {time.monotonic() - began:.0f} s")


class Stages:
    """The stages in order; each prints its results."""

    def __init__(self, path: Path, choice: EngineChoice, seeds: int) -> None:
        from arm_cli.demo.measure import test_digits, training_digits
        from arm_cli.sweep.folder import SweepFolder
        from arm_cli.sweep.members import Member
        from arm_core.recipe.recipe import load_recipe

        self.folder, self.choice, self.seeds = SweepFolder(path), choice, range(seeds)
        self.backend = choice.find()
        self.pretraining = Member(name="pretrain", recipe=load_recipe("pretrain-digits"))
        self.train = training_digits(self.pretraining.recipe)
        self.test = test_digits(self.pretraining.recipe)

    def run(self, began: float) -> None:
        jobs = [
            self._job(arm, labels, seed) for labels in LABELS for seed in self.seeds for arm in reversed(ARMS)
        ]
        text = f"Pretraining on {len(self.train)} digits without labels, and {len(jobs)} finetuning runs"
        with _stage(f"{text}: {len(self.seeds)} seeds, {' and '.join(map(str, LABELS))} labels per class"):
            pixels = self._baselines()  # while the runs train
            self._run_all([self.pretraining, *jobs])
        with _stage("Measuring simple methods on the same pixels"):
            comparisons = [self._compare(labels, pixels()) for labels in LABELS]
        with _stage("Comparing the two engines"):
            parity = self._parity()
        with _stage("Writing a page to draw digits on"):
            self._write_try_page()
        with _stage("Writing the report"):
            command = self._save_digits()
            contents = self._contents(began, comparisons, parity, command)
            report = self._write(contents)
        click.echo(f"\n{time.monotonic() - began:.0f} s in total. Report: ", nl=False)
        click.secho(str(report.resolve()), bold=True)
        click.echo(f"To classify images: {command}")

    def _job(self, arm: str, labels: int, seed: int) -> Member:
        from arm_cli.sweep.members import Member
        from arm_core.recipe.recipe import load_recipe, override

        changes = [f"data.labels_per_class={labels}", f"training.seed={seed}"]
        return Member(
            name=f"{arm.replace(' ', '-')}-{labels}-labels-seed-{seed}",
            recipe=override(load_recipe(ARMS[arm]), changes),
            after=self.pretraining.name if arm == "pretrained" else None,
            evaluate_on="test",
        )

    def _run_all(self, jobs: list[Member]) -> None:
        from arm_cli.sweep.workers import Event, on_cpu, run_members

        options = self.choice.options()
        cpu = on_cpu(self.backend.name, options)

        def report(event: Event) -> None:
            if event.result is None:
                return
            if event.result.error:
                raise click.ClickException(f"{event.member}: {event.result.error}")
            click.echo(f"  {event.member}: {self._in_short(event.member, event.result)}")

        run_members(
            self.folder,
            jobs,
            self.backend.name,
            options,
            jobs=min(os.cpu_count() or 1, MOST_JOBS) if cpu else 1,
            report=report,
            save_on_interrupt=False,
        )

    def _in_short(self, name: str, result: Result) -> str:
        if name == self.pretraining.name:
            losses = [row["loss"] for row in self._rows(name) if "loss" in row]
            return f"loss {losses[0]:.3f} -> {losses[-1]:.3f}"
        return f"{100 * result.metrics['eval_top1']:.1f} % of the test images after {result.steps} steps"

    def _rows(self, name: str) -> list[dict[str, float]]:
        from arm_core.training.records import ignore, read_rows
        from arm_core.training.run_folder import METRICS

        return read_rows(self.folder.run(name) / METRICS, ignore)

    def _baselines(self) -> Callable[[], dict[tuple[int, int], dict[str, float]]]:
        """Start to measure methods on raw pixels; the function that is returned waits for the results.

        By labels per class and seed: accuracy by the name of the method.
        """
        from arm_cli.demo.measure import baselines, training_digits

        found: dict[tuple[int, int], dict[str, float]] = {}

        def measure() -> None:
            for labels, seed in itertools.product(LABELS, self.seeds):
                recipe = self._job("pretrained", labels, seed).recipe
                train = training_digits(recipe)
                steps = int(recipe.training.length.amount)
                visits = max(1, recipe.training.batch_size * steps // len(train))
                found[labels, seed] = baselines(train, self.test, recipe, visits)

        # A daemon, so that Ctrl-C does not wait for it.
        thread = threading.Thread(target=measure, daemon=True)
        thread.start()

        def wait() -> dict[tuple[int, int], dict[str, float]]:
            thread.join()
            return found

        return wait

    def _compare(self, labels: int, pixels: dict[tuple[int, int], dict[str, float]]) -> Comparison:
        """Curves of both starting points for one number of labels, and the baselines on the same images."""
        import numpy as np

        from arm_cli.demo.report.contents import Comparison

        curves = {
            arm: [
                {
                    int(r["step"]): 100 * r["eval_top1"]
                    for r in self._rows(self._job(arm, labels, seed).name)
                    if "eval_top1" in r
                }
                for seed in self.seeds
            ]
            for arm in ARMS
        }
        steps = list(next(iter(curves.values()))[0])
        found = [pixels[labels, seed] for seed in self.seeds]
        for arm, runs in curves.items():
            accuracy = np.mean([run[steps[-1]] for run in runs])
            click.echo(f"  {labels} labels per class, {arm}: {accuracy:.1f} % after {steps[-1]} steps")
        means = {name: np.mean([one[name] for one in found]) for name in found[0]}
        text = ", ".join(f"{name} {mean:.1f} %" for name, mean in means.items())
        click.echo(f"  {labels} labels per class, raw pixels: {text}")
        return Comparison(
            labels=labels,
            steps=steps,
            arms={arm: np.array([list(run.values()) for run in runs]) for arm, runs in curves.items()},
            baselines={name: np.array([one[name] for one in found]) for name in found[0]},
        )

    def _engine(self, name: str) -> Engine:
        from arm_cli.opening import open_model
        from arm_core.engine.protocol import TrainingState

        opened = open_model(str(self.folder.run(name)))
        state, options = TrainingState(parameters=opened.parameters), self.choice.options()
        return self.backend.create_engine(opened.spec, state, options=options)

    def _classifier(self) -> Member:
        return self._job("pretrained", LABELS[-1], 0)

    def _parity(self) -> Parity | None:
        """Compare a finetuned classifier in the other engine."""
        from arm_cli.demo.measure import images_of, parity_of
        from arm_core.engine.registry import installed_backends

        others = [b for n, b in installed_backends().items() if n != self.backend.name and not b.missing()]
        if not others:
            click.echo("  only one engine is installed; nothing to compare")
            return None
        images = images_of(self.test, self._classifier().recipe, range(PARITY_IMAGES))
        parity = parity_of(self._engine(self._classifier().name), self.backend, others[0], *images)
        click.echo(
            f"  {' and '.join(parity.engines)}: largest relative difference of a logit "
            f"{parity.logits:.1e}, of a gradient {parity.gradient:.1e}"
        )
        return parity

    def _write_try_page(self) -> None:
        """Write `try.html` if onnx and onnxruntime-web are installed; else print which one is missing."""
        from arm_cli.export import write_drawing_page
        from arm_cli.opening import open_model

        page = self.folder.path / "try.html"
        try:
            write_drawing_page(
                open_model(str(self.folder.run(self._classifier().name))), page, "Draw a digit"
            )
        except ValueError as error:
            click.echo(f"  skipped: {error}")
        else:
            click.echo(f"  {page}: open it in a browser")

    def _save_digits(self) -> str:
        """Save test digits as PNG files, with their class in the name; the command that classifies them."""
        import shlex

        from PIL import Image

        folder = self.folder.path / "digits"
        folder.mkdir()
        for index in range(0, len(self.test), len(self.test) // FILES):
            item = self.test.item(index)
            Image.fromarray(item.image).save(folder / f"{index:03}-is-{item.label}.png")  # type: ignore[arg-type]
        return shlex.join(
            ["arm", "predict", str(self.folder.run(self._classifier().name)), str(folder), "--top", "1"]
        )

    def _contents(
        self, began: float, comparisons: list[Comparison], parity: Parity | None, command: str
    ) -> Demonstration:
        import numpy as np

        from arm_cli.demo.measure import answers_of, cost_of_tiny, features_of, images_of, plane_of
        from arm_cli.demo.report.contents import Demonstration
        from arm_cli.demo.report.pictures import grey, predicted_images
        from arm_core.data.transforms import denormalize
        from arm_core.engine.protocol import TrainingState
        from arm_core.engine.ranks import ALONE
        from arm_core.model.parameters import initial_parameters
        from arm_core.model.spec import PretrainSpec

        recipe = self.pretraining.recipe
        mean, std = recipe.augmentation.mean, recipe.augmentation.std
        model = self._engine(self.pretraining.name)
        assert isinstance(model.spec, PretrainSpec)
        announce(self.backend, model, ALONE)
        images, labels = images_of(self.test, recipe)
        pictures = grey(denormalize(images, mean, std))
        chosen = np.arange(0, len(images), len(images) // PICTURES)[:PICTURES]
        painted = predicted_images(model.spec, images[chosen], model.forward(images[chosen])["prediction"])

        train = images_of(self.train, recipe)
        planes = []
        start = TrainingState(parameters=initial_parameters(model.spec, recipe.training.seed))
        random = self.backend.create_engine(model.spec, start, options=self.choice.options())
        classifier = self._engine(self._classifier().name)
        for title, engine in (
            ("before pretraining", random),
            ("after pretraining", model),
            ("after finetuning", classifier),
        ):
            features = (features_of(engine, train[0]), train[1]), (features_of(engine, images), labels)
            planes.append(plane_of(title, *features))

        losses = [row for row in self._rows(self.pretraining.name) if "loss" in row]
        return Demonstration(
            seconds=time.monotonic() - began,
            spec=model.spec,
            loss_steps=[int(row["step"]) for row in losses],
            losses=[row["loss"] for row in losses],
            truth=pictures[chosen],
            predicted=grey(denormalize(painted, mean, std)),
            comparisons=comparisons,
            rates={arm: _rates(self._job(arm, LABELS[0], 0).recipe) for arm in ARMS},
            answers=answers_of(classifier, images, labels, pictures),
            planes=planes,
            labels=labels,
            parity=parity,
            predict=command,
            costs=cost_of_tiny(model.device),
            facts=self._facts(began, model),
        )

    def _write(self, contents: Demonstration) -> Path:
        from arm_cli.demo.report.demonstration import write_up

        report = self.folder.path / "report.html"
        write_up(contents).write(report)
        return report

    def _facts(self, began: float, engine: Engine) -> dict[str, str]:
        import platform

        return {
            "engine": f"{self.backend.version()}, {engine.device}, scan {engine.scan}",
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
            "Python": platform.python_version(),
            "time": f"{time.monotonic() - began:.0f} s",
            "data": "handwritten digits of scikit-learn (UCI Optical Recognition of Handwritten Digits, "
            "CC BY 4.0), distorted by seed; training, validation and test digits do not overlap",
            "runs and recipes": str(self.folder.path),
        }


def _rates(recipe: Recipe) -> str:
    decay = recipe.optimizer.layer_decay
    return f"{recipe.lr:.2g}" + (f" with layer decay {decay:g}" if decay < 1 else "")
