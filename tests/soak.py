"""Interrupt training runs in many ways for some minutes, and compare each with an uninterrupted run.

    python tests/soak.py [--minutes 30] [--seed 0] [--engines torch,mlx] [--keep FOLDER]

Each round trains a small model through the command line, on one process or two, injects faults, resumes
until the run is finished, and compares every byte of the final model, optimizer state and average with those
of an uninterrupted run. After each round, `arm` reads some hostile files. A traceback, a hang and an
unexpected exit code are findings as well. The seed determines the faults. Their effect depends on timing, so
a repetition is similar but not equal.
This is not part of `make test`. The exit code is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from hostile import CASES, LONG
from PIL import Image

STEPS = 24
LIMIT = 180.0
"""Seconds after which a command counts as hanging."""
FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors")
ARM = [sys.executable, "-c", "from arm_cli.main import main; main()"]
COMMON = [
    "model.width=16", "model.depth=6", "model.patch=4", "model.image_size=24",
    "data.labels_per_class=none", "optimizer.ema_decay=0.9", "schedule.warmup=4 steps",
    "training.batch_size=8", "training.accumulation=2", f"training.length={STEPS} steps",
    "training.save_every=5 steps", "training.evaluate_every=6 steps", "training.log_every=4",
    "training.keep=3", "data.workers=2",
]  # fmt: skip
STAGES = {
    "pretrain": ["model.decoder_width=16", "model.decoder_heads=2", "model.decoder_depth=1"],
    "finetune": ["mixing.mixup=0.8", "training.drop_path=0.2", "augmentation.flip=0.5"],
}


@dataclass(frozen=True)
class Setup:
    """The training stage and its processes."""

    engine: str
    stage: str
    processes: int

    def __str__(self) -> str:
        return f"{self.engine}-{self.stage}-{self.processes}"


@dataclass
class Ended:
    """A command that has ended."""

    code: int
    output: str
    seconds: float
    hung: bool


@dataclass
class Soak:
    """The folder with the data, the reference runs and the current run; counts and findings."""

    folder: Path
    draw: random.Random
    rounds: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    findings: list[str] = field(default_factory=list)
    durations: dict[Setup, float] = field(default_factory=dict)

    def find(self, what: str, ended: Ended | None = None) -> None:
        tail = "" if ended is None else f" (exit code {ended.code}): ...{ended.output[-1500:]}"
        self.findings.append(f"{what}{tail}")
        print(f"FINDING {what}{tail}", flush=True)


def paint(folder: Path) -> None:
    """24 training and 10 evaluation images of two classes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 5)):
        for label, hue in (("blue", 200), ("red", 40)):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (24, 24, 3)) + np.array([hue // 2, 30, 120 - hue // 2])
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{i}.png")


def command(setup: Setup, folder: Path, run: Path, *, resume: bool) -> list[str]:
    words = [setup.stage]
    if resume:
        words += ["--resume", str(run)]
    else:
        data, held_out = str(folder / "train"), str(folder / "val")
        words += ["digits", "--data", data, "--eval-data", held_out, "--out", str(run)]
        words += [word for change in [*COMMON, *STAGES[setup.stage]] for word in ("--set", change)]
    words += ["--backend", setup.engine, "--device", "cpu", "--threads", "1"]
    if setup.processes == 1:
        return [*ARM, *words]
    if setup.engine == "torch":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, f"--nproc-per-node={setup.processes}", "--no-python", *ARM, *words]
    launcher = [str(Path(sys.executable).with_name("mlx.launch")), "-n", str(setup.processes)]
    return [*launcher, "--backend", "ring", "-p", str(free_port()), "--", *ARM, *words]


def free_port() -> int:
    """A port with a free one after it, most likely."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def running(words: list[str], *, file_limit: int | None = None) -> Iterator[Callable[[], Ended]]:
    """A command in a separate session; the value waits for its end. The block ends all its processes."""

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "ARM_PEER_TIMEOUT": "60"}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            words,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **threads, "PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,
            preexec_fn=limit,
        )

        def wait() -> Ended:
            hung = False
            try:
                process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                hung = True
            end(process)
            output.seek(0)
            return Ended(process.returncode, output.read(), time.monotonic() - began, hung)

        wait.process = process  # type: ignore[attr-defined]
        try:
            yield wait
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill the remaining processes of a command's session."""
    for member in session(process.pid):
        member.kill()
    process.wait()


def session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def workers(leader: int) -> list[psutil.Process]:
    """The `arm` processes of a job, in the order of their ranks."""
    ranked = []
    for process in session(leader):
        try:
            words, variables = process.cmdline(), process.environ()
        except (psutil.Error, OSError):
            continue
        if words[:3] == ARM:
            rank = variables.get("RANK") or variables.get("MLX_RANK") or "0"
            ranked.append((int(rank), process.pid, process))
    return [process for *_, process in sorted(ranked)]


def steps(run: Path) -> list[int]:
    names = (path.name for path in (run / "checkpoints").glob("step-????????"))
    return sorted(int(name.removeprefix("step-")) for name in names)


# Moments at which a fault is injected, each as a condition to wait for.


def anytime(soak: Soak, setup: Setup, run: Path) -> Callable[[], bool]:
    moment = time.monotonic() + soak.draw.uniform(0, soak.durations[setup])
    return lambda: time.monotonic() >= moment


def while_writing(soak: Soak, setup: Setup, run: Path) -> Callable[[], bool]:
    after = soak.draw.choice([0, 5, 10, 15])

    def now() -> bool:
        drafts = [path.name for path in (run / "checkpoints").glob("*.tmp")]
        return any(int(re.sub(r"\D", "", name) or 0) >= after for name in drafts)

    return now


def while_evaluating(soak: Soak, setup: Setup, run: Path) -> Callable[[], bool]:
    step = soak.draw.choice([6, 12, 18, STEPS])

    def now() -> bool:
        metrics = run / "metrics.jsonl"
        text = metrics.read_text() if metrics.exists() else ""
        evaluated = any(f'"step": {step},' in line and "eval_loss" in line for line in text.splitlines())
        return step in steps(run) and not evaluated

    return now


MOMENTS = (anytime, anytime, while_writing, while_evaluating)


# Faults: each runs the command once and disturbs it, or damages files on the disk.


def signalled(soak: Soak, setup: Setup, run: Path, words: list[str]) -> str:
    """A signal to the job, or to one of its processes."""
    name = soak.draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"])
    moment = soak.draw.choice(MOMENTS)
    one = setup.processes > 1 and name == "SIGKILL" and soak.draw.random() < 0.7
    with running(words) as wait:
        leader = wait.process.pid  # type: ignore[attr-defined]
        ready = moment(soak, setup, run)
        began = time.monotonic()
        while not ready() and time.monotonic() - began < LIMIT and wait.process.poll() is None:  # type: ignore[attr-defined]
            time.sleep(0.002)
        targets = workers(leader)
        if one:
            targets = targets[1:2]
        for target in targets:
            try:
                target.send_signal(getattr(signal, name))
            except psutil.Error:
                continue
        ended = wait()
    what = f"{'rank 1 ' if one else ''}{name} {moment.__name__.replace('_', ' ')}"
    check(soak, setup, f"{setup}: {what}", ended)
    finished = f"finished after {STEPS} steps" in ended.output
    gracefully = name != "SIGKILL" and "after step" in ended.output
    if setup.processes == 1 and targets and not finished and not gracefully and name != "SIGKILL":
        early = f"{name}: saving and stopping" not in ended.output
        if not early:  # a signal before training begins may end the process as usual
            soak.find(f"{setup}: {what}: not stopped in good order", ended)
    return what


def full_disk(soak: Soak, setup: Setup, run: Path, words: list[str]) -> str:
    """No file may grow beyond a random size."""
    limit = soak.draw.choice([100, 2_000, 20_000, 100_000])
    with running(words, file_limit=limit) as wait:
        ended = wait()
    check(soak, setup, f"{setup}: files of {limit} bytes at most", ended)
    if ended.code == 0 and setup.processes == 1 and f"finished after {STEPS} steps" not in ended.output:
        soak.find(f"{setup}: files of {limit} bytes at most: exit code 0", ended)
    return "full disk"


def small_disk(soak: Soak, setup: Setup, run: Path, words: list[str]) -> str:
    """The run is on a file system of a few hundred kilobytes; needs the right to mount."""
    run.mkdir(parents=True, exist_ok=True)
    kept = run.with_name("kept")
    size = soak.draw.choice([300, 600, 900])
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(run, kept)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(run)], capture_output=True, check=False
    )
    if done.returncode != 0:
        return full_disk(soak, setup, run, words)
    try:
        try:
            shutil.copytree(kept, run, dirs_exist_ok=True)
        except (OSError, shutil.Error):
            return "small disk (too small for the existing files)"
        with running(words) as wait:
            ended = wait()
        check(soak, setup, f"{setup}: a disk of {size} KiB", ended)
        shutil.rmtree(kept)
        shutil.copytree(run, kept)
    finally:
        subprocess.run(["umount", str(run)], check=True)
        shutil.rmtree(run)
        kept.rename(run)
    return "small disk"


