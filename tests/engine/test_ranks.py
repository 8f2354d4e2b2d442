"""Several ranks on the toy engine: shared batches, common decisions, exact evaluation, clear errors."""

import os
import signal

import numpy as np
import pytest
from thread_ranks import ThreadRanks, run_ranks
from toy_engine import ToyEngine, ToyStep, fresh_state, state_of

from arm_core.data import EvalTransform, Synthetic
from arm_core.data.loader import EvalLoader
from arm_core.engine import ranks as ranks_module
from arm_core.engine.protocol import OutOfMemory, StepResult
from arm_core.engine.ranks import ALONE, FailedElsewhere, PeerFailed, StopTogether, agree, lead, together
from arm_core.recipe.recipe import load_recipe, override
from arm_core.training.checkpoint import newest_checkpoint, saved_steps
from arm_core.training.evaluation import evaluate
from arm_core.training.nonfinite import NonFiniteError
from arm_core.training.observer import Observer
from arm_core.training.plan import BatchFailed, Plan
from arm_core.training.records import read_rows
from arm_core.training.run_folder import resume_run, start_run
from arm_core.training.trainer import Trainer

TRAIN = Synthetic(43, (8, 8), classes=4)
HELD_OUT = Synthetic(11, (8, 8), classes=4, seed=1)
RECIPE = override(
    load_recipe("finetune-digits"),
    [
        "model.width=8",
        "model.depth=2",
        "model.patch=4",
        "model.image_size=8",
        "data.labels_per_class=none",
        "mixing.mixup=0.8",
        "optimizer.ema_decay=0.9",
        "training.batch_size=12",
        "training.accumulation=6",
        "training.drop_path=0.3",
        "training.length=8 steps",
        "training.log_every=2",
        "training.save_every=3 steps",
        "training.evaluate_every=4 steps",
        "schedule.base_lr=0.5",
        "schedule.warmup=2 steps",
    ],
)


class SharedToy(ToyEngine):
    """The toy, with gradients added up over the ranks."""

    ranks: ThreadRanks

    def train_step(self, batches, *, step, lr, total_micro_batches=None, stop=None):
        self._poison = step in self.poisoned_steps and self.ranks.rank == 1
        share = dict.fromkeys(("loss", *self.trainable), 0.0)
        for batch in batches:
            loss, gradients = self.loss_and_gradients(batch)
            for name, value in {"loss": loss, **gradients}.items():
                share[name] = share[name] + np.asarray(value, np.float64) / total_micro_batches
        parts = self.ranks.gather({name: np.asarray(v).tolist() for name, v in share.items()})
        total = {name: np.sum([np.asarray(part[name]) for part in parts], 0) for name in share}
        loss, norm = float(total.pop("loss")), float(np.sqrt(sum(np.sum(g**2) for g in total.values())))
        result = StepResult(loss=loss, grad_norm=norm)
        if result.finite:
            self._update({name: g.astype(np.float32) for name, g in total.items()}, norm, step, lr)
        self.steps.append((step, lr))
        return ToyStep(step, result, self.asked)

    def export_state(self):
        state = super().export_state()
        return state if self.ranks.rank == 0 else type(state)(parameters={})


def make_engine(run, ranks, cls=SharedToy, **options):
    engine = cls(run.spec, state_of(run), run.recipe.optimizer, **options)
    engine.ranks = ranks
    return engine


def train(path, ranks, *, source=TRAIN, observer=None, recipe=RECIPE, cls=SharedToy, **options):
    """Start or resume a run at `path`, as one rank."""
    begun = bool(lead(ranks, lambda: saved_steps(path)))
    run = (
        resume_run(path, warn=pytest.fail, ranks=ranks)
        if begun
        else start_run(path, recipe, recipe.spec(4), ranks=ranks)
    )
    with run:
        engine = make_engine(run, ranks, cls, **options)
        trainer = Trainer(run, engine, source, HELD_OUT, observer=observer, ranks=ranks)
        return trainer.train(), engine


def final(path):
    return newest_checkpoint(path, pytest.fail)


def assert_same_state(found, expected):
    for kind in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        for name, value in getattr(expected.state, kind).items():
            np.testing.assert_allclose(
                getattr(found.state, kind)[name], value, rtol=1e-4, atol=1e-6, err_msg=f"{kind}/{name}"
            )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process to which all others are compared."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(1, lambda ranks: train(path, ranks))
    return path


def test_ranks_learn_each_others_values_in_order():
    assert run_ranks(3, lambda ranks: ranks.gather(ranks.rank * 2)) == [[0, 2, 4]] * 3
    assert run_ranks(3, lambda ranks: agree(ranks, [None, "b", "c"][ranks.rank])) == ["b"] * 3


def test_only_rank_0_does_the_work_and_all_ranks_get_the_result():
    done: list[int] = []

    def work(ranks):
        return lead(ranks, lambda: done.append(ranks.rank) or "made")

    assert run_ranks(3, work) == ["made"] * 3
    assert done == [0]


