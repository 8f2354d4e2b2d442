"""Records of runs as `arm runs` reads them: hours, totals, the best evaluation."""

import json

import pytest

from arm_core.recipe.recipe import load_recipe, override, to_toml
from arm_core.training.history import find_runs, read_history


def write(folder, rows, *, sessions=(), changes=()):
    folder.mkdir(parents=True)
    recipe = override(load_recipe("pretrain-digits"), ["training.batch_size=36", *changes])
    (folder / "recipe.toml").write_text(to_toml(recipe))
    for name, lines in (("metrics.jsonl", rows), ("sessions.jsonl", sessions)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def row(step, rate, **more):
    return {"step": step, "epoch": step / 10, "loss": 1.0, "images_per_s": rate, **more}


def test_hours_add_up_the_time_between_rows(tmp_path):
    rows = [row(100, 1.0), {"step": 100, "eval_loss": 2.0}, row(300, 2.0)]
    history = read_history(write(tmp_path / "run", rows), warn=pytest.fail)
    assert history.hours == pytest.approx((1.0, 2.0))  # 36 images per step: 3600 s, then 200 * 36 / 2 s
    assert history.hours_at(100) == pytest.approx(1.0)
    assert history.hours_at(200) == pytest.approx(1.5)
    assert history.hours_at(50) == pytest.approx(0.5)
    assert history.hours_at(900) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("length", "sessions", "total"),
    [
        ("400 steps", (), 400),
        ("30 epochs", (), 300),
        ("30 epochs", ({"step": 0, "total_steps": 299}, {"step": 5, "total_steps": 301}), 301),
    ],
)
def test_total_steps_come_from_the_last_start_or_the_recipe(tmp_path, length, sessions, total):
    folder = write(tmp_path / "run", [row(7, 1.0)], sessions=sessions, changes=[f"training.length={length}"])
    history = read_history(folder, warn=pytest.fail)
    assert (history.total_steps, history.finished) == (total, False)


def test_the_best_evaluation_has_the_highest_score(tmp_path):
    rows = [{"step": s, "eval_loss": 1.0, "score": score} for s, score in ((1, 0.1), (2, 0.5), (3, 0.4))]
    history = read_history(write(tmp_path / "run", rows), warn=pytest.fail)
    assert history.best["step"] == 2
    assert history.step == 3


def test_runs_are_found_at_any_depth_but_not_inside_runs(tmp_path):
    for name in ("b", "a/c", "a/d"):
        write(tmp_path / name, [])
    write(tmp_path / "b/checkpoints/step-00000001", [])
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/recipe.toml").write_text("")  # no run: neither metrics nor checkpoints
    assert [str(p.relative_to(tmp_path)) for p in find_runs(tmp_path)] == ["a/c", "a/d", "b"]
    assert list(find_runs(tmp_path / "b")) == [tmp_path / "b"]
