"""The official code's results, compared with the emulated Metal kernels. On a Mac, the same tests run outside
this folder with the real kernels."""

from dataclasses import replace
from typing import Any

import golden
import pytest
from test_golden_engines import SETS, TOLERANCE, beyond_tolerance, computed

import arm_mlx

pytest.importorskip("mlx.core", reason="needs MLX")

from arm_mlx import scan as scans


@pytest.mark.parametrize("name", SETS)
def test_outputs_and_gradients_are_the_official_ones(
    name: str, emulator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    usable = replace(scans.IMPLEMENTATIONS["metal"], unusable=lambda device: None)
    monkeypatch.setitem(scans.IMPLEMENTATIONS, "metal", usable)
    data = golden.load(name)
    outputs, gradients = computed(arm_mlx.backend, "cpu", "metal", name)
    assert emulator.launches
    assert not beyond_tolerance(name, data, outputs)
    for what, errors in (
        ("gradients", data.gradient_errors(gradients)),
        ("gradient norms", data.gradient_norm_errors(gradients)),
    ):
        assert errors
        assert not {key: error for key, error in errors.items() if not error < TOLERANCE[what]}
