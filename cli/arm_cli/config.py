"""`arm config`: every setting of a recipe, with its meaning, its value and the origin of the value."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import tomllib
from typing import TYPE_CHECKING, Any

import click

from arm_cli.declare import options_of
from arm_cli.options import PRECISIONS, json_option
from arm_cli.recipe import recipe_path, shown
from arm_cli.show import echo, print_json
from arm_cli.training.options import RecipeChanges

if TYPE_CHECKING:
    from arm_core.recipe.recipe import Recipe

ENCODER = ("width", "depth", "patch", "state", "conv_width")


@click.command(short_help="Every setting of a recipe: meaning, value, origin.")
@click.argument("name", metavar="RECIPE")
@options_of(RecipeChanges, "changes")
@click.option("--precision", type=click.Choice(PRECISIONS), help="Type of the matrix products.")
@json_option
def config(name: str, changes: RecipeChanges, precision: str | None, as_json: bool) -> None:
    """Print every setting of RECIPE with its meaning, its value and where the value comes from.

    RECIPE is a shipped recipe, a .toml file or a run. The options change settings as they do in
    `arm pretrain` and `arm finetune`. Each name in the list is a key for --set.
    """
    from arm_cli.training.changes import apply, changes_of
    from arm_core.recipe.recipe import load_recipe, recipe_text

    path = recipe_path(name)
    recipe = load_recipe(path)
    made = changes_of(changes, recipe, precision)
    given = _keys(tomllib.loads(recipe_text(path)))
    rows = settings(apply(recipe, made), given, {change.key: change.option for change in made})
    if as_json:
        print_json(rows)
        return
    section = None
    for row in rows:
        head, _, key = row["key"].partition(".")
        if head != section:
            section = head
            echo(f"\n[{section}]", bold=True)
        echo(f"{key} = {shown(row['value'])}  ({row['from']})")
        if row["meaning"]:
            echo(textwrap.fill(row["meaning"], 100, initial_indent="    ", subsequent_indent="    "))


def settings(recipe: Recipe, given: set[str], changed: dict[str, str]) -> list[dict[str, Any]]:
    """A row per setting: key, value, origin, meaning.

    given: keys that the recipe's file holds.  changed: the option that changed a key.
    """
    effective = _effective_model(recipe)
    rows: list[dict[str, Any]] = []

    def collect(owner: Any, prefix: str) -> None:
        meanings = field_docs(type(owner))
        for field in dataclasses.fields(owner):
            key, value = f"{prefix}{field.name}", getattr(owner, field.name)
            if dataclasses.is_dataclass(value) and not hasattr(value, "unit"):
                collect(value, f"{key}.")
                continue
            origin = changed.get(key) or ("recipe" if key in given else "default")
            if value is None and key in effective:
                value = effective[key]
                if origin == "default" and recipe.model.preset is not None and _preset_has(field.name):
                    origin = f"preset {recipe.model.preset}"
            meaning = " ".join(meanings.get(field.name, "").split())
            rows.append({"key": key, "value": _plain(value), "from": origin, "meaning": meaning})

    for field in dataclasses.fields(recipe):
        if field.name != "stage":
            collect(getattr(recipe, field.name), f"{field.name}.")
    return rows


def field_docs(cls: type[Any]) -> dict[str, str]:
    """The string under each field of a dataclass, by field name, inherited fields included."""
    found: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(owner):
            continue
        (body,) = [ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = text.value.value
    return found


def _effective_model(recipe: Recipe) -> dict[str, Any]:
    """The resolved values of the model's settings that the recipe omits."""
    classes = getattr(recipe.model, "classes", None)
    spec = recipe.spec(classes or 1)
    values: dict[str, Any] = {name: getattr(spec.encoder, name) for name in ENCODER}
    for name in ("image_size", "cluster", "prediction_order", "order_seed", "target", "pooling"):
        values[name] = getattr(spec, name, None)
    for name in ("decoder_width", "decoder_depth", "decoder_heads", "directions"):
        values[name] = getattr(spec, name, None)
    return {f"model.{name}": value for name, value in values.items() if value is not None}


def _preset_has(name: str) -> bool:
    from arm_core.model.presets import Preset

    return name in {field.name for field in dataclasses.fields(Preset)} or name == "decoder_heads"


def _plain(value: Any) -> Any:
    """A value in TOML or JSON notation."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


def _keys(table: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in table.items():
        found |= _keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found
