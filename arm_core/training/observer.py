"""Reports of a training loop: events to an `Observer`, and an `Outcome` at the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from arm_core.training.plan import Plan
from arm_core.training.run_folder import RunFolder


class Training(Protocol):
    """A training loop as its observers see it."""

    run: RunFolder
    plan: Plan
    step: int
    """Updates done."""


class Observer:
    """Receives the events of a run; override what you need. A method should return quickly."""

    def started(self, trainer: Training) -> None:
        """Called before the first step; `trainer.step` and `trainer.plan.total_steps` are set."""

    def stepped(self, step: int, images: int) -> None:
        """Step number `step`, of `images` images, was passed to the engine."""

    def logged(self, row: Mapping[str, Any]) -> None:
        """A row was written to `metrics.jsonl`: of training (`loss`) or of an evaluation (`eval_loss`)."""

    def evaluating(self, images: int, total: int) -> None:
        """An evaluation has processed `images` of `total` images."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is being written; it is on the disk before the next one, and when training ends."""

    def warned(self, sentence: str) -> None:
        """A sentence for the user."""


class Observers(Observer):
    """Passes each event to several observers, in order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def started(self, trainer: Training) -> None:
        for one in self._observers:
            one.started(trainer)

    def stepped(self, step: int, images: int) -> None:
        for one in self._observers:
            one.stepped(step, images)

    def logged(self, row: Mapping[str, Any]) -> None:
        for one in self._observers:
            one.logged(row)

    def evaluating(self, images: int, total: int) -> None:
        for one in self._observers:
            one.evaluating(images, total)

    def saved(self, checkpoint: Path) -> None:
        for one in self._observers:
            one.saved(checkpoint)

    def warned(self, sentence: str) -> None:
        for one in self._observers:
            one.warned(sentence)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of a call of `Trainer.train`."""

    step: int
    """Updates done in the whole run."""
    total_steps: int
    checkpoint: Path
    signal: str | None
    """Name of the signal that interrupted the run, such as `SIGINT`; None at its end."""
    message: str
    """One sentence for the user: where the model is, or how to resume."""
    best: dict[str, Any] | None
    """The evaluation row with the highest score, None without evaluations."""

    @property
    def finished(self) -> bool:
        return self.signal is None
