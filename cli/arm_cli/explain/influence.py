"""Influence maps as PNG files and as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from arm_cli.images import image_batches
from arm_cli.opening import Opened
from arm_cli.pages.pictures import overlay, stems
from arm_cli.pages.shell import check_count, pack, picture, render
from arm_cli.progress import ProgressBar
from arm_core.data.transforms import denormalize
from arm_core.engine.protocol import Array, Engine
from arm_core.explain.influence import Influence, check_layers, gradient_times_input, influence
from arm_core.explain.layout import CLASS, on_grid, token_patches, token_weights
from arm_core.model.spec import ClassifierSpec, ModelSpec

STORED = 1_200_000
"""Bytes of maps that a page stores for every target; other maps are only stored for the chosen target."""
MOST = 12
"""Largest number of images on a page."""
MEAN, ROLLOUT, GRADIENT = "mean of directions", "rollout", "gradient times input"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The values of --layer, --direction and --token."""

    layers: tuple[int, ...] | None
    """None for all."""
    directions: tuple[str, ...]
    """Names; `MEAN` is one of them."""
    token: str

    @classmethod
    def parse(cls, spec: ModelSpec, *, layer: str, direction: str, token: str | None) -> Choice:
        """Check the options against the model; a ValueError lists its valid values."""
        if layer != "all" and not layer.isdecimal():
            raise ValueError(f"--layer: expected a number from 0 or all, found {layer!r}")
        layers = None if layer == "all" else check_layers(spec, [int(layer)])
        names = direction_names(spec)
        if direction == "all":
            chosen = (MEAN, *names) if len(names) > 1 else names
        elif direction == "mean":
            chosen = (MEAN,)
        elif direction in names:
            chosen = (direction,)
        elif direction.isdecimal() and int(direction) < len(names):
            chosen = (names[int(direction)],)
        else:
            raise ValueError(
                f"--direction: expected all, mean, {', '.join(names)} or 0 to {len(names) - 1}, found "
                f"{direction!r}"
            )
        if token is None:
            token = (
                CLASS if isinstance(spec, ClassifierSpec) else _patch_name(spec, int(token_patches(spec)[-1]))
            )
        token_weights(spec, token)
        return cls(layers=layers, directions=chosen, token=token)


