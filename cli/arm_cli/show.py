"""How results look: tables and numbers on stdout for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import click


def print_json(data: Any) -> None:
    """Data on stdout, alone, so that a pipe can read it. Numbers that are not finite become null."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, total: Sequence[str] | None = None
) -> None:
    """A table on stdout: the first `left` columns flush left, numbers flush right, `total` set apart."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=box.SIMPLE, pad_edge=False, show_footer=total is not None)
    for i, column in enumerate(table.columns):
        column.justify = "left" if i < left else "right"
        column.overflow = "fold"
        column.footer = total[i] if total else ""
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def scaled(value: float, unit: str = "") -> str:
    """A large number in three figures: 12.3 G, 4.56 M; a factor of 1000 each."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
