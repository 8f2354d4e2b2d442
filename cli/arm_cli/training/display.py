"""The display of a run while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arm_core.training.observer import Observer


def display(stack: ExitStack) -> Observer:
    """Shows a run on stderr until the stack is closed."""
    from arm_cli.progress import ProgressBar
    from arm_cli.show import echo
    from arm_core.training.observer import Observer, Training

    class Display(Observer):
        bar: ProgressBar
        note = ""

        def started(self, trainer: Training) -> None:
            stage, total = str(trainer.run.recipe.stage), trainer.plan.total_steps
            self.bar = stack.enter_context(ProgressBar(stage, total, "steps", start=trainer.step))

        def stepped(self, step: int, images: int) -> None:
            self.bar.advance(1, self.note)

        def logged(self, row: Mapping[str, Any]) -> None:
            if "eval_loss" in row:
                self.bar.say(evaluation_line(row))
            else:
                self.note = (
                    f"epoch {row['epoch']:.2f}, loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
                    f"{row['images_per_s']:.3g} images/s"
                )

        def evaluating(self, images: int, total: int) -> None:
            self.bar.advance(0, f"evaluated {images}/{total} images")

        def warned(self, sentence: str) -> None:
            if hasattr(self, "bar"):
                self.bar.say(sentence)
            else:  # before the first step
                echo(f"Warning: {sentence}", err=True)

    return Display()


def evaluation_line(row: Mapping[str, Any]) -> str:
    """A readable form of an evaluation row of `metrics.jsonl`."""
    parts = []
    for prefix, label in (("eval", ""), ("ema", "averaged weights: ")):
        if f"{prefix}_loss" in row:
            top = "".join(
                f"{name} {100 * row[key]:.2f} %, "
                for name, key in (("top-1", f"{prefix}_top1"), ("top-5", f"{prefix}_top5"))
                if key in row
            )
            parts.append(f"{label}{top}loss {row[f'{prefix}_loss']:.4f}")
    return f"step {row['step']}, epoch {row['epoch']:.2f}: {'; '.join(parts)}"
