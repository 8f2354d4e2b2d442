"""--deterministic: what is fixed, recorded, and kept when a run is resumed."""

import os

import pytest

from arm_core.engine.protocol import EngineOptions
from arm_core.training.determinism import pin

RECORD = {"deterministic": "True", "threads": "3", "backend": "torch"}


def test_other_runs_are_unchanged():
    options = EngineOptions(threads=5)
    assert pin(options, {}) == options
    assert pin(options, {"threads": "3"}) == options


def test_a_deterministic_run_has_a_fixed_number_of_threads():
    assert pin(EngineOptions(deterministic=True), {}).threads == os.cpu_count()
    assert pin(EngineOptions(deterministic=True, threads=7), {}).threads == 7
    assert pin(EngineOptions(deterministic=True), {"threads": "3"}).threads == os.cpu_count()


def test_a_resumed_deterministic_run_keeps_its_number_of_threads():
    for options in (EngineOptions(), EngineOptions(threads=3), EngineOptions(deterministic=True)):
        assert pin(options, RECORD) == EngineOptions(deterministic=True, threads=3)
    with pytest.raises(ValueError, match="--threads 4: this run is deterministic with 3 threads"):
        pin(EngineOptions(threads=4), RECORD)
