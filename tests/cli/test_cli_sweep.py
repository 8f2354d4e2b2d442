"""`arm sweep`: combinations, shared pretraining, failures, and resuming to the same table."""

import json
import os
import signal
import time

import pytest
from click.testing import CliRunner

from arm_cli.main import main
from arm_cli.sweep import workers
from arm_cli.sweep.folder import Definition, Result, SweepFolder
from arm_cli.sweep.members import Member, members, parse_factor
from arm_cli.sweep.table import conclusion, differences, markdown, rows
from arm_core.recipe.recipe import load_recipe, override
from arm_core.training.intervals import Interval
from arm_core.training.observer import Observer

SMALL = (
    "model.width=8",
    "model.depth=6",
    "training.batch_size=4",
    "training.length=4 steps",
    "training.log_every=1",
    "training.save_every=1 steps",
    "schedule.warmup=1 steps",
)


@pytest.fixture
def recipes():
    return {
        "pretrain": override(load_recipe("pretrain-digits"), [*SMALL, "model.decoder_width=8"]),
        "finetune": override(load_recipe("finetune-digits"), SMALL),
    }


def define(recipes, *vary):
    return Definition(recipes=recipes, factors=tuple(parse_factor(text, recipes) for text in vary))


def names(definition):
    return [member.name for member in definition.members()]


def test_members_are_all_combinations_of_the_values(recipes):
    definition = define(
        {"pretrain": recipes["pretrain"]}, "model.cluster=1x1,2x2", "training.seed=0..1", "model.state=8,"
    )
    assert names(definition) == [
        f"pretrain/cluster-{c}_seed-{s}_state-8" for c in ("1x1", "2x2") for s in (0, 1)
    ]
    last = definition.members()[-1]
    assert last.recipe.model.cluster == (2, 2)
    assert last.recipe.training.seed == 1
    assert last.recipe.model.state == 8


def test_classifiers_share_the_pretraining_that_they_have_in_common(recipes):
    definition = define(recipes, "pretrain.model.cluster=1x1,2x2", "finetune.training.seed=0..2")
    found = definition.members()
    assert [m.name for m in found[:2]] == ["pretrain/cluster-1x1", "pretrain/cluster-2x2"]
    assert [m.after for m in found[2:]] == ["pretrain/cluster-1x1"] * 3 + ["pretrain/cluster-2x2"] * 3
    assert found[-1].name == "finetune/pretrain.cluster-2x2_seed-2"
    assert found[0].recipe.training.seed == 0


def test_a_key_without_a_stage_changes_both_stages(recipes):
    found = define(recipes, "training.seed=3..4").members()
    assert [m.recipe.training.seed for m in found] == [3, 4, 3, 4]
    assert [m.after for m in found[2:]] == ["pretrain/seed-3", "pretrain/seed-4"]


def test_without_varied_pretraining_there_is_one(recipes):
    found = define(recipes, "finetune.training.seed=0..1").members()
    assert [m.name for m in found] == ["pretrain/all", "finetune/seed-0", "finetune/seed-1"]


def test_values_in_brackets_may_contain_commas(recipes):
    factor = parse_factor("optimizer.betas=[0.9,0.95], [0.9,0.999]", {"finetune": recipes["finetune"]})
    assert factor.values == ("[0.9,0.95]", "[0.9,0.999]")


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ("model.clutser=1x1", "pretrain recipe with model.clutser=1x1: .*cluster"),
        ("model.cluster=5x5", "pretrain recipe with model.cluster=5x5: "),
        ("model.cluster", "expected section.key=value"),
        ("training.seed=0,0", "the value 0 appears twice"),
        ("training.seed=4..0", "the smaller number comes first"),
        ("finetune.training.seed=0", "no finetune recipe; write training.seed"),
    ],
)
def test_a_bad_variation_is_refused_before_anything_runs(recipes, vary, message):
    with pytest.raises(ValueError, match=message):
        define({"pretrain": recipes["pretrain"]}, vary).members()


def test_a_setting_that_varies_twice_is_refused(recipes):
    with pytest.raises(ValueError, match="appears twice"):
        define(recipes, "training.seed=0,1", "training.seed=2").members()


