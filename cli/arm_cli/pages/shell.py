"""An interactive page as one file: text, then data as JSON, then the scripts that read it."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

LIMIT = 3_000_000
"""Largest size of a page, bytes."""
LOSSLESS = 128
"""Pictures up to this side are stored as PNG, larger ones as JPEG, pixels."""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""A browser lets the page load only its own pictures, styles and scripts."""


def render(title: str, paragraphs: Sequence[str], script: str, data: Any, *, footer: str = "") -> str:
    """The page's HTML. script: name of a file in this folder that reads `data` and fills `main`.

    Everything is escaped: texts as HTML, data as JSON inside a script element. Raises ValueError if the
    page would be larger than `LIMIT`.
    """
    folder = files("arm_cli.pages")
    style, common, own = (folder.joinpath(n).read_text("utf-8") for n in ("page.css", "common.js", script))
    packed = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    lead = "".join(f"<p>{html.escape(text)}</p>" for text in paragraphs)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>"
        f"<header><h1>{html.escape(title)}</h1>{lead}</header>"
        "<noscript><p>This page needs JavaScript; the PNG files beside it do not.</p></noscript>"
        '<main id="main"></main>'
        f'<footer>{html.escape(footer)}</footer><script type="application/json" id="data">{packed}</script>'
        f"<script>{common}</script><script>{own}</script></body></html>\n"
    )
    if len(page.encode()) > LIMIT:
        raise ValueError(
            f"{title}: the page would have {len(page.encode()) / 1e6:.1f} MB, more than {LIMIT / 1e6:.0f}; "
            "pass fewer images"
        )
    return page


def check_count(files: Sequence[Path], most: int) -> None:
    """Refuse more images than a page has room for, before anything is computed."""
    if len(files) > most:
        raise ValueError(f"a page holds at most {most} images, found {len(files)}; give fewer images")


def picture(pixels: npt.NDArray[np.uint8]) -> str:
    """An (H, W, 3) picture as a data URI."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    if max(image.size) <= LOSSLESS:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{pack(buffer.getvalue())}"


def pack(raw: bytes) -> str:
    """Bytes as base64, for `unpack` in common.js."""
    return base64.b64encode(raw).decode("ascii")
