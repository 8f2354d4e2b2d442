"""The pictures of the documentation."""

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
LIMIT = 300_000


def test_the_picture_of_directions_matches_the_order_tables():
    made = runpy.run_path(str(DOCS / "make_pictures.py"))["directions_picture"]()
    assert made == (DOCS / "directions.svg").read_text(encoding="utf-8"), "run python docs/make_pictures.py"


def test_pictures_of_the_documentation_are_small_and_described():
    text = (DOCS / "explain.md").read_text(encoding="utf-8")
    for name in ("directions.svg", "explain.png", "complete.png", "pca.png", "neighbours.png"):
        assert (DOCS / name).stat().st_size < LIMIT
        assert f"]({name})" in text
        assert f"![]({name})" not in text