def result(top1, **others):
    return Result(metrics={"eval_top1": top1}, **others)


def test_the_table_holds_intervals_over_seeds_and_differences_by_seed(recipes):
    definition = define(recipes, "finetune.model.directions=1,4", "finetune.training.seed=0..2")
    results = {
        "finetune/directions-1_seed-0": result(0.50),
        "finetune/directions-1_seed-1": result(0.70),
        "finetune/directions-1_seed-2": Result(error="broken"),
        "finetune/directions-4_seed-0": result(0.55),
        "finetune/directions-4_seed-1": result(0.75),
    }
    table = rows(definition, definition.members(), results, "eval_top1")
    assert [(row.levels, len(row.values), row.failed, row.missing) for row in table] == [
        ((("finetune.model.directions", "1"),), 2, 1, 0),
        ((("finetune.model.directions", "4"),), 2, 0, 1),
    ]
    assert table[0].interval.mean == pytest.approx(60)
    (difference,) = differences(table)
    assert difference.interval.mean == pytest.approx(5)
    assert difference.interval.half == pytest.approx(0, abs=1e-9)
    assert "| 4 | 65.0 ± 127.1 | 2 | 0 | 1 |" in markdown("eval_top1", table, [difference])


def test_differences_compare_with_the_first_value_all_else_equal(recipes):
    definition = define(recipes, "finetune.model.directions=1,4", "finetune.data.labels_per_class=5,20")
    top1 = {("1", "5"): 0.1, ("4", "5"): 0.2, ("1", "20"): 0.4, ("4", "20"): 0.8}
    results = {
        f"finetune/directions-{d}_labels_per_class-{n}": result(value) for (d, n), value in top1.items()
    }
    found = differences(rows(definition, definition.members(), results, "eval_top1"))
    shown = {(d.factor.rpartition(".")[2], d.rest[0][1]): round(d.interval.mean) for d in found}
    assert shown == {
        ("directions", "5"): 10,
        ("directions", "20"): 40,
        ("labels_per_class", "1"): 30,
        ("labels_per_class", "4"): 60,
    }
    assert conclusion(Interval(mean=1.0, half=None, count=1)) == "undecided"


def test_an_unknown_metric_is_refused_with_the_known_ones(recipes):
    definition = define(recipes, "finetune.training.seed=0")
    with pytest.raises(ValueError, match="they have eval_top1"):
        rows(definition, definition.members(), {"finetune/seed-0": result(0.5)}, "top1")


def test_a_member_is_claimed_once(tmp_path):
    first, second = SweepFolder(tmp_path), SweepFolder(tmp_path)
    with first.claim("finetune/a") as mine, second.claim("finetune/a") as theirs:
        assert (mine, theirs) == (True, False)
    with second.claim("finetune/a") as theirs:
        assert theirs


def test_a_folder_of_another_sweep_is_refused_and_values_can_be_added(recipes, tmp_path):
    folder = SweepFolder(tmp_path)
    folder.write(define(recipes, "finetune.training.seed=0..1"))
    folder.write(define(recipes, "finetune.training.seed=0..2"))
    assert len(folder.read().members()) == 4
    assert folder.read() == define(recipes, "finetune.training.seed=0..2")
    changed = {**recipes, "finetune": override(recipes["finetune"], ["schedule.base_lr=0.5"])}
    with pytest.raises(ValueError, match=r"finetune.schedule.base_lr = 0.1 there, 0.5 here"):
        folder.write(define(changed, "finetune.training.seed=0..2"))


def arguments(out, *more):
    small = [word for text in SMALL for word in ("--set", text)]
    pair = ["pretrain-digits", "--finetune", "finetune-digits", "--set", "pretrain.model.decoder_width=8"]
    # The number of threads changes the last bits of a result.
    return ["sweep", *pair, *small, "--out", str(out), "--device", "cpu", "--threads", "1", *more]


