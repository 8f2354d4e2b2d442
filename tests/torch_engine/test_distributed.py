"""Several torch processes train one model and compute the same as one process with the same global batch.

They use gloo on the CPU. Each job is started once and makes several runs, since starting it takes seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from training_folder import furnish

pytest.importorskip("torch")

from torch_job import train

from arm_cli.main import main
from arm_core.training.checkpoint import newest_checkpoint, verify
from arm_core.training.records import read_rows

JOB = Path(__file__).parents[1] / "torch_job.py"
TOLERANCE = 1e-5
"""Largest difference of a weight, a moment or an average; weights are about 0.1."""
TIMEOUT = 120.0


def torchrun(world, *words, restarts=0, cwd=None, **variables) -> subprocess.CompletedProcess[str]:
    """A job of `world` processes with one thread each; after TIMEOUT all of them are killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    command += [f"--max-restarts={restarts}", str(JOB), *words]
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **threads, "PYTHONPATH": path, **variables},
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun then ends its processes
        out, err = process.communicate(timeout=60)
        pytest.fail(f"the job did not end: {err[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def runs(world, *tasks) -> None:
    done = torchrun(world, "runs", json.dumps(tasks))
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_torch_thread):
    """Runs of 1, 2, 3 and 4 processes, and runs that were resumed with another number."""
    folder = tmp_path_factory.mktemp("runs")

    def path(name):
        return str(folder / name)

    for stage in ("pretrain", "finetune"):
        train(path(f"{stage}-1"), stage)
    runs(
        2,
        {"path": path("finetune-2")},
        {"path": path("pretrain-2-shard"), "stage": "pretrain", "shard": True, "recompute": True},
        {"path": path("finetune-2-3"), "stop": 2},
        {"path": path("finetune-2-3-shard"), "stop": 2, "shard": True},
        {"path": path("finetune-2-1"), "stop": 3, "shard": True},
    )
    runs(3, {"path": path("finetune-2-3")}, {"path": path("finetune-2-3-shard"), "shard": True})
    runs(4, {"path": path("finetune-4")}, {"path": path("finetune-4-shard"), "shard": True})
    train(path("finetune-2-1"))
    return folder


NAMES = [
    "finetune-2", "pretrain-2-shard", "finetune-2-3", "finetune-2-3-shard", "finetune-2-1", "finetune-4",
    "finetune-4-shard",
]  # fmt: skip


def final(run: Path):
    return newest_checkpoint(run, pytest.fail)


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_processes_gives_the_run_of_one(folder, name):
    found, expected = final(folder / name), final(folder / f"{name.split('-')[0]}-1")
    assert found.progress.step == expected.progress.step == 4
    assert found.progress.position == expected.progress.position == 24
    for kind in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        arrays, wanted = getattr(found.state, kind), getattr(expected.state, kind)
        assert list(arrays) == list(wanted)
        for tensor, value in wanted.items():
            np.testing.assert_allclose(
                arrays[tensor], value, rtol=0, atol=TOLERANCE, err_msg=f"{kind}/{tensor}"
            )


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_processes_logs_the_same_rows_and_evaluates_exactly(folder, name):
    rows, wanted = (
        [{**row, "images_per_s": 0} for row in read_rows(folder / run / "metrics.jsonl")]
        for run in (name, f"{name.split('-')[0]}-1")
    )
    assert [row["step"] for row in rows] == [2, 4, 4]
    assert rows[-1]["eval_images"] == 11
    for row, want in zip(rows, wanted, strict=True):
        assert row == pytest.approx(want, rel=1e-4)


def test_checkpoints_have_the_same_files_for_any_number_of_processes(folder):
    def files(name):
        return {p.name: p.stat().st_size for p in final_folder(name).iterdir() if p.suffix == ".safetensors"}

    def final_folder(name):
        return folder / name / "checkpoints" / "step-00000004"

    for name in NAMES:
        verify(final_folder(name))
        assert files(name) == files(f"{name.split('-')[0]}-1")


def test_a_run_records_its_number_of_processes(folder):
    sessions = read_rows(folder / "finetune-2-3-shard" / "sessions.jsonl")
    assert [(row["step"], row["ranks"]) for row in sessions] == [(0, "2"), (2, "3")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = ["pretrain", "pre.toml", "--data", "train", "--device", "cpu", "--threads", "1"]
TWO = ["--set", "training.accumulation=2"]


def test_a_killed_process_ends_the_job_and_a_restart_resumes_it(place):
    words = [*WORDS, *TWO, "--set", "training.save_every=1 step"]
    done = torchrun(2, "arm", *words, "--out", "run", restarts=1, cwd=place, KILL="1:3")
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Error: another process of this job has ended (" in done.stderr
    assert "exitcode: -9" in done.stderr
    assert done.stderr.count("finished after 4 steps; the model is in run/checkpoints/step-00000004") == 1
    sessions = read_rows(place / "run" / "sessions.jsonl")
    assert [row["step"] for row in sessions] == [0, 2]

    assert CliRunner().invoke(main, [*words, "--out", "whole"]).exit_code == 0
    found, expected = (final(place / name).state.parameters for name in ("run", "whole"))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCE, err_msg=name)


def test_mistakes_under_torchrun_are_reported_once(place):
    done = torchrun(2, "arm", *WORDS, "--out", "run", cwd=place)
    assert done.stderr.count("Error: training.accumulation: an update has 1 micro-batches") == 1
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert not (place / "run").exists()


def test_evaluation_by_several_processes_prints_one_result(place):
    assert (
        CliRunner().invoke(main, [*WORDS, "--set", "training.length=1 step", "--out", "run"]).exit_code == 0
    )
    words = ["evaluate", "run", "--data", "train", "--batch-size", "5", "--device", "cpu", "--json"]
    alone = json.loads(CliRunner().invoke(main, words).stdout)
    together = json.loads(torchrun(2, "arm", *words, cwd=place).stdout)
    assert together.keys() == alone.keys()
    assert (together["images"], together["loss"]) == (12, pytest.approx(alone["loss"], rel=1e-6))