def damaged(soak: Soak, setup: Setup, run: Path, words: list[str]) -> str:
    """One bit of the newest checkpoint differs, or a record has foreign lines."""
    found = steps(run)
    if len(found) < 2:
        return signalled(soak, setup, run, words)
    folder = run / "checkpoints" / f"step-{found[-1]:08d}"
    path = soak.draw.choice([p for p in folder.iterdir() if p.is_file() and p.stat().st_size])
    content = bytearray(path.read_bytes())
    content[soak.draw.randrange(len(content))] ^= 1 << soak.draw.randrange(8)
    path.write_bytes(content)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(soak.draw.choice(["[]\n", "5\n", '{"step": 3, "lo', "\n", "nonsense\n"]))
    return "damaged checkpoint"


def changed_data(soak: Soak, setup: Setup, run: Path, words: list[str]) -> str:
    """A class of the training images is renamed.

    Finetuning must refuse it (mlx.launch itself returns 0). Pretraining has no classes: a warning is enough.
    """
    if not steps(run):
        return signalled(soak, setup, run, words)
    train = soak.folder / "train"
    (train / "blue").rename(train / "green")
    try:
        with running(words) as wait:
            ended = wait()
    finally:
        (train / "green").rename(train / "blue")
    check(soak, setup, f"{setup}: changed data", ended)
    if setup.stage == "pretrain":
        reported = "Warning:" in ended.output and "images of other names" in ended.output
    else:
        launched = setup.engine == "mlx" and setup.processes > 1
        _, error, sentence = ended.output.partition("Error")
        reported = bool(error and re.search(r"data|images|class", sentence)) and (ended.code != 0 or launched)
    if not reported:
        soak.find(f"{setup}: changed data was not reported", ended)
    return "changed data"


