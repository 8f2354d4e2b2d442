"""An official checkpoint with its optimizer can be resumed as a run."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import foreign
import golden
import numpy as np
import pytest
from converting import arm

from arm_convert.checkpoint_source import open_checkpoint_source
from arm_convert.importing import resolve
from arm_convert.official import official_view
from arm_convert.official_run import official_groups
from arm_core.engine.protocol import Precision
from arm_core.model.parameters import parameter_table
from arm_core.recipe.recipe import load_recipe
from arm_core.training.checkpoint import newest_checkpoint

SPECS = {"pretrain": foreign.PRETRAIN, "classifier": foreign.CLASSIFIER}
ARGS = {
    "pretrain": {"clip_grad": 3.0, "weight_decay": 0.05},
    "classifier": {"layer_decay": 0.75, "ema_decay": 0.99, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0}
    | {
        "aa": "rand-m9-mstd0.5-inc1",
        "reprob": 0.25,
        "drop_path": 0.1,
        "global_pool": False,
        "clip_grad": None,
    },
}
COMMON = {"batch_size": 8, "accum_iter": 2, "world_size": 2, "epochs": 100, "warmup_epochs": 5, "lr": 0.01}


def moments(spec, seed):
    """Random moments by our names."""
    rng = np.random.default_rng(seed)
    rows = [row for row in parameter_table(spec).values() if row.trainable]
    return {row.name: np.abs(rng.normal(size=row.shape)).astype(np.float32) for row in rows}


def with_optimizer(kind: str, path: Path, **changes) -> Path:
    """An official checkpoint after 7 steps, with the official numbering of its optimizer."""
    spec = SPECS[kind]
    content = foreign.checkpoint(spec, 3)
    content["args"] = argparse.Namespace(**{**COMMON, **ARGS[kind], **changes.pop("args", {})})
    if kind == "classifier":
        content["model_ema"] = foreign.official_state(spec, 4)
    foreign.save(path, foreign.torch_zip(content))
    groups = official_groups(open_checkpoint_source(path, warn=print), spec)
    first, second = (official_view(spec, moments(spec, seed)) for seed in (1, 2))
    state, numbered, number = {}, [], 0
    for names in groups:
        numbered.append(
            {"params": list(range(number, number + len(names))), "betas": (0.9, 0.95), "eps": 1e-8}
        )
        numbered[-1]["weight_decay"] = 0.05 if numbered[:-1] else 0.0
        for name in names:
            step = np.array(7.0, np.float32)
            state[number] = {"step": step, "exp_avg": first[name], "exp_avg_sq": second[name]}
            number += 1
    content["optimizer"] = {"state": state, "param_groups": numbered}
    changes.pop("change", lambda _: None)(content["optimizer"])
    return foreign.save(path, foreign.torch_zip(content))


@pytest.mark.parametrize("kind", SPECS)
def test_moments_step_average_and_recipe_are_imported(tmp_path, kind):
    result = arm(
        "convert", "import", with_optimizer(kind, tmp_path / "x.pth"), tmp_path / "run", "--with-optimizer"
    )
    assert result.exit_code == 0, result.output
    found = newest_checkpoint(tmp_path / "run", print)
    assert found.spec == SPECS[kind]
    assert found.progress.step == 7
    for name, value in moments(found.spec, 1).items():
        assert np.array_equal(found.state.exp_avg[name], value), name
    for name, value in moments(found.spec, 2).items():
        assert np.array_equal(found.state.exp_avg_sq[name], value), name
    recipe = load_recipe(tmp_path / "run/recipe.toml")
    assert recipe.training.batch_size == 32
    assert recipe.training.accumulation == 4
    assert found.progress.position == 28
    assert np.isclose(recipe.lr, 0.01)
    assert recipe.training.precision is Precision.BFLOAT16
    assert recipe.optimizer.weight_decay == 0.05
    if kind == "classifier":
        assert recipe.optimizer.layer_decay == 0.75
        assert recipe.mixing.mixup == 0.8
        assert recipe.augmentation.rand_augment is not None
        assert np.array_equal(found.state.ema["head.bias"], np.zeros(3))
        assert set(found.state.ema) == set(found.state.exp_avg)
    else:
        assert recipe.optimizer.clip == 3.0
        assert not found.state.ema


def test_the_run_can_be_resumed(tmp_path):
    arm(
        "convert",
        "import",
        with_optimizer("pretrain", tmp_path / "x.pth"),
        tmp_path / "run",
        "--with-optimizer",
    )
    words = [
        "training.length=9 steps",
        "schedule.warmup=0 steps",
        "data.source=synthetic",
        "training.save_every=1 steps",
    ]
    sets = [item for word in words for item in ("--set", word)]
    result = arm("pretrain", "--resume", tmp_path / "run", *sets, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert newest_checkpoint(tmp_path / "run", print).progress.step == 9


def drop_moment(optimizer):
    del optimizer["state"][5]["exp_avg"]


def swap_two(optimizer):
    state = optimizer["state"]
    state[0]["exp_avg"] = state[7]["exp_avg"][:3]


def other_steps(optimizer):
    optimizer["state"][3]["step"] = np.array(8.0, np.float32)


def one_group_less(optimizer):
    optimizer["param_groups"].pop()


def emptied(optimizer):
    optimizer["state"].clear()


def nan_moment(optimizer):
    optimizer["state"][3]["exp_avg"].reshape(-1)[0] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_moment, "optimizer exp_avg: missing"),
        (swap_two, "optimizer exp_avg: .*expected"),
        (other_steps, "one step count"),
        (one_group_less, "expected groups of"),
        (emptied, "its optimizer state is empty"),
        (nan_moment, "1 of .* values are NaN"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path, change, message):
    import re

    path = with_optimizer("pretrain", tmp_path / "x.pth", change=change)
    result = arm("convert", "import", path, tmp_path / "run", "--with-optimizer")
    assert result.exit_code == 2
    assert re.search(message, result.output), result.output
    assert [item.name for item in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"lr": None}, "args.lr is missing"),
        ({"batch_size": "many"}, "args.batch_size: expected a number, found 'many'"),
        ({"epochs": 10**400}, "args.epochs: expected a number, found a huge number"),
        ({"epochs": float("nan")}, "args.epochs: expected a number"),
        ({"aa": "original"}, "args.aa: expected 'rand-m9-mstd0.5-inc1' or none, found 'original'"),
    ],
)
def test_training_arguments_that_no_recipe_can_express_are_named(tmp_path, args, message):
    path = with_optimizer("classifier", tmp_path / "x.pth", args=args)
    result = arm("convert", "import", path, tmp_path / "run", "--with-optimizer")
    assert result.exit_code == 2
    assert message in result.output
    assert [item.name for item in tmp_path.iterdir()] == ["x.pth"]


def test_a_checkpoint_without_an_optimizer_is_refused(tmp_path):
    path = foreign.save(tmp_path / "x.pth", foreign.torch_zip(foreign.checkpoint(foreign.PRETRAIN)))
    result = arm("convert", "import", path, tmp_path / "run", "--with-optimizer")
    assert result.exit_code == 2
    assert "has no optimizer state" in result.output


@pytest.mark.skipif(golden.complete() is None, reason="needs the complete official data: set ARM_GOLDEN")
@pytest.mark.parametrize("name", ["pretrain_checkpoint-40", "ft_cls_checkpoint-10", "ft_gp_checkpoint-10"])
def test_the_optimizer_groups_are_the_official_ones(name):
    import json

    folder = golden.complete()
    source = open_checkpoint_source(folder / f"{name}.pth", warn=print)
    stated = json.loads((folder / f"{name.split('_checkpoint')[0]}_meta.json").read_text())["groups"]
    assert official_groups(source, resolve(source).spec) == [group["names"] for group in stated]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"batch_size": 0}, r"args.batch_size: expected a whole number, 1 or more, found 0"),
        ({"batch_size": 1.5}, r"args.batch_size: expected a whole number, 1 or more, found 1.5"),
        ({"accum_iter": 0}, r"args.accum_iter: expected a whole number"),
        ({"world_size": 0.5}, r"args.world_size: expected a whole number"),
        ({"world_size": -1}, r"args.world_size: expected a whole number"),
        ({"batch_size": float("nan")}, r"args.batch_size: expected a number"),
        ({"batch_size": 10**400}, r"args.batch_size: expected a number, found a huge number"),
        ({"seed": -1}, r"args.seed: expected a whole number, 0 or more"),
        ({"lr": 0}, r"base_lr"),
        ({"epochs": -1}, r"length|expected"),
        ({"warmup_epochs": 1e14}, r"warmup|expected"),
        ({"drop_path": 7}, r"drop_path"),
        ({"layer_decay": -3}, r"layer_decay"),
    ],
    ids=str,
)
def test_training_arguments_out_of_range_are_refused_by_name(tmp_path, args, message):
    path = with_optimizer("classifier", tmp_path / "x.pth", args=args)
    result = arm("convert", "import", path, tmp_path / "run", "--with-optimizer")
    assert result.exit_code == 2
    assert re.search(rf"x\.pth: .*({message})", result.output), result.output
    assert not (tmp_path / "run").exists()
