"""Frozen dataclasses to TOML and back, checked against their annotations.

The fields of a settings class (a keyword-only dataclass) are ints, floats, booleans, strings, enums,
`Span`s, tuples of these, other settings classes, or an optional one of these. TOML has no null: a field that
may be None has None as its default, and is omitted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any, TypeVar

from arm_core.model.checks import check_keys, shortened

T = TypeVar("T")


MAX_SPAN = 1e12
"""Epochs or steps; no run is longer."""


@dataclass(frozen=True)
class Span:
    """A part of a run in epochs or in steps: `40 epochs`, `0.5 epochs`, `100 steps`."""

    amount: float
    unit: str

    def __post_init__(self) -> None:
        if self.unit not in ("epochs", "steps") or not 0 <= self.amount <= MAX_SPAN:
            raise ValueError(f"expected '40 epochs' or '100 steps', found '{self.amount} {self.unit}'")
        if self.unit == "steps" and self.amount != int(self.amount):
            raise ValueError(f"expected a whole number of steps, found {self.amount}")

    @classmethod
    def parse(cls, text: str) -> Span:
        amount, _, unit = text.strip().partition(" ")
        try:
            return cls(float(amount), unit.strip() if unit.endswith("s") else f"{unit.strip()}s")
        except ValueError:
            raise ValueError(f"expected '40 epochs' or '100 steps', found {shortened(text)}") from None

    def steps(self, steps_per_epoch: Fraction) -> Fraction:
        """Its length in steps, exactly."""
        amount = Fraction(str(self.amount))
        return amount * steps_per_epoch if self.unit == "epochs" else amount

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit[:-1] if amount == 1 else self.unit}"


def field_types(cls: type[Any]) -> dict[str, Any]:
    """Annotation of each field of a settings class, by name."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def from_table(cls: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """Create a settings class from a TOML table; ValueError names a wrong key. where: path of the table."""
    known = field_types(cls)
    check_keys(where, table, known)
    values = {key: read_value(known[key], value, _path(where, key)) for key, value in table.items()}
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    absent = [
        _path(where, name)
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if absent:
        raise ValueError(f"missing {', '.join(absent)}")
    return cls(**values)


def to_table(settings: Any) -> dict[str, Any]:
    """The TOML table of a settings class; fields that are None are omitted."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return {name: _plain(value) for name, value in values.items() if value is not None}


def dump(table: Mapping[str, Any], section: str = "") -> str:
    """TOML text of a table: first its own values, then a section for each table in it."""
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {_toml(value)}" for key, value in table.items() if key not in inner]
    own = "\n".join([f"[{section}]"] * bool(section) + lines) + "\n"
    return "\n".join([own, *(dump(value, _path(section, key)) for key, value in inner.items())])


def assign(
    table: dict[str, Any], hints: Mapping[str, Any], path: Sequence[str], text: str, where: str = ""
) -> None:
    """Set the value at `path` of a nested table from command-line text; None removes it.

    hints: annotation of each key of `table`.  Raises ValueError on an unknown key or a mistyped value.
    """
    name, here = path[0], _path(where, path[0])
    check_keys(where, [name], hints)
    hint = _strip_none(hints[name])
    if len(path) > 1:
        if not _is_settings(hint):
            rest = shortened(".".join(path[1:]), quote=False)
            raise ValueError(f"{here} is {_name(hint)} and has no key {rest}")
        assign(table.setdefault(name, {}), field_types(hint), path[1:], text, here)
    elif (value := parse_text(hints[name], text, here)) is None:
        table.pop(name, None)
    else:
        table[name] = value


def read_value(hint: Any, value: Any, where: str) -> Any:
    """Convert a TOML value to the annotated type; ValueError names `where`."""
    hint = _strip_none(hint)
    if _is_settings(hint):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a table [{where}], found {shortened(value)}")
        return from_table(hint, value, where)
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        # A side length alone means a square.
        value = [value, value] if items == (int, int) and isinstance(value, int) else value
        if not isinstance(value, list | tuple) or (items[-1] is not ... and len(value) != len(items)):
            raise ValueError(f"{where}: expected {_name(hint)}, found {shortened(value)}")
        kinds = items[:1] * len(value) if items[-1] is ... else items
        return tuple(read_value(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    try:
        return _scalar(hint, value)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{where}: expected {_name(hint)}, found {shortened(value)}") from None


def parse_text(hint: Any, text: str, where: str) -> Any:
    """Convert command-line text to the value that TOML would give; None for `none`."""
    plain = _strip_none(hint)
    text = text.strip()
    if text.lower() == "none" and plain is not hint:
        return None
    if typing.get_origin(plain) is tuple:
        items = typing.get_args(plain)
        words = text.strip("[]()").replace("x" if items[0] is int else ",", ",").split(",")
        values = [parse_text(items[0], word, where) for word in words if word.strip()]
        return values[0] if items == (int, int) and len(values) == 1 else values
    if _is_settings(plain):
        keys = ", ".join(f"{where}.{name}" for name in field_types(plain))
        raise ValueError(f"{where} is a table; set one of its keys: {keys}")
    if plain in (str, Span) or (isinstance(plain, type) and issubclass(plain, StrEnum)):
        return text.strip("'\"")
    try:
        return json.loads(text.lower() if plain is bool else text)
    except (ValueError, RecursionError):
        with suppress(ValueError):
            if plain is float:  # .5 and 5. are not JSON
                return float(text)
    raise ValueError(f"{where}: expected {_name(plain)}, found {shortened(text)}")


def _is_settings(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) and hint is not Span


def _scalar(hint: Any, value: Any) -> Any:
    if hint is Span:
        if not isinstance(value, str | Span):
            raise TypeError
        return value if isinstance(value, Span) else Span.parse(value)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise TypeError
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, Span | StrEnum):
        return str(value)
    if dataclasses.is_dataclass(value):
        return to_table(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _strip_none(hint: Any) -> Any:
    """`X` of `X | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        assert len(kinds) == 1, f"a setting has one type, found {hint}"
        return kinds[0]
    return hint


def _name(hint: Any) -> str:
    """Name of a type, for messages."""
    if hint is Span:
        return "a length such as '40 epochs' or '100 steps'"
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return " or ".join(repr(str(item)) for item in hint)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        count = "a list" if items[-1] is ... else f"a list of {len(items)}"
        return f"{count}, each {words.get(items[0], str(items[0]))}"
    return words.get(hint, str(hint))


def _path(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