def direction_names(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the scan directions."""
    if isinstance(spec, ClassifierSpec):
        return tuple(str(name) for name in spec.scan_directions)
    return ("prediction order",)


def _patch_name(spec: ModelSpec, patch: int) -> str:
    return "{},{}".format(*divmod(patch, spec.grid[1]))


@dataclass(frozen=True, kw_only=True)
class View:
    """One map of one image."""

    name: str
    direction: str
    values: Array
    """(T, T) by target and source; or (rows, columns), the chosen target's map on the patches."""
    on_patches: bool = False


def influence_page(
    opened: Opened, engine: Engine, files: Sequence[Path], folder: Path, choice: Choice, threads: int | None
) -> str:
    """Compute the maps, write a PNG of each to the folder, and return the page."""
    check_count(files, MOST)
    spec = opened.spec
    images = []
    views: dict[str, None] = {}
    with ProgressBar("explain", len(files), "images") as counter:
        for file, name, batch in zip(files, stems(files), image_batches(files, opened, 1), strict=True):
            found = influence(
                engine, batch, layers=choice.layers, parameters=opened.parameters, threads=threads
            )
            gradient = gradient_times_input(engine, batch, token=choice.token)[0]
            pixels = denormalize(batch[0], opened.transform.mean, opened.transform.std)
            maps, room = [], STORED // len(files)
            # Maps of the first direction of all layers have priority to be stored for every target.
            for view in sorted(
                _views(found, gradient, choice), key=lambda view: view.direction != choice.directions[0]
            ):
                views[view.name] = None
                _save(folder / f"{name}-{_slug(view)}.png", spec, view, choice.token, pixels)
                packed, room = _pack(spec, view, choice.token, room)
                maps.append(packed)
            images.append({
                "name": file.name,
                "src": picture(pixels),
                "answer": _answer(opened, engine, batch, found, gradient, choice.token),
                "maps": maps,
            })  # fmt: skip
            counter.advance(1)
    names = tuple(views)
    patches = token_patches(spec)
    classifier = isinstance(spec, ClassifierSpec)
    data = {
        "grid": spec.grid,
        "size": spec.image_size,
        "patches": patches.tolist(),
        "views": names,
        "firstView": ROLLOUT if ROLLOUT in names else names[0],
        "directions": choice.directions,
        "target": _target(spec, choice.token),
        "hasClass": classifier,
        "classToken": int(np.flatnonzero(patches < 0)[0]) if classifier else None,
        "images": images,
    }
    return render("Influence maps", _captions(spec), "influence.js", data, footer=f"Model: {opened.folder}")


def _views(found: Influence, gradient: Array, choice: Choice) -> Iterator[View]:
    names = direction_names(found.spec)
    for m, layer in enumerate(found.layers):
        for direction in choice.directions:
            maps = found.maps[0, m]
            values = maps.mean(0) if direction == MEAN else maps[names.index(direction)]
            yield View(name=f"layer {layer}", direction=direction, values=values)
    first = choice.directions[0]
    if choice.layers is None:
        yield View(name=ROLLOUT, direction=first, values=found.rollout()[0])
    yield View(name=GRADIENT, direction=first, values=gradient, on_patches=True)


def _row(spec: ModelSpec, view: View, token: str) -> Array:
    """The map of the chosen target: (T,), or (rows, columns) if it is on the patches."""
    return view.values if view.on_patches else np.asarray(token_weights(spec, token) @ view.values)


def _pack(spec: ModelSpec, view: View, token: str, room: int) -> tuple[dict[str, Any], int]:
    """A map for the page, for every target if there is room, and the remaining room in bytes."""
    targets: list[int | str] = [_target(spec, token)]
    rows = _row(spec, view, token).reshape(1, -1)
    complete = view.values.size + view.values.shape[1]
    if not view.on_patches and complete <= room:
        room -= complete
        targets, rows = list(range(spec.tokens)), view.values
        if isinstance(spec, ClassifierSpec):
            targets, rows = [*targets, CLASS], np.concatenate([rows, token_weights(spec, CLASS)[None] @ rows])
    scale = np.abs(rows).max(1)
    levels = np.divide(rows, scale[:, None], out=np.zeros_like(rows), where=scale[:, None] > 0)
    packed = {
        "view": view.name,
        "direction": view.direction,
        "targets": targets,
        "onPatches": view.on_patches,
        "scale": [float(f"{s:.4g}") for s in scale],
        "data": pack((128 + np.round(127 * levels)).astype(np.uint8).tobytes()),
    }
    return packed, room


def _target(spec: ModelSpec, token: str) -> int | str:
    """The target's name on the page: `class` or the token's index."""
    return token if token == CLASS else int(token_weights(spec, token).argmax())


def _save(path: Path, spec: ModelSpec, view: View, token: str, pixels: npt.NDArray[np.uint8]) -> None:
    from PIL import Image

    row = _row(spec, view, token)
    values = row if view.on_patches else on_grid(spec, row)
    patch = token_patches(spec)[token_weights(spec, token).argmax()]
    marked = None if token == CLASS else (int(patch) // spec.grid[1], int(patch) % spec.grid[1])
    Image.fromarray(overlay(pixels, values, marked=marked)).save(path, optimize=True)


def _slug(view: View) -> str:
    if view.name in (ROLLOUT, GRADIENT):
        return view.name.replace(" ", "-")
    layer = int(view.name.split()[1])
    return f"layer{layer:02d}-{'mean' if view.direction == MEAN else view.direction.replace(' ', '-')}"


def _answer(
    opened: Opened, engine: Engine, batch: Array, found: Influence, gradient: Array, token: str
) -> str:
    """The model's prediction, and the agreement of the rollout with gradient times input."""
    text = ""
    if isinstance(opened.spec, ClassifierSpec):
        logits = engine.forward(batch)["logits"][0].astype(np.float64)
        share = np.exp(logits - logits.max())
        best = int(logits.argmax())
        text = f"Most likely class: {opened.class_names[best]} ({100 * share[best] / share.sum():.1f} %). "
    if found.layers == tuple(range(opened.spec.encoder.depth)):
        rollout = on_grid(opened.spec, token_weights(opened.spec, token) @ found.rollout()[0]).ravel()
        read = np.isfinite(rollout)
        value = rank_correlation(rollout[read], np.abs(gradient.ravel()[read]))
        text += f"Rank correlation of the rollout with the size of gradient times input: {value:.2f}."
    return text


def rank_correlation(a: npt.NDArray[np.floating], b: npt.NDArray[np.floating]) -> float:
    """Spearman's rank correlation, without correction for ties; NaN for fewer than 2 values."""
    if len(a) < 2:
        return float("nan")
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (a, b)]
    first, second = (values - values.mean() for values in ranks)
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


def _captions(spec: ModelSpec) -> list[str]:
    lead = (
        "Influence is the signed share that each token contributes to the output of one mixer at the target "
        "token, through the convolution, the scan, the gate and the output projection. The "
        "coefficients that depend on the image (dt, B, C and both gates) are held at their values. Over "
        "all tokens, with the share of the biases, influence adds up to 100 %."
    )
    if isinstance(spec, ClassifierSpec):
        lead += " The class is read from the mean of all patches." if spec.pooling == "mean" else ""
    return [
        lead,
        "The rollout multiplies the maps of all layers and is a heuristic; gradient times input "
        "differentiates the whole model without holding any value. Within a map, colour is "
        "proportional to size.",
    ]
