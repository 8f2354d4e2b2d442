"""`--log`: TensorBoard's event files read back, and the calls that Weights & Biases and Trackio receive."""

import importlib.machinery
import json
import logging
import shutil
import sys
import types

import pytest
from click.testing import CliRunner
from training_folder import furnish

from arm_cli.main import main

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def place(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


DATA = ("--data", "train", "--eval-data", "val", "--device", "cpu")


def rows(place):
    lines = (place / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def expected(place):
    """(step, value) by name, as in metrics.jsonl."""
    found = {}
    for row in rows(place):
        for name, value in row.items():
            if name != "step":
                found.setdefault(name, []).append((row["step"], value))
    return found


def curves(place):
    """(step, value) by name, as TensorBoard's reader returns them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it announces that a run was resumed
    events = EventAccumulator(str(place / "run/tensorboard"), {"scalars": 0})
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points]), name


def test_tensorboard_receives_the_rows_of_a_run_and_of_its_continuation(place):
    pytest.importorskip("tensorboard", reason="needs tensorboard, part of the dev extra")
    result = arm("pretrain", "pre.toml", *DATA, "--out", "run", "--log", "tensorboard")
    assert result.exit_code == 0, result.output
    assert {"loss", "lr", "grad_norm", "images_per_s", "epoch", "eval_loss", "score"} <= set(curves(place))
    assert_equal(curves(place), expected(place))

    # As if the run had been killed after step 2 was saved: its later rows are written again.
    shutil.rmtree(place / "run/checkpoints/step-00000004")
    result = arm("pretrain", "--resume", "run", "--log", "tensorboard", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert len(list((place / "run/tensorboard").iterdir())) == 2
    found = curves(place)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4]
    assert_equal(found, expected(place))


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    """A stand-in for the package; `calls` holds what it was called with."""
    module = types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    module.calls = []
    for name in ("init", "log", "finish"):
        setattr(module, name, lambda *a, _name=name, **k: module.calls.append((_name, a, k)))
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def calls(service, name):
    return [(arguments, options) for called, arguments, options in service.calls if called == name]


def test_a_service_receives_every_row_and_the_settings(place, service):
    result = arm("finetune", "fine.toml", *DATA, "--out", "run", "--log", service.__name__)
    assert result.exit_code == 0, result.output
    ((_, settings),) = calls(service, "init")
    assert (settings["project"], settings["resume"]) == ("arm-vision", "allow")
    assert settings["name"].startswith("run")
    assert settings["config"]["training.batch_size"] == "4"
    sent = [{"step": options["step"], **values} for (values,), options in calls(service, "log")]
    assert sent == rows(place)
    assert [name for name, _, _ in service.calls][-1] == "finish"
    if service.__name__ == "wandb":
        assert calls(service, "finish") == [((), {"exit_code": 0})]

    before = settings
    service.calls.clear()
    result = arm("finetune", "--resume", "run", "--log", service.__name__, "--device", "cpu")
    assert result.exit_code == 0, result.output
    ((_, settings),) = calls(service, "init")
    assert settings == before, "a resumed run continues the same record"


def test_a_service_that_fails_does_not_end_the_run(place, service):
    def fail(*arguments, **options):
        raise ConnectionError("no route to the server")

    service.log = fail
    result = arm("pretrain", "pre.toml", *DATA, "--out", "run", "--log", service.__name__)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("no route to the server; no more rows are sent") == 1
    assert rows(place)[-1]["step"] == 4


def test_a_service_that_cannot_start_ends_the_command_in_one_line(place, service):
    def fail(*arguments, **options):
        raise RuntimeError("not logged in")

    service.init = fail
    result = arm("pretrain", "pre.toml", *DATA, "--out", "run", "--log", service.__name__)
    assert result.exit_code == 2
    assert f"--log {service.__name__}: not logged in" in result.stderr


def test_a_missing_package_is_named_before_anything_is_written(place, monkeypatch):
    monkeypatch.setattr("arm_cli.training.trackers.find_spec", lambda name: None)
    result = arm("pretrain", "pre.toml", *DATA, "--out", "run", "--log", "wandb")
    assert result.exit_code == 2
    assert "--log wandb: needs the package wandb; pip install 'arm-vision[wandb]'" in result.stderr
    assert not (place / "run").exists()
