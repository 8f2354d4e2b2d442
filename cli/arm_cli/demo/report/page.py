"""A self-contained HTML file of text sections, tables, figures and pictures."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #223; background: #fcfcfd; max-width: 62rem;
       margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; }
p { max-width: 46rem; }
.lead { font-size: 1.1rem; color: #445; }
.caption { font-size: .88rem; color: #556; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
.row > svg { flex: 1 1 18rem; max-width: 100%; height: auto; }
figure > svg { max-width: 100%; height: auto; }
figure { margin: 0; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid #e2e2ea; }
th { font-weight: 600; }
pre { background: #f0f1f5; padding: .9rem 1.1rem; border-radius: 6px; overflow-x: auto; font-size: .88rem; }
.pictures { display: flex; flex-wrap: wrap; gap: 1.1rem; }
figure > img, .pictures img { max-width: 100%; height: auto; }
.gallery { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0; }
.gallery figure { width: 5.4rem; font-size: .8rem; line-height: 1.3; }
.gallery img { width: 72px; image-rendering: pixelated; border-bottom: 4px solid #3d8b40; }
.gallery .wrong img { border-color: #c4501b; }
footer { margin-top: 3rem; font-size: .85rem; color: #667; }
"""


@dataclass
class Page:
    """Collects sections in order, and escapes all text."""

    title: str
    lead: str
    _body: list[str] = field(default_factory=list)

    def section(self, heading: str, *paragraphs: str) -> None:
        self._body.append(f"<h2>{html.escape(heading)}</h2>")
        self._body += [f"<p>{html.escape(text)}</p>" for text in paragraphs]

    def figures(self, svgs: Iterable[str], caption: str = "") -> None:
        """SVG texts side by side, with a caption below."""
        self._body.append(f'<figure><div class="row">{"".join(svgs)}</div>{_caption(caption)}</figure>')

    def picture(self, uri: str, description: str, caption: str) -> None:
        """One picture, given as a data URI."""
        shown = f'<img src="{uri}" alt="{html.escape(description)}">'
        self._body.append(f"<figure>{shown}{_caption(caption)}</figure>")

    def pictures(self, uris: Iterable[str], description: str, caption: str) -> None:
        """Pictures side by side, given as data URIs."""
        shown = "".join(f'<img src="{uri}" alt="{html.escape(description)}">' for uri in uris)
        self._body.append(f'<figure><div class="pictures">{shown}</div>{_caption(caption)}</figure>')

    def gallery(self, answers: Iterable[tuple[str, str, bool]]) -> None:
        """Pictures as data URIs with a text below each, and whether the text is right."""
        shown = "".join(
            f'<figure class="{"right" if right else "wrong"}"><img src="{uri}" alt="image">'
            f"<figcaption>{html.escape(text)}</figcaption></figure>"
            for uri, text, right in answers
        )
        self._body.append(f'<div class="gallery">{shown}</div>')

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> None:
        def cells(tag: str, values: Iterable[object]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values) + "</tr>"

        body = "".join(cells("td", row) for row in rows)
        self._body.append(f"<table>{cells('th', head)}{body}</table>{_caption(caption)}")

    def code(self, text: str) -> None:
        self._body.append(f"<pre>{html.escape(text)}</pre>")

    def render(self, footer: str = "") -> str:
        return (
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style>"
            f'<h1>{html.escape(self.title)}</h1><p class="lead">{html.escape(self.lead)}</p>'
            f"{''.join(self._body)}<footer>{html.escape(footer)}</footer></html>\n"
        )

    def write(self, path: Path, footer: str = "") -> None:
        """Write the page atomically."""
        partial = path.with_suffix(".partial")
        partial.write_text(self.render(footer), encoding="utf-8")
        partial.replace(path)


def _caption(text: str) -> str:
    return f'<p class="caption">{html.escape(text)}</p>' if text else ""
