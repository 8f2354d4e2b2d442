"""Output: text and tables for people, JSON for programs.

File names, class names and metadata can hold escape sequences that control a terminal, so all text is
printed with such characters escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click

from arm_core.files.errors import printable


def echo(text: str, *, err: bool = False, bold: bool = False) -> None:
    """Print text with control characters escaped, except for line breaks; `err`: to stderr."""
    click.secho("\n".join(printable(line) for line in text.split("\n")), err=err, bold=bold or None)


def print_json(data: Any) -> None:
    """Print only the data as JSON on stdout, for other programs."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    click.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


def print_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int = 1,
    text: Sequence[int] = (),
    total: Sequence[str] | None = None,
) -> None:
    """Print a table. The first `left` columns and those in `text` are left-aligned, the others right-aligned.

    total: the last row, separated from the others.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.SIMPLE, pad_edge=False, show_footer=total is not None)
    for i, column in enumerate(table.columns):
        column.justify = "left" if i < left or i in text else "right"
        column.overflow = "fold"
        column.footer = total[i] if total else ""
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


def scaled(value: float, unit: str = "") -> str:
    """A large number with three digits and a prefix: 12.3 G, 4.56 M; powers of 1000."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
