"""A run that an earlier version wrote opens, resumes and predicts as it did then.

`fixtures/run-0.1.tar.xz` was written by version 0.1 when the torch engine was called cuda. It holds `run`
(`arm finetune digits --backend cuda --threads 1`, width 8, depth 2, drop path, EMA, two micro-batches per
update), cut back to its checkpoint of step 2 of 4; the weights and the EMA that it reached at step 4; and
its outputs for `images.npy`.
"""

import json
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner

from arm_cli.main import main
from arm_core.engine.registry import installed_backends
from arm_core.files.safetensors import read_tensors
from arm_core.training.checkpoint import load_checkpoint

TOLERANCE = 1e-4
"""Relative to each tensor's largest value; the last bits depend on the processor and its BLAS."""


@pytest.fixture
def old(tmp_path, pytestconfig):
    """The unpacked archive."""
    with tarfile.open(pytestconfig.rootpath / "tests/fixtures/run-0.1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture(params=["torch", "mlx"])
def backend(request):
    if reason := installed_backends()[request.param].missing():
        pytest.skip(reason)
    return request.param


def arm(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result


def near(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


def arrays(path):
    return {name: np.asarray(tensor.read()) for name, tensor in read_tensors(path).tensors.items()}


def test_a_checkpoint_of_version_0_1_is_read_bit_for_bit(old):
    """Values that do not depend on the machine: every stored number, the progress, and the metadata."""
    folder = old / "run/checkpoints/step-00000002"
    checkpoint = load_checkpoint(folder)
    for name, value in arrays(folder / "model.safetensors").items():
        np.testing.assert_array_equal(checkpoint.state.parameters[name], value)
    assert (checkpoint.progress.step, checkpoint.progress.position) == (2, 4)
    assert checkpoint.progress.engine["backend"] == "cuda"
    assert json.loads(checkpoint.metadata["classes"]) == [str(i) for i in range(10)]


def test_a_run_of_version_0_1_resumes_as_if_it_was_never_interrupted(old, backend):
    rows = [json.loads(line) for line in (old / "run/metrics.jsonl").read_text().splitlines()]
    arm("finetune", "--resume", old / "run", "--backend", backend, "--device", "cpu", "--threads", 1)
    resumed = [json.loads(line) for line in (old / "run/metrics.jsonl").read_text().splitlines()]
    losses, expected = ([row["loss"] for row in found if "loss" in row] for found in (resumed, rows))
    assert losses == pytest.approx(expected, rel=1e-5)
    last = old / "run/checkpoints/step-00000004"
    for name in ("model.safetensors", "ema.safetensors"):
        found, expected = arrays(last / name), arrays(old / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            near(found[key], value)
    sessions = [json.loads(line) for line in (old / "run/sessions.jsonl").read_text().splitlines()]
    assert [(row["backend"], row["step"]) for row in sessions] == [("cuda", 0), (backend, 2)]


@pytest.mark.parametrize(("weights", "stored"), [("raw", "outputs.npz"), ("ema", "averaged.npz")])
def test_a_model_of_version_0_1_gives_the_same_outputs(old, backend, weights, stored):
    words = ["--array", old / "images.npy", "--out", old / "found.npz", "--weights", weights]
    arm("embed", old / "run", *words, "--backend", backend, "--device", "cpu")
    with np.load(old / stored) as expected, np.load(old / "found.npz") as found:
        assert set(found) == set(expected)
        for name in expected:
            near(found[name], expected[name])
