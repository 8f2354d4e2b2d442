"""`arm demo`: the whole paper in the small, in two minutes, ending in a report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import EngineChoice, announce, engine_options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from arm_core.backend import Array, Backend, Engine
    from arm_core.data.source import Source
    from arm_core.recipe import Recipe
    from arm_core.report.demonstration import Comparison, Parity

    Percent = npt.NDArray[np.floating]

LABELS = (20, 50)
"""Labelled images per class in the two comparisons."""

ARMS = {"pretrained": "finetune-digits", "from scratch": "scratch-digits"}
"""Starting points, and the recipe that each was given on validation images (`benchmarks/tune_demo.py`)."""

PICTURES = 12
"""Test images whose prediction is shown."""

PARITY_IMAGES = 64
"""Test images that both engines are given."""


@click.command()
@click.option("--out", default="demo", show_default=True, help="Folder for the runs and the report.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs of each kind.")
@engine_options
def demo(out: str, seeds: int, engine: EngineChoice) -> None:
    """Pretrain a small ARM on digits, finetune it, compare it with the same network from scratch.

    Takes about two minutes on two CPU cores, needs no network, and writes OUT/report.html. A folder OUT
    that is there already is left alone: OUT-2, OUT-3, ... is taken instead.
    """
    folder = _unused(Path(out))
    began = time.monotonic()
    _Demo(folder, engine, seeds).run(began)


def _unused(path: Path) -> Path:
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


@contextmanager
def _stage(text: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    click.secho(text, bold=True)
    began = time.monotonic()
    yield
    click.echo(f"  {time.monotonic() - began:.0f} s")


class _Demo:
    """The stages of the demonstration, in order; each prints what it does."""

    def __init__(self, folder: Path, choice: EngineChoice, seeds: int) -> None:
        self.folder, self.choice, self.seeds = folder, choice, seeds
        self.backend: Backend = choice.find()
        self.engine: Engine

    def run(self, began: float) -> None:
        from arm_core.data.digits import Digits
        from arm_core.recipe import load_recipe
        from arm_core.report.demonstration import Demonstration, write_up
        from arm_core.spec import PretrainSpec

        recipe = load_recipe("pretrain-digits")
        spec = recipe.spec(None)
        assert isinstance(spec, PretrainSpec)
        train, test = Digits("train", size=spec.image_size), Digits("test", size=spec.image_size)
        with _stage(f"Pretraining on {len(train)} digits, without labels"):
            rows = self._pretrain(recipe, train)
            pretrained = self.engine.export_state().parameters
        with _stage("Predicting the next clusters of test images"):
            images = _images(test, recipe, range(0, len(test), len(test) // PICTURES))[0][:PICTURES]
            prediction = self.engine.forward(images)["prediction"]
        with _stage(f"Finetuning with few labels, {self.seeds} seeds, pretrained and from scratch"):
            comparisons = [self._compare(labels, spec, pretrained, test) for labels in LABELS]
        with _stage("Holding the two engines against each other"):
            parity = self._parity(test)
        page = write_up(
            Demonstration(
                spec=spec,
                loss_steps=[row["step"] for row in rows],
                losses=[row["loss"] for row in rows],
                images=images,
                prediction=prediction,
                comparisons=comparisons,
                rates={name: _rates(load_recipe(recipe)) for name, recipe in ARMS.items()},
                parity=parity,
                facts=self._facts(began),
            )
        )
        report = self.folder / "report.html"
        page.write(report)
        click.echo(f"\n{time.monotonic() - began:.0f} s in all. The report: ", nl=False)
        click.secho(str(report), bold=True)
        click.echo(f"One of the classifiers: arm predict IMAGE --model {self._classifier_folder()}")

    def _train(
        self,
        folder: Path,
        recipe: Recipe,
        parameters: Mapping[str, Array],
        train: Source,
        test: Source | None,
        classes: int | None,
    ) -> list[dict[str, Any]]:
        """One run; leaves its engine in `self.engine` and returns the rows of its metrics."""
        from arm_core.run import start_run
        from arm_core.trainer import Trainer

        spec = recipe.spec(classes)
        first = not hasattr(self, "engine")
        options = self.choice.options()
        options = options if self.choice.precision else replace(options, precision=recipe.training.precision)
        self.engine = self.backend.create_engine(
            spec, parameters, optimizer=recipe.optimizer, options=options
        )
        if first:
            announce(self.backend, self.engine)
        with start_run(folder, recipe, spec) as run:
            session = {"backend": self.backend.name, "version": self.backend.version()}
            outcome = Trainer(run, self.engine, train, test, session=session).train()
            if outcome.signal:
                raise click.ClickException(f"stopped by {outcome.signal}; `arm demo` starts anew")
            return run.metrics()

    def _pretrain(self, recipe: Recipe, train: Source) -> list[dict[str, Any]]:
        from arm_core.parameters import initial_parameters

        spec = recipe.spec(None)
        parameters = initial_parameters(spec, recipe.training.seed)
        rows = self._train(self.folder / "pretrain", recipe, parameters, train, None, None)
        click.echo(f"  loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}")
        return rows

    def _compare(
        self, labels: int, pretrain_spec: Any, pretrained: Mapping[str, Array], test: Source
    ) -> Comparison:
        """Finetune both arms at one number of labels, and measure the baselines on the same images."""
        import numpy as np

        from arm_core.data.digits import Digits
        from arm_core.recipe import load_recipe, override
        from arm_core.report.demonstration import Comparison

        runs: dict[str, list[list[float]]] = {name: [] for name in ARMS}
        baselines: list[dict[str, float]] = []
        steps: list[int] = []
        for seed in range(self.seeds):
            for name, recipe_name in ARMS.items():
                recipe = override(
                    load_recipe(recipe_name), [f"data.labels_per_class={labels}", f"training.seed={seed}"]
                )
                train = Digits("train", size=pretrain_spec.image_size, seed=seed, labels_per_class=labels)
                start = first_weights(name, recipe, pretrain_spec, pretrained, seed)
                folder = self._run_folder(name, labels, seed)
                rows = self._train(folder, recipe, start, train, test, len(train.classes))
                evaluations = [row for row in rows if "eval_top1" in row]
                steps = [row["step"] for row in evaluations]
                runs[name].append([100 * row["eval_top1"] for row in evaluations])
            visits = recipe.training.batch_size * steps[-1] // len(train)
            baselines.append(_baselines(train, test, recipe, max(1, visits)))
        arms = {name: np.array(values) for name, values in runs.items()}
        for name, values in arms.items():
            click.echo(
                f"  {labels} labels per class, {name}: "
                + ", ".join(f"{v:.1f} % after {s}" for s, v in zip(steps, values.mean(0), strict=True))
            )
        return Comparison(
            labels=labels,
            steps=steps,
            arms=arms,
            baselines={name: np.array([b[name] for b in baselines]) for name in baselines[0]},
        )

    def _run_folder(self, arm: str, labels: int, seed: int) -> Path:
        return self.folder / f"{arm.replace(' ', '-')}-{labels}-labels-seed-{seed}"

    def _classifier_folder(self) -> Path:
        return self._run_folder("pretrained", LABELS[-1], 0)

    def _parity(self, test: Source) -> Parity | None:
        """The best-trained classifier in the other engine: logits, gradients, classes."""
        import numpy as np

        from arm_cli.models import open_model
        from arm_core.backend import Batch, EngineOptions, installed_backends
        from arm_core.recipe import load_recipe
        from arm_core.report.demonstration import Parity

        others = [b for n, b in installed_backends().items() if n != self.backend.name and not b.missing()]
        if not others:
            click.echo("  only one engine is installed: nothing to compare")
            return None
        opened = open_model(str(self._classifier_folder()))
        images, labels = _images(test, load_recipe(ARMS["pretrained"]), range(PARITY_IMAGES))
        targets = np.eye(10, dtype=np.float32)[labels]
        results = []
        for backend in (self.backend, others[0]):
            options = self.choice.options() if backend is self.backend else EngineOptions()
            engine = backend.create_engine(opened.spec, opened.parameters, options=options)
            gradients = engine.loss_and_gradients(Batch(images=images, targets=targets))[1]
            results.append((engine.forward(images)["logits"], gradients))
        (logits, gradients), (other_logits, other_gradients) = results
        parity = Parity(
            engines=(self.backend.version(), others[0].version()),
            logits=float(np.abs(logits - other_logits).max() / np.abs(logits).max()),
            gradient=max(
                float(np.abs(g - other_gradients[name]).max() / max(np.abs(g).max(), 1e-30))
                for name, g in gradients.items()
            ),
            same_class=float((logits.argmax(1) == other_logits.argmax(1)).mean()),
        )
        click.echo(
            f"  largest relative difference: logits {parity.logits:.1e}, gradients {parity.gradient:.1e}"
        )
        return parity

    def _facts(self, began: float) -> dict[str, str]:
        import os
        import platform

        return {
            "engine": f"{self.backend.version()}, {self.engine.device}, scan {self.engine.scan}",
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
            "Python": platform.python_version(),
            "time": f"{time.monotonic() - began:.0f} s",
            "data": "handwritten digits of scikit-learn (UCI Optical Recognition of Handwritten Digits, "
            "CC BY 4.0), distorted by seed; training, validation and test digits are different ones",
            "runs and recipes": str(self.folder),
        }


def first_weights(
    arm: str, recipe: Recipe, pretrain_spec: Any, pretrained: Mapping[str, Array], seed: int
) -> dict[str, Array]:
    """Weights that a classifier starts from: grown from the pretrained ones, or drawn from the seed."""
    from arm_convert.adapt import OFFICIAL_HEAD_STD, to_classifier
    from arm_core.parameters import initial_parameters
    from arm_core.settings import ClassifierModel
    from arm_core.spec import ClassifierSpec
    from arm_core.tensor_file import Tensor

    spec = recipe.spec(10)
    assert isinstance(spec, ClassifierSpec)
    assert isinstance(recipe.model, ClassifierModel)
    if arm != "pretrained":
        return initial_parameters(spec, seed)
    tensors = {name: Tensor.of(value) for name, value in pretrained.items()}
    head_std = recipe.model.head_std or OFFICIAL_HEAD_STD
    made = to_classifier(pretrain_spec, tensors, spec, seed=seed, head_std=head_std)
    return {name: tensor.read() for name, tensor in made.items()}


def _images(source: Source, recipe: Recipe, indices: range) -> tuple[Array, npt.NDArray[np.int64]]:
    """Images as the evaluation prepares them, (B, H, W, 3), and their labels."""
    import numpy as np

    size = recipe.spec(10 if recipe.stage == "finetune" else None).image_size
    items = [source.item(index) for index in indices]
    images = np.stack([recipe.eval_transform(item, size) for item in items])
    return images, np.array([item.label for item in items])


def _baselines(train: Source, test: Source, recipe: Recipe, visits: int) -> dict[str, float]:
    """Accuracy in percent of methods on raw pixels, given `visits` drawings of every training image."""
    import numpy as np

    from arm_core.baselines import nearest_class_mean, nearest_neighbour

    size = recipe.spec(10).image_size
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
