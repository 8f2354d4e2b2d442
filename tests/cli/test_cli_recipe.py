"""`arm recipe` and `arm config`: settings, meanings, origins, differences."""

import json

import pytest
from click.testing import CliRunner

from arm_cli.config import field_docs
from arm_cli.main import main
from arm_core.recipe.recipe import load_recipe, recipe_text, shipped_recipes
from arm_core.recipe.sections import ClassifierModel, DataSettings, PretrainModel, TrainingSettings


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def rows(*words):
    return {row["key"]: row for row in json.loads(arm("config", *words, "--json").stdout)}


def test_config_prints_the_origin_of_each_value():
    found = rows("pretrain-base", "--set", "training.seed=3", "--lr", "1e-3")
    origins = {key: row["from"] for key, row in found.items()}
    assert origins["schedule.base_lr"] == "--lr"
    assert origins["training.seed"] == "--set"
    assert origins["training.length"] == "recipe"
    assert origins["model.width"] == "preset base"
    assert origins["model.state"] == "default"
    assert (found["model.width"]["value"], found["model.decoder_heads"]["value"]) == (768, 8)
    assert found["schedule.base_lr"]["value"] * 2048 / 256 == pytest.approx(1e-3)


@pytest.mark.parametrize("name", shipped_recipes())
def test_config_lists_every_setting_of_every_recipe_with_its_meaning(name):
    found = rows(name)
    assert {"data.workers", "optimizer.clip", "mixing.mixup", "augmentation.flip"} <= set(found)
    assert [key for key, row in found.items() if not row["meaning"]] == []
    listed = {key.split(".")[1] for key in found if key.startswith("model.")}
    kind = PretrainModel if name.startswith("pretrain") else ClassifierModel
    assert listed == set(kind.__dataclass_fields__)


def test_field_docs_are_the_strings_under_the_fields_inherited_ones_included():
    assert field_docs(TrainingSettings)["batch_size"] == "Images per update, over all processes."
    assert "preset" in field_docs(PretrainModel)
    assert set(field_docs(DataSettings)) == set(DataSettings.__dataclass_fields__)


def test_recipe_list_names_all_and_show_prints_the_file():
    listed = arm("recipe", "list").stdout
    assert all(name in listed for name in shipped_recipes())
    assert arm("recipe", "show", "finetune-base").stdout.strip() == recipe_text("finetune-base").strip()
    assert {row["name"] for row in json.loads(arm("recipe", "list", "--json").stdout)} == {*shipped_recipes()}


def test_recipe_diff_shows_the_settings_that_differ_and_reads_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = json.loads(arm("recipe", "diff", "pretrain-large", "pretrain-huge", "--json").stdout)
    assert found == {"model.preset": ["large", "huge"], "training.accumulation": [8, 16]}
    assert arm("pretrain", "digits", "--steps", "1", "--out", "run", "--device", "cpu").exit_code == 0
    found = json.loads(arm("recipe", "diff", "pretrain-digits", "run", "--json").stdout)
    assert found == {"training.length": ["600 steps", "1 step"], "schedule.warmup": ["40 steps", "0 steps"]}
    assert "no differences" in arm("recipe", "diff", "run", "run/recipe.toml").stdout
    shown = arm("recipe", "show", "run").stdout
    (tmp_path / "again.toml").write_text(shown)
    assert load_recipe("again.toml") == load_recipe("run/recipe.toml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("config tiny", "'tiny' has several recipes; pass finetune-tiny or pretrain-tiny"),
        ("config pretrain-tyni", "did you mean 'pretrain-tiny'?"),
        ("config pretrain-tiny --set training.sede=1", "did you mean 'seed'?"),
        ("recipe show nowhere", "unknown recipe 'nowhere'"),
        ("recipe diff pretrain-tiny nowhere", "unknown recipe 'nowhere'"),
    ],
)
def test_a_mistake_is_one_line(words, message):
    result = arm(*words.split())
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
