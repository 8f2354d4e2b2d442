"""`arm demo`, shortened to a few steps: every stage runs, and the page shows the measured values."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

from arm_cli.demo.report.demonstration import Comparison, verdict
from arm_cli.main import main
from arm_core.recipe import recipe as recipes


@pytest.fixture
def short_recipes(monkeypatch):
    load = recipes.load_recipe

    def short(name):
        recipe = load(name)
        changes = ["training.length=4 steps", "schedule.warmup=1 steps", "training.log_every=2"]
        if recipe.stage == "finetune":
            changes += ["training.evaluate_every=2 steps", "training.batch_size=8"]
        return recipes.override(recipe, changes)

    monkeypatch.setattr(recipes, "load_recipe", short)


@pytest.fixture
def no_browser_runtime(monkeypatch, tmp_path):
    from arm_convert.browser import runtime

    monkeypatch.setattr(runtime, "VENDORED", tmp_path / "none")


def test_the_demo_runs_every_stage_and_writes_a_report(short_recipes, no_browser_runtime, tmp_path):
    (tmp_path / "demo").mkdir()
    arguments = ["demo", "--out", str(tmp_path / "demo"), "--seeds", "1", "--device", "cpu"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "demo").iterdir()) == []  # existing files are not changed
    folder = tmp_path / "demo-2"
    assert {path.name for path in folder.iterdir()} == {
        "report.html",
        "pretrain",
        *(f"{arm}-{n}-labels-seed-0" for arm in ("pretrained", "from-scratch") for n in (20, 50)),
    }
    assert "skipped: a web page needs onnxruntime-web, which this installation does not" in result.output
    text = (folder / "report.html").read_text()
    shown = re.search(r"20 labels per class, from scratch: ([\d.]+) % after 4 steps", result.output)
    assert shown
    assert re.search(rf"<td>20</td><td>from scratch</td><td>[\d.]+</td><td>{shown[1]}</td>", text)
    assert text.count('alt="prediction"') == 12


def comparison(first, second):
    runs = {"pretrained": np.array(first), "from scratch": np.array(second)}
    arms = {name: np.stack([values, values], axis=1) for name, values in runs.items()}
    baselines = {"nearest neighbour": np.array([70.0, 70.0]), "nearest class mean": np.array([20.0, 20.0])}
    return Comparison(labels=5, steps=[10, 20], arms=arms, baselines=baselines)


def test_the_verdict_claims_no_more_than_the_seeds_show():
    text = verdict([comparison([60.0, 70.0], [40.0, 50.0])])
    assert "pretrained is 20.0 points ahead of from scratch, and each of its seeds is better" in text
    assert "against nearest neighbour on raw pixels it is 5.0 points behind" in text
    assert "but the seeds overlap" in verdict([comparison([60.0, 70.0], [40.0, 65.0])])
    lost = verdict([comparison([60.0, 61.0], [80.0, 81.0])])
    assert "from scratch is 20.0 points ahead of pretrained" in lost
    assert "10.5 points ahead" in lost
