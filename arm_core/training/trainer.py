"""The training loop: runs a recipe on any engine, and writes a run that can be resumed anywhere.

Everything at step s (data, drop path, learning rate) depends only on the recipe and s, so a run that was
killed, or moved to another engine, continues as if it had not been interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from arm_core.data.decode import BadImage
from arm_core.data.loader import EvalLoader
from arm_core.data.sources import ImageSource
from arm_core.engine.protocol import Batch, Engine, OutOfMemory, PendingStep, StepStopped
from arm_core.engine.ranks import ALONE, Ranks, StopTogether, confirm, lead, together
from arm_core.recipe.recipe import fingerprint
from arm_core.training.checkpoint import (
    FOLDER,
    Checkpoint,
    Progress,
    saved_steps,
    step_name,
)
from arm_core.training.data_record import DataRecord
from arm_core.training.evaluation import Evaluation, EvaluationStopped, evaluate, with_ema_weights
from arm_core.training.nonfinite import NonFiniteError, first_bad_state, first_non_finite
from arm_core.training.observer import Observer, Outcome
from arm_core.training.plan import BatchFailed, Plan
from arm_core.training.records import environment
from arm_core.training.run_folder import RunFolder
from arm_core.training.signals import StopOnSignal
from arm_core.training.writer import CheckpointWriter


class Trainer:
    """Trains `engine` with the recipe of `run`, from the run's current step. It does not modify `run`.

    run: from `start_run` or `resume_run`.  engine: created with the state to train from, which for a
    resumed run is `run.resumed.state`.
    train_source: images, with labels for a classifier.  eval_source: None for no evaluation.
    session: recorded about this session, for example backend and version.
    ranks: the job of this process, the same as of the engine and the run; all ranks train.
    accept_changed_data: record images that differ from those at the start, without a warning.

    Raises ValueError if data, recipe and ranks do not match.
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
        accept_changed_data: bool = False,
    ) -> None:
        if engine.spec != run.spec:
            raise ValueError(f"{run.path}: the engine was created for another model than that of the run")
        self.run, self.engine, self.observer = run, engine, observer or Observer()
        self._recipe, self._training = run.recipe, run.recipe.training
        self._session = {**(session or {}), "device": engine.device, "scan": engine.scan}
        self._ranks = ranks
        sources = {"train": train_source, "eval": eval_source}
        self._data = DataRecord(run, sources, accept=accept_changed_data, warn=self.observer.warned)
        self.plan = Plan(run.recipe, run.spec, train_source, ranks=ranks, known_bad=self._data.bad_images)
        self._eval_loader = None if eval_source is None else self.plan.eval_loader(eval_source)
        self._writer = CheckpointWriter(run, self.plan)

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
        """Train to the end, or until SIGINT, SIGTERM or SIGHUP: then save the last complete step.

        A process that trains alone drops the step that it is in; several processes finish it.
        Raises NonFiniteError if a loss or gradient is not finite, BatchFailed if a batch cannot be made,
        PeerFailed if another process of the job ended, ValueError for corrupt data and for a batch that
        exceeds the device's memory, and OSError if the disk fails. The run keeps an intact checkpoint in
        each case.
        """
        lost: BatchFailed | OutOfMemory | None = None
        with ExitStack() as stack:
            stack.callback(self._writer.join)  # in any case: the run is locked until everything is written
            noted = stack.enter_context(StopOnSignal(self.observer.warned))
            stop = StopTogether(self._ranks, lambda: noted.signal)
            self._begin()
            with self.plan.open(self._position, workers=self._recipe.data.workers) as loader:
                try:
                    self._take_steps(loader, stop)
                except (BatchFailed, OutOfMemory) as error:
                    if self._ranks.world > 1:  # the others are in the middle of a step
                        raise self._interrupted(error) from error
                    lost = error
                    stop.asked()
            complete = self.step >= self.plan.total_steps and not self._owes_evaluation()
            checkpoint = self._save()
            lead(self._ranks, self._writer.wait)
        if lost:
            raise self._interrupted(lost, saved=f"saved step {self.step}, ") from lost
        return self._outcome(checkpoint, None if complete else stop.signal)

    def _take_steps(self, loader: Iterator[Batch], stop: StopTogether) -> None:
        self._reset_clock()
        if self.step and not stop.asked():
            self._evaluate_if_due(stop)  # the run may have been interrupted before the evaluation
        while self.step < self.plan.total_steps and not stop.asked():
            try:
                self._take_step(loader, stop)
            except StepStopped:
                break
            if self._ranks.world == 1:
                self._writer.check()
            if self.step % self._training.log_every == 0 or self.step == self.plan.total_steps:
                self._log()
            if stop.asked():
                break
            if self.plan.save_due(self.step):
                self._save()
            self._evaluate_if_due(stop)

    def _begin(self) -> None:
        """Prepare the files for the first step of this session."""
        session = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": self.step,
            "total_steps": self.plan.total_steps,
            "recipe": fingerprint(self._recipe),
            "overrides": list(self.run.overrides),
            **environment(),
            **self._engine_record(),
        }
        with together(self._ranks):
            if self.run.resumed is not None:
                self.run.truncate_metrics(self.step)
            self.run.record_session(session)
            self._data.write()
        self.observer.started(self)
        if self._saved_step < 0:
            self._save()  # with the initial weights, so that a run that is killed early can be resumed

    def _take_step(self, loader: Iterator[Batch], stop: StopTogether) -> None:
        # A job of several processes finishes its step: they ask one another between steps only.
        asked = stop.asked if self._ranks.world == 1 else None
        batches, total = self.plan.next_batches(loader, self._position, asked), self._training.accumulation
        step = self.step + 1
        lr = self.plan.lr(step)
        pending = self.engine.train_step(batches, step=step, lr=lr, total_micro_batches=total, stop=asked)
        self._pending.append((step, pending))
        self.step, self._position = step, self._position + total
        self._clock_images += self._training.batch_size
        self.observer.stepped(step, self._training.batch_size)

    def _collect(self) -> None:
        """Wait for the pending steps and collect their results."""
        for step, pending in self._pending:
            result = pending.result()
            if not result.finite:
                what = f"loss {result.loss:g}, gradient norm {result.grad_norm:g}"
                raise self._non_finite(step, what, self._find_non_finite(step))
            self._losses.append(result.loss)
            self._grad_norms.append(result.grad_norm)
        self._pending.clear()

    def _log(self) -> None:
        """Write a row with the means since the previous row."""
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
        self._data.note(self.plan.bad_images, self._ranks)
        self._reset_clock()

    def _owes_evaluation(self) -> bool:
        if self._eval_loader is None or self.step == 0:
            return False
        every = self._training.evaluate_every
        due = self.step == self.plan.total_steps or (every is not None and self.plan.due(every, self.step))
        return due and not lead(self._ranks, self._evaluated)

    def _evaluated(self) -> bool:
        return any("eval_loss" in row and row["step"] == self.step for row in self.run.metrics())

    def _evaluate_if_due(self, stop: StopTogether) -> None:
        """Save, then evaluate, if an evaluation is due. A signal ends it; resuming repeats it."""
        if self._eval_loader is None or not self._owes_evaluation():
            return
        self._save()
        row: dict[str, Any] = {"step": self.step, "epoch": self.plan.epoch(self.step)}
        try:
            found = self._evaluate(self._eval_loader, stop)
            score = found.score
            row |= _named("eval", found)
            if self._recipe.optimizer.ema_decay is not None:
                with with_ema_weights(self.engine):
                    averaged = self._evaluate(self._eval_loader, stop)
                row |= _named("ema", averaged)
                score = max(score, averaged.score)
        except EvaluationStopped:
            return
        row["score"] = score
        self._data.note(self.plan.bad_images, self._ranks)
        self.run.append_metrics(row)
        lead(self._ranks, self._writer.prune)  # the best checkpoint may have changed
        self.observer.logged(row)
        self._reset_clock()

    def _evaluate(self, loader: EvalLoader, stop: StopTogether) -> Evaluation:
        done, total = 0, len(loader.batches.source)

        def seen(images: int) -> None:
            nonlocal done
            done = min(done + images * self._ranks.world, total)
            self.observer.evaluating(done, total)

        batches = self.plan.eval_batches(loader)
        return evaluate(
            self.engine, batches, seen=seen, stop=stop.asked, ranks=self._ranks, rounds=loader.rounds
        )

    def _save(self) -> Path:
        """Begin to save the current step, unless it is already saved; old checkpoints are removed then."""
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
        confirm(self._ranks, self.step)
        lead(self._ranks, lambda: self._start_writing(checkpoint))
        self._saved_step = self.step
        self.observer.saved(target)
        self._reset_clock()
        return target

    def _start_writing(self, checkpoint: Checkpoint) -> None:
        if bad := first_bad_state(checkpoint.state):
            raise self._non_finite(self.step, "the state is not finite", bad)
        self._writer.start(checkpoint)

    def _reset_clock(self) -> None:
        self._clock, self._clock_images = time.monotonic(), 0

    def _engine_record(self) -> dict[str, str]:
        several = {"ranks": str(self._ranks.world)} if self._ranks.world > 1 else {}
        return {**self._session, **several, "precision": str(self._training.precision)}

    def _find_non_finite(self, step: int) -> str | None:
        """Prepare the batches of a failed step again and find the first tensor that is not finite."""
        start = self._position - (self.step - step + 1) * self._training.accumulation
        with self.plan.open(start, workers=0) as loader:
            return first_non_finite(self.engine, self.plan.next_batches(loader, start), self._ranks)

    def _non_finite(self, step: int, what: str, cause: str | None) -> NonFiniteError:
        start = self._position - (self.step - step + 1) * self._training.accumulation
        names = self.plan.image_names(start)
        self._writer.join()
        steps = saved_steps(self.run.path)
        last = self.run.path / FOLDER / step_name(steps[-1]) if steps else None
        return NonFiniteError(step, what, cause, names, last, self.run.resume_command)

    def _interrupted(self, error: BatchFailed | OutOfMemory, *, saved: str = "") -> Exception:
        """The error, with advice for the user."""
        if isinstance(error, BatchFailed):
            image = isinstance(error.__cause__, BadImage) and self.plan.bad_images is None
            skip = " --on-bad-image skip" if image else ""
            return BatchFailed(f"{error}; {saved}resume with: {self.run.resume_command}{skip}")
        batch, fitting = self._training.batch_size, error.fitting or 0
        smaller = [n for n in range(self._training.accumulation + 1, batch + 1) if batch % n == 0]
        enough = next((n for n in smaller if batch // n <= fitting), smaller[-1] if smaller else None)
        again = f", or start a new run with --set training.accumulation={enough}" if enough else ""
        return ValueError(f"{error}; {saved}resume with: {self.run.resume_command} --recompute{again}")

    def _outcome(self, checkpoint: Path, signal: str | None) -> Outcome:
        if signal:
            message = f"stopped by {signal} after step {self.step} of {self.plan.total_steps}; resume with: "
            message += self.run.resume_command
        else:
            message = f"finished after {self.step} steps; the model is in {checkpoint}"
        return Outcome(
            step=self.step,
            total_steps=self.plan.total_steps,
            checkpoint=checkpoint,
            signal=signal,
            message=message,
            best=self._writer.best(),
        )


def _named(prefix: str, found: Evaluation) -> dict[str, Any]:
    """`eval_loss`, `eval_top1`, ...; without the values that a pretraining model does not have."""
    return {f"{prefix}_{name}": value for name, value in asdict(found).items() if value is not None}
