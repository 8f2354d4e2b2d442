"""The output of a training command before its first step, and options that set keys of the recipe."""

import json

import pytest
from click.testing import CliRunner

from arm_cli.main import main
from arm_cli.training.summary import physical_memory
from arm_core.recipe.recipe import load_recipe
from tests.cli.test_cli_train import furnish, paint


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def place(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_first_prints_its_plan(place):
    result = arm("pretrain", "pre.toml", "--data", "train", "--eval-data", "val", "--out", "run")
    assert result.exit_code == 0, result.output
    said = result.stderr
    assert "images   12 images in train; evaluation: 4 images" in said
    assert "model    32 wide, 6 deep, image 24x24, patches of 4, clusters of 2x2 patches; " in said
    assert "batch    4 images per step; float32 products" in said
    assert "length   4 steps, 1.33 epochs of 3 steps" in said
    assert "lr       peak 0.00469 (base_lr 0.3 x 4 / 256), warm-up 0 epochs, then a cosine to 0" in said
    assert "output   run" in said
    assert said.index("memory ") < said.index("backend ") < said.index("pretrain: 4/4 steps")


def test_options_set_the_keys_of_the_recipe_and_the_session_records_them(place):
    words = ["--data", "train", "--out", "run", "--batch-size", "6", "--lr", "0.01", "--steps", "2"]
    words += ["--workers", "1", "--seed", "7", "--image-size", "32x24", "--precision", "bfloat16"]
    result = arm("pretrain", "pre.toml", *words)
    assert result.exit_code == 0, result.output
    recipe = load_recipe("run/recipe.toml")
    training = recipe.training
    assert (training.batch_size, training.seed, str(training.length)) == (6, 7, "2 steps")
    assert (recipe.data.workers, recipe.model.image_size, training.precision) == (1, (32, 24), "bfloat16")
    assert recipe.lr == pytest.approx(0.01)
    session = json.loads((place / "run/sessions.jsonl").read_text())
    assert session["command"] == "arm pretrain pre.toml " + " ".join(words)
    assert "training.seed=7" in session["overrides"]


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (8, 2), (9, 3), (12, 3), (7, 7)])
def test_batch_size_keeps_micro_batches_no_larger_than_the_recipes(place, batch, accumulation):
    found = json.loads(arm("config", "pre.toml", "--batch-size", batch, "--json").stdout)
    values = {row["key"]: row["value"] for row in found}
    assert (values["training.batch_size"], values["training.accumulation"]) == (batch, accumulation)


def test_a_shorter_run_gets_a_shorter_warm_up(place):
    def warmup(*words):
        rows = json.loads(arm("config", "pretrain-tiny", "--json", *words).stdout)
        return next((row["value"], row["from"]) for row in rows if row["key"] == "schedule.warmup")

    assert warmup() == ("5 epochs", "recipe")
    assert warmup("--epochs", "20") == ("5 epochs", "recipe")
    assert warmup("--epochs", "2") == ("0.1 epochs", "--epochs")
    assert warmup("--steps", "40") == ("2 steps", "--steps")
    assert warmup("--steps", "40", "--set", "schedule.warmup=1 step") == ("1 step", "--set")


def test_finetuning_takes_the_size_of_the_trunk_from_the_model(place):
    words = ["--data", "train", "--steps", "1", "--set", "model.width=16", "--set", "model.depth=12"]
    assert arm("pretrain", "pre.toml", *words, "--out", "run").exit_code == 0
    result = arm("finetune", "fine.toml", "--from", "run", "--data", "train", "--steps", "1", "--out", "run2")
    assert result.exit_code == 0, result.output
    assert "16 wide, 12 deep, patches of 4 (the recipe has 32 wide, 6 deep, patches of 4)" in result.stderr
    assert load_recipe("run2/recipe.toml").spec(2).encoder.width == 16

    result = arm(
        "finetune",
        "tiny",
        "--from",
        "run",
        "--data",
        "train",
        "--steps",
        "1",
        "--out",
        "run3",
        "--batch-size",
        "4",
    )
    assert result.exit_code == 0, result.output
    assert ", image size 24x24 (the recipe has 192 wide, 12 deep, patches of 16 (tiny))" in result.stderr


def test_likely_problems_of_a_run_are_warned_of(place):
    paint(place / "single", {"only": 90})
    result = arm("finetune", "fine.toml", "--data", "single", "--out", "run", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "Warning: no images to evaluate on" in result.stderr
    assert "Warning: only one class (only)" in result.stderr
    words = ["pretrain", "pre.toml", "--data", "train", "--device", "cpu", "--dry-run"]
    assert "Warning" not in arm(*words).stderr
    assert "on this CPU the run takes about" in arm(*words, "--steps", "100000000").stderr


def test_a_warning_about_too_little_memory_names_the_setting_that_fits(place, monkeypatch):
    monkeypatch.setattr("arm_cli.training.summary.physical_memory", lambda: 3_000_000)
    fits = "2 images at a time fit: --set training.accumulation=2"
    result = arm("pretrain", "pre.toml", "--data", "train", "--device", "cpu", "--dry-run")
    assert f"Warning: this machine has 3 MB of memory; {fits}" in result.stderr
    assert physical_memory() is None or physical_memory() > 10**8


def test_a_dry_run_shows_schedule_disk_and_speed_and_writes_nothing(place):
    before = sorted(place.rglob("*"))
    result = arm(
        "pretrain",
        "pre.toml",
        "--data",
        "train",
        "--out",
        "run",
        "--dry-run",
        "--set",
        "schedule.warmup=1 step",
    )
    assert result.exit_code == 0, result.output
    assert "learning rate over the run" in result.stdout
    assert "4.69e-03 |" in result.stdout
    assert "9 checkpoints of " in result.stdout
    assert " images/s, " in result.stdout
    assert " for 4 steps" in result.stdout
    assert sorted(place.rglob("*")) == before
