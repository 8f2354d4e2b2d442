"""`arm data preview`: training images as the model sees them, as an HTML page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

import click

from arm_cli.options import data_format_option
from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_core.data.loader import TrainBatches
    from arm_core.engine.byte_images import ByteImages
    from arm_core.engine.protocol import Array
    from arm_core.recipe.recipe import Recipe

STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; background: #fff; color: #222 }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(13em, 1fr)); gap: 1.2em }
figure { margin: 0 } img { width: 100%; image-rendering: auto; border: 1px solid #ccc }
figcaption { font-size: 12px; overflow-wrap: anywhere } .class { font-weight: 600 }
"""


@click.command(short_help="Show augmented images in an HTML page.")
@click.argument("recipe")
@click.option("--data", required=True, metavar="PATH", help="Images to train on.")
@data_format_option
@click.option("--out", required=True, metavar="GRID.HTML", help="File to write.")
@click.option("--count", type=click.IntRange(1, 512), default=32, show_default=True, help="Images to show.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def preview(recipe: str, data: str, data_format: str | None, out: str, count: int, force: bool) -> None:
    """Write a grid of the first training images of RECIPE to GRID.HTML.

    Each image is shown as training sees it, with its random operations. A classifier's images are also shown
    mixed, with the weight of each of the two.
    """
    from arm_core.files.atomic import new_file, write_text
    from arm_core.recipe.images import open_sources
    from arm_core.recipe.recipe import load_recipe, override
    from arm_core.training.plan import training_batches

    changes = ["data.source=folder", f"data.path={data}", "data.labels_per_class=none"]
    changes += [f"data.format={data_format}"] if data_format else []
    chosen = override(load_recipe(recipe), changes)
    source, _ = open_sources(chosen)
    spec = chosen.spec(len(source.classes) or None)
    size = min(chosen.training.micro_batch, len(source))
    batches = training_batches(chosen, spec, source, batch_size=size)
    page = _page(recipe, chosen, batches, count)
    with new_file(Path(out), force=force) as draft:
        write_text(draft, page)
    echo(f"{out}: {count} images", err=True)


def _page(name: str, recipe: Recipe, batches: TrainBatches, count: int) -> str:
    from dataclasses import replace

    from arm_core.engine.byte_images import Mix

    figures: list[str] = []
    mixed: list[str] = []
    position = 0
    while len(figures) < count:
        items, augmented, traces = zip(*batches.samples(position), strict=True)
        mix = Mix() if batches.classes is None else batches.mix(position)
        images = batches.transform.batch(augmented, mix)
        plain = replace(images, mix=Mix()).normalised()
        for item, pixels, trace in list(zip(items, plain, traces, strict=True))[: count - len(figures)]:
            label = batches.source.classes[item.label] if batches.source.classes else ""
            figures.append(_figure(recipe, pixels, label, f"{Path(item.name).name}: {'; '.join(trace)}"))
        labels = [batches.source.classes[item.label] for item in items] if batches.source.classes else []
        mixed += _mixed(recipe, images, labels, count - len(mixed))
        position += 1
    sections = [("Augmented", figures), *([("Mixed", mixed)] if mixed else [])]
    body = "".join(f"<h2>{title}</h2><div class=grid>{''.join(cells)}</div>" for title, cells in sections)
    title = html.escape(f"Training images of {name}")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style><h1>{title}</h1>{body}</html>\n"
    )


def _mixed(recipe: Recipe, images: ByteImages, labels: list[str], room: int) -> list[str]:
    mix = images.mix
    if mix.weight == 1.0:
        return []
    kind = "mixup" if mix.box is None else "cutmix"
    cells = []
    for i, pixels in enumerate(images.normalised()[:room]):
        words = f"{100 * mix.weight:.0f} % {labels[i]}, {100 * (1 - mix.weight):.0f} % {labels[-1 - i]}"
        cells.append(_figure(recipe, pixels, words, kind))
    return cells


def _figure(recipe: Recipe, pixels: Array, label: str, words: str) -> str:
    from PIL import Image

    from arm_core.data.transforms import denormalize

    file = io.BytesIO()
    image = denormalize(pixels, recipe.augmentation.mean, recipe.augmentation.std)
    Image.fromarray(image).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>'
        f"<span class=class>{html.escape(label)}</span> {html.escape(words)}</figcaption></figure>"
    )