FAULTS = (signalled, signalled, signalled, signalled, full_disk, small_disk, damaged, changed_data)


def check(soak: Soak, setup: Setup, what: str, ended: Ended) -> None:
    """Checks that every command must pass."""
    if ended.hung:
        soak.find(f"{what}: did not end in {LIMIT:.0f} s", ended)
    # torchrun prints its own traceback, and so does a process that SIGINT ends before it trains.
    own = "torch.distributed" in ended.output or "KeyboardInterrupt" in ended.output
    if "Traceback" in ended.output and not own:
        soak.find(f"{what}: traceback", ended)


def finish(soak: Soak, setup: Setup, run: Path) -> bool:
    """Resume without faults until the end."""
    with running(command(setup, soak.folder, run, resume=bool(steps(run)))) as wait:
        ended = wait()
    check(soak, setup, f"{setup}: the end", ended)
    if f"finished after {STEPS} steps" not in ended.output:
        soak.find(f"{setup}: could not be finished", ended)
        return False
    return True


def compare(soak: Soak, setup: Setup, run: Path, faults: list[str]) -> None:
    found, expected = (
        folder / "checkpoints" / f"step-{STEPS:08d}" for folder in (run, reference(soak, setup))
    )
    for name in FILES:
        if (found / name).read_bytes() != (expected / name).read_bytes():
            soak.find(f"{setup}: {name} differs after {', '.join(faults)}")
            shutil.copytree(run, soak.folder / f"finding-{len(soak.findings)}")