VARY = ("--vary", "finetune.training.seed=0..1")


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_sweep_resumes_to_the_table_of_an_uninterrupted_one(recipes, tmp_path):
    class Interrupt(Observer):
        def stepped(self, step, images):
            if step == 2:
                signal.raise_signal(signal.SIGTERM)

    from arm_cli.sweep.training import Stopped, train_member
    from arm_core.engine.protocol import EngineOptions
    from arm_core.engine.registry import choose_backend

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    answer = CliRunner().invoke(main, arguments(whole, *VARY), catch_exceptions=False)
    assert answer.exit_code == 0, answer.output

    folder = SweepFolder(parts)
    with folder.locked():
        folder.write(SweepFolder(whole).read())
    backend, options = choose_backend("auto"), EngineOptions(device="cpu", threads=1)
    pretraining, first, _ = folder.read().members()
    for member in (pretraining, first):
        with pytest.raises(Stopped):
            train_member(folder, member, backend, options, observer=Interrupt())
        assert folder.result(member.name) is None
        if member is pretraining:
            folder.record(member.name, train_member(folder, member, backend, options))
    answer = CliRunner().invoke(main, ["sweep", "--out", str(parts), "--device", "cpu", "--threads", "1"])
    assert answer.exit_code == 0, answer.output
    assert "3 runs, 1 of them finished" in answer.output
    assert (parts / "table.md").read_text() == (whole / "table.md").read_text()
    for name in ("finetune/seed-0", "finetune/seed-1"):
        assert folder.result(name).metrics == SweepFolder(whole).result(name).metrics


def test_a_failing_member_leaves_the_others_and_is_tried_again(tmp_path):
    vary = ("--vary", "finetune.data.labels_per_class=1,20", "--set", "finetune.training.batch_size=20")
    answer = CliRunner().invoke(main, [*arguments(tmp_path / "sweep", *vary), "--json"])
    assert answer.exit_code == 1
    assert "1 of 3 runs failed" in answer.stderr
    found = json.loads(answer.stdout)
    assert list(found["failed"]) == ["finetune/labels_per_class-1"]
    assert "10 images" in found["failed"]["finetune/labels_per_class-1"]
    assert [row["failed"] for row in found["rows"]] == [1, 0]
    again = CliRunner().invoke(main, ["sweep", "--out", str(tmp_path / "sweep"), "--device", "cpu"])
    assert "3 runs, 2 of them finished" in again.stderr
    assert "[1/1] finetune/labels_per_class-1: failed" in again.stderr
    assert again.exit_code == 1


def die_once(events, path, wanted, *task):
    """A worker that is killed in its first member."""
    if (path / "died").exists():
        return
    (path / "died").touch()
    events.send(workers.Event(kind="started", member=wanted[0].name))
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_a_process_that_dies_fails_its_member_and_is_replaced(recipes, monkeypatch, tmp_path):
    from arm_core.engine.protocol import EngineOptions

    monkeypatch.setattr(workers, "_work", die_once)
    seen = []
    member = Member(name="pretrain/all", recipe=recipes["pretrain"])
    workers.run_members(SweepFolder(tmp_path), [member], "torch", EngineOptions(), jobs=1, report=seen.append)
    assert [(event.kind, event.member) for event in seen] == [
        ("started", "pretrain/all"),
        ("failed", "pretrain/all"),
    ]
    assert "SIGKILL" in SweepFolder(tmp_path).result("pretrain/all").error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain-digits"], "pass the settings that vary"),
        (["--vary", "training.seed=0,1"], "is resumed unchanged"),
        ([], "contains no sweep.json"),
        (["finetune-digits", "--finetune", "finetune-digits", *VARY], "expected RECIPE to pretrain"),
        (["pretrain-digits", "--from", "x", *VARY], "is for finetuning recipes"),
    ],
)
def test_a_bad_request_is_one_line(words, message, tmp_path):
    import re

    answer = CliRunner().invoke(main, ["sweep", *words, "--out", str(tmp_path / "sweep")])
    assert answer.exit_code == 2
    assert re.search(message, answer.output)
    assert len(answer.output.splitlines()) == 1
    assert not (tmp_path / "sweep").exists()


def test_members_are_unique(recipes):
    assert len(members(recipes, [])) == 2
