"""Options declared once, as the fields of a frozen dataclass that the command receives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def option(*flags: str, **attributes: Any) -> Any:
    """A field that `click.option(*flags, **attributes)` fills; its name is the parameter's."""
    return dataclasses.field(
        metadata={"add": lambda name: click.option(*flags, name, **attributes)}, kw_only=True
    )


def added_by(decorator: Callable[[Any], Any]) -> Any:
    """A field that another decorator fills, such as `engine_options` or `click.argument`."""
    return dataclasses.field(metadata={"add": lambda name: decorator}, kw_only=True)


def options_of(cls: type[Any], argument: str) -> Callable[[F], F]:
    """A decorator that adds the options of dataclass `cls`; the command receives a `cls` as `argument`."""

    def decorate(command: F) -> F:
        fields = dataclasses.fields(cls)

        @functools.wraps(command)
        def wrapped(*args: Any, **values: Any) -> Any:
            chosen = cls(**{field.name: values.pop(field.name) for field in fields})
            return command(*args, **{argument: chosen}, **values)

        result: Any = wrapped
        for field in reversed(fields):
            result = field.metadata["add"](field.name)(result)
        return result  # type: ignore[no-any-return]

    return decorate
