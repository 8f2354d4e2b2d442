"""Identifies a data set, so that a resumed run detects other images or classes."""

from __future__ import annotations

import hashlib
from typing import Any

from arm_core.data.sources import ImageSource, ListedSource


def identity(source: ImageSource) -> dict[str, Any]:
    """Classes in order, number of images, and a hash of their relative names and labels, as JSON values.

    It does not depend on the location of the data. The hash is None for generated images, without names.
    """
    names = None
    if isinstance(source, ListedSource):
        found = hashlib.sha256()
        for name, label in zip(source.names, source.labels.tolist(), strict=True):
            found.update(name.encode(errors="surrogateescape") + b"\0%d\0" % label)
        names = found.hexdigest()
    return {"classes": list(source.classes), "images": len(source), "names": names}


def differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[str | None, str | None]:
    """Differences from the recorded data: in the classes (the meaning of labels), and in the images.

    Each is a part of a sentence, or None if there is no difference.
    """
    classes = images = None
    old, new = before.get("classes"), now["classes"]
    if old != new:
        old = old if isinstance(old, list) else []
        lost, added = sorted(set(old) - set(new)), sorted(set(new) - set(old))
        parts = [f"without {', '.join(map(str, lost[:3]))}"] * bool(lost)
        parts += [f"with {', '.join(added[:3])}"] * bool(added)
        classes = f"{len(new)} classes, {' and '.join(parts) or 'in another order'}; the run has {len(old)}"
    if before.get("images") != now["images"]:
        images = f"{now['images']} images instead of {before.get('images')}"
    elif before.get("names") != now["names"]:
        images = f"{now['images']} images of other names or labels"
    return classes, images
