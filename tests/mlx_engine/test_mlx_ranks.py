"""Several MLX processes over loopback: the same weights as one process; clear messages if one is lost."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, Compile, EngineOptions, TrainingState
from arm_core.engine.ranks import ALONE, PeerFailed
from arm_core.engine.registry import choose_backend
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ClassifierSpec, EncoderSpec
from arm_core.training.checkpoint import load_checkpoint
from arm_mlx import backend

mx = pytest.importorskip("mlx.core", reason="needs MLX")

from arm_mlx import distributed  # noqa: E402

SPEC = ClassifierSpec(encoder=EncoderSpec(width=16, depth=2, patch=4, state=4), classes=3, image_size=(12, 8))
OPTIMIZER = OptimizerSettings(clip=0.5, ema_decay=0.9)
STEPS, IMAGES, LR = 3, 4, 1e-3
TOLERANCE = 1e-5
"""Tolerances relative to each tensor's largest value."""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++, which MLX compiles with on a CPU"
)


def batches(step: int) -> list[Batch]:
    """The micro-batches of a step, over all ranks."""
    rng = np.random.default_rng(step)
    images = rng.standard_normal((IMAGES, *SPEC.image_size, 3)).astype(np.float32)
    targets = rng.dirichlet(np.ones(SPEC.classes), IMAGES).astype(np.float32)
    return [Batch(images=images[i : i + 1], targets=targets[i : i + 1]) for i in range(IMAGES)]


def engine(compiled: str = "none", **more: Any) -> Any:
    scan = "cpu" if compiled == "none" else "reference"
    options = EngineOptions(device="cpu", scan=scan, compile=Compile(compiled))
    state = TrainingState(parameters=initial_parameters(SPEC, 3))
    return backend.create_engine(SPEC, state, optimizer=OPTIMIZER, options=options, **more)


def as_arrays(state: Any) -> dict[str, np.ndarray]:
    kinds = ("parameters", "exp_avg", "exp_avg_sq", "ema")
    return {f"{kind} {name}": a for kind in kinds for name, a in getattr(state, kind).items()}


def work(folder: str, compiled: str) -> None:
    """The work of each process in the tests below: its share of every step."""
    ranks = backend.join("cpu")
    trained = engine(ranks=ranks, compiled=compiled)
    results = []
    for step in range(STEPS):
        mine = batches(step)[ranks.rank :: ranks.world]
        result = trained.train_step(mine, step=step + 1, lr=LR, total_micro_batches=IMAGES).result()
        results.append([result.loss, result.grad_norm])
    seen = ranks.gather({"rank": ranks.rank, "results": results, "long": "x" * 1000 * ranks.rank})
    arrays = as_arrays(trained.export_state())
    np.savez(Path(folder, f"{ranks.rank}.npz"), **arrays, seen=np.array(json.dumps(seen)))
    ranks.close()


def outlive(folder: str, compiled: str) -> None:
    """Rank 1 exits without a message; rank 0 prints its error."""
    ranks = backend.join("cpu")
    trained = engine(ranks=ranks, compiled=compiled)
    if ranks.rank == 1:
        os._exit(0)
    for action in (
        lambda: trained.train_step(batches(0)[:1], step=1, lr=LR, total_micro_batches=2).result(),
        lambda: ranks.gather(1),
    ):
        try:
            action()
        except PeerFailed as error:
            print(error, flush=True)


