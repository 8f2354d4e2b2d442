"""`--log`: the rows of `metrics.jsonl`, under the same names, in TensorBoard, Weights & Biases or Trackio."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from arm_core.training.observer import Observer, Training
    from arm_core.training.run_folder import RunFolder

NAMES = ("tensorboard", "wandb", "trackio")
"""Values of --log; each is also the name of a package and of an extra."""
PROJECT = "arm-vision"
"""Project of Weights & Biases and Trackio, unless their environment variables name another."""
FLUSH = 10
"""Seconds after which TensorBoard's rows are on the disk."""


class Tracker(Protocol):
    """A program that shows the curves of runs."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, by the writer of the package tensorboard; torch is not needed."""

    def __init__(self, run: RunFolder, step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2.Summary
        self._writer = EventFileWriter(str(run.path / "tensorboard"), flush_secs=FLUSH)
        # TensorBoard then drops rows after this step, which an interrupted session has written.
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step + 1, session_log=begin)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        entries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, summary=self._summary(value=entries))

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))

    def close(self, failed: bool) -> None:
        self._writer.close()


class Service:
    """Weights & Biases, or Trackio, which has the same functions. A resumed run continues its record."""

    def __init__(self, run: RunFolder, step: int, *, name: str) -> None:
        from arm_cli.recipe import flat, shown

        self._module = importlib.import_module(name)
        settings: dict[str, Any] = {
            "project": PROJECT,
            "name": run.path.resolve().name,
            "config": {key: shown(value) for key, value in flat(run.recipe).items()},
            "resume": "allow",
        }
        if name == "wandb":
            settings |= {"id": identity(run), "dir": str(run.path)}
        else:
            settings["name"] += f"-{identity(run)}"  # Trackio identifies runs by name
        self._has_exit_code = name == "wandb"
        self._module.init(**settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._module.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        if self._has_exit_code:
            self._module.finish(exit_code=int(failed))
        else:
            self._module.finish()


def check(names: Sequence[str]) -> None:
    """Raise ValueError if a package is not installed, before anything is written."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(f"--log {name}: needs the package {name}; pip install 'arm-vision[{name}]'")


def identity(run: RunFolder) -> str:
    """A name that the sessions of a run share: a hash of its folder and its first start."""
    from arm_core.training.records import ignore, read_rows
    from arm_core.training.run_folder import SESSIONS

    first = next(iter(read_rows(run.path / SESSIONS, ignore)), {})
    text = f"{run.path.resolve()} {first.get('started')}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def tracking(names: Sequence[str], warn: Callable[[str], None], stack: ExitStack) -> list[Observer]:
    """An observer for each name. They end with the stack, which knows whether the run failed.

    A tracker that fails while the run trains is reported once and dropped; metrics.jsonl has every row.
    """
    from arm_core.training.observer import Observer

    class Tracking(Observer):
        def __init__(self, name: str) -> None:
            self.name = name
            self.tracker: Tracker | None = None

        def started(self, trainer: Training) -> None:
            try:
                self.tracker = opened(self.name, trainer.run, trainer.step)
            except Exception as error:
                raise ValueError(f"--log {self.name}: {error}") from error

        def logged(self, row: Mapping[str, Any]) -> None:
            if self.tracker is None:
                return
            numbers = {k: float(v) for k, v in row.items() if k != "step" and isinstance(v, int | float)}
            try:
                self.tracker.log(row["step"], numbers)
            except Exception as error:  # of a server or a disk: not a reason to stop training
                self.tracker = None
                warn(f"--log {self.name}: {error}; no more rows are sent, metrics.jsonl has all of them")

        def close(self, kind: object, error: object, trace: object) -> None:
            if self.tracker is not None:
                self.tracker.close(failed=kind is not None)

    found = [Tracking(name) for name in dict.fromkeys(names)]
    for one in found:
        stack.push(one.close)
    return list(found)


def opened(name: str, run: RunFolder, step: int) -> Tracker:
    """The tracker of a run that is at `step`."""
    return TensorBoard(run, step) if name == "tensorboard" else Service(run, step, name=name)
