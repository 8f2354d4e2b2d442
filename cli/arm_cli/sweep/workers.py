"""Processes that train the members of a sweep. A process that dies fails its member, not the sweep.

On a CPU with several jobs, each uses its part of the cores: a small network cannot keep all cores busy, so
this is faster than one run at a time on all cores.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arm_cli.sweep.folder import Result, SweepFolder
from arm_cli.sweep.members import Member

if TYPE_CHECKING:
    from arm_core.engine.protocol import EngineOptions

POLL = 0.5
"""Pause before a process looks again for a member that it can train, seconds."""

GRACE = 60.0
"""Time that runs have to save a checkpoint after Ctrl-C, seconds."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A report of a process about a member."""

    kind: str
    """`started`, `finished`, `failed` or `waiting` (for members that other processes train)."""
    member: str = ""
    result: Result | None = None


def run_members(
    folder: SweepFolder,
    wanted: Sequence[Member],
    backend: str,
    options: EngineOptions,
    *,
    jobs: int,
    report: Callable[[Event], None],
    save_on_interrupt: bool = True,
) -> None:
    """Train all members that have no result, `jobs` at a time; returns when every member has ended.

    A member that failed earlier is tried again, once. Ctrl-C and SIGTERM save the active runs (unless
    `save_on_interrupt` is False), end the processes and raise KeyboardInterrupt.
    """
    if jobs > 1 and options.threads is None and on_cpu(backend, options):
        options = replace(options, threads=max(1, (os.cpu_count() or 1) // jobs))
    task = (folder.path, tuple(wanted), backend, options, time.time())
    pool = _Pool(task)
    with _terminated_like_interrupted():
        try:
            for _ in range(jobs):
                pool.start()
            while pool.workers:
                for event in pool.wait():
                    report(event)
        except BaseException:
            pool.stop(gently=save_on_interrupt)
            raise


class _Worker:
    def __init__(self, task: tuple[Any, ...]) -> None:
        # Spawned: a forked process must not use the threads of an engine that was loaded before.
        context = get_context("spawn")
        self.events, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_work, args=(theirs, *task), daemon=True)
        resource_tracker.ensure_running()  # starting it would unblock the signals in the next block
        with _interrupts_blocked():
            self.process.start()
        theirs.close()
        self.member = ""


class _Pool:
    """The processes of this sweep on this machine."""

    def __init__(self, task: tuple[Any, ...]) -> None:
        self._task, self._folder = task, SweepFolder(task[0])
        self.workers: list[_Worker] = []

    def start(self) -> None:
        self.workers.append(_Worker(self._task))

    def wait(self) -> Iterator[Event]:
        """The next events. A process that died is replaced, and its member has failed."""
        by_pipe = {worker.events: worker for worker in self.workers}
        for pipe in connection.wait(list(by_pipe)):
            assert isinstance(pipe, Connection)
            worker = by_pipe[pipe]
            try:
                event: Event = pipe.recv()
            except EOFError:
                yield from self._ended(worker)
                continue
            worker.member = event.member if event.kind == "started" else ""
            if event.kind != "waiting" or not any(other.member for other in self.workers):
                yield event

    def _ended(self, worker: _Worker) -> Iterator[Event]:
        worker.process.join()
        worker.events.close()
        self.workers.remove(worker)
        if worker.process.exitcode == 0:
            return
        error = f"its process ended with {_exit(worker.process.exitcode)}"
        if not worker.member:
            raise RuntimeError(f"a process of the sweep could not work: {error}")
        result = Result(error=error, ended=time.time())
        self._folder.record(worker.member, result)
        yield Event(kind="failed", member=worker.member, result=result)
        self.start()

    def stop(self, *, gently: bool) -> None:
        """End all processes: after they have saved their runs, or at once."""
        with suppress(KeyboardInterrupt):  # a second Ctrl-C does not wait
            for worker in self.workers:
                worker.process.terminate() if gently else worker.process.kill()
            deadline = time.monotonic() + GRACE
            for worker in self.workers:
                worker.process.join(max(0.0, deadline - time.monotonic()))
        for worker in self.workers:
            worker.process.kill()


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"{name} (not enough memory?)" if name == "SIGKILL" else name
    return f"exit code {code}"


def _work(
    events: Connection,
    path: Path,
    wanted: Sequence[Member],
    backend: str,
    options: EngineOptions,
    began: float,
) -> None:
    """Train members until all have ended. The process ends with its parent."""
    from arm_cli.sweep.training import Stopped

    _end_with_parent()
    folder, ended, waiting = SweepFolder(path), dict[str, Result](), False
    while remaining := [member for member in wanted if not _ended(folder, member.name, began, ended)]:
        for member in remaining:
            if member.after is not None and not _ended(folder, member.after, began, ended):
                continue
            with folder.claim(member.name) as mine:
                # Another process may have trained it since.
                if not mine or _ended(folder, member.name, began, ended):
                    continue
                events.send(Event(kind="started", member=member.name))
                try:
                    result = _train(folder, member, backend, options, ended)
                except Stopped:
                    return
                folder.record(member.name, result)
                events.send(
                    Event(kind="failed" if result.error else "finished", member=member.name, result=result)
                )
            waiting = False
            break
        else:
            if not waiting:
                events.send(Event(kind="waiting"))
            waiting = True
            time.sleep(POLL)


def _ended(folder: SweepFolder, name: str, began: float, ended: dict[str, Result]) -> bool:
    """Whether a member needs no training: it has finished, or failed since the sweep was started."""
    if name not in ended:
        result = folder.result(name)
        if result is not None and (result.error is None or result.ended >= began):
            ended[name] = result
    return name in ended


def _train(
    folder: SweepFolder,
    member: Member,
    backend: str,
    options: EngineOptions,
    ended: Mapping[str, Result],
) -> Result:
    from arm_cli.sweep.training import Stopped, train_member
    from arm_core.engine.registry import choose_backend

    if member.after is not None and ended[member.after].error:
        return Result(error=f"its pretraining, {member.after}, failed", ended=time.time())
    try:
        return train_member(folder, member, choose_backend(backend), options)
    except Stopped:
        raise
    except Exception as error:  # whatever it is, the other members are trained
        return Result(error=f"{type(error).__name__}: {error}", ended=time.time())


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started in the block ignore Ctrl-C, which a terminal sends to the whole group.

    Only this process handles it, after the end of the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the block."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_with_parent() -> None:
    """In a new process: save and exit when the process that started it has ended, for whatever reason."""
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def on_cpu(backend: str, options: EngineOptions) -> bool:
    """Whether these options select a CPU."""
    from arm_core.engine.registry import choose_backend

    device = options.device if options.device != "auto" else choose_backend(backend).devices()[0]
    return device == "cpu"