def start(task: Callable[..., None], world: int, folder: Path, compiled: str = "none") -> list[str]:
    """Run a function of this file in several processes that form a ring; returns their outputs."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(world)]))
    command = [sys.executable, __file__, task.__name__, str(folder), compiled]
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    found = {"MLX_HOSTFILE": str(hosts), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {**os.environ, **threads, **found}
    processes = [
        subprocess.Popen(
            command,
            env={**environment, "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [printed for printed, _ in outputs]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


needs_ring = pytest.mark.skipif(
    not mx.distributed.is_available("ring"), reason="needs MLX's ring backend, which this build lacks"
)


@needs_ring
@pytest.mark.parametrize(
    ("world", "compiled"),
    [(2, "none"), (3, "none"), pytest.param(2, "model", marks=needs_compiler)],
    ids=["2 processes", "3 processes with unequal shares", "2 processes, compiled"],
)
def test_several_processes_train_like_one_with_the_larger_batch(
    world: int, compiled: str, tmp_path: Path
) -> None:
    alone = engine()
    expected = []
    for step in range(STEPS):
        parts = batches(step)
        whole = Batch(
            images=np.concatenate([part.images for part in parts]),
            targets=np.concatenate([part.targets for part in parts]),
        )
        result = alone.train_step([whole], step=step + 1, lr=LR).result()
        expected.append([result.loss, result.grad_norm])

    start(work, world, tmp_path, compiled)
    ranks = [dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(world)]
    for found in ranks:
        seen = json.loads(str(found.pop("seen")))
        assert [row["rank"] for row in seen] == list(range(world))
        assert [len(row["long"]) for row in seen] == [1000 * rank for rank in range(world)]
        for row in seen:
            np.testing.assert_allclose(row["results"], expected, rtol=TOLERANCE)
    for name, value in as_arrays(alone.export_state()).items():
        for found in ranks:
            np.testing.assert_array_equal(found[name], ranks[0][name])  # bit for bit, or they drift apart
        assert np.abs(ranks[0][name] - value).max() <= TOLERANCE * np.abs(value).max(), name


RECIPE = """
stage = "pretrain"
[model]
width = 16
depth = 6
patch = 4
image_size = [24, 24]
cluster = [2, 2]
decoder_width = 16
decoder_depth = 1
decoder_heads = 2
[data]
source = "synthetic"
workers = 0
[schedule]
base_lr = 0.1
[training]
length = "3 steps"
batch_size = 4
accumulation = 2
log_every = 1
"""


@needs_ring
def test_arm_pretrain_under_mlx_launch_equals_the_run_of_one_process(tmp_path: Path) -> None:
    launcher = Path(sys.executable).with_name("mlx.launch")
    if not launcher.exists():
        pytest.skip(f"needs {launcher}, which comes with MLX")
    (tmp_path / "tiny.toml").write_text(RECIPE)
    start_arm = "from arm_cli.main import main; main()"
    arm = [sys.executable, "-c", start_arm, "pretrain", "tiny.toml", "--backend", "mlx"]
    arm += ["--device", "cpu", "--scan", "cpu", "--out"]
    port = str(min(free_ports(2)))
    # The two dashes: otherwise mlx.launch would read --backend mlx as its own option.
    together = [str(launcher), "-n", "2", "--backend", "ring", "-p", port, "--", *arm]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    said = []
    for command, out in ((together, "two"), (arm, "one")):
        done = subprocess.run(
            [*command, out], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    assert "scan cpu, 2 processes" in said[0]
    assert said[0].count("finished after 3 steps") == 1, "only rank 0 prints"
    runs = [tmp_path / "two", tmp_path / "one"]
    rows = [list(map(json.loads, (run / "metrics.jsonl").read_text().splitlines())) for run in runs]
    assert len(rows[0]) == 4, "three steps and an evaluation: only rank 0 writes"
    for found, expected in zip(*rows, strict=True):
        for name in found.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert found[name] == pytest.approx(expected[name], rel=TOLERANCE)
    two, one = (as_arrays(load_checkpoint(run / "checkpoints" / "step-00000003").state) for run in runs)
    for name, value in one.items():
        if not name.endswith("key_value.bias"):  # the gradients of the keys' half are rounding errors
            assert np.abs(two[name] - value).max() <= 10 * TOLERANCE * np.abs(value).max(), name


@needs_ring
def test_a_lost_process_ends_the_others_with_one_sentence(tmp_path: Path) -> None:
    printed, _ = start(outlive, 2, tmp_path)
    lines = printed.splitlines()
    assert len(lines) == 2, "a step and an exchange of values both detect it"
    assert all(line.startswith("another process of the job has ended ([ring] ") for line in lines)


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in distributed.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert backend.join("cpu") is ALONE


def test_auto_selects_mlx_under_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    assert choose_backend("auto").name == "mlx"


@pytest.mark.parametrize(
    ("rank", "hosts", "sentence"),
    [
        ("0", None, "MLX_HOSTFILE: expected a JSON file of addresses, found "),
        ("0", "nonsense", "MLX_HOSTFILE: expected a JSON file of addresses, found "),
        ("2", '[["127.0.0.1:1"], ["127.0.0.1:2"]]', "MLX_RANK: expected a number below 2, found '2'"),
        ("one", '[["127.0.0.1:1"], ["127.0.0.1:2"]]', "MLX_RANK: expected a number below 2, found 'one'"),
    ],
)
def test_an_invalid_description_of_the_job_is_refused(
    rank: str, hosts: str | None, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    monkeypatch.setenv("MLX_RANK", rank)
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        backend.join("cpu")


def test_gradients_are_sent_in_few_messages_that_keep_their_order() -> None:
    sizes = {"a": 3, "b": 5, "c": 20, "d": 1, "e": 9, "f": 2}
    assert list(distributed.pieces(sizes, 10)) == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert list(distributed.pieces({}, 10)) == []


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
