"""Images that cannot be decoded: counted, named, and replaced by others, up to a limit."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from enum import StrEnum

from arm_core.data.decode import BadImage

LIMIT = 0.01
"""Largest fraction of bad images; a single one is always accepted."""


class OnBadImage(StrEnum):
    """How training treats an image that cannot be decoded."""

    FAIL = "fail"
    """Save and stop; the message names the image."""
    SKIP = "skip"
    """Use the next image of the data instead; count and name the bad one."""


class BadImages:
    """The bad images of a data set of `total` images, for several threads.

    known: sentences about images that were found before.
    """

    def __init__(self, total: int, known: Iterable[str] = ()) -> None:
        self._total, self._known = total, dict.fromkeys(known)
        self._new: list[str] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._known)

    def add(self, sentences: Iterable[str]) -> None:
        """Note bad images; known ones count once. Raises BadImage if there are too many."""
        with self._lock:
            new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in self._known]
            self._known.update(dict.fromkeys(new))
            self._new += new
            if len(self._known) > max(1, LIMIT * self._total):
                raise BadImage(
                    f"{len(self._known)} of {self._total} images cannot be decoded, more than "
                    f"{100 * LIMIT:g} %; the last one: {next(reversed(self._known))}"
                )

    def take_new(self) -> list[str]:
        """Sentences that were added since the last call."""
        with self._lock:
            new, self._new = self._new, []
            return new
