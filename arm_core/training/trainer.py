"""The training loop: drives any engine through a recipe, and leaves a run that can be resumed anywhere.

What happens at step s follows from the recipe and s alone (data, drop path, learning rate), so a run
that was killed, or moved to another engine, goes on as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from arm_core.data.loader import EvalLoader
from arm_core.data.sources import ImageSource
from arm_core.engine.protocol import Batch, Engine, OutOfMemory, PendingStep
from arm_core.engine.ranks import ALONE, Ranks, StopTogether, lead, together
from arm_core.recipe.recipe import fingerprint
from arm_core.training.checkpoint import (
    FOLDER,
    Checkpoint,
    Progress,
    prune,
    save_checkpoint,
    saved_steps,
    step_name,
)
from arm_core.training.evaluation import Evaluation, evaluate, with_ema_weights
from arm_core.training.nonfinite import NonFiniteError, first_bad_state, first_non_finite
from arm_core.training.plan import Plan, WorkersFailed
from arm_core.training.run_folder import RunFolder
from arm_core.training.signals import StopOnSignal


class Observer:
    """Told how a run goes; override what you need. Every method returns at once, nothing waits for it."""

    def started(self, trainer: Trainer) -> None:
        """Before the first step: `trainer.step` and `trainer.plan.total_steps` are known."""

    def stepped(self, step: int, images: int) -> None:
        """Step number `step` was handed to the engine, with so many images."""

    def logged(self, row: Mapping[str, Any]) -> None:
        """A row went to `metrics.jsonl`: of training (`loss`) or of an evaluation (`eval_loss`)."""

    def evaluating(self, images: int, total: int) -> None:
        """An evaluation has seen so many images of all."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is on disk."""

    def warned(self, sentence: str) -> None:
        """Something that a user should read."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `Trainer.train` ended."""

    step: int
    """Updates done in the whole run."""
    total_steps: int
    checkpoint: Path
    signal: str | None
    """Name of the signal that interrupted the run, such as `SIGINT`; None at its end."""
    message: str
    """One sentence for the user: where the model is, or how to go on."""
    best: dict[str, Any] | None
    """The evaluation row with the highest score, None without evaluations."""

    @property
    def finished(self) -> bool:
        return self.signal is None


