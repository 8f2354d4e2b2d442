"""The steps of saves and evaluations, and the images of each step."""

from fractions import Fraction

import pytest
from test_trainer import SMALL

from arm_core.data import Synthetic
from arm_core.recipe.recipe import load_recipe, override
from arm_core.recipe.toml import Span
from arm_core.training.plan import Plan


def plan(micro_batches: int, **changes: str) -> Plan:
    """A plan with this number of micro-batches of 4 images per epoch, two per update."""
    recipe = override(
        load_recipe("finetune-digits"), [*SMALL, *(f"training.{k}={v}" for k, v in changes.items())]
    )
    return Plan(recipe, recipe.spec(4), Synthetic(4 * micro_batches, (8, 8), classes=4))


@pytest.mark.parametrize(
    ("micro_batches", "every", "due"),
    [
        (5, "1 epoch", [3, 5, 8, 10]),  # 5 steps in 2 epochs: epochs end at 2.5, 5, 7.5, 10
        (5, "2 epochs", [5, 10]),
        (5, "0.5 epochs", [2, 3, 4, 5, 7, 8, 9, 10]),  # at 1.25, 2.5, 3.75, 5, ...
        (5, "4 steps", [4, 8]),
        (3, "1 epoch", [2, 3, 5, 6, 8, 9]),  # at 1.5, 3, 4.5, 6, 7.5, 9
        (1, "1 epoch", list(range(1, 11))),  # several epochs in a step are due once
        (4, "1 epoch", [2, 4, 6, 8, 10]),
        (5, "0.3333 epochs", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_due_steps_with_fractional_steps_per_epoch(micro_batches, every, due):
    found = plan(micro_batches)
    assert found.steps_per_epoch == Fraction(micro_batches, 2)
    assert [step for step in range(1, 11) if found.due(Span.parse(every), step)] == due


def test_an_update_can_span_two_epochs():
    found = plan(5, length="2 epochs")
    assert found.total_steps == 5
    assert [found.epoch(step) for step in range(1, 6)] == [0.4, 0.8, 1.2, 1.6, 2.0]
    names = [found.image_names(2 * step) for step in range(5)]
    assert len({*names[0], *names[1], *names[2][:4]}) == 20, "the first epoch: every image once"
    assert len({*names[2][4:], *names[3], *names[4]}) == 20, "the second one"
