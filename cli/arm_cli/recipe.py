"""`arm recipe`: the shipped recipes, one recipe in full, and the differences between two."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arm_cli.options import json_option
from arm_cli.show import echo, print_json, print_table

if TYPE_CHECKING:
    from arm_core.recipe.recipe import Recipe


@click.group(short_help="List, show and compare recipes.")
def recipe() -> None:
    """List, show and compare recipes.

    A recipe holds every setting of a run. Wherever a RECIPE is expected, pass a shipped name, a .toml file
    or a run folder.
    """


@recipe.command("list", short_help="List the shipped recipes.")
@json_option
def list_command(as_json: bool) -> None:
    """List the shipped recipes with their model, length and batch size."""
    from arm_core.recipe.recipe import load_recipe, recipe_text, shipped_recipes

    recipes = {name: load_recipe(name) for name in shipped_recipes()}
    about = {name: recipe_text(name).partition("\n")[0].removeprefix("# ").rstrip(".") for name in recipes}
    if as_json:
        print_json([{"name": name, "about": about[name], **flat(found)} for name, found in recipes.items()])
        return
    rows = []
    for name, found in recipes.items():
        encoder, training = found.model.encoder(), found.training
        size = f"{encoder.width} x {encoder.depth}"
        rows.append((name, size, str(training.length), str(training.batch_size), about[name]))
    print_table(("recipe", "width x depth", "length", "batch", "about"), rows, left=1, text=(4,))


@recipe.command(short_help="Print a recipe as TOML.")
@click.argument("name", metavar="RECIPE")
def show(name: str) -> None:
    """Print a recipe as TOML: a shipped recipe or file with its comments, or the resolved recipe of a run."""
    from arm_core.recipe.recipe import recipe_text

    echo(recipe_text(recipe_path(name)).rstrip("\n"))


@recipe.command(short_help="Compare the settings of two recipes.")
@click.argument("first", metavar="RECIPE")
@click.argument("second", metavar="RECIPE")
@json_option
def diff(first: str, second: str, as_json: bool) -> None:
    """Print the settings in which two recipes differ, defaults included."""
    from arm_core.recipe.recipe import load_recipe

    a, b = (flat(load_recipe(recipe_path(name))) for name in (first, second))
    rows = [(key, a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]
    if as_json:
        print_json({key: [one, other] for key, one, other in rows})
        return
    if not rows:
        echo("no differences")
        return
    print_table(("setting", first, second), [(key, shown(x), shown(y)) for key, x, y in rows], left=3)


def recipe_path(name: str) -> str:
    """The shipped recipe, the .toml file, or the recipe of the run folder with this name.

    Raises ValueError for a size with several recipes, such as `tiny`, and for unknown names.
    """
    from arm_core.recipe.recipe import shipped_recipes
    from arm_core.training.run_folder import RECIPE

    shipped = shipped_recipes()
    if name in shipped or Path(name).suffix == ".toml":
        return name
    if (Path(name) / RECIPE).is_file():
        return str(Path(name) / RECIPE)
    if several := [full for full in shipped if full.partition("-")[2] == name]:
        raise ValueError(f"{name!r} has several recipes; pass {' or '.join(several)}")
    return name  # reading it raises the error


def flat(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe by dotted key, in order; those that are None are omitted."""
    from arm_core.recipe.toml import to_table

    found: dict[str, Any] = {}

    def collect(table: dict[str, Any], prefix: str) -> None:
        for key, value in table.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{key}.")
            else:
                found[prefix + key] = value

    collect(to_table(recipe), "")
    return found


def shown(value: Any) -> str:
    """A setting in readable form; `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(shown, value)) if isinstance(value, list | tuple) else str(value)
