"""What all engines do alike around their scan implementations."""

from __future__ import annotations

from collections.abc import Mapping


def choose_scan(scans: Mapping[str, str | None], requested: str) -> str:
    """Resolve a scan name against what a backend offers: `auto` takes the first usable one."""
    if requested == "auto":
        usable = [name for name, why in scans.items() if why is None]
        if not usable:
            raise ValueError("no scan can run here: " + "; ".join(f"{n}: {why}" for n, why in scans.items()))
        return usable[0]
    if requested not in scans:
        raise ValueError(f"unknown scan {requested!r} for this backend; known are auto, {', '.join(scans)}")
    if why := scans[requested]:
        raise ValueError(f"scan {requested!r} cannot run here: {why}")
    return requested
