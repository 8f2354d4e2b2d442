"""Writes checkpoints while training continues.

A checkpoint holds copies of the training state, so what is written does not change. One is written at a time:
the next one, the end of training, and anything that removes checkpoints wait for it. A process that is killed
meanwhile leaves the checkpoint before, since a folder gets its name when it is complete.
"""

from __future__ import annotations

import threading
from typing import Any

from arm_core.training.checkpoint import (
    FOLDER,
    Checkpoint,
    prune,
    save_checkpoint,
    saved_steps,
    step_name,
)
from arm_core.training.plan import Plan
from arm_core.training.run_folder import RunFolder


class CheckpointWriter:
    """Writes the checkpoints of `run` on a thread, and removes old ones according to its recipe.

    An error of the write is raised by the next `check`, `start` or `wait`, as an OSError with advice.
    """

    def __init__(self, run: RunFolder, plan: Plan) -> None:
        self._run, self._plan = run, plan
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._newest = run.resumed.progress.step if run.resumed else 0
        """Step of the checkpoint that this session resumed from or has written last; it is never removed."""

    def start(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, after the one before."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that has failed; does not wait."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Wait for the end of the write; raises nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Wait until the checkpoint is on the disk, or raise the error of the write."""
        self.join()
        self.check()

    def prune(self) -> None:
        """Remove checkpoints that are no longer kept, once nothing is being written."""
        self.wait()
        self._prune()

    def best(self) -> dict[str, Any] | None:
        """The evaluation with the highest score so far."""
        rows = [row for row in self._run.metrics() if "score" in row]
        return max(rows, key=lambda row: row["score"], default=None)

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            save_checkpoint(self._run.path, checkpoint)
            self._newest = checkpoint.progress.step
            self._prune()
        except OSError as error:
            self._error = self._explained(error, checkpoint.progress.step)
        except BaseException as error:  # raised again on the thread that trains
            self._error = error

    def _explained(self, error: OSError, step: int) -> OSError:
        if not self._run.path.is_dir():
            explained = OSError(f"{self._run.path}: the folder of the run was deleted during training")
        else:
            target = self._run.path / FOLDER / step_name(step)
            explained = OSError(
                f"{target}: cannot be written ({error.strerror or error}); earlier checkpoints are intact. "
                f"Free some space, then resume with: {self._run.resume_command}"
            )
        explained.__cause__ = error
        return explained

    def _prune(self) -> None:
        best = self.best()
        kept = [step for step in saved_steps(self._run.path) if self._plan.kept(step)]
        also = [self._newest, *kept, *([best["step"]] if best else [])]
        prune(self._run.path, keep=self._run.recipe.training.keep, also=also)
