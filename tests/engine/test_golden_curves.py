"""30 training steps of each engine against the recorded losses, compared by `arm runs compare`.

The curves are in tests/fixtures/curves. To record them again after an intended change of the numbers:

    arm pretrain tests/fixtures/curves/pretrain-torch/recipe.toml --backend torch --device cpu --out RUN
    arm runs compare tests/fixtures/curves/pretrain-torch RUN

then copy the training rows of RUN/metrics.jsonl. The two engines, other numbers of threads and the reference
scan agree within 4e-7; `TOLERANCE` leaves room for the matrix products of other processors.
"""

from pathlib import Path

import pytest
from click.testing import CliRunner

from arm_cli.main import main
from arm_core.engine.registry import installed_backends

CURVES = Path(__file__).parents[1] / "fixtures/curves"
TOLERANCE = "1e-5"
"""Largest difference of a loss, relative to the recorded one."""

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def train(stage: str, backend: str, out: Path, *changes: str) -> Path:
    if reason := installed_backends()[backend].missing():
        pytest.skip(reason)
    recipe = CURVES / f"{stage}-{backend}/recipe.toml"
    result = arm(stage, recipe, "--backend", backend, "--device", "cpu", "--out", out, *changes)
    assert result.exit_code == 0, result.output
    return out


@pytest.mark.parametrize("backend", ["torch", "mlx"])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_an_engine_reproduces_the_recorded_losses(stage, backend, tmp_path):
    run = train(stage, backend, tmp_path / "run")
    result = arm("runs", "compare", CURVES / f"{stage}-{backend}", run, "--tolerance", TOLERANCE)
    assert result.exit_code == 0, result.output
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 30


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_both_engines_have_recorded_the_same_losses(stage):
    paths = [CURVES / f"{stage}-{backend}" for backend in ("torch", "mlx")]
    result = arm("runs", "compare", *paths, "--tolerance", "1e-6")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        ("pretrain", "schedule.base_lr=0.0303"),
        ("pretrain", "optimizer.weight_decay=0.06"),
        ("finetune", "optimizer.layer_decay=0.76"),
    ],
)
def test_a_small_change_of_a_setting_exceeds_the_tolerance(stage, change, tmp_path):
    run = train(stage, "torch", tmp_path / "run", "--set", change)
    result = arm("runs", "compare", CURVES / f"{stage}-torch", run, "--tolerance", TOLERANCE)
    assert result.exit_code == 1, result.output
    assert "loss differs by" in result.stderr
