"""`--from`: a classifier that starts from the trunk of another model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arm_core.engine.protocol import Array
    from arm_core.files.model_folder import Model
    from arm_core.model.spec import EncoderSpec, ModelSpec
    from arm_core.recipe.recipe import Recipe


Say = Callable[[str], None]
"""A function that prints one line for the user."""


def with_trunk_of(model: Model, recipe: Recipe, chosen: Collection[str], say: Say) -> Recipe:
    """The finetuning recipe with the trunk of `model`; prints a line if the recipe has a different one.

    If the patch size differs as well, the image size is the model's too, unless it was chosen.
    chosen: keys that the command line sets. Raises ValueError if they ask for a different trunk.
    """
    from arm_core.recipe.sections import ClassifierModel, EncoderChoice

    assert isinstance(recipe.model, ClassifierModel)
    trunk, own = model.spec.encoder, recipe.model.encoder()
    if trunk == own:
        return recipe
    names = [field.name for field in dataclasses.fields(EncoderChoice)]
    if asked := [name for name in names if f"model.{name}" in chosen]:
        raise ValueError(
            f"{model.path}: its trunk is {in_words(trunk)}, but --set model.{asked[0]} asks for "
            f"{in_words(own)}; drop it, or start from a model of that size"
        )
    sizes = {name: getattr(trunk, name) for name in names if name != "preset"}
    image_size, note = recipe.model.image_size, ""
    if trunk.patch != own.patch and "model.image_size" not in chosen:
        image_size = model.spec.image_size
        note = f", image size {image_size[0]}x{image_size[1]}"
    say(f"trunk of {model.path}: {in_words(trunk)}{note} (the recipe has {in_words(own)})")
    return dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, preset=None, **sizes, image_size=image_size)
    )


def grown(
    model: Model, recipe: Recipe, spec: ModelSpec, classes: tuple[str, ...], say: Say
) -> Mapping[str, Array]:
    """Initial weights of the classifier `spec`, made from those of `model`.

    A classifier with exactly the same classes keeps its head; any other model gets a new one.
    """
    from arm_cli.opening import class_names
    from arm_convert.adapt import OFFICIAL_HEAD_STD, to_classifier
    from arm_core.model.spec import ClassifierSpec
    from arm_core.recipe.sections import ClassifierModel

    assert isinstance(spec, ClassifierSpec)
    assert isinstance(recipe.model, ClassifierModel)
    keep_head = isinstance(model.spec, ClassifierSpec) and class_names(model, model.spec) == classes
    kind = "classifier" if isinstance(model.spec, ClassifierSpec) else "pretraining model"
    say(f"from {model.path} ({kind}), {'keeps its head' if keep_head else 'with a new head'}")
    weights = to_classifier(
        model.spec,
        model.arrays,
        spec,
        seed=recipe.training.seed,
        head_std=recipe.model.head_std or OFFICIAL_HEAD_STD,
        keep_head=keep_head,
    )
    return {name: tensor.read().astype("float32", copy=False) for name, tensor in weights.items()}


def in_words(encoder: EncoderSpec) -> str:
    """The size of a trunk, with the name of its preset."""
    from arm_core.model.presets import PRESETS

    named = [
        name
        for name, size in PRESETS.items()
        if (size.width, size.depth, size.patch) == (encoder.width, encoder.depth, encoder.patch)
    ]
    size = f"{encoder.width} wide, {encoder.depth} deep, patches of {encoder.patch}"
    return f"{size} ({named[0]})" if named else size
