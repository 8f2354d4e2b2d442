"""The report about a training step that is not finite."""

import shutil

import numpy as np
import pytest
from test_trainer import SMALL, TRAIN, make_engine

from arm_core.engine.protocol import Batch, EngineOptions, TrainingState
from arm_core.engine.registry import installed_backends
from arm_core.model.parameters import initial_parameters, parameter_table
from arm_core.recipe.recipe import Recipe, load_recipe, override
from arm_core.training.nonfinite import NonFiniteError, first_non_finite
from arm_core.training.observer import Observer
from arm_core.training.run_folder import start_run
from arm_core.training.trainer import Trainer


@pytest.fixture
def recipe() -> Recipe:
    return override(load_recipe("finetune-digits"), [*SMALL, "mixing.mixup=0.8", "mixing.cutmix=1"])


def fail(path, recipe, observer=None, **options) -> NonFiniteError:
    with start_run(path, recipe, recipe.spec(4)) as run, pytest.raises(NonFiniteError) as caught:
        Trainer(run, make_engine(run, **options), TRAIN, observer=observer).train()
    return caught.value


def test_the_images_of_a_failed_step_are_listed(tmp_path, recipe):
    error = fail(tmp_path, recipe, poisoned_steps=frozenset(range(3, 16)))
    assert error.step == 3
    with start_run(tmp_path / "other", recipe, recipe.spec(4)) as run:
        batches = Trainer(run, make_engine(run), TRAIN).plan._batches
    expected = [f"synthetic image {i}" for position in (4, 5) for i in batches.indices(position)]
    assert list(error.images) == expected
    shown = f"Images of the step: {', '.join(expected[:5])} and 3 more. The last checkpoint is"
    assert shown in str(error)


def test_a_failure_without_a_checkpoint_is_one_sentence(tmp_path, recipe):
    class Remover(Observer):
        def started(self, trainer):
            self.trainer = trainer

        def stepped(self, step, images):
            self.trainer._writer.join()
            shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)

    error = fail(tmp_path, recipe, observer=Remover(), poisoned_steps=frozenset(range(3, 16)))
    assert error.checkpoint is None
    assert "There is no checkpoint. Try a lower learning rate, clipping or float32: in a new run" in str(
        error
    )
    assert "--resume" not in str(error)


def test_the_first_bad_tensor_does_not_depend_on_the_order_in_which_an_engine_lists_them(classifier_spec):
    names = ["tokens", "layers.0.mixer", "layers.0", "layers.2", "layers.10", "norm_f", "logits"]
    weights = list(parameter_table(classifier_spec))

    class Listing:
        """Lists bad tensors in another order each time."""

        spec = classifier_spec

        def __init__(self, order: int, bad: set[str]) -> None:
            self.order, self.bad = order, bad

        def listed(self, names):
            arrays = {n: np.full(2, np.nan if n in self.bad else 1, np.float32) for n in names}
            return dict(list(arrays.items())[:: self.order])

        def export_state(self):
            return TrainingState(parameters=self.listed(weights))

        def forward(self, images, *, intermediates):
            return self.listed(names)

        def loss_and_gradients(self, batch):
            return 1.0, self.listed([f"{n}" for n in weights]) if not self.bad & set(
                weights
            ) else self.grads()

    batch = Batch(images=np.zeros((1, 24, 24, 3), np.float32))
    for bad, first in (
        ({"layers.10", "layers.2", "logits"}, "layers.2 (forward pass)"),
        ({"layers.0.mixer", "layers.0", "norm_f"}, "layers.0.mixer (forward pass)"),
        ({"layers.4.mlp.w1.weight", "layers.1.mixer.D"}, "layers.1.mixer.D (a weight)"),
    ):
        found = {first_non_finite(Listing(order, bad), [batch]) for order in (1, -1)}
        assert found == {first}

    class BadGradients(Listing):
        def export_state(self):
            return TrainingState(parameters={n: np.ones(2, np.float32) for n in weights})

        def loss_and_gradients(self, batch):
            return 1.0, self.listed(weights)

    bad = {"layers.4.mlp.w1.weight", "layers.1.mixer.D"}
    found = {first_non_finite(BadGradients(order, bad), [batch]) for order in (1, -1)}
    assert found == {"layers.4.mlp.w1.weight (gradient)"}, "the one nearest to the loss"


def test_both_engines_name_the_same_tensor(pretrain_spec):
    rng = np.random.default_rng(0)
    batch = Batch(images=rng.standard_normal((2, 24, 24, 3)).astype(np.float32))
    found = {}
    for name, backend in installed_backends().items():
        if backend.missing():
            continue
        for tensor, value in (("layers.3.mlp.w3.weight", 3e38), ("decoder.1.mlp.fc2.weight", np.inf)):
            parameters = initial_parameters(pretrain_spec, 0)
            parameters[tensor] = np.full_like(parameters[tensor], value)
            options = EngineOptions(device="cpu", threads=1)
            engine = backend.create_engine(
                pretrain_spec, TrainingState(parameters=parameters), options=options
            )
            found.setdefault(tensor, {})[name] = first_non_finite(engine, [batch])
    for names in found.values():
        assert len(set(names.values())) == 1, found
        assert None not in names.values()
