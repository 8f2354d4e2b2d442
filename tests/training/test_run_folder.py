"""The run folder: starting, resuming, refusing, and consistent metrics."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from toy_engine import ToyEngine, fresh_state

from arm_core.engine.protocol import TrainingState
from arm_core.files.model_folder import read_config
from arm_core.recipe.recipe import Recipe, fingerprint, load_recipe, override
from arm_core.training.checkpoint import Checkpoint, Progress, save_checkpoint
from arm_core.training.records import read_rows
from arm_core.training.run_folder import RunFolder, resume_run, start_run


@pytest.fixture
def recipe() -> Recipe:
    small = ["model.width=8", "model.depth=6", "model.decoder_width=8", "data.source=synthetic"]
    return override(load_recipe("pretrain-digits"), small)


def no_warning(sentence: str) -> None:
    raise AssertionError(sentence)


def save_step(run: RunFolder, step: int) -> None:
    engine = ToyEngine(run.spec, fresh_state(run.spec, step))
    state = engine.export_state()
    progress = Progress(step=step, position=step, recipe=fingerprint(run.recipe), engine={})
    save_checkpoint(run.path, Checkpoint(spec=run.spec, progress=progress, state=state))


def test_a_new_run_contains_its_recipe_and_its_model(tmp_path, recipe):
    with start_run(tmp_path / "new" / "run", recipe, recipe.spec()) as run:
        assert load_recipe(run.path / "recipe.toml") == recipe
        assert read_config(run.path) == recipe.spec()
        assert run.resumed is None
        assert run.resume_command == f"arm pretrain --resume {run.path}"


def test_a_run_is_not_started_over(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        save_step(run, 0)
    with pytest.raises(ValueError, match="already contains a run; resume it with `arm pretrain --resume"):
        start_run(tmp_path, recipe, recipe.spec())


def test_a_run_that_never_reached_a_checkpoint_may_start_again(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        run.append_metrics({"step": 1})
    with pytest.raises(ValueError, match="no checkpoint; start it again in the same folder"):
        resume_run(tmp_path, warn=no_warning)
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        assert run.metrics() == []


def test_a_folder_with_other_files_is_refused(tmp_path, recipe):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"not empty \(contains 'thesis.tex'\)"):
        start_run(tmp_path, recipe, recipe.spec())
    with pytest.raises(ValueError, match="is a file"):
        start_run(tmp_path / "thesis.tex", recipe, recipe.spec())


def test_only_a_run_can_be_resumed(tmp_path):
    with pytest.raises(ValueError, match=r"contains no recipe\.toml"):
        resume_run(tmp_path, warn=no_warning)
    with pytest.raises(ValueError, match="no such folder"):
        resume_run(tmp_path / "none", warn=no_warning)


def test_two_processes_cannot_train_in_one_folder(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        save_step(run, 0)
        script = (
            f"from arm_core.training.run_folder import resume_run; resume_run({str(tmp_path)!r}, warn=print)"
        )
        other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert f"in use by another process (pid {__import__('os').getpid()})" in other.stderr
        with pytest.raises(ValueError, match="in use by another process"):
            resume_run(tmp_path, warn=no_warning)
    resume_run(tmp_path, warn=no_warning).close()


def test_a_refused_resume_releases_the_lock(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        save_step(run, 0)
    with pytest.raises(ValueError, match=r"did you mean 'seed'\?"):
        resume_run(tmp_path, ["training.sed=3"], warn=no_warning)
    resume_run(tmp_path, warn=no_warning).close()


def test_resuming_loads_the_newest_intact_checkpoint(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        for step in (0, 5):
            save_step(run, step)
    (tmp_path / "checkpoints" / "step-00000005" / "state.json").write_text("")
    warnings: list[str] = []
    with resume_run(tmp_path, warn=warnings.append) as run:
        assert isinstance(run.resumed.state, TrainingState)
        assert run.resumed.progress.step == 0
    assert len(warnings) == 1
    assert "step-00000005 is corrupt; skipped" in warnings[0]


def test_overrides_on_resume_are_kept_but_cannot_change_model_or_batches(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        save_step(run, 0)
    with resume_run(tmp_path, ["schedule.base_lr=0.5"], warn=no_warning) as run:
        assert run.recipe.schedule.base_lr == 0.5
        assert run.overrides == ("schedule.base_lr=0.5",)
    warnings: list[str] = []
    with resume_run(tmp_path, warn=warnings.append) as run:
        assert run.recipe.schedule.base_lr == 0.5
    # Until the next checkpoint the recipe is newer than the state.
    assert "recipe.toml was changed after step 0 was saved" in warnings[0]
    for change in ("model.width=16", "training.seed=1", "training.batch_size=32", "training.accumulation=2"):
        name = change.split("=")[0].removesuffix(".width")
        with pytest.raises(ValueError, match=rf"^{name} cannot change within a run"):
            resume_run(tmp_path, [change], warn=warnings.append)


def test_metrics_are_truncated_at_the_resumed_step_and_an_incomplete_line_is_dropped(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        for step in (1, 2, 3, 4):
            run.append_metrics({"step": step, "loss": 1 / step})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4]
        run.truncate_metrics(2)
        run.append_metrics({"step": 3})
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        json.dumps(row) for row in ({"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}, {"step": 3})
    ]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not valid JSON"):
        read_rows(tmp_path / "metrics.jsonl")


def test_a_checkpoint_of_another_model_is_refused(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        run.spec = replace(run.spec, decoder_depth=1)
        save_step(run, 0)
    with pytest.raises(ValueError, match="describe different models"):
        resume_run(tmp_path, warn=no_warning)
