"""An interrupted evaluation continues where it was, with the same result to the last bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from thread_ranks import run_ranks
from toy_engine import ToyEngine, fresh_state

from arm_core.data import EvalLoader, EvalTransform, Synthetic
from arm_core.engine.ranks import ALONE
from arm_core.recipe.recipe import load_recipe, override
from arm_core.training import evaluation_state
from arm_core.training.evaluation import evaluate
from arm_core.training.evaluation_state import EvaluationState, model_key
from arm_core.training.predictions import Collector

SOURCE = Synthetic(23, (12, 12), classes=4, seed=5)
SPEC = override(load_recipe("finetune-digits"), ["model.image_size=[8, 8]"]).spec(4)


class Interrupted(ToyEngine):
    """Raises KeyboardInterrupt instead of computing the batch `at`."""

    at = -1
    calls = 0

    def forward(self, images, *, intermediates=False):
        if self.calls == self.at:
            raise KeyboardInterrupt
        self.calls += 1
        return super().forward(images, intermediates=intermediates)


def measure(folder, *, at=-1, key="a", ranks=ALONE):
    """The result, the predictions, and the number of batches that were computed."""
    state = EvaluationState({"key": key}, ranks, folder)
    engine = Interrupted(SPEC, fresh_state(SPEC))
    engine.at = at
    loader = EvalLoader(
        SOURCE, EvalTransform(), size=(8, 8), batch_size=4, start=len(state.sums), rank=ranks.rank,
        world=ranks.world,
    )  # fmt: skip
    try:
        found = evaluate(
            engine, loader, each=Collector(state.rows), seen=lambda _: state.note(), ranks=ranks,
            rounds=loader.rounds, sums=state.sums,
        )  # fmt: skip
    except KeyboardInterrupt:
        state.save()
        raise
    predictions = Collector(state.rows).gather(ranks)
    state.remove()
    return found, [column.tolist() for column in vars(predictions).values()], engine.calls


def test_an_interrupted_evaluation_continues_at_its_batch_with_the_same_result(tmp_path):
    whole, rows, calls = measure(tmp_path / "other")
    assert (whole.images, calls) == (23, 6)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, at=3)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, at=1)
    assert measure(tmp_path) == (whole, rows, 2)
    assert list(tmp_path.glob("*.json")) == []
    assert measure(tmp_path)[2] == 6


def test_an_evaluation_without_a_finished_batch_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, at=0)
    assert list(tmp_path.iterdir()) == []


def test_another_key_starts_from_the_beginning(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, at=3)
    assert measure(tmp_path, key="b")[2] == 6
    assert measure(tmp_path)[2] == 3


@pytest.mark.parametrize("damage", ["", "{", '{"sums": [[4, 1]], "rows": []}', '{"sums": 3}'])
def test_a_damaged_file_is_ignored(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, at=3)
    (file,) = tmp_path.glob("*.json")
    file.write_text(damage)
    assert measure(tmp_path)[2] == 6


def test_rows_that_do_not_belong_to_the_sums_are_ignored(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, at=3)
    (file,) = tmp_path.glob("*.json")
    stored = json.loads(file.read_text())
    del stored["rows"][-1]
    file.write_text(json.dumps(stored))
    assert measure(tmp_path)[2] == 6


def test_the_file_is_written_from_time_to_time(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_state, "SAVE_EVERY", -1.0)
    state = EvaluationState({}, ALONE, tmp_path)
    state.sums.append((1, 1, 1, 0.1))
    state.rows.append((0, 2, 2, 0.5))
    state.note()
    state.sums.append((1, 0, 1, 0.2))  # interrupted before its row
    state.save()
    again = EvaluationState({}, ALONE, tmp_path)
    assert (again.sums, again.rows) == ([(1, 1, 1, 0.1)], [(0, 2, 2, 0.5)])


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    state = EvaluationState({}, ALONE, tmp_path / "file")
    state.sums.append((1, 1, 1, 0.1))
    state.note()
    state.save()
    state.remove()


def test_ranks_continue_together_at_the_batch_that_all_have_finished(tmp_path):
    whole, rows, _ = measure(tmp_path / "alone")

    def first(ranks):
        state = EvaluationState({"key": "a"}, ranks, tmp_path)
        engine = ToyEngine(SPEC, fresh_state(SPEC))
        loader = EvalLoader(
            SOURCE, EvalTransform(), size=(8, 8), batch_size=4, rank=ranks.rank, world=ranks.world
        )
        batches = list(loader)[: 1 + ranks.rank]  # rank 1 is a batch ahead
        for batch in batches:
            logits = engine.forward(batch.images)["logits"]
            Collector(state.rows)(batch, logits)
        counts: list = []
        evaluate(engine, batches, sums=counts)
        state.sums += counts
        state.note()
        state.save()

    run_ranks(2, first)
    found = run_ranks(2, lambda ranks: measure(tmp_path, ranks=ranks))
    assert found == [(whole, rows, 2)] * 2


def test_the_key_of_a_model_depends_on_names_and_values():
    values = np.arange(6, dtype=np.float32)
    keys = {
        model_key({"a": values}),
        model_key({"b": values}),
        model_key({"a": values + 1}),
        model_key({"a": values.reshape(2, 3)}),
    }
    assert len(keys) == 4
    assert model_key({"a": values.copy()}) in keys
