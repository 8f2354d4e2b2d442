"""The record of a run's data in `RUN/data.json`: its images, its classes, and bad images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from arm_core.data.bad_images import BadImages
from arm_core.data.identity import differences, identity
from arm_core.data.sources import ImageSource
from arm_core.engine.ranks import Ranks, lead
from arm_core.files.atomic import replace_text
from arm_core.files.reading import MAX_JSON, read_text
from arm_core.training.checkpoint import Warn
from arm_core.training.run_folder import DATA, RunFolder


class DataRecord:
    """The data of a run, compared with the record from when it was started or last resumed.

    A run without a record (of an older version) is compared only by the class names of its checkpoint.
    accept: whether other images are recorded in place of the earlier ones, without a warning.
    Raises ValueError for other classes, or classes in another order: the labels would change their meaning.
    """

    def __init__(
        self,
        run: RunFolder,
        sources: Mapping[str, ImageSource | None],
        *,
        accept: bool = False,
        warn: Warn,
    ) -> None:
        self._run, self._warn = run, warn
        now = {name: identity(source) for name, source in sources.items() if source is not None}
        record = _read(run) if run.resumed is not None else {}
        before = {name: record[name] for name in now if isinstance(record.get(name), dict)}
        if run.resumed is not None and "train" not in before and "classes" in run.resumed.metadata:
            before["train"] = {**now["train"], "classes": json.loads(run.resumed.metadata["classes"])}
        for name, known in before.items():
            classes, images = differences(known, now[name])
            if classes is not None:
                raise ValueError(
                    f"{run.path}: the {_WORDS[name]} data have {classes}; expected the same classes"
                )
            if images is not None and not accept:
                warn(
                    f"{run.path}: the {_WORDS[name]} data have {images}; the order of the images changes "
                    "(pass --accept-changed-data to record the new data)"
                )
                now[name] = known
        known = record.get("bad_images", [])
        self.bad_images = [text for text in known if isinstance(text, str)] if isinstance(known, list) else []
        self._identities = now

    def write(self) -> None:
        """Write the record, on the rank that writes."""
        text = json.dumps({**self._identities, "bad_images": self.bad_images}, indent=1)
        if self._run.writes:
            replace_text(self._run.path / DATA, text + "\n")

    def note(self, bad: BadImages | None, ranks: Ranks) -> None:
        """Record and report the images that any rank has skipped since the last call; all ranks call it."""
        if bad is None:
            return
        found = [sentence for own in ranks.gather(bad.take_new()) for sentence in own]
        if new := [sentence for sentence in dict.fromkeys(found) if sentence not in self.bad_images]:
            self.bad_images += new
            lead(ranks, self.write)
            for sentence in new:
                self._warn(f"{sentence}; skipped")
        bad.add(new)
        bad.take_new()


_WORDS = {"train": "training", "eval": "evaluation"}


def _read(run: RunFolder) -> dict[str, Any]:
    path = run.path / DATA
    if not path.exists():
        return {}
    try:
        record = json.loads(read_text(path, MAX_JSON))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it to record the data again") from None
    return record if isinstance(record, dict) else {}