class Trainer:
    """Trains `engine` as the recipe of `run` says, from where the run stands.

    run: from `start_run` or `resume_run`.  engine: created with the state to train from, which for a
    resumed run is `run.resumed.state`.
    train_source: images, and labels for a classifier.  eval_source: evaluated as the recipe says; None for
    no evaluation.  session: what is to be recorded about this session, such as backend and version.
    ranks: the job of which this process is a part, as the engine and the run know it; all ranks train.

    Raises ValueError where data, recipe and ranks do not fit together.
    """

    def __init__(
        self,
        run: RunFolder,
        engine: Engine,
        train_source: ImageSource,
        eval_source: ImageSource | None = None,
        *,
        observer: Observer | None = None,
        session: Mapping[str, str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if engine.spec != run.spec:
            raise ValueError(f"{run.path}: the engine was made for another model than the run's")
        self.run, self.engine, self.observer = run, engine, observer or Observer()
        self._recipe, self._training = run.recipe, run.recipe.training
        self._session = {**(session or {}), "device": engine.device, "scan": engine.scan}
        self._ranks = ranks
        self.plan = Plan(run.recipe, run.spec, train_source, ranks=ranks)
        self._eval_loader = None if eval_source is None else self.plan.eval_loader(eval_source)

        progress = run.resumed.progress if run.resumed else None
        self.step = progress.step if progress else 0
        """Updates done."""
        self._position = progress.position if progress else 0
        self._losses = list(progress.losses) if progress else []
        self._grad_norms = list(progress.grad_norms) if progress else []
        self._pending: list[tuple[int, PendingStep]] = []
        self._saved_step = progress.step if progress else -1
        self._clock, self._clock_images = time.monotonic(), 0

    def train(self) -> Outcome:
        """Run until the end, or until SIGINT or SIGTERM: then the step is finished and the state saved.

        Raises NonFiniteError where a loss or gradient is no number, WorkersFailed where data workers were
        killed, PeerFailed where another process of the job ended, ValueError for broken data and for a batch
        that the device has no room for, and OSError where the disk fails; a sound checkpoint to go on from
        is there in each case.
        """
        lost: WorkersFailed | OutOfMemory | None = None
        with StopOnSignal(self.observer.warned) as noted:
            stop = StopTogether(self._ranks, lambda: noted.signal)
            self._begin()
            with self.plan.open(self._position, workers=self._recipe.data.workers) as loader:
                try:
                    self._take_steps(loader, stop)
                except (WorkersFailed, OutOfMemory) as error:
                    if self._ranks.world > 1:  # the others are in the middle of a step
                        raise self._interrupted(error) from error
                    lost = error
                    stop.asked()
            complete = self.step >= self.plan.total_steps and not self._owes_evaluation()
            checkpoint = self._save()
        if lost and not stop.signal:  # a signal to the whole process group ends the workers, too
            raise self._interrupted(lost, saved=f"saved step {self.step}, ") from lost
        return self._outcome(checkpoint, None if complete else stop.signal)

    def _take_steps(self, loader: Iterator[Batch], stop: StopTogether) -> None:
        self._reset_clock()
        if self.step and not stop.asked():
            self._evaluate_if_due()  # an interrupted run owes the evaluation of its last step
        while self.step < self.plan.total_steps and not stop.asked():
            self._take_step(loader)
            if self.step % self._training.log_every == 0 or self.step == self.plan.total_steps:
                self._log()
            if stop.asked():
                break
            best = self._evaluate_if_due()
            if best or self.plan.due(self._training.save_every, self.step):
                self._save()

    def _begin(self) -> None:
        """Bring engine and files to the step where training goes on."""
        session = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": self.step,
            "recipe": fingerprint(self._recipe),
            "overrides": list(self.run.overrides),
            **self._engine_record(),
        }
        with together(self._ranks):
            if self.run.resumed is not None:
                self.run.truncate_metrics(self.step)
            self.run.record_session(session)
        self.observer.started(self)
        if self._saved_step < 0:
            self._save()  # a run that dies early can then be resumed, wherever its first weights came from

    def _take_step(self, loader: Iterator[Batch]) -> None:
        batches, total = self.plan.next_batches(loader, self._position), self._training.accumulation
        step = self.step + 1
        lr = self.plan.lr(step)
        pending = self.engine.train_step(batches, step=step, lr=lr, total_micro_batches=total)
        self._pending.append((step, pending))
        self.step, self._position = step, self._position + total
        self._clock_images += self._training.batch_size
        self.observer.stepped(step, self._training.batch_size)

    def _collect(self) -> None:
        """Wait for the steps under way and keep their results."""
        for step, pending in self._pending:
            result = pending.result()
            if not result.finite:
                what = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
                raise self._non_finite(step, what, self._find_non_finite(step))
            self._losses.append(result.loss)
            self._grad_norms.append(result.grad_norm)
        self._pending.clear()

    def _log(self) -> None:
        """One row: means since the row before."""
        self._collect()
        seconds = max(time.monotonic() - self._clock, 1e-9)
        row = {
            "step": self.step,
            "epoch": self.plan.epoch(self.step),
            "lr": self.plan.lr(self.step),
            "loss": sum(self._losses) / len(self._losses),
            "grad_norm": sum(self._grad_norms) / len(self._grad_norms),
            "images_per_s": self._clock_images / seconds,
        }
        self._losses.clear()
        self._grad_norms.clear()
        self.run.append_metrics(row)
        self.observer.logged(row)
        self._reset_clock()

    def _owes_evaluation(self) -> bool:
        if self._eval_loader is None or self.step == 0:
            return False
        every = self._training.evaluate_every
        due = self.step == self.plan.total_steps or (every is not None and self.plan.due(every, self.step))
        return due and not lead(self._ranks, self._evaluated)

    def _evaluated(self) -> bool:
        return any("eval_loss" in row and row["step"] == self.step for row in self.run.metrics())

    def _evaluate_if_due(self) -> bool:
        """Evaluate where the recipe says so; True for a new best."""
        if self._eval_loader is None or not self._owes_evaluation():
            return False
        self._collect()
        best = lead(self._ranks, self._best)
        row: dict[str, Any] = {"step": self.step, "epoch": self.plan.epoch(self.step)}
        found = self._evaluate(self._eval_loader)
        score = found.score
        row |= _named("eval", found)
        if self._recipe.optimizer.ema_decay is not None:
            with with_ema_weights(self.engine):
                averaged = self._evaluate(self._eval_loader)
            row |= _named("ema", averaged)
            score = max(score, averaged.score)
        row["score"] = score
        self.run.append_metrics(row)
        self.observer.logged(row)
        self._reset_clock()
        return best is None or score > best["score"]

    def _evaluate(self, loader: EvalLoader) -> Evaluation:
        done, total = 0, len(loader.batches.source)

        def seen(images: int) -> None:
            nonlocal done
            done = min(done + images * self._ranks.world, total)
            self.observer.evaluating(done, total)

        batches = self.plan.eval_batches(loader)
        return evaluate(self.engine, batches, seen=seen, ranks=self._ranks, rounds=loader.rounds)

    def _best(self) -> dict[str, Any] | None:
        rows = [row for row in self.run.metrics() if "score" in row]
        return max(rows, key=lambda row: row["score"], default=None)

    def _save(self) -> Path:
        """Save the present step, unless that is done, and remove what is not to be kept."""
        target = self.run.path / FOLDER / step_name(self.step)
        if self._saved_step == self.step:
            return target
        self._collect()
        progress = Progress(
            step=self.step,
            position=self._position,
            recipe=fingerprint(self._recipe),
            engine=self._engine_record(),
            losses=tuple(self._losses),
            grad_norms=tuple(self._grad_norms),
        )
        checkpoint = Checkpoint(
            spec=self.run.spec,
            progress=progress,
            state=self.engine.export_state(),
            metadata=self.plan.model_metadata(),
        )
        lead(self._ranks, lambda: self._write(checkpoint, target))
        self._saved_step = self.step
        self.observer.saved(target)
        self._reset_clock()
        return target

    def _write(self, checkpoint: Checkpoint, target: Path) -> None:
        if bad := first_bad_state(checkpoint.state):
            raise self._non_finite(self.step, "the state is not finite", bad)
        try:
            save_checkpoint(self.run.path, checkpoint)
        except OSError as error:
            raise OSError(
                f"{target}: cannot be written ({error.strerror or error}); the checkpoints before it are "
                f"sound. Make room, then go on with: {self.run.resume_command}"
            ) from error
        best = self._best()
        prune(self.run.path, keep=self._training.keep, also=[best["step"]] if best else [])

    def _reset_clock(self) -> None:
        self._clock, self._clock_images = time.monotonic(), 0

    def _engine_record(self) -> dict[str, str]:
        several = {"ranks": str(self._ranks.world)} if self._ranks.world > 1 else {}
        return {**self._session, **several, "precision": str(self._training.precision)}

    def _find_non_finite(self, step: int) -> str | None:
        """Make the batches of a failed step again and look where they go wrong."""
        start = self._position - (self.step - step + 1) * self._training.accumulation
        with self.plan.open(start, workers=0) as loader:
            return first_non_finite(self.engine, self.plan.next_batches(loader, start), self._ranks)

    def _non_finite(self, step: int, what: str, tensor: str | None) -> NonFiniteError:
        last = self.run.path / FOLDER / step_name(saved_steps(self.run.path)[-1])
        return NonFiniteError(step, what, tensor, last, self.run.resume_command)

    def _interrupted(self, error: WorkersFailed | OutOfMemory, *, saved: str = "") -> Exception:
        """The error with what a user can do about it."""
        if isinstance(error, WorkersFailed):
            return WorkersFailed(f"{error}; {saved}go on with: {self.run.resume_command}")
        batch, fitting = self._training.batch_size, error.fitting or 0
        smaller = [n for n in range(self._training.accumulation + 1, batch + 1) if batch % n == 0]
        enough = next((n for n in smaller if batch // n <= fitting), smaller[-1] if smaller else None)
        again = f", or start a new run with --set training.accumulation={enough}" if enough else ""
        return ValueError(f"{error}; {saved}go on with: {self.run.resume_command} --recompute{again}")

    def _outcome(self, checkpoint: Path, signal: str | None) -> Outcome:
        if signal:
            message = f"stopped by {signal} after step {self.step} of {self.plan.total_steps}; go on with: "
            message += self.run.resume_command
        else:
            message = f"finished after {self.step} steps; the model is in {checkpoint}"
        return Outcome(
            step=self.step,
            total_steps=self.plan.total_steps,
            checkpoint=checkpoint,
            signal=signal,
            message=message,
            best=self._best(),
        )


def _named(prefix: str, found: Evaluation) -> dict[str, Any]:
    """`eval_loss`, `eval_top1`, ...; what a pretraining model lacks is left out."""
    return {f"{prefix}_{name}": value for name, value in asdict(found).items() if value is not None}
