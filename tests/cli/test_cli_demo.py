"""`arm demo`, shortened to a few steps: every stage runs, and the page shows the measured values."""

import re

import numpy as np
import pytest
from click.testing import CliRunner

from arm_cli.demo.report.contents import Comparison
from arm_cli.demo.report.demonstration import summary, verdict
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
        "members",
        "digits",
        *(f"{arm}-{n}-labels-seed-0" for arm in ("pretrained", "from-scratch") for n in (10, 20)),
    }
    assert "skipped: a web page needs onnxruntime-web, which this installation does not" in result.output
    text = (folder / "report.html").read_text()
    shown = re.search(r"20 labels per class, from scratch: ([\d.]+) % after 4 steps", result.output)
    assert shown
    assert re.search(rf"<td>20</td><td>from scratch</td><td>[\d.]+</td><td>{shown[1]}</td>", text)
    assert text.count('alt="seen so far, predicted, truth, error"') == 6
    assert re.search(r"<title>ARM in (\d+ minutes? ?)?(\d+ seconds)?</title>", text)
    assert "--eval-data VAL" in text
    command = re.search(r"To classify images: arm (predict .*)", result.output)
    assert command
    assert command[1] in text
    answer = CliRunner().invoke(main, [*command[1].split(), "--device", "cpu"], catch_exceptions=False)
    assert answer.exit_code == 0
    assert len(re.findall(r"digits/\d+-is-\d.png: \d", answer.output)) == 20


def comparison(first, second):
    runs = {"pretrained": np.array(first), "from scratch": np.array(second)}
    arms = {name: np.stack([values, values], axis=1) for name, values in runs.items()}
    baselines = {"nearest neighbour": np.array([70.0, 70.0]), "nearest class mean": np.array([20.0, 20.0])}
    return Comparison(labels=5, steps=[10, 20], arms=arms, baselines=baselines)


def test_the_verdict_claims_no_more_than_the_seeds_show():
    text = verdict([comparison([60.0, 70.0], [40.0, 50.0])])
    assert "pretrained is 20.0 points (95 % interval ± 0.0) ahead of from scratch" in text
    assert "5.0 points (95 % interval ± 63.5; undecided) behind nearest neighbour on raw pixels" in text
    assert "undecided) ahead of from scratch" in verdict([comparison([60.0, 70.0], [40.0, 65.0])])
    lost = verdict([comparison([60.0, 61.0], [80.0, 81.0])])
    assert "20.0 points (95 % interval ± 0.0) behind from scratch" in lost


def test_the_verdict_says_when_more_labels_do_not_help():
    fewer, more = comparison([70.0, 72.0], [40.0, 50.0]), comparison([60.0, 62.0], [40.0, 50.0])
    assert "pretrained loses 10.0 points" in verdict([fewer, more])
    assert "pretrained gains 10.0 points" in verdict([more, fewer])


def test_the_first_sentence_states_the_means():
    text = summary(comparison([60.0, 70.0], [40.0, 50.0]))
    assert "from 5 labelled examples of each digit to read 65 % of new digits" in text
    assert "it reads 45 % after the same training; nearest neighbour on raw pixels reads 70 %" in text