def reference(soak: Soak, setup: Setup) -> Path:
    """The uninterrupted run, trained once."""
    run = soak.folder / f"reference-{setup}"
    if not run.exists():
        began = time.monotonic()
        if not finish(soak, setup, run):
            raise SystemExit("the uninterrupted run failed")
        soak.durations[setup] = time.monotonic() - began
    return run


def one_round(soak: Soak, setup: Setup, until: float) -> None:
    run = soak.folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    reference(soak, setup)
    faults: list[str] = []
    for _ in range(soak.draw.randint(1, 4)):
        if STEPS in steps(run) or time.monotonic() > until:
            break
        fault = soak.draw.choice(FAULTS)
        words = command(setup, soak.folder, run, resume=bool(steps(run)))
        faults.append(fault(soak, setup, run, words))
    soak.faults.update(faults)
    if finish(soak, setup, run):
        compare(soak, setup, run, faults)
    soak.rounds[str(setup)] += 1
    print(f"{sum(soak.rounds.values()):4d} {setup}: {'; '.join(faults) or 'no fault'}", flush=True)


def hostile_files(soak: Soak, count: int = 5) -> None:
    """Some cases of `tests/hostile.py`: `arm` on hostile files, under limits of memory and time."""
    names = soak.draw.sample([name for name in CASES if name not in LONG], count)
    words = [sys.executable, str(Path(__file__).with_name("hostile.py")), *names]
    done = subprocess.run(words, capture_output=True, text=True, timeout=count * 130, check=False)
    for line in done.stdout.splitlines():
        name, problem, cost, output = json.loads(line)
        soak.faults["hostile file"] += 1
        if problem is not None:
            soak.find(f"hostile files: {name}: {problem} ({cost}): {output}")
    if done.returncode or len(done.stdout.splitlines()) != count:
        soak.find(f"hostile files: {names}: exit code {done.returncode}: {done.stderr[-1500:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", default="torch,mlx")
    parser.add_argument("--keep", type=Path, help="folder to work in, which is kept")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="arm-soak-"))
    folder.mkdir(exist_ok=True)
    soak = Soak(folder.resolve(), random.Random(options.seed))
    if not (folder / "train").exists():
        paint(folder)
    setups = [
        Setup(engine, stage, processes)
        for processes in (1, 2)
        for stage in STAGES
        for engine in options.engines.split(",")
    ]
    began = time.monotonic()
    until = began + 60 * options.minutes
    while time.monotonic() < until:
        one_round(soak, soak.draw.choice([*setups, *setups[: len(setups) // 2]]), until)
        hostile_files(soak)
    minutes, count = (time.monotonic() - began) / 60, sum(soak.rounds.values())
    print(f"\n{minutes:.1f} minutes, seed {options.seed}, {count} runs:")
    for name, counts in (("runs", soak.rounds), ("faults", soak.faults)):
        print(f"  {name}: " + ", ".join(f"{what} {count}" for what, count in sorted(counts.items())))
    print(f"  findings: {len(soak.findings)}")
    if options.keep is None and not soak.findings:
        shutil.rmtree(folder)
    raise SystemExit(1 if soak.findings else 0)


if __name__ == "__main__":
    main()
