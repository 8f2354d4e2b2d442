"""The search for the kernels' constants."""

from dataclasses import replace
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core", reason="needs MLX")

from arm_core.engine.scan_timing import ScanShape  # noqa: E402
from arm_core.model.spec import ClassifierSpec  # noqa: E402
from arm_mlx import scan as scans  # noqa: E402
from arm_mlx import scan_timer  # noqa: E402
from arm_mlx.metal.tuning import MAX_OWN_VALUES, STATES, TABLE, Tuning, candidates  # noqa: E402


@pytest.mark.parametrize("states", STATES)
def test_candidates_are_within_the_limits_and_hold_the_entry_of_the_table(states: int) -> None:
    found = list(candidates(states))
    assert len(set(found)) == len(found) >= 4
    entry = TABLE["any"][states]
    own = states // entry.lanes * (entry.chunk + 1)
    if own <= MAX_OWN_VALUES:
        assert replace(entry, chosen_by=Tuning.chosen_by) in found


def test_a_search_prints_entries_that_can_be_pasted(
    classifier_spec: ClassifierSpec, metal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = "gpu"
    if metal is not None:
        device = "cpu"
        usable = replace(scans.IMPLEMENTATIONS["metal"], unusable=lambda device: None)
        monkeypatch.setitem(scans.IMPLEMENTATIONS, "metal", usable)
    wanted = [Tuning(states=16, lanes=4, simdgroups=s, chunk=8) for s in (1, 2)]
    monkeypatch.setattr(scan_timer, "candidates", lambda states: wanted)
    timer = scan_timer.MlxScanTimer(device)
    found = list(timer.tune(ScanShape(spec=classifier_spec, batch=1), repeats=1))
    assert len(found) == len(wanted)
    for (entry, times), tuning in zip(found, wanted, strict=True):
        assert min(times.forward + times.both) > 0
        ((_, row),) = eval(f"{{{entry}}}", {"Tuning": Tuning}).items()
        assert row[16] == replace(tuning, chosen_by=row[16].chosen_by)
        assert row[16].chosen_by.startswith(f"{timer.device}, mlx ")
