"""From recipes and the settings that vary to the runs of a sweep, its members."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arm_core.recipe.recipe import Recipe

SEED = "seed"
"""A factor whose key ends in this word repeats a run; it is averaged over, not compared."""

MOST_MEMBERS = 10_000


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A setting that varies, with its values as text."""

    key: str
    """`section.key` in the recipe."""
    stage: str | None
    """The stage whose recipe it changes; None for all stages of the sweep."""
    values: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.key if self.stage is None else f"{self.stage}.{self.key}"

    @property
    def repeats(self) -> bool:
        """Whether it is a seed."""
        return self.key.rpartition(".")[2] == SEED


@dataclass(frozen=True, kw_only=True)
class Member:
    """One run of a sweep."""

    name: str
    """Its folder below the sweep's, for example `finetune/cluster-2x2_seed-0`."""
    recipe: Recipe
    levels: tuple[tuple[str, str], ...] = ()
    """The value of each factor, by the factor's name."""
    after: str | None = None
    """The member that it starts from."""
    origin: str | None = None
    """The model that it starts from, if that is no member."""
    chosen: frozenset[str] = frozenset()
    """Keys that the command line sets; the model that it starts from must not contradict them."""
    evaluate_on: str | None = None
    """Split of the digits to evaluate on; None for what the recipe says."""


def parse_factor(text: str, recipes: Mapping[str, Recipe]) -> Factor:
    """`model.cluster=1x1,2x2` or `training.seed=0..4`; with two recipes, `finetune.training.seed=0..4`.

    Values are separated by commas; a value that contains commas is written in brackets. `0..4` is the
    integers from 0 to 4. Raises ValueError for a missing or repeated value, and for an unknown key.
    """
    name, equals, listed = text.partition("=")
    name = name.strip()
    if not equals or not listed.strip():
        raise ValueError(f"--vary: expected section.key=value,value,..., found {text!r}")
    stage, key = split_stage(name, recipes)
    values = tuple(_values(listed))
    if repeated := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"--vary {name}: the value {repeated[0]} appears twice")
    factor = Factor(key=key, stage=stage, values=values)
    for own in [stage] if stage else recipes:
        for value in values:
            _changed(recipes[own], own, [f"{key}={value}"])
    return factor


def split_stage(name: str, recipes: Mapping[str, Recipe]) -> tuple[str | None, str]:
    """The stage that a key names in front, None if it names none, and the key in the recipe."""
    first, _, rest = name.partition(".")
    if first not in ("pretrain", "finetune"):
        return None, name
    if first not in recipes:
        raise ValueError(f"{name}: the sweep has no {first} recipe; write {rest}")
    return (first if len(recipes) > 1 else None), rest


def _values(text: str) -> Iterator[str]:
    for value in re.findall(r"\s*(\[[^\]]*\]|[^,]*)\s*(?:,|$)", text.rstrip().removesuffix(",")):
        value = value.strip()
        if whole := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", value):
            first, last = int(whole[1]), int(whole[2])
            if not first <= last < first + MOST_MEMBERS:
                raise ValueError(f"--vary: {value} is not a range; the smaller number comes first")
            yield from map(str, range(first, last + 1))
        elif value:
            yield value


def members(
    recipes: Mapping[str, Recipe], factors: Sequence[Factor], *, origin: str | None = None
) -> list[Member]:
    """All combinations of the values, in order: pretraining runs first, each combination once.

    recipes: one recipe, or those of a pair, by stage.  origin: the model that finetuning runs start from.
    Raises ValueError for a combination that is not a valid recipe, and for a setting that varies twice.
    """
    names = [factor.name for factor in factors]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"--vary {repeated[0]} appears twice; list all its values once")
    if (count := _count(factors)) > MOST_MEMBERS:
        raise ValueError(f"--vary: {count} combinations; expected at most {MOST_MEMBERS}")
    found: dict[str, Member] = {}
    for stage, recipe in recipes.items():
        pair = len(recipes) > 1
        # A classifier also depends on the settings of its pretraining.
        used = [f for f in factors if f.stage in (None, stage) or stage == "finetune"]
        for values in itertools.product(*(factor.values for factor in used)):
            levels = list(zip(used, values, strict=True))
            own = [(factor, value) for factor, value in levels if factor.stage in (None, stage)]
            changes = [f"{factor.key}={value}" for factor, value in own]
            member = Member(
                name=_folder(stage, levels, recipes),
                recipe=_changed(recipe, stage, changes),
                levels=tuple((factor.name, value) for factor, value in levels),
                after=_pretraining(levels, recipes) if pair and stage == "finetune" else None,
                origin=origin if stage == "finetune" else None,
                chosen=frozenset(factor.key for factor, _ in own),
            )
            if member.name in found:
                raise ValueError(f"--vary: two values lead to the same folder name {member.name}")
            found[member.name] = member
    return list(found.values())


def _count(factors: Sequence[Factor]) -> int:
    total = 1
    for factor in factors:
        total *= len(factor.values)
    return total


def _changed(recipe: Recipe, stage: str, changes: Sequence[str]) -> Recipe:
    from arm_core.recipe.recipe import override

    try:
        changed = override(recipe, changes)
        changed.spec(getattr(changed.model, "classes", None) or (2 if stage == "finetune" else None))
    except ValueError as error:
        raise ValueError(f"{stage} recipe with {', '.join(changes)}: {error}") from None
    return changed


def _pretraining(levels: Sequence[tuple[Factor, str]], recipes: Mapping[str, Recipe]) -> str:
    return _folder("pretrain", [level for level in levels if level[0].stage != "finetune"], recipes)


def _folder(stage: str, levels: Sequence[tuple[Factor, str]], recipes: Mapping[str, Recipe]) -> str:
    words = [f"{_short(factor, stage, recipes)}-{_plain(value)}" for factor, value in levels]
    return f"{stage}/{'_'.join(words) or 'all'}"


def _short(factor: Factor, stage: str, recipes: Mapping[str, Recipe]) -> str:
    """The last word of a key, or the whole key if another key ends in the same word."""
    from arm_cli.recipe import flat

    last = factor.key.rpartition(".")[2]
    same = [key for key in flat(recipes[stage]) if key.rpartition(".")[2] == last]
    word = last if len(same) < 2 else factor.key
    return word if factor.stage in (None, stage) else f"{factor.stage}.{word}"


def _plain(value: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", value).strip("-") or "empty"
