"""A page from blocks in order: headings, texts, tables, charts, pictures and code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from arm_cli.pages.shell import render

SCRIPT = "blocks.js"


class Blocks:
    """Collects the blocks of a page; `blocks.js` shows them."""

    def __init__(self) -> None:
        self._blocks: list[dict[str, Any]] = []

    def heading(self, text: str) -> None:
        self._blocks.append({"kind": "heading", "text": text})

    def text(self, text: str) -> None:
        self._blocks.append({"kind": "text", "text": text})

    def table(self, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        self._blocks.append({"kind": "table", "head": list(head), "rows": [list(row) for row in rows]})

    def code(self, text: str, *, summary: str | None = None) -> None:
        """Text in a fixed-width font. summary: the line that opens it; None shows it immediately."""
        self._blocks.append({"kind": "code", "text": text, "summary": summary})

    def charts(self, charts: Sequence[dict[str, Any]]) -> None:
        """Charts over steps and over hours of training (`arm_cli.runs.curves`)."""
        if charts:
            self._blocks.append({"kind": "charts", "charts": list(charts)})
        else:
            self.text("No rows have been logged.")

    def pictures(self, pictures: Iterable[tuple[str, str]], *, small: bool) -> None:
        """A row of pictures that wraps: data URI and caption of each. small: enlarge their pixels."""
        shown = [{"src": src, "caption": caption} for src, caption in pictures]
        self._blocks.append({"kind": "pictures", "pictures": shown, "small": small})

    def render(self, title: str, lead: Sequence[str], *, footer: str = "") -> str:
        """The page; ValueError if it would be too large."""
        return render(title, lead, SCRIPT, {"blocks": self._blocks}, footer=footer)
