"""The models that `arm` opens: folders, runs, checkpoints."""

import json
from dataclasses import replace

import numpy as np
import pytest

from arm_cli.opening import find_model, open_model
from arm_core.data.transforms import EvalTransform
from arm_core.engine.protocol import TrainingState
from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters
from arm_core.training.checkpoint import Checkpoint, Progress, save_checkpoint


@pytest.fixture
def run(tmp_path, classifier_spec):
    """A run of two checkpoints; their averages are shifted by one."""
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 2):
        values = initial_parameters(classifier_spec, seed=step)
        average = {name: value + 1 for name, value in values.items()}
        state = TrainingState(parameters=values, exp_avg=values, exp_avg_sq=values, ema=average)
        progress = Progress(step=step, position=step, recipe="", engine={})
        metadata = {"classes": json.dumps([f"kind {i}" for i in range(10)])}
        save_checkpoint(
            folder, Checkpoint(spec=classifier_spec, progress=progress, state=state, metadata=metadata)
        )
    return folder


def test_a_run_stands_for_its_newest_checkpoint(run):
    assert find_model(str(run)).model.path == run / "checkpoints/step-00000002"
    opened = open_model(str(run))
    assert opened.classes[3] == "kind 3"
    np.testing.assert_array_equal(
        opened.parameters["head.weight"], initial_parameters(opened.spec, 2)["head.weight"]
    )


def test_a_corrupt_checkpoint_is_skipped_with_a_warning(run, capsys):
    weights = run / "checkpoints/step-00000002/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find_model(str(run)).model.path == run / "checkpoints/step-00000001"
    assert "step-00000002 is corrupt; skipped" in capsys.readouterr().err
    with pytest.raises(ValueError, match="corrupt"):  # if passed directly, it is refused
        open_model(str(run / "checkpoints/step-00000002"))


def test_the_average_of_the_weights_is_taken_on_request(run):
    plain, averaged = open_model(str(run)), open_model(str(run), weights="ema")
    np.testing.assert_array_equal(averaged.parameters["head.weight"], plain.parameters["head.weight"] + 1)


def test_a_run_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has not saved a checkpoint yet"):
        find_model(str(tmp_path))


def test_the_transform_and_the_class_names_come_from_the_metadata(tmp_path, classifier_spec):
    values = initial_parameters(classifier_spec, 0)
    stored = {"crop_fraction": 0.5, "mean": [0, 0, 0], "std": [1, 1, 1]}
    write_model(tmp_path / "a", classifier_spec, values, metadata={"eval_transform": json.dumps(stored)})
    write_model(tmp_path / "b", classifier_spec, values)
    assert open_model(str(tmp_path / "a")).transform == EvalTransform(
        crop_fraction=0.5, mean=(0, 0, 0), std=(1, 1, 1)
    )
    plain = open_model(str(tmp_path / "b"))
    assert (plain.transform, plain.named, plain.classes[9]) == (EvalTransform(), False, "9")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"classes": "["}, "not valid JSON"),
        ({"classes": '["one"]'}, "1 names for a classifier of 10 classes"),
        ({"eval_transform": '{"crop": 1}'}, "eval_transform.*crop"),
    ],
)
def test_corrupt_metadata_is_refused(tmp_path, classifier_spec, metadata, message):
    write_model(tmp_path / "a", classifier_spec, initial_parameters(classifier_spec, 0), metadata=metadata)
    with pytest.raises(ValueError, match=message):
        open_model(str(tmp_path / "a"))


def test_a_pretraining_model_has_no_classes(tmp_path, pretrain_spec):
    spec = replace(pretrain_spec, cluster=(3, 3))
    write_model(tmp_path / "a", spec, initial_parameters(spec, 0))
    assert open_model(str(tmp_path / "a")).classes == ()
