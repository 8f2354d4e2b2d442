"""Token orders, the decoder's mask and position tables.

Patches are numbered in raster order, row by row from the top left. An *order* is a permutation
`order[t] = token read at step t`; each direction of the scan is a row of `direction_orders`. Nothing is
flipped or transposed in memory; kernels index through these tables.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from arm_core.model.spec import ClassifierSpec, Direction, ModelSpec, PredictionOrder, PretrainSpec

Indices = npt.NDArray[np.int32]


def cluster_order(spec: PretrainSpec) -> Indices:
    """Clusters in prediction order: `(clusters,)` raster indices of clusters."""
    rows, columns = spec.grid[0] // spec.cluster[0], spec.grid[1] // spec.cluster[1]
    raster = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns)
    match spec.prediction_order:
        case PredictionOrder.ROW:
            order = raster.ravel()
        case PredictionOrder.ROW_REVERSE:
            order = raster.ravel()[::-1]
        case PredictionOrder.COLUMN:
            order = raster.T.ravel()
        case PredictionOrder.COLUMN_REVERSE:
            order = raster.T.ravel()[::-1]
        case PredictionOrder.RANDOM:
            # Sort raw 64-bit draws: NumPy keeps this stream stable, but not that of `permutation`.
            draws = np.random.Philox(key=spec.order_seed).random_raw(raster.size)
            order = np.argsort(draws, kind="stable").astype(np.int32)
    return np.ascontiguousarray(order)


def patch_order(spec: PretrainSpec) -> Indices:
    """All patches, cluster by cluster: `(patches,)` raster indices, in row order within a cluster."""
    height, width = spec.cluster
    rows, columns = spec.grid
    raster = np.arange(spec.patches, dtype=np.int32).reshape(rows // height, height, columns // width, width)
    clusters = raster.transpose(0, 2, 1, 3).reshape(spec.clusters, spec.patches_per_cluster)
    return np.ascontiguousarray(clusters[cluster_order(spec)].ravel())


def encoder_patches(spec: PretrainSpec) -> Indices:
    """Patches that the encoder reads, `(tokens,)`: every cluster except the last."""
    return patch_order(spec)[: spec.tokens]


def target_patches(spec: PretrainSpec) -> Indices:
    """Patches that the decoder predicts, `(tokens,)`: every cluster except the first."""
    return patch_order(spec)[spec.patches_per_cluster :]


def decoder_mask(spec: PretrainSpec) -> npt.NDArray[np.bool_]:
    """Latents that each query attends to: `(tokens, tokens)`, True at [query, latent].

    Queries of cluster i + 1 attend to the latents of clusters 1..i, regardless of the token in the cluster.
    """
    cluster = np.arange(spec.tokens) // spec.patches_per_cluster
    return np.asarray(cluster[:, None] >= cluster[None, :])


def direction_orders(spec: ModelSpec) -> Indices:
    """One row per scan direction: `(K, tokens)`, the token read at each step.

    Pretraining tokens are already in prediction order, so their only direction is the identity. The tokens
    of a classifier are the patches in raster order with the class token in the middle. Every direction
    reads the class token at its middle step; for an odd number of patches the two reversed directions read
    it one step later, since they are exact mirrors of the forward ones.
    """
    if isinstance(spec, PretrainSpec):
        return np.arange(spec.tokens, dtype=np.int32)[None]
    return np.stack([_classifier_order(spec, direction) for direction in spec.scan_directions])


def _classifier_order(spec: ClassifierSpec, direction: Direction) -> Indices:
    patches = np.arange(spec.patches, dtype=np.int32).reshape(spec.grid)
    if direction in (Direction.COLUMN, Direction.COLUMN_REVERSE):
        patches = patches.T
    tokens = patches.ravel()
    tokens = tokens + (tokens >= spec.class_position)  # patch -> token: skip the position of the class token
    order = np.insert(tokens, spec.class_position, spec.class_position).astype(np.int32)
    if direction in (Direction.ROW_REVERSE, Direction.COLUMN_REVERSE):
        order = order[::-1]
    return np.ascontiguousarray(order)


def sincos_positions(grid: tuple[int, int], width: int) -> npt.NDArray[np.float32]:
    """Fixed 2-D position table, `(rows * columns, width)` float32, patches in raster order.

    The first half of the channels encodes the column, the second half the row; each half is
    [sin(position * f), cos(position * f)] with f = 10000^(-i / (width / 4)), computed in float64.
    """
    if width % 4:
        raise ValueError(f"the channels of a 2-D sin-cos table must be divisible by 4, found {width}")
    rows, columns = grid
    frequencies = 10000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width / 4))

    def encode(position: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        angle = position[:, None] * frequencies
        return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

    column = encode(np.tile(np.arange(columns, dtype=np.float64), rows))
    row = encode(np.repeat(np.arange(rows, dtype=np.float64), columns))
    return np.concatenate([column, row], axis=1).astype(np.float32)
