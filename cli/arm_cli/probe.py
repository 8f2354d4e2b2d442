"""`arm probe`: accuracy of frozen features, with an interval."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import EngineChoice, batch_size_option, engine_options, json_option, weights_option

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from arm_core.data.model_config import ModelConfig
    from arm_core.data.sources import ImageSource


@click.command(short_help="Measure frozen features: k-NN and linear classifier.")
@click.argument("model")
@click.option("--data", required=True, metavar="TRAIN", help="Labelled images: a folder, or `digits`.")
@click.option("--eval-data", metavar="VAL", help="Images to evaluate on; not needed for `digits`.")
@click.option("--k", type=click.IntRange(min=1), default=20, show_default=True, help="Neighbours of k-NN.")
@click.option(
    "--temperature",
    type=float,
    default=0.07,
    show_default=True,
    help="Temperature of the k-NN votes, as in DINO.",
)
@click.option("--block", type=int, help="Read the output of this block instead of the last; -1 is the last.")
@click.option(
    "--pool", type=click.Choice(("default", "mean", "cls")), default="default", help="How tokens are reduced."
)
@click.option("--random", "random_weights", is_flag=True, help="Also measure random weights of this size.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the split and the weights.",
)
@batch_size_option(64)
@weights_option
@engine_options
@json_option
def probe(
    model: str,
    data: str,
    eval_data: str | None,
    k: int,
    temperature: float,
    block: int | None,
    pool: str,
    random_weights: bool,
    seed: int,
    batch_size: int,
    weights: str,
    engine: EngineChoice,
    as_json: bool,
) -> None:
    """Accuracy of k nearest neighbours and of a linear classifier on the frozen features of MODEL.

    TRAIN and VAL hold one sub-folder of images per class. The linear classifier is L2-regularized logistic
    regression on standardized features; its strength is chosen on a fifth of TRAIN. Intervals are 95 %.
    """
    from arm_cli.opening import open_model
    from arm_cli.show import echo, print_json, print_table
    from arm_core.data.model_config import ModelConfig
    from arm_core.model.parameters import initial_parameters
    from arm_core.training.probe import knn_probe, linear_probe

    opened = open_model(model, weights=weights)
    config = ModelConfig(transform=opened.transform)
    train, test = _sources(data, eval_data, opened.spec.image_size)
    candidates = {"model": opened.parameters}
    if random_weights:
        candidates["random weights"] = initial_parameters(opened.spec, seed)
    results: dict[str, Any] = {}
    for name, parameters in candidates.items():
        module = engine.create_module(opened.spec, parameters)
        found = [
            _features(module, config, source, batch_size, block, pool, f"{name}, {what}")
            for what, source in (("training images", train), ("evaluation images", test))
        ]
        (x, y), (v, w) = found
        results[name] = {
            "k-NN": asdict(knn_probe(x, y, v, w, k=k, temperature=temperature)),
            "linear": asdict(linear_probe(x, y, v, w, seed=seed)),
        }
    if as_json:
        print_json({"train": len(train), "eval": len(test), "block": block, "pool": pool, "results": results})
        return
    rows = [
        (name, kind, f"{100 * r['accuracy']:.1f} %", f"{100 * r['low']:.1f} to {100 * r['high']:.1f} %")
        for name, kinds in results.items()
        for kind, r in kinds.items()
    ]
    print_table(("features", "probe", "accuracy", "95 % interval"), rows, left=2)
    if any(kinds["linear"]["settings"]["at_edge"] for kinds in results.values()):
        echo("Warning: a linear probe chose the first or last strength of its grid.", err=True)


def _sources(data: str, eval_data: str | None, size: tuple[int, int]) -> tuple[ImageSource, ImageSource]:
    from arm_core.data.digits import PLACINGS, Digits, Split
    from arm_core.data.folder import ImageFolder

    if data in PLACINGS:
        if eval_data is not None:
            raise ValueError(f"--eval-data: `{data}` is evaluated on its test split; drop it")
        return Digits(Split.TRAIN, size=size, name=data), Digits(Split.TEST, size=size, name=data)
    if eval_data is None:
        raise ValueError("--eval-data: expected the folder of images to evaluate on")
    train = ImageFolder(data)
    return train, ImageFolder(eval_data, classes=train.classes)


def _features(
    module: Any,
    config: ModelConfig,
    source: ImageSource,
    batch_size: int,
    block: int | None,
    pool: str,
    what: str,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Features (N, D) and labels (N,) of a source."""
    import numpy as np

    from arm_cli.progress import ProgressBar
    from arm_core.data.loader import EvalLoader

    loader = EvalLoader(source, config.transform, size=module.spec.image_size, batch_size=batch_size)
    features, labels = [], []
    with ProgressBar(what, len(source), "images") as progress:
        for batch in loader:
            features.append(module.extract(np.asarray(batch.images), block=block, pool=pool))
            labels.append(batch.labels)
            progress.advance(len(batch.images))
    return np.concatenate(features), np.concatenate(labels)
