"""The training loop on the toy engine: inputs of each step, logging, saving, evaluation, refusals."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
from toy_engine import ToyEngine, fresh_state, state_of

from arm_core.data import EvalLoader, EvalTransform, Synthetic
from arm_core.data.loader import EvalBatch
from arm_core.engine.protocol import Batch, TrainingState
from arm_core.files.model_folder import read_model
from arm_core.recipe.recipe import Recipe, load_recipe, override
from arm_core.training.checkpoint import newest_checkpoint, saved_steps
from arm_core.training.evaluation import classes_before, cross_entropy, evaluate
from arm_core.training.model_source import Weights, open_folder
from arm_core.training.nonfinite import NonFiniteError
from arm_core.training.observer import Observer
from arm_core.training.plan import BatchFailed
from arm_core.training.run_folder import RunFolder, resume_run, start_run
from arm_core.training.trainer import Trainer

SMALL = [
    "model.width=8",
    "model.depth=2",
    "model.patch=4",
    "model.image_size=8",
    "data.source=synthetic",
    "data.labels_per_class=none",
    "training.batch_size=8",
    "training.accumulation=2",
    "training.length=3 epochs",
    "training.log_every=4",
    "training.save_every=1 epoch",
    "training.evaluate_every=none",
    "schedule.base_lr=0.5",
    "schedule.warmup=1 epoch",
]
TRAIN = Synthetic(43, (8, 8), classes=4)  # 10 micro-batches of 4: 5 steps an epoch, 15 in all
HELD_OUT = Synthetic(11, (8, 8), classes=4, seed=1)


@pytest.fixture
def recipe() -> Recipe:
    return override(load_recipe("finetune-digits"), SMALL)


def make_engine(run: RunFolder, **options) -> ToyEngine:
    return ToyEngine(run.spec, state_of(run), run.recipe.optimizer, **options)


def train(path, recipe, eval_source=None, observer=None, **options):
    with start_run(path, recipe, recipe.spec(4)) as run:
        engine = make_engine(run, **options)
        return Trainer(run, engine, TRAIN, eval_source, observer=observer).train(), engine, run


class Recorder(Observer):
    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.warnings: list[str] = []

    def stepped(self, step, images):
        self.events.append(("step", step))

    def logged(self, row):
        self.events.append(("eval" if "eval_loss" in row else "log", row["step"]))

    def saved(self, checkpoint):
        self.events.append(("save", int(checkpoint.name.removeprefix("step-"))))

    def warned(self, sentence):
        self.warnings.append(sentence)


def test_a_run_trains_logs_and_saves_according_to_its_recipe(tmp_path, recipe):
    observer = Recorder()
    outcome, engine, run = train(tmp_path, recipe, observer=observer)
    assert outcome.finished
    assert (outcome.step, outcome.total_steps, outcome.signal) == (15, 15, None)
    assert [event for event in observer.events if event[0] != "step"] == [
        ("save", 0),
        ("log", 4),
        ("save", 5),
        ("log", 8),
        ("save", 10),
        ("log", 12),
        ("log", 15),
        ("save", 15),
    ]
    rows = run.metrics()
    assert set(rows[0]) == {"step", "epoch", "lr", "loss", "grad_norm", "images_per_s"}
    assert [row["epoch"] for row in rows] == [0.8, 1.6, 2.4, 3.0]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert saved_steps(tmp_path) == [10, 15]
    newest = newest_checkpoint(tmp_path, observer.warned)
    assert newest.progress.position == 30
    for name, value in engine.parameters.items():
        assert newest.state.parameters[name].tobytes() == value.tobytes()
    assert observer.warnings == []


def test_learning_rates_follow_the_fractional_epoch(tmp_path, recipe):
    _, engine, _ = train(tmp_path, recipe)
    peak, moments = 0.5 * 8 / 256, np.arange(15) / 5
    expected = np.where(moments < 1, peak * moments, peak * 0.5 * (1 + np.cos(np.pi * (moments - 1) / 2)))
    assert [step for step, _ in engine.steps] == list(range(1, 16))
    np.testing.assert_allclose([lr for _, lr in engine.steps], expected, rtol=1e-12)


def test_logging_reports_means_since_the_previous_row(tmp_path, recipe):
    _, _, fine = train(tmp_path / "fine", override(recipe, ["training.log_every=1"]))
    _, _, coarse = train(tmp_path / "coarse", recipe)
    losses = [row["loss"] for row in fine.metrics()]
    assert coarse.metrics()[1]["loss"] == pytest.approx(np.mean(losses[4:8]))
    assert coarse.metrics()[-1]["loss"] == pytest.approx(np.mean(losses[12:15]))


def test_the_trainer_only_waits_for_results_when_they_are_needed(tmp_path, recipe):
    """Reading a loss stops an asynchronous device; between two rows no loss is read."""
    asked_at: list[tuple[int, list[int]]] = []

    class Watch(Observer):
        def stepped(self, step, images):
            asked_at.append((step, list(engine.asked)))

    recipe = override(recipe, ["training.save_every=100 epochs"])
    with start_run(tmp_path, recipe, recipe.spec(4)) as run:
        engine = make_engine(run)
        Trainer(run, engine, TRAIN, observer=Watch()).train()
    assert [len(asked) for _, asked in asked_at] == [0] * 4 + [4] * 4 + [8] * 4 + [12] * 3


def test_accumulated_micro_batches_make_one_update(tmp_path, recipe):
    """Same images in one or two micro-batches: same gradient (the toy has no batch statistics)."""
    _, two, _ = train(tmp_path / "two", recipe)
    _, one, _ = train(tmp_path / "one", override(recipe, ["training.accumulation=1"]))
    assert one.steps == two.steps
    for name, value in one.parameters.items():
        np.testing.assert_allclose(value, two.parameters[name], rtol=2e-4, atol=1e-6)


def test_drop_path_masks_follow_from_seed_and_position(tmp_path, recipe):
    recipe = override(recipe, ["model.depth=6", "training.drop_path=0.5"])
    seen: list[Batch] = []

    class Watched(ToyEngine):
        def train_step(self, batches, *, step, lr, total_micro_batches, stop):
            seen.extend(batches)
            return super().train_step(
                batches, step=step, lr=lr, total_micro_batches=total_micro_batches, stop=stop
            )

    with start_run(tmp_path, recipe, recipe.spec(4)) as run:
        Trainer(run, Watched(run.spec, state_of(run), run.recipe.optimizer), TRAIN).train()
    scales = [batch.drop_path_scale for batch in seen]
    assert {scale.shape for scale in scales} == {(6, 2, 4)}
    assert len({scale.tobytes() for scale in scales}) == len(scales) == 30
    assert 0.1 < np.mean(np.stack(scales)[:, -1] == 0) < 0.7


def test_evaluation_counts_exactly(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec(4)) as run:
        engine = make_engine(run)
    loader = EvalLoader(HELD_OUT, EvalTransform(crop_fraction=1.0), size=(8, 8), batch_size=4)
    found = evaluate(engine, loader)
    whole = next(iter(EvalLoader(HELD_OUT, EvalTransform(crop_fraction=1.0), size=(8, 8), batch_size=99)))
    logits = engine.forward(whole.images)["logits"].astype(np.float64)
    assert (found.images, found.top5) == (11, 1.0)
    assert found.top1 == np.mean(logits.argmax(-1) == whole.labels)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert found.loss == pytest.approx(-log_p[np.arange(11), whole.labels].mean())
    with pytest.raises(ValueError, match="the data has no images"):
        evaluate(engine, [])
    unlabelled = EvalBatch(whole.images, np.full(11, -1), whole.indices)
    with pytest.raises(ValueError, match="image 0 has label -1, expected 0 to 3"):
        evaluate(engine, [unlabelled])


def test_ranks_break_ties_by_class_index_and_never_favour_nan():
    logits = np.array([[1, 1, 0], [1, 1, 0], [np.nan, 0, 1], [0, np.nan, 1]], np.float32)
    assert classes_before(logits, np.array([0, 1, 2, 1])).tolist() == [0, 1, 1, 3]
    assert cross_entropy(np.array([[1000.0, 0.0]], np.float32), np.array([1]))[0] == 1000.0


def test_the_average_is_evaluated_and_the_weights_are_restored(tmp_path, recipe):
    averaged = override(recipe, ["optimizer.ema_decay=0.9", "training.evaluate_every=1 epoch"])
    _, engine, run = train(tmp_path / "ema", averaged, HELD_OUT)
    _, plain, _ = train(tmp_path / "plain", recipe)
    for name, value in plain.parameters.items():
        assert value.tobytes() == engine.parameters[name].tobytes(), name
    row = [row for row in run.metrics() if "eval_loss" in row][-1]
    source = open_folder(tmp_path / "ema" / "checkpoints" / "step-00000015", warn=print)
    spec, parameters = source.model.spec, source.load(Weights.EMA)
    loader = EvalLoader(HELD_OUT, recipe.eval_transform, size=(8, 8), batch_size=11)
    assert row["ema_loss"] == pytest.approx(
        evaluate(ToyEngine(spec, TrainingState(parameters=parameters)), loader).loss
    )
    assert row["ema_loss"] != row["eval_loss"]
    assert row["score"] == max(row["eval_top1"], row["ema_top1"])


def test_the_best_checkpoint_is_kept(tmp_path, recipe):
    """Scripted evaluations: the second of five is the best, although no save was due there."""
    scores = iter([0.25, 0.75, 0.5, 0.5, 0.25])

    class Scripted(ToyEngine):
        def forward(self, images, *, intermediates=False):
            count = len(images)
            right = round(next(scores) * count)
            chosen = np.where(np.arange(count) < right, np.arange(count), np.arange(count) + 1) % 4
            return {"logits": np.eye(4, dtype=np.float32)[chosen]}

    recipe = override(
        recipe, ["training.evaluate_every=3 steps", "training.save_every=5 steps", "training.keep=1"]
    )
    with start_run(tmp_path, recipe, recipe.spec(4)) as run:
        engine = Scripted(run.spec, state_of(run), run.recipe.optimizer)
        four = Synthetic(4, (8, 8), classes=4)
        outcome = Trainer(run, engine, TRAIN, four).train()
    assert outcome.best["step"] == 6
    assert outcome.best["score"] == 0.75
    assert saved_steps(tmp_path) == [6, 15]


def test_the_newest_and_the_permanent_checkpoints_are_kept(tmp_path, recipe):
    changes = ["training.save_every=2 steps", "training.keep=2", "training.keep_every=1 epoch"]
    train(tmp_path, override(recipe, changes))
    assert saved_steps(tmp_path) == [5, 10, 14, 15], "an epoch has 5 steps"


def test_pretraining_evaluates_its_loss(tmp_path):
    small = [item for item in SMALL if "model.depth" not in item and "labels" not in item]
    recipe = override(
        load_recipe("pretrain-digits"), [*small, "model.cluster=1", "model.decoder_width=8", "model.depth=6"]
    )
    with start_run(tmp_path, recipe, recipe.spec()) as run:
        outcome = Trainer(run, make_engine(run), TRAIN, HELD_OUT).train()
    assert "eval_top1" not in outcome.best
    assert outcome.best["score"] == -outcome.best["eval_loss"]
    assert outcome.best["eval_images"] == 11


def test_a_saved_model_has_its_classes_and_its_evaluation_transform(tmp_path, recipe):
    outcome, _, _ = train(tmp_path, recipe)
    metadata = read_model(outcome.checkpoint).metadata
    assert metadata["classes"] == '["0", "1", "2", "3"]'
    assert '"crop_fraction": 1.0' in metadata["eval_transform"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_prints_how_to_resume(tmp_path, recipe, name):
    class Interrupting(Recorder):
        def stepped(self, step, images):
            if step == 7:
                os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(getattr(signal, name))
    observer = Interrupting()
    outcome, engine, run = train(tmp_path, recipe, observer=observer)
    assert (outcome.finished, outcome.signal, outcome.step) == (False, name, 7)
    assert outcome.message == (
        f"stopped by {name} after step 7 of 15; resume with: arm finetune --resume {run.path}"
    )
    assert observer.warnings == [f"{name}: saving and stopping; press Ctrl-C again to stop immediately"]
    assert newest_checkpoint(tmp_path, observer.warned).progress.step == 7
    assert engine.steps[-1][0] == 7
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_second_signal_stops_immediately(tmp_path, recipe):
    class Impatient(Recorder):
        def stepped(self, step, images):
            if step == 7:
                os.kill(os.getpid(), signal.SIGINT)
                while not self.warnings:  # two signals can merge into one before the first is noted
                    time.sleep(0.001)
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe, observer=Impatient())
    assert saved_steps(tmp_path)[-1] == 5


def test_an_evaluation_missed_by_an_interruption_is_repeated(tmp_path, recipe):
    class Interrupting(Recorder):
        def stepped(self, step, images):
            if step == 15:
                os.kill(os.getpid(), signal.SIGINT)

    outcome, _, _ = train(tmp_path, recipe, HELD_OUT, observer=Interrupting())
    assert not outcome.finished
    with resume_run(tmp_path, warn=pytest.fail) as run:
        outcome = Trainer(run, make_engine(run), TRAIN, HELD_OUT).train()
    assert outcome.finished
    assert outcome.best["step"] == 15


def test_a_nan_gradient_stops_the_run_and_names_the_step(tmp_path, recipe):
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, recipe, poisoned_steps=frozenset([7]))
    error = caught.value
    assert error.step == 7
    assert error.checkpoint == tmp_path / "checkpoints" / "step-00000005"
    assert "gradient norm nan" in str(error)
    assert "a repetition gave finite tensors" in str(error)
    assert f"arm finetune --resume {tmp_path}" in str(error)
    assert saved_steps(tmp_path)[-1] == 5
    assert newest_checkpoint(tmp_path, pytest.fail).progress.step == 5


def test_a_bad_gradient_is_named_if_the_forward_pass_is_finite(tmp_path, recipe):
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, recipe, poisoned_steps=frozenset(range(7, 16)))
    assert caught.value.step == 7
    assert caught.value.tensor == "patch_embed.weight (gradient)"


def test_the_first_bad_tensor_is_found_by_a_forward_pass(tmp_path, recipe):
    class Overflowing(ToyEngine):
        """Features become infinite after the weights have moved for six steps."""

        def _features(self, images):
            features = super()._features(images)
            return features * np.float32(np.inf) if len(self.steps) >= 6 else features

    with start_run(tmp_path, recipe, recipe.spec(4)) as run, np.errstate(invalid="ignore", over="ignore"):
        engine = Overflowing(run.spec, state_of(run), run.recipe.optimizer)
        with pytest.raises(
            NonFiniteError, match=r"step 7: loss nan.*first non-finite tensor is tokens"
        ) as error:
            Trainer(run, engine, TRAIN).train()
    assert error.value.tensor == "tokens (forward pass)"


def test_a_bad_state_is_never_saved(tmp_path, recipe):
    class Rotting(ToyEngine):
        def export_state(self):
            state = super().export_state()
            if len(self.steps) >= 10:
                state.exp_avg_sq["norm_f.bias"][0] = np.inf
            return state

    with start_run(tmp_path, recipe, recipe.spec(4)) as run:
        engine = Rotting(run.spec, state_of(run), run.recipe.optimizer)
        with pytest.raises(NonFiniteError, match=r"norm_f.bias \(second moment\)"):
            Trainer(run, engine, TRAIN).train()
    assert saved_steps(tmp_path)[-1] == 5


def test_a_full_disk_is_reported_with_how_to_resume(tmp_path, recipe, monkeypatch):
    def full(run, checkpoint):
        if checkpoint.progress.step == 10:
            raise OSError(28, "No space left on device")
        return save(run, checkpoint)

    from arm_core.training import writer

    save = writer.save_checkpoint
    monkeypatch.setattr(writer, "save_checkpoint", full)
    with pytest.raises(OSError, match=r"step-00000010: cannot be written \(No space left.*resume with: arm"):
        train(tmp_path, recipe)
    assert saved_steps(tmp_path)[-1] == 5


class Losing(Synthetic):
    """Images that become unreadable when micro-batch `at` is due, optionally after a signal."""

    def __init__(self, at: int, *, signalled: bool) -> None:
        super().__init__(43, (8, 8), classes=4)
        self.left, self.signalled = 4 * at, signalled

    def item(self, index, epoch=0):
        self.left -= 1
        if self.left < 0:
            if self.signalled:
                os.kill(os.getpid(), signal.SIGTERM)
            raise OSError("Stale file handle")
        return super().item(index, epoch)


@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.parametrize("at", [14, 15])
def test_no_step_is_lost_with_data_that_cannot_be_read(tmp_path, recipe, signalled, at):
    with start_run(tmp_path / "lost", recipe, recipe.spec(4)) as run:
        trainer = Trainer(run, make_engine(run), Losing(at, signalled=signalled))
        with pytest.raises(BatchFailed, match=r"Stale file handle; saved step 7, resume with: arm finetune"):
            trainer.train()
    train(tmp_path / "whole", recipe)
    with resume_run(tmp_path / "lost", warn=pytest.fail) as run:
        assert run.resumed.progress.step == 7
        engine = make_engine(run)
        assert Trainer(run, engine, TRAIN).train().finished
    whole = newest_checkpoint(tmp_path / "whole", pytest.fail)
    for name, value in engine.parameters.items():
        assert value.tobytes() == whole.state.parameters[name].tobytes()


@pytest.mark.parametrize(
    ("changes", "train_source", "eval_source", "sentence"),
    [
        (["training.batch_size=98"], TRAIN, None, "43 images, fewer than one batch of 49"),
        ([], Synthetic(43, (8, 8), classes=3), None, "the data has 3 classes, the model 4"),
        ([], TRAIN, Synthetic(9, (8, 8), classes=5), "other classes (0, 1, 2, ... 5 in all)"),
        (
            ["schedule.warmup=4 epochs"],
            TRAIN,
            None,
            "schedule.warmup of 4 epochs exceeds training.length of 3 epochs (20 and 15 steps)",
        ),
    ],
)
def test_data_that_does_not_match_the_recipe_is_refused(
    tmp_path, recipe, changes, train_source, eval_source, sentence
):
    recipe = override(recipe, changes)
    with start_run(tmp_path, recipe, recipe.spec(4)) as run, pytest.raises(ValueError) as error:  # noqa: PT011
        Trainer(run, make_engine(run), train_source, eval_source)
    assert sentence in str(error.value)


def test_an_engine_of_another_model_is_refused(tmp_path, recipe):
    with start_run(tmp_path, recipe, recipe.spec(4)) as run:
        other = replace(run.spec, classes=5)
        engine = ToyEngine(other, fresh_state(other))
        with pytest.raises(ValueError, match="created for another model"):
            Trainer(run, engine, TRAIN)
