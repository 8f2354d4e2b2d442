"""Features of patches, their colours and their neighbours."""

import numpy as np
import pytest

from arm_core.explain.features import (
    component_colors,
    nearest_patches,
    patch_features,
    read_patches,
)
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward
from arm_core.model.tokens import encoder_patches


class Reference:
    def __init__(self, spec):
        self.spec, self.parameters = spec, initial_parameters(spec, 3)

    def forward(self, images, *, intermediates=False):
        found = forward(self.spec, self.parameters, images)
        return {name: value.astype(np.float32) for name, value in found.items()}


def images_for(spec, count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, *spec.image_size, 3)).astype(np.float32)


def test_features_of_a_classifier_are_its_last_norm_without_the_class_token(classifier_spec):
    engine, images = Reference(classifier_spec), images_for(classifier_spec, 2)
    tokens = engine.forward(images)["norm_f"]
    middle = classifier_spec.class_position
    expected = np.delete(tokens, middle, axis=1)
    assert (patch_features(engine, images) == expected).all()


def test_features_of_a_pretraining_model_are_in_raster_order_without_the_last_cluster(pretrain_spec):
    engine, images = Reference(pretrain_spec), images_for(pretrain_spec, 1)
    found, patches = patch_features(engine, images), read_patches(pretrain_spec)
    assert sorted(encoder_patches(pretrain_spec)) == list(patches)
    tokens = engine.forward(images)["layers.5"][0]
    place = int(np.flatnonzero(encoder_patches(pretrain_spec) == 6)[0])  # patch 6 is not token 6
    normed = (tokens[place] - tokens[place].mean()) / tokens[place].std()
    np.testing.assert_allclose(found[0, list(patches).index(6)], normed, rtol=1e-3, atol=1e-4)


def test_colours_are_the_first_three_components_whatever_the_offset_and_scale():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((20, 20)))[0][:, :3]
    values = rng.uniform(-1, 1, (2, 200, 3)) * [9, 3, 1]
    colors = component_colors((values @ axes.T + 5).astype(np.float32))
    for i in range(3):
        correlation = np.corrcoef(colors[..., i].ravel(), values[..., i].ravel())[0, 1]
        assert abs(correlation) > 0.98
    assert colors.min() == 0
    assert colors.max() == 1
    np.testing.assert_allclose(
        colors, component_colors((values @ axes.T * 2 - 3).astype(np.float32)), atol=1e-3
    )


def test_colours_of_equal_or_few_features_are_finite():
    assert (component_colors(np.ones((1, 4, 8), np.float32)) == 0.5).all()
    assert np.isfinite(component_colors(np.ones((1, 1, 2), np.float32))).all()


def test_the_nearest_patch_of_an_image_among_others_is_its_own_copy(classifier_spec):
    engine = Reference(classifier_spec)
    pool = images_for(classifier_spec, 7, seed=1)
    queries = np.stack([patch_features(engine, pool[i : i + 1])[0, 11] for i in (2, 4)])
    batches = (pool[:3], pool[3:6], pool[6:])
    other, found = nearest_patches(engine, queries, batches, count=3)
    assert (other[0].image, other[0].patch) == (2, 11)
    assert (found[0].image, found[0].patch) == (4, 11)
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    assert len(found) == len({n.image for n in found}) == 3
    assert [n.similarity for n in found] == sorted((n.similarity for n in found), reverse=True)
