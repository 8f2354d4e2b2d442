"""The images that a recipe's [data] section names."""

from __future__ import annotations

from arm_core.data.combine import split
from arm_core.data.digits import PLACINGS, Digits, Split
from arm_core.data.opening import open_images
from arm_core.data.sources import ImageSource, Synthetic
from arm_core.model.checks import near_match
from arm_core.recipe.recipe import Recipe, Stage
from arm_core.recipe.sections import ClassifierModel

SYNTHETIC_IMAGES = {"train": 1024, "eval": 128}

KINDS = ("folder", *PLACINGS, "synthetic")
"""Known values of `data.source`."""


def open_sources(recipe: Recipe) -> tuple[ImageSource, ImageSource | None]:
    """Images to train on, and images to evaluate on (None if the recipe names none).

    `folder` reads `data.path` and `data.eval_path` in any format: classes in finetuning, any images in
    pretraining. `digits` and `varied-digits` train on the training split and evaluate on the validation
    split, so that the test split is unused until `arm evaluate`. `synthetic` generates its images.
    Raises ValueError for an unknown kind, a missing path, and settings of another kind.
    """
    data, labelled = recipe.data, recipe.stage is Stage.FINETUNE
    if data.source not in KINDS:
        raise ValueError(f"data.source: unknown {data.source!r}{near_match(data.source, KINDS)}")
    if data.source != "folder" and (data.path or data.eval_path):
        raise ValueError(f"data.path and data.eval_path belong to the source 'folder', not {data.source!r}")
    if data.source not in PLACINGS and data.labels_per_class is not None:
        raise ValueError(f"data.labels_per_class belongs to the source 'digits', not {data.source!r}")
    size, seed = _image_size(recipe), recipe.training.seed
    if (name := data.source) in PLACINGS:
        labels = data.labels_per_class
        training = Digits(Split.TRAIN, size=size, seed=seed, labels_per_class=labels, name=name)
        return training, Digits(Split.VALIDATION, size=size, name=name)
    if data.source == "synthetic":
        return (
            Synthetic(SYNTHETIC_IMAGES["train"], size, seed=seed),
            Synthetic(SYNTHETIC_IMAGES["eval"], size, seed=seed + 1),
        )
    if data.path is None:
        raise ValueError("data.path: the recipe names no training images; pass --data PATH")
    if data.eval_path is not None and data.val_fraction is not None:
        raise ValueError("data.val_fraction: data.eval_path already names images to evaluate on; drop one")
    train = open_images(data.path, form=data.format, labels=labelled)
    if data.val_fraction is not None:
        return split(train, data.val_fraction)
    if data.eval_path is None:
        return train, None
    return train, open_images(
        data.eval_path, form=data.format, labels=labelled, classes=train.classes or None
    )


def _image_size(recipe: Recipe) -> tuple[int, int]:
    model = recipe.model
    return recipe.spec(model.classes or 1 if isinstance(model, ClassifierModel) else None).image_size