@pytest.mark.parametrize("failing", [0, 2])
def test_an_error_on_one_rank_ends_a_common_block_on_all_ranks(failing):
    def work(ranks):
        with together(ranks):
            if ranks.rank == failing:
                raise OSError("no such thing")

    found = run_ranks(3, work)
    assert [type(error) for error in found] == [
        OSError if failing == 0 else ValueError,
        FailedElsewhere,
        FailedElsewhere,
    ]
    assert str(found[0]) == ("no such thing" if failing == 0 else "process 3 of 3: no such thing")


def test_a_single_process_exchanges_nothing():
    with pytest.raises(KeyError), together(ALONE):
        raise KeyError("own")
    assert lead(ALONE, lambda: {1}) == {1}


def test_all_ranks_stop_at_the_same_call_whichever_rank_received_the_signal(monkeypatch):
    monkeypatch.setattr(ranks_module, "PACE", 0.0)  # exchange at every call

    def work(ranks):
        calls = 0
        stop = StopTogether(ranks, lambda: "SIGTERM" if ranks.rank == 1 and calls >= 5 else None)
        while not stop.asked():
            calls += 1
        return calls, stop.signal

    assert run_ranks(3, work) == [(5, "SIGTERM")] * 3


def test_ranks_exchange_signals_only_from_time_to_time():
    def work(ranks):
        stop = StopTogether(ranks, lambda: None)
        for _ in range(4000):
            stop.asked()
        return ranks.calls

    calls = run_ranks(2, work)
    assert calls[0] == calls[1] < 100


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_micro_batches_of_every_update(world):
    """Even if their number is not divisible by the ranks, and wherever the run is resumed."""
    spec = RECIPE.spec(4)
    alone = Plan(RECIPE, spec, TRAIN)
    for position in (0, 6, 12):
        with alone.open(position, workers=0) as loader:
            expected = [*alone.next_batches(loader, position), *alone.next_batches(loader, position + 6)]
        found = {}
        for rank in range(world):
            plan = Plan(RECIPE, spec, TRAIN, ranks=ThreadRanks(rank, world, None))
            with plan.open(position, workers=0) as loader:
                for start in (position, position + 6):
                    mine = [p for p in range(start, start + 6) if p % world == rank]
                    found |= dict(zip(mine, plan.next_batches(loader, start), strict=True))
        assert sorted(found) == list(range(position, position + 12))
        for offset, batch in enumerate(expected):
            for name in ("images", "targets", "drop_path_scale"):
                mine = np.asarray(getattr(found[position + offset], name))
                assert mine.tobytes() == np.asarray(getattr(batch, name)).tobytes()


def test_more_ranks_than_micro_batches_are_refused_with_what_to_set():
    with pytest.raises(ValueError, match=r"6 micro-batches of 2 images, too few for 8 processes; start a new "
                       r"run with --set training.accumulation=12, or use 6 or fewer"):  # fmt: skip
        Plan(RECIPE, RECIPE.spec(4), TRAIN, ranks=ThreadRanks(0, 8, None))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_like_one_process_and_only_rank_0_writes(tmp_path, whole, world):
    outcomes = run_ranks(world, lambda ranks: train(tmp_path / "run", ranks))
    assert [outcome.finished for outcome, _ in outcomes] == [True] * world
    found, expected = final(tmp_path / "run"), final(whole)
    assert_same_state(found, expected)
    assert found.progress.position == expected.progress.position == 48
    assert found.progress.engine["ranks"] == str(world)
    rows, wanted = (
        [{**row, "images_per_s": 0} for row in read_rows(folder / "metrics.jsonl")]
        for folder in (tmp_path / "run", whole)
    )
    assert len(rows) == len(wanted)
    for row, want in zip(rows, wanted, strict=True):
        assert row == pytest.approx(want, rel=1e-4)
    assert len(read_rows(tmp_path / "run" / "sessions.jsonl")) == 1


