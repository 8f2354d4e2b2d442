"""Checks of settings that every room shares: ranges of numbers, and the nearest known word."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SHOWN = 60
"""Characters of a wrong value that a message quotes."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers from `low` to `high`; `above` and `below` exclude the end itself."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: object) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and self.low <= value <= self.high
            and self.above < value < self.below
        )

    def __str__(self) -> str:
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{self.low} to {self.high}"
        words = {
            f"{self.low} or more": self.low,
            f"above {self.above}": self.above,
            f"{self.high} or less": self.high,
            f"below {'2**63' if self.below == 2**63 else self.below}": self.below,
        }
        return " and ".join(word for word, end in words.items() if math.isfinite(end))


POSITIVE = Range(above=0)
NOT_NEGATIVE = Range(low=0)
AT_LEAST_ONE = Range(low=1)
PART = Range(low=0, high=1)


def check_ranges(owner: str, settings: Any, **ranges: Range) -> None:
    """Check attributes of `settings` by name; a ValueError lists each one that is out of range.

    An attribute that is None is not checked; in a tuple, every item is checked.
    """
    problems = []
    for name, allowed in ranges.items():
        value = getattr(settings, name)
        items = value if isinstance(value, tuple) else (value,)
        if value is not None and not all(item in allowed for item in items):
            problems.append(f"{owner}.{name}: expected {allowed}, found {shortened(value)}")
    if problems:
        raise ValueError("; ".join(problems))


def check_whole(owner: str, allowed: Range = AT_LEAST_ONE, **values: object) -> None:
    """Check whole numbers by name; a ValueError lists each one of another type or out of range."""
    problems = [
        f"{owner}.{name}: expected a whole number, {allowed}, found {shortened(value)}"
        for name, value in values.items()
        if not isinstance(value, int) or value not in allowed
    ]
    if problems:
        raise ValueError("; ".join(problems))


def check_keys(owner: str, found: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for the first unknown key; the message names the known key that it resembles."""
    names = list(known)
    for key in found:
        if key not in names:
            where = f"{owner}.{key}" if owner else key
            raise ValueError(f"unknown key {shortened(where, quote=False)}{near_match(key, names)}")


def near_match(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` if a known word is similar, else `; expected one of: ...`."""
    names = [str(name) for name in known]
    # Comparing takes quadratic time, and no known word is that long.
    if len(word) <= 10 * SHOWN and (close := difflib.get_close_matches(word, names, n=1)):
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of: {', '.join(names)}"


def shortened(value: object, *, quote: bool = True) -> str:
    """`repr` of a value (or the text itself), truncated if it is long."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**SHOWN:
        return "a whole number of more than 60 digits"  # Python refuses to print some of them
    text = repr(value) if quote else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
