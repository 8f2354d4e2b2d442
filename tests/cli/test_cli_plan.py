"""`--dry-run` on another machine and of a run that would be resumed."""

import pytest
from click.testing import CliRunner
from training_folder import furnish

from arm_cli.main import main
from arm_core.model.machines import MACHINES, estimate, parse_machines
from arm_core.model.presets import pretrain_preset

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def planned(*words):
    result = arm(*words)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def place(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_estimate_is_the_table_of_the_page_on_scaling(place):
    result = planned("pretrain", "base", "--dry-run", "--estimate", "h200:8")
    assert "as many images and classes as ImageNet-1k has are assumed" in result.stderr
    for part in (
        "8 x h200: estimates by the cost model, not measured",
        "step     83.4 ms: products 32.9 ms, scan 16.1 ms, elementwise 34.3 ms",
        "speed    24,550 images/s",
        "time     23:11:",
        "16.1 GB per GPU with 256 images at a time, of 141 GB",
    ):
        assert part in result.stdout, part
    assert not (place / "runs").exists()


def test_an_estimate_uses_the_images_and_names_the_setting_that_fits(place):
    result = planned("pretrain", "pre.toml", "--data", "train", "--dry-run", "--estimate", "m4-max")
    assert "images   12 images" in result.stderr
    assert " for 4 steps" in result.stdout
    result = planned(
        "finetune", "huge", "--dry-run", "--estimate", "a100:2", "--set", "training.accumulation=4"
    )
    assert "of 80 GB; 128 images at a time fit: --set training.accumulation=8" in result.stdout
    result = planned("pretrain", "base", "--dry-run", "--estimate", "h200:16")
    assert "set      --set training.accumulation=16" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dry-run", "--estimate", "h20"), "unknown machine 'h20'; did you mean 'h200'?"),
        (("--dry-run", "--estimate", "h200:0"), "expected h200 or h200:N with N from 1 to 512"),
        (("--dry-run", "--estimate", "m4:2"), "expected m4 or m4:N with N from 1 to 1"),
        (("--dry-run", "--estimate", "h200:64", "--batch-size", "32"), "32 images, too few for 64 GPUs"),
        (("--estimate", "h200:8"), "--estimate belongs to --dry-run"),
    ],
)
def test_an_impossible_estimate_is_refused(place, words, message):
    result = arm("pretrain", "base", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_slower_machines_and_float32_take_longer():
    spec = pretrain_preset("base")

    def seconds(name, **changes):
        settings = {"batch_size": 256, "accumulation": 1, "average": False, **changes}
        return estimate(spec, MACHINES[name], 1, **settings).seconds

    ordered = ["h200", "h100", "a100", "m2-ultra", "m4-max", "m4", "m1"]
    times = [seconds(name) for name in ordered]
    assert times == sorted(times)
    assert seconds("h200", bfloat16=False) > 2 * seconds("h200")
    assert parse_machines("a100") == (MACHINES["a100"], 1)
    assert parse_machines("a100:4") == (MACHINES["a100"], 4)


def test_the_rest_of_a_run_is_planned_without_changing_it(place):
    words = ["--data", "train", "--out", "run", "--device", "cpu"]
    assert arm("pretrain", "pre.toml", *words).exit_code == 0
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    rest = ("pretrain", "--resume", "run", "--dry-run", "--device", "cpu")
    result = planned(*rest, "--set", "training.length=10 steps")
    assert "Resuming at step 4 of 10" in result.stderr
    assert " for 6 steps" in result.stdout
    assert "time     none: all 4 steps are done" in planned(*rest).stdout
    estimated = planned(*rest, "--set", "training.length=10 steps", "--estimate", "m1")
    assert "for 6 steps, evaluations not counted" in estimated.stdout
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert arm(*rest, "--set", "training.batch_size=6").exit_code == 2
