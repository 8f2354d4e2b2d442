"""The folder of a sweep: its definition, one lock and one result for each member, and the runs.

DIR/sweep.json                 recipes and settings that vary
DIR/members/STAGE/NAME.lock    held by the process that trains the member
DIR/members/STAGE/NAME.json    its result
DIR/STAGE/NAME/                its run

Processes and machines that share the folder take members by locking, so none is trained twice.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from arm_cli.sweep.members import Factor, Member, members

if TYPE_CHECKING:
    from arm_core.recipe.recipe import Recipe

DEFINITION, MEMBERS, LOCK = "sweep.json", "members", ".lock"
FORMAT = "arm-sweep/1"


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What a sweep consists of."""

    recipes: dict[str, Recipe]
    """By stage."""
    factors: tuple[Factor, ...]
    origin: str | None = None
    """The model that finetuning starts from, without a pretraining recipe."""

    def members(self) -> list[Member]:
        return members(self.recipes, self.factors, origin=self.origin)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of a member's run."""

    error: str | None = None
    """Why it failed; None if it finished."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Values of the last evaluation and of the last logged step."""
    steps: int = 0
    seconds: float = 0.0
    """Time of the last session."""
    ended: float = 0.0
    """Seconds since the epoch."""


class SweepFolder:
    """The files of a sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, name: str) -> Path:
        """Folder of a member's run."""
        return self.path / name

    def result(self, name: str) -> Result | None:
        """The recorded result of a member; None if it has not ended."""
        try:
            values = json.loads(self._file(name, ".json").read_text("utf-8"))
            return Result(**values)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise ValueError(f"{self._file(name, '.json')}: not a result of a sweep; delete it") from None

    def record(self, name: str, result: Result) -> None:
        """Write the result of a member whose lock this process holds, or whose process has ended."""
        from arm_core.files.atomic import replace_text

        file = self._file(name, ".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(asdict(result)) + "\n")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the files of the whole sweep for the block; waits for another process."""
        from arm_core.files.atomic import open_in_place

        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = open_in_place(self.path / LOCK, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def claim(self, name: str) -> Iterator[bool]:
        """Lock a member for the block; False if another process holds it.

        The operating system releases the lock when the process ends, in any way.
        """
        from arm_core.files.atomic import open_in_place

        file = self._file(name, ".lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_in_place(file, os.O_RDWR)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(descriptor)

    def _file(self, name: str, suffix: str) -> Path:
        return self.path / MEMBERS / f"{name}{suffix}"

    def write(self, definition: Definition) -> None:
        """Store the definition, in a locked folder. A folder that holds another sweep is refused.

        Values can be added to a sweep later: runs that exist are kept.
        """
        from arm_core.files.atomic import replace_text
        from arm_core.recipe.recipe import to_toml

        if self.exists():
            self._check_same(self.read(), definition)
        elif any(item.name != LOCK for item in self.path.iterdir()):
            raise ValueError(f"{self.path}: not empty and not a sweep; expected a new or empty folder")
        text = {
            "format": FORMAT,
            "recipes": {stage: to_toml(recipe) for stage, recipe in definition.recipes.items()},
            "vary": [asdict(factor) for factor in definition.factors],
            "from": definition.origin,
        }
        replace_text(self.path / DEFINITION, json.dumps(text, indent=2) + "\n")

    def exists(self) -> bool:
        return (self.path / DEFINITION).is_file()

    def read(self) -> Definition:
        """The stored definition; ValueError if the folder is no sweep."""
        from arm_core.recipe.recipe import from_toml

        file = self.path / DEFINITION
        if not file.is_file():
            raise ValueError(f"{self.path}: contains no {DEFINITION}; pass a recipe to start a sweep there")
        try:
            values = json.loads(file.read_text("utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"expected the format {FORMAT}, found {values['format']!r}")
            return Definition(
                recipes={stage: from_toml(text) for stage, text in values["recipes"].items()},
                factors=tuple(Factor(**{**v, "values": tuple(v["values"])}) for v in values["vary"]),
                origin=values["from"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file}: not the definition of a sweep ({error})") from None

    def _check_same(self, stored: Definition, wanted: Definition) -> None:
        from arm_cli.recipe import flat, shown
        from arm_core.recipe.recipe import bookkeeping

        different = []
        if [*stored.recipes] != [*wanted.recipes] or stored.origin != wanted.origin:
            different.append("its stages or the model that it starts from")
        for stage in set(stored.recipes) & set(wanted.recipes):
            a, b = flat(stored.recipes[stage]), flat(wanted.recipes[stage])
            different += [
                f"{stage}.{key} = {shown(a.get(key))} there, {shown(b.get(key))} here"
                for key in dict.fromkeys([*a, *b])
                if a.get(key) != b.get(key) and key not in bookkeeping()
            ]
        if different:
            raise ValueError(
                f"{self.path}: contains another sweep ({'; '.join(different[:5])}); choose another --out"
            )


def results_of(folder: SweepFolder, wanted: Sequence[Member]) -> Mapping[str, Result]:
    """The results that are recorded so far, by member."""
    found = {member.name: folder.result(member.name) for member in wanted}
    return {name: result for name, result in found.items() if result is not None}
