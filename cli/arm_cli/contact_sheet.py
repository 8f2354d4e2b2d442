"""A self-contained HTML page of images with their predicted classes."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

THUMBNAIL = 160
"""Longest side of a picture, pixels."""

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
ul { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1.2rem; padding: 0; }
li { list-style: none; overflow-wrap: anywhere; font-size: .85rem; }
img { display: block; max-width: 100%; border-radius: 4px; }
b { font-size: 1rem; }
"""


def write_contact_sheet(path: Path, title: str, results: Sequence[dict[str, Any]]) -> None:
    """Write the page. results: `image`, the file's name, and `top`, its classes, most likely first."""
    from arm_core.files.atomic import create_file, new_file

    items = "\n".join(_item(result) for result in results)
    page = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n<ul>\n{items}\n</ul>\n</html>\n"
    )
    with new_file(path, force=True) as draft, create_file(draft) as file:
        file.write(page.encode())


def _item(result: dict[str, Any]) -> str:
    first, *others = [f"{one['name']} {100 * one['probability']:.1f} %" for one in result["top"]]
    rest = "".join(f"<br>{html.escape(line)}" for line in others)
    name = html.escape(result["image"])
    return (
        f'<li><img src="{_thumbnail(Path(result["image"]))}" alt="{html.escape(first)}: {name}" '
        f'loading="lazy"><b>{html.escape(first)}</b>{rest}<br>{name}</li>'
    )


def _thumbnail(path: Path) -> str:
    """A small JPEG of an image file as a data address."""
    from arm_core.data.decode import decode
    from arm_core.data.walk import read_file

    image = decode(read_file(path), str(path))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
