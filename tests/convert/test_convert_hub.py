"""The Hugging Face hub as a source and a target, against a stand-in that keeps repositories in folders."""

from __future__ import annotations

import fnmatch
import inspect
import shutil
from pathlib import Path

import foreign
import numpy as np
import pytest
from converting import convert

from arm_convert.hub import Address, parse_address
from arm_core.engine.protocol import TrainingState
from arm_core.files.model_folder import read_model, write_model
from arm_core.model.parameters import initial_parameters
from arm_core.recipe.recipe import load_recipe, override
from arm_core.training.checkpoint import Checkpoint, Progress, save_checkpoint
from arm_core.training.run_folder import start_run

huggingface_hub = pytest.importorskip("huggingface_hub")


class StandIn:
    """Repositories as folders, `root/user/name/revision/files`; calls must fit the library's signatures."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: dict[str, bool] = {}

    def folder(self, repository: str, revision: str | None) -> Path:
        return self.root / repository / (revision or "main")

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns):
        source = self.folder(repo_id, revision)
        if not source.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo_id}\nand more lines")
        cache = self.root / "cache" / repo_id
        shutil.rmtree(cache, ignore_errors=True)
        for path in source.rglob("*"):
            name = str(path.relative_to(source))
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).symlink_to(path)  # like the library's cache
        return str(cache)

    def hf_hub_download(self, repo_id, filename, *, revision=None):
        return str(self.folder(repo_id, revision) / filename)

    def HfApi(self):
        return self

    def create_repo(self, repo_id, *, private, exist_ok):
        self.private[repo_id] = private
        self.folder(repo_id, None).mkdir(parents=True, exist_ok=exist_ok)

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.folder(repo_id, branch).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(
        self, *, repo_id, folder_path, revision, commit_message, allow_patterns, delete_patterns
    ):
        target = self.folder(repo_id, revision)
        for path in target.iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in delete_patterns):
                path.unlink()
        for path in Path(folder_path).iterdir():
            assert any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns), path.name
            shutil.copy(path, target)
        return f"https://hub/{repo_id}/commit: {commit_message}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    stand_in = StandIn(tmp_path / "hub")
    for name in ("snapshot_download", "hf_hub_download", "HfApi"):
        monkeypatch.setattr(huggingface_hub, name, getattr(stand_in, name))
    return stand_in


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (StandIn.snapshot_download, huggingface_hub.snapshot_download),
        (StandIn.hf_hub_download, huggingface_hub.hf_hub_download),
        (StandIn.create_repo, huggingface_hub.HfApi.create_repo),
        (StandIn.create_branch, huggingface_hub.HfApi.create_branch),
        (StandIn.upload_folder, huggingface_hub.HfApi.upload_folder),
    ],
)
def test_the_stand_in_takes_arguments_that_the_library_takes(ours, theirs):
    known = inspect.signature(theirs).parameters
    assert [name for name in inspect.signature(ours).parameters if name != "self" and name not in known] == []


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "m", foreign.CLASSIFIER, initial_parameters(foreign.CLASSIFIER, 4))


def test_a_pushed_model_is_downloaded_unchanged(hub, model, tmp_path):
    result = convert("push", model, "hf://user/name", "--private", "--message", "First")
    assert result.exit_code == 0, result.output
    assert result.output.strip() == "https://hub/user/name/commit: First"
    assert hub.private == {"user/name": True}
    assert sorted(p.name for p in hub.folder("user/name", None).iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert "# ARM 8x6 classifier" in (hub.folder("user/name", None) / "README.md").read_text()
    assert convert("import", "hf://user/name", tmp_path / "back").exit_code == 0
    back, expected = read_model(tmp_path / "back").load(), read_model(model).load()
    assert all(np.array_equal(back[name], expected[name]) for name in expected)


def test_revisions_are_separate(hub, model, tmp_path):
    convert("push", model, "hf://user/name@v2")
    assert not list(hub.folder("user/name", "main").iterdir())
    assert convert("import", "hf://user/name", tmp_path / "a").exit_code == 2
    assert convert("import", "hf://user/name@v2", tmp_path / "b").exit_code == 0


def test_pushing_fewer_shards_leaves_none_of_the_old_ones(hub, model, tmp_path):
    convert("push", model, "hf://user/name", "--shard-size", "20KB")
    folder = hub.folder("user/name", None)
    (folder / "LICENSE").write_text("theirs")
    assert len(list(folder.glob("model-*"))) > 2
    convert("push", model, "hf://user/name")
    assert not list(folder.glob("model-*"))
    assert (folder / "LICENSE").exists()
    assert convert("import", "hf://user/name", tmp_path / "a").exit_code == 0


def test_an_official_checkpoint_on_the_hub_is_one_file_of_a_repository(hub, tmp_path):
    folder = hub.folder("someone/arm", None)
    folder.mkdir(parents=True)
    foreign.save(folder / "arm.pth", foreign.torch_zip(foreign.checkpoint(foreign.PRETRAIN)))
    assert convert("import", "hf://someone/arm/arm.pth", tmp_path / "a").exit_code == 0
    assert read_model(tmp_path / "a").spec == foreign.PRETRAIN


def test_a_missing_repository_is_reported_in_one_line(hub, tmp_path):
    result = convert("import", "hf://user/missing", tmp_path / "a")
    assert result.exit_code == 2
    assert result.output.strip() == "Error: hf://user/missing: no user/missing"


@pytest.mark.parametrize(
    "address", ["hf://name", "hf://a/b@c@d", "hf:///a/b", "hf://a/b/../../c", "hf://../b", "hf://a/.."]
)
def test_an_invalid_address_is_refused(address):
    with pytest.raises(ValueError, match="expected hf://user/name"):
        parse_address(address)


def test_addresses_have_a_revision_and_a_file():
    assert parse_address("hf://a/b") == Address("a/b")
    assert parse_address("hf://a/b@v1.0/x/y.pth") == Address("a/b", "v1.0", "x/y.pth")


@pytest.mark.parametrize("place", ["run", "run/checkpoints/step-00000004"])
def test_the_card_of_a_run_holds_its_recipe_and_results_but_no_paths(hub, tmp_path, place):
    recipe = override(load_recipe("finetune-digits"), ["data.path=/secret/images"])
    state = TrainingState(parameters=initial_parameters(foreign.CLASSIFIER, 4))
    progress = Progress(step=4, position=4, recipe="", engine={})
    with start_run(tmp_path / "run", recipe, foreign.CLASSIFIER) as run:
        save_checkpoint(run.path, Checkpoint(spec=foreign.CLASSIFIER, progress=progress, state=state))
        run.append_metrics({"step": 2, "eval_loss": 9.0, "eval_top1": 0.1})
        run.append_metrics({"step": 4, "eval_loss": 1.5, "eval_top1": 0.625})
    assert convert("push", tmp_path / place, "hf://user/name").exit_code == 0
    card = (hub.folder("user/name", None) / "README.md").read_text()
    assert 'stage = "finetune"' in card
    assert "62.5" in card
    assert "taken from run run, step-00000004" in card
    assert "secret" not in card


def test_without_the_library_the_extra_is_named(monkeypatch, tmp_path):
    import builtins

    real = builtins.__import__

    def missing(name, *rest, **more):
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    result = convert("import", "hf://user/name", tmp_path / "a")
    assert result.exit_code == 2
    assert "pip install 'arm-vision[hub]'" in result.output
