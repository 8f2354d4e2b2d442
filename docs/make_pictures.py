"""Make the pictures of the documentation: `python docs/make_pictures.py [DEMO]`.

Without DEMO: `directions.svg`, from the order tables alone. DEMO is the folder of `arm demo`; with it also
`explain.png`, `complete.png`, `pca.png` and `neighbours.png`, by the commands that docs/explain.md shows, on
test digits.
"""

from __future__ import annotations

import html
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from click.testing import CliRunner
from PIL import Image

from arm_cli.main import main as arm
from arm_core.data.digits import Digits
from arm_core.model.spec import ClassifierSpec, EncoderSpec, PretrainSpec
from arm_core.model.tokens import cluster_order, direction_orders, encoder_patches, patch_order

DOCS = Path(__file__).parent
CELL, GAP = 32, 44
"""Side of a patch and space between panels, in units of the picture."""
SPACE = 6
"""White pixels between the pictures of a sheet."""
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1d2130; } .title, .term { font-weight: 650; }
.soft { fill: #545b70; } .step { font-size: 12px; text-anchor: middle; fill: #1d2130; }
.path { fill: none; stroke: #1d2130; stroke-width: 2; opacity: .3; }
.edge { fill: none; stroke: #1d2130; stroke-width: 2.4; } .class { fill: #0b6b3a; stroke: #fff; }
.never { fill: #8884; } .white { fill: #fff; }
@media (prefers-color-scheme: dark) { text, .title { fill: #e7e9f1; } .soft { fill: #a4abbf; }
.edge { stroke: #e7e9f1; } .step { fill: #14161d; } .white { fill: #fff; } }
"""
TERMS = (
    ("patch", "a square of pixels, numbered by the step at which it is read"),
    ("cluster", "a block of patches, framed; predicted as one"),
    ("token order", "a table of the token read at each step; nothing is moved in memory"),
    ("pretraining", "reads cluster by cluster and predicts each from those before it;"),
    ("", "the last cluster (grey) is predicted and never read"),
    ("direction", "one order scanned one way, with scan weights of its own;"),
    ("", "a classifier takes the mean over its K directions,"),
    ("", "and each passes the class token (diamond) in its middle"),
)


def color(part: float) -> str:
    """From yellow (read first) to blue (read last)."""
    return f"hsl({55 + 165 * part:.0f} 75% {78 - 14 * part:.0f}%)"


def centre(patch: int, columns: int) -> tuple[float, float]:
    return (patch % columns + 0.5) * CELL, (patch // columns + 0.5) * CELL


def grid(steps: dict[int, int], count: int, columns: int, last: int, path: str) -> str:
    """Patches colored by the step at which they are read, grey where they never are; a path; the steps."""
    squares, numbers = [], []
    for patch in range(count):
        (x, y), read = centre(patch, columns), patch in steps
        paint = f'fill="{color(steps[patch] / last)}"' if read else 'class="never"'
        box = f'x="{x - CELL / 2:g}" y="{y - CELL / 2:g}" width="{CELL}" height="{CELL}"'
        squares.append(f'<rect {box} {paint} stroke="#fff"/>')
        if read:
            numbers.append(f'<text class="step" x="{x:g}" y="{y + 4:g}">{steps[patch] + 1}</text>')
    return "".join([*squares, f'<polyline class="path" points="{path}"/>', *numbers])


def polyline(points: Iterable[Sequence[float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def pretraining(spec: PretrainSpec) -> str:
    """Patches by the step of the encoder, clusters framed and connected in the order of prediction."""
    columns, (height, width) = spec.grid[1], spec.cluster
    steps = {int(patch): t for t, patch in enumerate(encoder_patches(spec))}
    clusters = patch_order(spec).reshape(spec.clusters, -1)
    centres = [np.mean([centre(int(p), columns) for p in cluster], axis=0) for cluster in clusters]
    body = grid(steps, spec.patches, columns, spec.tokens, polyline(centres))
    for number in cluster_order(spec):
        row, column = divmod(int(number), columns // width)
        box = f'x="{column * width * CELL}" y="{row * height * CELL}"'
        body += f'<rect class="edge" {box} width="{width * CELL}" height="{height * CELL}"/>'
    return body


def direction(spec: ClassifierSpec, order: npt.NDArray[np.int32]) -> str:
    """Patches by the step of the scan, the path from patch to patch, and the class token on it."""
    columns, middle = spec.grid[1], spec.class_position
    steps = {int(t) - int(t > middle): step for step, t in enumerate(order) if t != middle}
    path = [centre(patch, columns) for patch in sorted(steps, key=lambda patch: steps[patch])]
    step = int(np.flatnonzero(order == middle)[0])
    (x0, y0), (x1, y1) = path[step - 1], path[step]
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    body = grid(steps, spec.patches, columns, spec.tokens, polyline(path))
    body += f'<path class="class" d="M{x:g} {y - 13:g}l13 13l-13 13l-13 -13z"/>'
    return body + f'<text class="step white" x="{x:g}" y="{y + 4:g}">{step + 1}</text>'


def panel(x: float, y: float, title: str, body: str) -> str:
    head = f'<text class="title" y="-12">{html.escape(title)}</text>'
    return f'<g transform="translate({x:g} {y:g})">{head}{body}</g>'


def directions_picture() -> str:
    """Clusters and their order in pretraining, and the four directions of a classifier."""
    encoder = EncoderSpec(width=32, depth=6, patch=4)
    pretrain = PretrainSpec(
        encoder=encoder, image_size=(24, 24), cluster=(2, 2), decoder_width=16, decoder_heads=1
    )
    classifier = ClassifierSpec(encoder=encoder, classes=10, image_size=(24, 24))
    side, second = pretrain.grid[1] * CELL, 32 + pretrain.grid[0] * CELL + 56
    parts = [panel(0, 32, "pretraining, one order", pretraining(pretrain))]
    for i, (term, text) in enumerate(TERMS):
        y = 52 + 24 * i
        parts.append(f'<text class="term" x="{side + GAP}" y="{y}">{term}</text>')
        parts.append(f'<text class="soft" x="{side + GAP + 110}" y="{y}">{html.escape(text)}</text>')
    names, orders = classifier.scan_directions, direction_orders(classifier)
    for k, (name, order) in enumerate(zip(names, orders, strict=True)):
        x = k * (side + GAP)
        parts.append(panel(x, second, f"direction {k}, {name}", direction(classifier, order)))
    width, height = 4 * side + 3 * GAP, second + side + 8
    about = (
        "A 6 by 6 grid of patches, numbered by the step at which each is read. In pretraining, clusters of "
        "2 by 2 patches are read one after the other. A classifier reads all patches in four directions; a "
        "diamond marks the class token, which every direction passes in its middle."
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-8 0 {width + 40} {height}" role="img" '
        f'aria-label="{about}"><title>Clusters, orders and directions</title><style>{STYLE}</style>'
        f"{''.join(parts)}</svg>\n"
    )


def run(*words: object) -> None:
    """One `arm` command."""
    done = CliRunner().invoke(arm, [str(word) for word in words])
    assert done.exit_code == 0, done.output


def demo_pictures(demo: Path) -> None:
    """Pictures of the demonstration's models, by the commands of docs/explain.md."""
    digits, chosen = Digits("test"), (3, 17, 44, 60)
    classifier, pretrained = demo / "pretrained-50-labels-seed-0", demo / "pretrain"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, numbers in (("images", chosen), ("others", range(100, 300))):
            (folder / part).mkdir()
            for i in numbers:
                Image.fromarray(np.asarray(digits.item(i).image)).save(folder / part / f"{i:03d}.png")
        images, out = folder / "images", folder / "out"
        names = [f"{i:03d}" for i in chosen]
        run("explain", classifier, images, "--token", "3,3", "--out", out)
        maps = ("layer00-mean", "layer02-mean", "layer02-row", "rollout", "gradient-times-input")
        stack(DOCS / "explain.png", [[out / f"{name}-{kind}.png" for kind in maps] for name in names[:2]])
        run("complete", pretrained, images, "--from", 3, "--out", out)
        stack(DOCS / "complete.png", [[out / f"{name}.png" for name in names[:2]], *[
            [out / f"{name}.png" for name in names[2:]]
        ]])  # fmt: skip
        run("explain", pretrained, images, "--pca", "--out", out)
        stack(DOCS / "pca.png", [[out / f"{name}-pca.png" for name in names]])
        words = ("--neighbours", folder / "others", "--token", "2,2", "--count", 5)
        run("explain", classifier, images, *words, "--out", out)
        stack(DOCS / "neighbours.png", [[out / f"{name}-neighbours.png"] for name in names[:3]])


def stack(path: Path, rows: Sequence[Sequence[Path]]) -> None:
    """Pictures of one size in rows, at most 960 pixels wide."""
    pictures = [[Image.open(file).convert("RGB") for file in row] for row in rows]
    width, height = pictures[0][0].size
    sheet = Image.new(
        "RGB", (len(rows[0]) * (width + SPACE) - SPACE, len(rows) * (height + SPACE) - SPACE), "white"
    )
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + SPACE), y * (height + SPACE)))
    scale = min(1, 960 / sheet.width)
    sheet = sheet.resize((round(sheet.width * scale), round(sheet.height * scale)), Image.Resampling.LANCZOS)
    sheet.quantize(256).save(path, optimize=True)


def main(words: list[str]) -> None:
    (DOCS / "directions.svg").write_text(directions_picture(), encoding="utf-8")
    if words:
        demo_pictures(Path(words[0]))


if __name__ == "__main__":
    main(sys.argv[1:])