def test_a_run_resumes_with_any_number_of_ranks(tmp_path, whole):
    path = tmp_path / "run"
    for world, until in ((2, 3), (3, 5), (1, 8)):

        class Killed(SharedToy):
            last = until

            def train_step(self, batches, **options):
                if options["step"] > self.last:
                    raise KeyboardInterrupt
                return super().train_step(batches, **options)

        found = run_ranks(world, lambda ranks, cls=Killed: train(path, ranks, cls=cls))
        assert all(isinstance(end, KeyboardInterrupt) for end in found) == (until < 8), found
    assert_same_state(final(path), final(whole))
    rows = [row["step"] for row in read_rows(path / "metrics.jsonl")]
    assert rows == [row["step"] for row in read_rows(whole / "metrics.jsonl")]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_evaluation_is_exact_and_the_same_from_any_number_of_ranks(world):
    """11 images in batches of 3: ranks get 2 or 1 or no batch, the last of 2 images."""
    spec = RECIPE.spec(4)
    calls: list[int] = []

    class Counting(ToyEngine):
        def forward(self, images, *, intermediates=False):
            calls.append(len(images))
            return super().forward(images, intermediates=intermediates)

    def work(ranks):
        loader = EvalLoader(
            HELD_OUT, EvalTransform(crop_fraction=1.0), size=(8, 8), batch_size=3,
            rank=ranks.rank, world=ranks.world,
        )  # fmt: skip
        engine = Counting(spec, fresh_state(spec))
        return evaluate(engine, loader, ranks=ranks, rounds=loader.rounds)

    found = run_ranks(world, work)
    (alone,) = run_ranks(1, work)
    assert found == [alone] * world
    assert alone.images == 11
    rounds = -(-4 // world)
    assert len(calls) == world * rounds + 4  # all ranks take part in each round


def test_a_value_that_is_not_finite_stops_all_ranks_and_names_the_tensor(tmp_path):
    found = run_ranks(2, lambda ranks: train(tmp_path, ranks, poisoned_steps=frozenset([4, 5, 6])))
    assert [type(error) for error in found] == [NonFiniteError] * 2
    assert {(error.step, error.tensor) for error in found} == {(4, "patch_embed.weight (gradient)")}
    assert final(tmp_path).progress.step == 3


def test_a_full_disk_ends_all_ranks(tmp_path, monkeypatch):
    from arm_core.training import writer

    def full(run, checkpoint):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "save_checkpoint", full)
    found = run_ranks(3, lambda ranks: train(tmp_path, ranks))
    assert [type(error) for error in found] == [OSError, FailedElsewhere, FailedElsewhere]
    assert "cannot be written" in str(found[0])


@pytest.mark.parametrize("error", [OSError("Stale file handle"), ValueError("7.png: broken")])
def test_a_rank_that_fails_ends_the_others(tmp_path, error):
    class Broken(Synthetic):
        def item(self, index, epoch=0):
            if index == 7:
                raise error
            return super().item(index, epoch)

    found = run_ranks(2, lambda ranks: train(tmp_path, ranks, source=Broken(43, (8, 8), classes=4)))
    kinds = {type(end) for end in found}
    assert kinds == {BatchFailed, PeerFailed}
    (lost,) = (end for end in found if isinstance(end, BatchFailed))
    assert "resume with: arm finetune --resume" in str(lost)
    assert "saved" not in str(lost)
    assert final(tmp_path) is not None


def test_all_ranks_refuse_a_folder_with_the_message_of_rank_0(tmp_path, whole):
    found = run_ranks(2, lambda ranks: start_run(whole, RECIPE, RECIPE.spec(4), ranks=ranks))
    assert isinstance(found[0], ValueError)
    assert isinstance(found[1], FailedElsewhere)
    assert "already contains a run" in str(found[0])
    (tmp_path / "empty").mkdir()
    found = run_ranks(2, lambda ranks: resume_run(tmp_path / "empty", warn=print, ranks=ranks))
    assert [type(error) for error in found] == [ValueError, FailedElsewhere]


def test_out_of_memory_loses_no_step_and_the_message_says_what_fits(tmp_path):
    class Full(SharedToy):
        def train_step(self, batches, **options):
            if options["step"] == 5:
                raise OutOfMemory("GPU", 8 << 30, batches[0].images.shape, fitting=1)
            return super().train_step(batches, **options)

    (error,) = run_ranks(1, lambda ranks: train(tmp_path, ranks, cls=Full))
    assert str(error) == (
        "GPU: out of memory (8 GiB) with 2 images of 8x8 at a time; by the cost model about 1 fit; saved "
        f"step 4, resume with: arm finetune --resume {tmp_path} --recompute, or start a new run with --set "
        "training.accumulation=12"
    )
    assert isinstance(error, ValueError)
    assert final(tmp_path).progress.step == 4
    found = run_ranks(2, lambda ranks: train(tmp_path, ranks, cls=Full))
    assert all("saved" not in str(error) for error in found)
    assert final(tmp_path).progress.step == 4


def test_out_of_memory_with_images_that_should_fit_points_to_other_programs():
    assert "9 fit; is another process using the device?" in str(
        OutOfMemory("GPU", 1, (8, 4, 4, 3), fitting=9)
    )
    assert "choose a smaller batch" in str(OutOfMemory("GPU", 1, (8, 4, 4, 3)))


def test_a_signal_ends_the_run_of_a_single_process(tmp_path):
    """A single process exchanges nothing: the current step is the last."""

    class Interrupting(Observer):
        def stepped(self, step, images):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    outcome, _ = train(tmp_path, ALONE, observer=Interrupting(), cls=AloneToy)
    assert (outcome.signal, outcome.step) == ("SIGTERM", 2)


class AloneToy(SharedToy):
    def train_step(self, batches, **options):
        return ToyEngine.train_step(self, batches, **options)
