"""Predictions cluster by cluster, against the float64 reference and their definition."""

import dataclasses

import numpy as np
import pytest

from arm_core.explain.completion import Statistics, complete, fold_patches, nearest, restore
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward, unfold_patches
from arm_core.model.spec import Target
from arm_core.model.tokens import patch_order


class Reference:
    """The float64 reference as an engine; it counts its passes."""

    def __init__(self, spec, seed=3):
        self.spec, self.passes = spec, 0
        self.parameters = {
            name: value * (1 if value.ndim < 2 else 3)
            for name, value in initial_parameters(spec, seed).items()
        }

    def forward(self, images, *, intermediates=False):
        self.passes += 1
        found = forward(self.spec, self.parameters, images)
        return {name: value.astype(np.float32) for name, value in found.items()}


class Oracle:
    """An engine that predicts the true patches of fixed images, for any input."""

    def __init__(self, spec, images):
        self.spec, self.true = spec, images

    def forward(self, images, *, intermediates=False):
        patches = unfold_patches(self.true, self.spec.encoder.patch)
        target = patches[:, patch_order(self.spec)[self.spec.patches_per_cluster :]]
        if self.spec.target is Target.NORMALIZED:
            target = (target - target.mean(-1, keepdims=True)) / target.std(-1, ddof=1, keepdims=True)
        return {"prediction": target.astype(np.float32)}


@pytest.fixture(params=["normalized", "raw"])
def spec(request, pretrain_spec):
    return dataclasses.replace(pretrain_spec, target=request.param)


@pytest.fixture
def images(spec):
    return np.random.default_rng(0).standard_normal((2, *spec.image_size, 3)).astype(np.float32)


def clusters(spec):
    return patch_order(spec).reshape(spec.clusters, -1)


def test_losses_from_true_clusters_are_those_of_training(spec, images):
    engine = Reference(spec)
    found = complete(engine, images)
    tokens = engine.forward(images)["loss_per_token"].reshape(spec.clusters - 1, -1)
    np.testing.assert_allclose(found.step_loss[:, 1:].mean(0), tokens.mean(1), rtol=1e-5)
    assert np.isnan(found.step_loss[:, 0]).all()


@pytest.mark.parametrize("statistics", Statistics)
def test_a_perfect_prediction_with_true_statistics_rebuilds_the_image(spec, images, statistics):
    found = complete(Oracle(spec, images), images, given=2, statistics=statistics)
    np.testing.assert_allclose(found.step_by_step, images, atol=1e-4)
    exact = statistics is Statistics.TRUE or spec.target is Target.RAW
    assert (np.abs(found.rollout - images).max() < 1e-4) == exact
    assert np.nanmax(found.rollout_loss) < 1e-6


@pytest.mark.parametrize("given", [1, 3, 8])
def test_a_rollout_is_a_pass_for_each_cluster_and_keeps_the_given_ones(spec, images, given):
    engine = Reference(spec)
    found = complete(engine, images, given=given)
    assert engine.passes == spec.clusters - given
    before = unfold_patches(images, spec.encoder.patch)
    after = unfold_patches(found.rollout, spec.encoder.patch)
    given_patches = clusters(spec)[:given].ravel()
    assert (before[:, given_patches] == after[:, given_patches]).all()
    assert np.isnan(found.rollout_pixels[:, :given]).all()
    assert np.isfinite(found.rollout_pixels[:, given:]).all()


def test_a_rollout_predicts_each_cluster_from_its_own_earlier_predictions(spec, images):
    engine = Reference(spec)
    found = complete(engine, images, given=2, statistics="true")
    places = clusters(spec)[6]
    prediction = engine.forward(found.rollout)["prediction"][:, 5 * 4 : 6 * 4]
    true = unfold_patches(images, spec.encoder.patch)[:, places]
    expected = restore(spec, prediction, true)
    np.testing.assert_allclose(
        unfold_patches(found.rollout, spec.encoder.patch)[:, places], expected, atol=1e-5
    )


def test_a_rollout_with_nearest_statistics_ignores_the_true_pixels(spec, images):
    """The brightness and contrast after the given clusters do not leak."""
    engine = Reference(spec)
    other = unfold_patches(images, spec.encoder.patch)
    other[:, clusters(spec)[3:].ravel()] = 5
    other = fold_patches(other, spec.grid, spec.encoder.patch)
    first, second = (complete(engine, x, given=3).rollout for x in (images, other))
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_the_nearest_patch_is_the_closest_in_the_grid(pretrain_spec):
    among = np.array([0, 5, 8, 33])
    assert list(nearest(pretrain_spec, np.array([1, 14, 35, 4]), among)) == [0, 8, 33, 5]


def test_classifiers_and_impossible_starts_are_refused(classifier_spec, pretrain_spec, images):
    with pytest.raises(ValueError, match="expected a pretraining model"):
        complete(Oracle(classifier_spec, images), images)
    for given in (0, 9):
        with pytest.raises(ValueError, match=f"expected 1 to 8 of 9 clusters, found {given}"):
            complete(Oracle(pretrain_spec, images), images, given=given)
