"""`arm runs` and `arm report`: lists, comparisons and pages of real runs, and runs that are incomplete."""

import json
import shutil

import browser
import pytest
from click.testing import CliRunner
from training_folder import furnish

from arm_cli.main import main
from arm_cli.report.samples import chosen_steps, evenly
from arm_cli.runs.compare import labels
from arm_cli.runs.facts import open_run
from tests.cli.test_cli_explain import check_self_contained, page_data

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def done(*words):
    result = arm(*words)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pretraining run, one with another rate and seed, and a classifier, in a folder of runs."""
    folder = tmp_path_factory.mktemp("runs")
    furnish(folder)
    common = ["--device", "cpu", "--eval-data", folder / "val", "--data", folder / "train"]
    every = ["--set", "training.evaluate_every=2 steps"]
    done("pretrain", folder / "pre.toml", *common, *every, "--out", folder / "runs/a")
    done(
        "pretrain",
        folder / "pre.toml",
        *common,
        "--lr",
        "0.01",
        "--seed",
        "5",
        "--out",
        folder / "runs/deep/b",
    )
    done("finetune", folder / "fine.toml", *common, "--from", folder / "runs/a", "--out", folder / "runs/c")
    return folder / "runs"


@pytest.fixture
def runs(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


def test_the_runs_in_a_folder_are_listed(runs):
    found = json.loads(done("runs", "list", runs, "--json").stdout)
    assert [run["run"].removeprefix(f"{runs}/") for run in found] == ["a", "c", "deep/b"]
    first = found[0]
    assert (first["stage"], first["step"], first["total_steps"], first["finished"]) == (
        "pretrain",
        4,
        4,
        True,
    )
    assert first["checkpoints"] == [0, 2, 4]
    assert first["hours"] > 0
    text = done("runs", "list", runs).stdout
    assert "deep/b" in text
    assert "finished" in text


def test_an_unreadable_run_is_skipped_with_a_warning(runs):
    (runs / "a/recipe.toml").write_text("stage = 3")
    result = done("runs", "list", runs, "--json")
    assert len(json.loads(result.stdout)) == 2
    assert "a: cannot be read; skipped" in result.stderr


def test_a_run_is_shown_with_its_curves_evaluations_and_changes(runs):
    text = done("runs", "show", runs / "deep/b").stdout
    for part in ("state    finished, 4 steps", "loss     ", "step 4, epoch 1.33: loss ", "arm pretrain "):
        assert part in text, part
    found = json.loads(done("runs", "show", runs / "deep/b", "--json").stdout)
    assert found["changed"]["training.seed"] == ["0", "5"]
    assert set(found["changed"]) == {"training.seed", "schedule.base_lr"}
    assert [row["step"] for row in found["training"]] == [1, 2, 3, 4]
    assert found["sessions"][0]["total_steps"] == 4


def test_runs_are_compared_in_settings_losses_and_results(runs):
    found = json.loads(done("runs", "compare", runs / "a", runs / "deep/b", "--json").stdout)
    assert set(found["settings"]) == {"training.seed", "schedule.base_lr", "training.evaluate_every"}
    (loss,) = found["losses"]
    rows = [[row["loss"] for row in open_run(str(runs / name)).training] for name in ("a", "deep/b")]
    expected = [abs(b - a) / a for a, b in zip(*rows, strict=True)]
    assert loss["largest"] == pytest.approx(max(expected))
    assert loss["at"] == 1 + expected.index(max(expected))
    assert loss["steps"] == 4
    text = done("runs", "compare", runs / "a", runs / "deep/b").stdout
    for part in ("settings that differ", "training.seed", "largest difference", "evaluation loss"):
        assert part in text, part


def test_a_tolerance_decides_the_exit_code(runs):
    shutil.copytree(runs / "a", runs / "copy")
    assert arm("runs", "compare", runs / "a", runs / "copy", "--tolerance", "0").exit_code == 0
    result = arm("runs", "compare", runs / "a", runs / "deep/b", "--tolerance", "1e-6")
    assert result.exit_code == 1
    assert "b: loss differs by " in result.stderr
    metrics = runs / "copy/metrics.jsonl"
    metrics.write_text("")
    result = arm("runs", "compare", runs / "a", runs / "copy", "--tolerance", "1")
    assert (result.exit_code, "no step in common" in result.stderr) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runs", "compare", "a"), "expected two or more runs"),
        (("runs", "show", "nothing"), "nothing: no such folder; expected the folder of a run"),
        (("runs", "list", "nothing"), "nothing: no such folder"),
        (("report", "deep"), "deep: contains no recipe.toml"),
    ],
)
def test_wrong_folders_are_refused_in_one_line(runs, monkeypatch, words, message):
    monkeypatch.chdir(runs)
    result = arm(*words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_the_comparison_page_draws_all_runs_over_steps_and_hours(runs, tmp_path):
    page = tmp_path / "compare.html"
    done("runs", "compare", runs / "a", runs / "deep/b", "--html", page)
    check_self_contained(page)
    found = browser.run(
        page,
        """const count = () => document.querySelectorAll('.chart')[0].querySelectorAll('polyline').length;
           const points = () => document.querySelector('polyline').getAttribute('points');
           const before = points();
           document.querySelector('[data-axis=hours]').click();
           return { curves: count(), moved: points() !== before,
                    pressed: document.querySelector('[aria-pressed=true]').dataset.axis,
                    readout: document.querySelector('.readout').textContent,
                    wide: document.documentElement.scrollWidth <= window.innerWidth };""",
        tmp_path,
    )
    assert found.pop("readout").count(" hours: a: ") == 1
    assert found == {"curves": 2, "moved": True, "pressed": "hours", "wide": True}


def test_the_report_of_a_pretraining_run_shows_predictions_at_its_saved_steps(runs, tmp_path):
    done("report", runs / "a", "--device", "cpu", "--samples", "3")
    page = runs / "a/report.html"
    check_self_contained(page)
    blocks = page_data(page)["blocks"]
    rows = [block["pictures"] for block in blocks if block["kind"] == "pictures"]
    assert len(rows) == 3
    assert [picture["caption"].partition(":")[0] for picture in rows[0]] == [
        "image",
        "step 0",
        "step 2",
        "step 4",
    ]
    charts = next(block["charts"] for block in blocks if block["kind"] == "charts")
    titles = ["Training loss", "Learning rate", "Gradient norm", "Images per second", "Evaluation loss"]
    assert [chart["title"] for chart in charts] == titles
    rows = open_run(str(runs / "a")).training
    assert charts[0]["curves"][0]["values"] == pytest.approx([row["loss"] for row in rows], rel=1e-4)
    text = page.read_text()
    for part in ("training.evaluate_every", "arm pretrain ", "base_lr = 0.3", "CPU cores"):
        assert part in text, part
    found = browser.run(
        page,
        """const chart = document.querySelector('.chart svg');
           const last = document.querySelector('.readout').textContent;
           chart.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft' }));
           return { last, before: document.querySelector('.readout').textContent,
                    loaded: [...document.images].every(image => image.naturalWidth === 24),
                    wide: document.documentElement.scrollWidth <= window.innerWidth };""",
        tmp_path,
        width=500,
    )
    assert found["last"].startswith("step 4: ")
    assert found["before"].startswith("step 3: ")
    assert found["loaded"]
    assert found["wide"]


def test_the_report_of_a_classifier_shows_right_and_wrong_answers(runs, tmp_path):
    target = tmp_path / "page.html"
    done("report", runs / "c", "--device", "cpu", "--out", target)
    check_self_contained(target)
    assert not (runs / "c/report.html").exists()
    blocks = page_data(target)["blocks"]
    captions = [p["caption"] for block in blocks if block["kind"] == "pictures" for p in block["pictures"]]
    assert len(captions) == 4  # the images to evaluate on
    right = sum("true:" not in caption for caption in captions)
    top1 = open_run(str(runs / "c")).evaluations[-1]["eval_top1"]
    assert right == round(4 * top1)
    (note,) = (block["text"] for block in blocks if block.get("text", "").startswith("Answers of step 4"))
    assert f"{right} right" in note
    browser.run(target, "return 1;", tmp_path)


def test_a_report_needs_neither_images_nor_checkpoints(runs):
    moved = (runs / "a/recipe.toml").read_text().replace("/val", "/gone")
    (runs / "a/recipe.toml").write_text(moved)
    result = done("report", runs / "a", "--device", "cpu")
    assert "the page has no samples: " in result.stderr
    shutil.rmtree(runs / "a/checkpoints")
    done("report", runs / "a", "--samples", "0")
    (runs / "a/metrics.jsonl").unlink()
    (runs / "a/sessions.jsonl").unlink()
    done("report", runs / "a", "--samples", "0")
    assert "No rows have been logged." in (runs / "a/report.html").read_text()


def test_a_corrupt_checkpoint_is_not_shown(runs):
    path = runs / "a/checkpoints/step-00000002/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = done("report", runs / "a", "--device", "cpu", "--samples", "1")
    assert "Warning: step 2 is not shown" in result.stderr
    text = (runs / "a/report.html").read_text()
    assert "step 4: loss" in text
    assert "step 2: loss" not in text


def test_a_run_without_a_recorded_parent_is_compared_with_the_most_similar_recipe(tmp_path):
    done("recipe", "show", "pretrain-digits")
    from arm_core.recipe.recipe import load_recipe, override, to_toml

    (tmp_path / "run").mkdir()
    recipe = override(load_recipe("pretrain-digits"), ["training.seed=9"])
    (tmp_path / "run/recipe.toml").write_text(to_toml(recipe))
    text = done("runs", "show", tmp_path / "run").stdout
    assert "differences from pretrain-digits (the most similar shipped recipe" in text
    assert "training.seed" in text


def test_names_are_as_short_as_they_can_be(runs):
    shutil.copytree(runs / "a", runs / "deep/a")
    found = [open_run(str(runs / name)) for name in ("a", "deep/a", "c")]
    assert labels(found) == ["runs/a", "deep/a", "runs/c"]
    assert labels(found[1:]) == ["a", "c"]


def test_samples_are_spread_over_steps_and_images():
    assert chosen_steps([0, 10, 20], 4) == [0, 10, 20]
    assert chosen_steps(list(range(0, 101, 10)), 4) == [0, 30, 70, 100]
    assert evenly(10, 4) == [0, 2, 5, 7]
    assert evenly(2, 4) == [0, 1]
