"""Features of patches: their principal components as colours, their similarity, nearest patches of other
images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arm_core.engine.protocol import Array, Engine
from arm_core.explain.layout import token_patches
from arm_core.model.spec import ClassifierSpec, ModelSpec

CLIP = 2.0
"""Percent of the values at each end of a component that are clipped to the end's colour."""


def patch_features(engine: Engine, images: Array) -> Array:
    """(B, patches read, D): the output of the last layer for each patch, after a LayerNorm.

    This is the classifier's last norm, or in pretraining a norm without weights, since the weights of its
    last tap are made for the decoder. Patches are in raster order, without the class token and, in
    pretraining, without the
    last cluster (`read_patches`). images: (B, H, W, 3), normalised.
    """
    recorded, spec = engine.forward(images, intermediates=True), engine.spec
    if isinstance(spec, ClassifierSpec):
        tokens = recorded["norm_f"]
    else:
        tokens = recorded[f"layers.{spec.encoder.depth - 1}"]
        tokens = tokens - tokens.mean(-1, keepdims=True)
        tokens = tokens / np.sqrt(tokens.var(-1, keepdims=True) + spec.encoder.norm_eps)
    patches = token_patches(spec)
    raster = np.argsort(patches)
    return np.ascontiguousarray(tokens[:, raster[patches[raster] >= 0]])


def read_patches(spec: ModelSpec) -> npt.NDArray[np.int32]:
    """Raster indices of the patches that `patch_features` describes, ascending."""
    patches = np.sort(token_patches(spec))
    return patches[patches >= 0]


def component_colors(features: Array) -> Array:
    """(B, P, D) features -> (B, P, 3) colours in 0..1: the first three principal components of all patches.

    Each component is scaled from its 2nd to its 98th percentile. Its sign is chosen so that the largest
    loading is positive. Constant components are 0.5.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    values = centred @ axes
    low, high = np.percentile(values, [CLIP, 100 - CLIP], axis=0)
    spans = high - low
    varies = spans > 1e-6 * max(float(np.abs(flat).max()), 1e-30)
    colors = np.where(varies, (values - low) / np.where(varies, spans, 1), 0.5)
    colors = np.pad(colors, ((0, 0), (0, 3 - colors.shape[1])), constant_values=0.5)
    return np.clip(colors, 0, 1).astype(np.float32).reshape(*features.shape[:2], 3)


def unit(features: Array) -> Array:
    """Features scaled to norm 1, so that products are cosines; features of 0 stay 0."""
    norms = np.linalg.norm(features, axis=-1, keepdims=True)
    return np.asarray(features / np.maximum(norms, np.finfo(np.float32).tiny))


@dataclass(frozen=True, kw_only=True, order=True)
class Neighbour:
    """The patch of one image that is most similar to a query."""

    similarity: float
    """Cosine, -1 to 1."""
    image: int
    """Index of the image among all searched images."""
    patch: int
    """Raster index."""


def nearest_patches(
    engine: Engine, queries: Array, batches: Iterable[Array], *, count: int
) -> list[list[Neighbour]]:
    """The most similar patches of other images for each query, at most one per image, most similar first.

    queries: (Q, D), rows of `patch_features`.  batches: normalised images (B, H, W, 3), read once.
    """
    found: list[list[Neighbour]] = [[] for _ in queries]
    directions, patches, start = unit(queries), read_patches(engine.spec), 0
    for images in batches:
        cosines = unit(patch_features(engine, images)) @ directions.T  # (B, P, Q)
        best = cosines.argmax(1)  # (B, Q)
        for (b, q), place in np.ndenumerate(best):
            value, patch = float(cosines[b, place, q]), int(patches[place])
            found[q].append(Neighbour(similarity=value, image=start + b, patch=patch))
        found = [sorted(one, key=lambda n: (-n.similarity, n.image))[:count] for one in found]
        start += len(images)
    return found
