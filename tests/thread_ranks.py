"""Ranks of one job as threads of this process, for tests of the protocol."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from arm_core.engine.ranks import PeerFailed

PATIENCE = 20.0
"""Seconds that a rank waits for the others before the test fails."""


class Meeting:
    """Shared state of the threads of one job. Every thread that takes part in an exchange gets its values."""

    def __init__(self, world: int) -> None:
        self.changed = threading.Condition()
        self.world, self.given = world, dict[int, str]()
        self.met: list[list[str]] = []
        self.lost = False

    def exchange(self, rank: int, text: str) -> list[str]:
        with self.changed:
            number = len(self.met)
            self.given[rank] = text
            if len(self.given) == self.world:
                self.met.append([self.given[r] for r in range(self.world)])
                self.given.clear()
                self.changed.notify_all()
            self.changed.wait_for(lambda: self.lost or len(self.met) > number, PATIENCE)
            if len(self.met) == number:
                raise PeerFailed("another process of this job has ended")
            return self.met[number]

    def leave(self) -> None:
        with self.changed:
            self.lost = True
            self.changed.notify_all()


@dataclass
class ThreadRanks:
    """`arm_core.engine.ranks.Ranks` in a thread; `calls` counts the exchanges."""

    rank: int
    world: int
    meeting: Meeting
    restarts: int = 0
    calls: int = 0

    def gather(self, value: Any) -> list[Any]:
        self.calls += 1
        return [json.loads(text) for text in self.meeting.exchange(self.rank, json.dumps(value))]

    def close(self) -> None:
        self.gather(None)


def run_ranks(world: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """The result of `work` on each rank, or its error."""
    meeting, results = Meeting(world), [None] * world

    def one(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, world, meeting))
        except BaseException as error:
            results[rank] = error
            meeting.leave()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
