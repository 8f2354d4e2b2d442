"""`arm pretrain`, `arm finetune` and `arm evaluate` on the command line, with images of two colours."""

import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from training_folder import furnish, paint

from arm_cli.main import main
from arm_cli.progress import ProgressBar
from arm_core.engine.registry import installed_backends
from arm_core.files.model_folder import read_model, write_model
from arm_core.model.parameters import initial_parameters
from arm_core.recipe.recipe import load_recipe
from arm_core.training.checkpoint import load_checkpoint


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with images and recipes."""
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pretraining_finetuning_and_evaluation_work_in_sequence(place):
    result = arm("pretrain", "pre.toml", "--data", "train", "--out", "run", "--json")
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout)
    assert (outcome["step"], outcome["total_steps"], outcome["signal"]) == (4, 4, None)
    assert "backend " in result.stderr
    assert ", scan cpu" in result.stderr
    assert "finished after 4 steps; the model is in run/checkpoints/step-00000004" in result.stderr
    assert [row["step"] for row in rows(place / "run")] == [1, 2, 3, 4]

    result = arm(
        "finetune", "fine.toml", "--from", "run", "--data", "train", "--eval-data", "val", "--out", "run2"
    )
    assert result.exit_code == 0, result.output
    assert "from run/checkpoints/step-00000004 (pretraining model), with a new head" in result.stderr
    assert "step 4, epoch 1.33: top-1 " in result.stderr
    session = json.loads((place / "run2/sessions.jsonl").read_text())
    assert (session["from"], session["scan"]) == ("run", "cpu")
    pretrained, start = (
        read_model("run/checkpoints/step-00000004"),
        read_model("run2/checkpoints/step-00000000"),
    )
    for name in ("patch_embed.weight", "layers.5.mlp.w1.weight"):
        np.testing.assert_array_equal(start.arrays[name].read(), pretrained.arrays[name].read())

    found = json.loads(arm("evaluate", "run2", "--json").stdout)
    assert found["images"] == 4
    logged = rows(place / "run2")[-1]
    assert (found["top1"], found["loss"]) == (
        logged["eval_top1"],
        pytest.approx(logged["eval_loss"], rel=1e-5),
    )
    assert arm("evaluate", "run2", "--data", "val").stdout.startswith(f"top-1 {100 * found['top1']:.2f} %")

    (prediction,) = json.loads(arm("predict", "run2", "val/dark/0.png", "--json").stdout)
    assert {best["class"] for best in prediction["top"]} == {"dark", "light"}


def test_a_new_head_has_the_standard_deviation_of_the_recipe(place):
    assert arm("pretrain", "pre.toml", "--data", "train", "--set", "training.length=1 step").exit_code == 0
    for std in (None, 0.5):
        words = [] if std is None else ["--set", f"model.head_std={std}"]
        result = arm(
            "finetune", "fine.toml", "--from", "runs/pre", "--data", "train", "--out", f"run-{std}", *words
        )
        assert result.exit_code == 0, result.output
        head = read_model(f"run-{std}/checkpoints/step-00000000").arrays["head.weight"].read()
        assert head.std() == pytest.approx(std or 2e-5, rel=0.3)


def test_finetuning_without_from_trains_from_scratch(place):
    assert arm("finetune", "fine.toml", "--data", "train", "--out", "run").exit_code == 0
    start = load_checkpoint(place / "run/checkpoints/step-00000000")
    expected = initial_parameters(start.spec, seed=0)
    for name, value in start.state.parameters.items():
        np.testing.assert_array_equal(value, expected[name])


@pytest.mark.parametrize(("classes", "kept"), [(["dark", "light"], True), (["light", "dark"], False)])
def test_a_classifier_of_the_same_classes_keeps_its_head(place, classes, kept):
    recipe = load_recipe("fine.toml")
    spec = recipe.spec(2)
    parameters = initial_parameters(spec, seed=5)
    write_model("model", spec, parameters, metadata={"classes": json.dumps(classes)})
    result = arm("finetune", "fine.toml", "--from", "model", "--data", "train", "--out", "run")
    assert result.exit_code == 0, result.output
    assert ("keeps its head" if kept else "with a new head") in result.stderr
    head = read_model("run/checkpoints/step-00000000").arrays["head.weight"].read()
    assert np.array_equal(head, parameters["head.weight"]) == kept


def test_labels_follow_the_class_names_of_the_model(place):
    spec = load_recipe("fine.toml").spec(2)
    values = {n: v * (50 if n == "head.weight" else 1) for n, v in initial_parameters(spec, 5).items()}
    losses = []
    for classes in (["dark", "light"], ["light", "dark"]):
        write_model("-".join(classes), spec, values, metadata={"classes": json.dumps(classes)})
        result = arm("evaluate", "-".join(classes), "--data", "train", "--json")
        losses.append(json.loads(result.stdout)["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3  # the same logits with exchanged labels


def test_set_and_precision_change_the_recipe_that_the_run_keeps(place):
    words = ["pretrain", "pre.toml", "--data", "train", "--out", "run", "--set", "training.length=1 step"]
    result = arm(*words, "--set", "training.seed=7", "--precision", "bfloat16", "--threads", "1")
    assert result.exit_code == 0, result.output
    recipe = load_recipe("run/recipe.toml")
    assert (recipe.training.seed, recipe.training.precision) == (7, "bfloat16")
    assert recipe.data.path == str(place / "train")
    session = json.loads((place / "run/sessions.jsonl").read_text())
    assert (session["precision"], session["threads"]) == ("bfloat16", "1")


@pytest.fixture
def interrupted(place, monkeypatch):
    """A run that was stopped after the first of four steps, and an uninterrupted one."""
    words = ["pretrain", "pre.toml", "--data", "train", "--backend", "torch", "--device", "cpu"]
    assert arm(*words, "--out", "whole").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "advance", lambda *_: signal.raise_signal(signal.SIGINT))
        return arm(*words, "--out", "halved", "--json")


def parameters(run):
    return load_checkpoint(run / "checkpoints/step-00000004").state.parameters


def test_an_interrupted_run_prints_how_to_resume_and_ends_like_an_uninterrupted_one(place, interrupted):
    assert interrupted.exit_code == 130
    assert json.loads(interrupted.stdout)["signal"] == "SIGINT"
    said = "stopped by SIGINT after step 1 of 4; resume with: arm pretrain --resume halved"
    assert said in interrupted.stderr
    result = arm("pretrain", "--resume", "halved", "--backend", "torch", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "Resuming at step 1 of 4: halved" in result.stderr
    whole = parameters(place / "whole")
    for name, value in parameters(place / "halved").items():
        np.testing.assert_array_equal(value, whole[name], err_msg=name)


def test_a_run_can_be_resumed_on_the_other_engine(place, interrupted):
    if reason := installed_backends()["mlx"].missing():
        pytest.skip(reason)
    result = arm("pretrain", "--resume", "halved", "--backend", "mlx", "--device", "cpu")
    assert result.exit_code == 0, result.output
    sessions = [json.loads(line) for line in (place / "halved/sessions.jsonl").read_text().splitlines()]
    assert [(row["backend"], row["step"]) for row in sessions] == [("torch", 0), ("mlx", 1)]
    losses = [[row["loss"] for row in rows(place / run) if "loss" in row] for run in ("halved", "whole")]
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_a_run_that_diverges_is_one_line_with_exit_code_1(place):
    words = ["pretrain", "pre.toml", "--data", "train", "--out", "run"]
    result = arm(*words, "--set", "schedule.base_lr=1e30", "--set", "training.length=10 steps")
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "the first non-finite tensor is" in errors[0]
    assert "arm pretrain --resume run" in errors[0]


PRE = "pretrain pre.toml --data train --out new"
FINE = "finetune fine.toml --data train --out new"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The files that the mistakes below name; created once."""
    folder = tmp_path_factory.mktemp("mistakes")
    furnish(folder)
    paint(folder / "other", {"green": 90})
    paint(folder, {"broken": 90}, count=5)
    (folder / "broken/1.png").write_bytes((folder / "broken/1.png").read_bytes()[:200])
    (folder / "empty").mkdir()
    (folder / "official.pth").write_bytes(b"PK")
    spec = load_recipe(folder / "fine.toml").spec(2)
    small = replace(spec, encoder=replace(spec.encoder, width=16))
    write_model(folder / "small", small, initial_parameters(small, 0))
    ten = replace(spec, classes=10)
    write_model(folder / "classifier", ten, initial_parameters(ten, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert arm(*PRE.replace("new", "run").split(), "--set", "training.length=1 step").exit_code == 0
    return folder


@pytest.fixture
def mistakes(prepared, monkeypatch):
    monkeypatch.chdir(prepared)
    yield prepared
    shutil.rmtree(prepared / "new", ignore_errors=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pretrain", "pass a recipe (pretrain-base, "),
        ("pretrain bsae --data train", "unknown recipe 'bsae'"),
        ("pretrain pretrain-bsae --data train", "did you mean 'pretrain-base'?"),
        ("pretrain fine.toml --data train", "recipe fine.toml is for `arm finetune`"),
        ("pretrain none.toml --data train", "none.toml: cannot be read"),
        ("pretrain pre.toml --out new", "pass --data PATH"),
        ("pretrain pre.toml --data nowhere --out new", "nowhere: no such folder"),
        ("pretrain pre.toml --data empty --out new", "empty: no images found"),
        ("finetune fine.toml --data train/dark --out new", "no class folders"),
        (f"{FINE} --eval-data other", "class folder 'green' is none of the 2 known classes"),
        (f"{FINE} --set model.classes=3", "the recipe has 3 classes, but the data has 2"),
        (f"{FINE} --from nowhere", "nowhere: no such model"),
        (f"{FINE} --from small --set model.width=32", "is 16 wide, 6 deep, patches of 4, but --set model.wi"),
        (f"{FINE} --epochs 1 --steps 3", "--epochs and --steps both set the length"),
        (f"{PRE} --batch-size 0", "0 is not in the range"),
        ("pretrain --resume run --batch-size 2", "training.batch_size cannot change within a run"),
        (f"{FINE} --from official.pth", "arm convert import official.pth"),
        (f"{FINE} --resume run --from run", "drop --from"),
        ("finetune --resume run", "resume with: arm pretrain --resume run"),
        ("pretrain pre.toml --resume run", "drop recipe"),
        ("pretrain --resume nowhere", "nowhere: no such folder"),
        ("pretrain --resume train", "train: contains no recipe.toml"),
        ("pretrain --resume run --set training.seed=3", "training.seed cannot change within a run"),
        ("pretrain pre.toml --data train --out run", "resume it with `arm pretrain --resume run`"),
        ("pretrain pre.toml --data train --out train", "not empty"),
        (f"{PRE} --set trainin.seed=1", "unknown key trainin; did you mean 'training'?"),
        (f"{PRE} --set training.sed=1", "unknown key training.sed; did you mean 'seed'?"),
        (f"{PRE} --set training.seed=x", "training.seed: expected a whole number"),
        (f"{PRE} --set model.preset=bsae", "unknown preset 'bsae'; did you mean 'base'"),
        (f"{PRE} --set training.batch_size=64", "12 images, fewer than one batch of 64"),
        (f"{PRE} --set model.cluster=4x4", "is not divisible into clusters of 4x4"),
        (f"{PRE} --set seed=1", "expected section.key=value"),
        (f"{PRE} --backend tpu", "unknown backend 'tpu'"),
        (f"{PRE} --scan warp", "unknown scan 'warp'"),
        (f"{PRE} --threads 0", "0 is not in the range"),
        ("pretrain pre.toml --data broken --out new", "broken/1.png: cannot be decoded"),
        ("evaluate run --data nowhere", "nowhere: no such folder"),
        ("evaluate run", "has no evaluation images"),
        ("evaluate small", "small: does not belong to a run"),
        ("evaluate classifier --data train", "train: 2 classes, the model has 10"),
        ("evaluate run --data train --ema", "has no moving average of the weights"),
        ("evaluate run --data train --weights ema", "has no moving average of the weights"),
        ("evaluate run --data train --weights eam", "'eam' is not one of 'raw', 'ema'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_run(mistakes, words, message):
    result = arm(*words.split())
    assert result.exit_code == 2, (result.output, result.exception)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    assert result.stdout == ""
    if "cannot be decoded" not in message:  # broken images are found while training
        assert not (mistakes / "new").exists()


def test_a_deterministic_run_records_its_threads_and_keeps_them(place):
    words = ["--data", "train", "--device", "cpu"]
    result = arm(
        "pretrain", "pre.toml", *words, "--out", "run", "--deterministic", "--threads", "1", "--steps", "2"
    )
    assert result.exit_code == 0, result.output
    result = arm("pretrain", "--resume", "run", "--threads", "2", "--set", "training.length=4 steps")
    assert result.exit_code == 2
    assert "--threads 2: this run is deterministic with 1 threads" in result.output
    result = arm("pretrain", "--resume", "run", "--set", "training.length=4 steps")
    assert result.exit_code == 0, result.output
    sessions = [json.loads(line) for line in (place / "run/sessions.jsonl").read_text().splitlines()]
    assert [(row["threads"], row["deterministic"]) for row in sessions] == [("1", "True")] * 2


def test_resume_auto_starts_a_run_and_resumes_it_later(place):
    words = ["pretrain", "pre.toml", "--data", "train", "--device", "cpu", "--out", "run", "--resume", "auto"]
    result = arm(*words, "--steps", "4")
    assert result.exit_code == 0, result.output
    assert "finished after 4 steps" in result.output
    assert arm(*words, "--steps", "4", "--workers", "1").exit_code == 0
    sessions = [json.loads(line) for line in (place / "run/sessions.jsonl").read_text().splitlines()]
    assert [row["step"] for row in sessions] == [0, 4]
    assert load_recipe(place / "run/recipe.toml").data.workers == 1
    result = arm(*words, "--steps", "4", "--set", "optimizer.clip=7", "--seed", "5")
    assert result.exit_code == 2
    assert "run: contains a run of another recipe (" in result.output
    assert "optimizer.clip = - there, 7.0 here" in result.output
    assert "training.seed = 0 there, 5 here" in result.output
    result = arm(*words[:-2], "--steps", "4")
    assert result.exit_code == 2
    assert "already contains a run; resume it with `arm pretrain --resume run`" in result.output


def test_the_command_for_a_run_of_another_stage_is_quoted(place):
    (place / "my run").mkdir()
    (place / "my run/recipe.toml").write_text((place / "fine.toml").read_text())
    result = arm("pretrain", "--resume", "my run")
    assert result.exit_code == 2
    assert "my run: resume with: arm finetune --resume 'my run'" in result.output
