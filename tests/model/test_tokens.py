"""Token orders, masks and position tables, compared with a second form of their definitions."""

import numpy as np
import pytest

from arm_core.model.spec import ClassifierSpec, Direction, EncoderSpec, PredictionOrder, PretrainSpec
from arm_core.model.tokens import (
    cluster_order,
    decoder_mask,
    direction_orders,
    encoder_patches,
    patch_order,
    sincos_positions,
    target_patches,
)

ENCODER = EncoderSpec(width=16, depth=6, patch=2)


def pretrain(order=PredictionOrder.ROW, size=(12, 8), cluster=(3, 2), seed=0):
    return PretrainSpec(
        encoder=ENCODER, image_size=size, cluster=cluster, prediction_order=order, order_seed=seed
    )


def classifier(size):
    return ClassifierSpec(encoder=ENCODER, image_size=size, classes=2)


def test_row_order_walks_clusters_then_patches_row_by_row():
    spec = pretrain()  # 6 x 4 patches, clusters of 3 x 2
    expected = [
        (3 * top + row) * 4 + 2 * left + column
        for top in range(2)
        for left in range(2)
        for row in range(3)
        for column in range(2)
    ]
    assert patch_order(spec).tolist() == expected


@pytest.mark.parametrize("order", PredictionOrder)
def test_every_prediction_order_is_a_permutation_that_keeps_clusters_whole(order):
    spec = pretrain(order)
    patches = patch_order(spec)
    assert sorted(patches.tolist()) == list(range(spec.patches))
    rows, columns = patches // 4 // 3, patches % 4 // 2
    clusters = (rows * 2 + columns).reshape(spec.clusters, -1)
    assert (clusters == cluster_order(spec)[:, None]).all()


def test_backward_and_column_orders_mirror_the_forward_row_order():
    forward = cluster_order(pretrain(PredictionOrder.ROW))
    assert (cluster_order(pretrain(PredictionOrder.ROW_REVERSE)) == forward[::-1]).all()
    columns = forward.reshape(2, 2).T.ravel()
    assert (cluster_order(pretrain(PredictionOrder.COLUMN)) == columns).all()
    assert (cluster_order(pretrain(PredictionOrder.COLUMN_REVERSE)) == columns[::-1]).all()


def test_the_random_order_is_fixed_by_its_seed():
    orders = [
        cluster_order(pretrain(PredictionOrder.RANDOM, (24, 24), (2, 2), seed)).tolist() for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    # Literal: a change of generator would silently reorder the clusters of every trained model.
    assert orders[0][:8] == EXPECTED_RANDOM


EXPECTED_RANDOM = [0, 21, 2, 11, 20, 17, 9, 1]


def test_the_encoder_omits_the_last_cluster_and_the_targets_omit_the_first():
    spec = pretrain()
    order = patch_order(spec)
    assert (encoder_patches(spec) == order[:-6]).all()
    assert (target_patches(spec) == order[6:]).all()


def test_queries_see_their_own_block_of_latents_and_all_before_it():
    mask = decoder_mask(pretrain())
    assert mask.shape == (18, 18)
    for query in range(18):
        for latent in range(18):
            assert mask[query, latent] == (latent // 6 <= query // 6)


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (6, 6), (2, 4)])
def test_directions_equal_flips_and_transposes_with_the_class_token_kept_in_the_middle(size):
    spec = classifier(size)
    middle = spec.class_position
    patches = np.delete(np.arange(spec.tokens), middle).reshape(spec.grid)  # token index of each patch
    row = np.insert(patches.ravel(), middle, middle)
    column = np.insert(patches.T.ravel(), middle, middle)
    expected = dict(zip(Direction, (row, row[::-1], column, column[::-1]), strict=True))
    orders = direction_orders(spec)
    for direction, order in zip(spec.scan_directions, orders, strict=True):
        assert (order == expected[direction]).all(), direction


def test_a_pretraining_model_reads_its_tokens_in_order():
    assert (direction_orders(pretrain()) == np.arange(18)).all()


def test_position_tables_encode_the_column_first_and_the_row_second():
    table = sincos_positions((3, 5), 8)
    angle = np.array([1.0, 10000.0**-0.5])
    row, column = 2, 3
    expected = np.concatenate(
        [np.sin(column * angle), np.cos(column * angle), np.sin(row * angle), np.cos(row * angle)]
    )
    np.testing.assert_allclose(table[row * 5 + column], expected, rtol=1e-6)
    assert table.dtype == np.float32


def test_position_tables_refuse_a_width_that_is_not_divisible_by_four():
    with pytest.raises(ValueError, match="must be divisible by 4, found"):
        sincos_positions((2, 2), 6)
