"""`arm bench scan` on the command line, and the timers of the core behind it."""

import importlib.util
import json

import numpy as np
import pytest
from click.testing import CliRunner

from arm_cli.main import main
from arm_core.engine.scan_timing import ScanShape, median, repeat
from arm_core.model.presets import classifier_preset
from arm_core.model.spec import ClassifierSpec, EncoderSpec, PretrainSpec

QUICK = ("--model", "tiny", "--stage", "pretrain", "--batch", "1", "--repeats", "2", "--device", "cpu")


def bench(*words: str):
    return CliRunner().invoke(main, ["bench", "scan", *words])


@pytest.mark.parametrize(("backend", "package"), [("mlx", "mlx"), ("torch", "torch")])
def test_times_and_rates_are_reported_for_the_requested_scan(backend: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    result = bench(*QUICK, "--backend", backend, "--scan", "cpu", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["backend"] == backend
    (row,) = report["results"]["pretrain"]
    assert (row["scan"], row["shape"], row["repeats"]) == ("cpu", "K=1 B=1 L=128 D=192 N=16", 2)
    assert row["forward_ms"] > 0
    assert row["spread_ms"][0] <= row["forward_backward_ms"] <= row["spread_ms"][1]
    assert row["forward_share"] == pytest.approx(row["forward_gb_per_s"] / row["copy_gb_per_s"])


def test_auto_measures_every_scan_that_can_run_and_prints_a_table() -> None:
    pytest.importorskip("mlx.core", reason="needs MLX")
    result = bench(*QUICK, "--backend", "mlx")
    assert result.exit_code == 0, result.output
    assert "device CPU, model tiny, float32" in result.stdout
    lines = [line.split()[0] for line in result.stdout.splitlines() if " ms " in line]
    assert lines == ["cpu", "reference"]


def test_unavailable_scans_and_searches_are_refused_in_one_line() -> None:
    pytest.importorskip("mlx.core", reason="needs MLX")
    for words, sentence in (
        (("--scan", "metal"), "scan 'metal' cannot run here: its kernels run on Apple GPUs"),
        (("--tune",), "scan 'metal' cannot run here: its kernels run on Apple GPUs"),
        (("--scan", "fast"), "unknown scan 'fast' for this backend"),
    ):
        result = bench(*QUICK, "--backend", "mlx", *words)
        assert result.exit_code == 2
        assert sentence in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_torch_has_no_constants_to_search() -> None:
    pytest.importorskip("torch", reason="needs torch")
    result = bench(*QUICK, "--backend", "torch", "--tune")
    assert result.exit_code == 2
    assert "backend 'torch' has no constants to search" in result.stderr


def test_a_shape_matches_a_layer_and_counts_each_byte_once() -> None:
    shape = ScanShape(spec=classifier_preset("base"), batch=2)
    assert str(shape) == "K=4 B=2 L=197 D=768 N=16"
    arrays = shape.arrays()
    per_token = sum(arrays[name].nbytes for name in ("u", "dt", "B", "C", "z"))
    assert shape.forward_bytes == per_token + arrays["z"].nbytes  # the result is as large as z
    assert shape.both_bytes == shape.forward_bytes + 2 * per_token + arrays["z"].nbytes
    assert ScanShape(spec=shape.spec, batch=2, bfloat16=True).both_bytes == shape.both_bytes // 2
    assert shape.order().shape == (4, 197)
    assert (arrays["A"] < 0).all()


@pytest.mark.parametrize("spec", [PretrainSpec, ClassifierSpec])
def test_arrays_have_the_sizes_of_the_shape(spec) -> None:
    encoder = EncoderSpec(width=32, depth=6, patch=4)
    options = {"image_size": (24, 24)} | ({"cluster": (2, 2)} if spec is PretrainSpec else {"classes": 2})
    shape = ScanShape(spec=spec(encoder=encoder, **options), batch=3)
    K, B, L, D, N = shape.sizes
    sizes = {"u": (K, B, L, D), "B": (K, B, L, N), "A": (K, D, N), "D": (K, D), "z": (B, L, D)}
    for name, size in sizes.items():
        assert shape.arrays()[name].shape == size
        assert shape.arrays()[name].dtype == np.float32


def test_a_measurement_warms_up_and_stops_after_its_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    assert len(repeat(lambda: runs.append(0), 4)) == 4
    assert len(runs) == 5
    monkeypatch.setattr("arm_core.engine.scan_timing.PATIENCE", 0.0)
    assert len(repeat(lambda: runs.append(0), 4)) == 1
    assert median([3.0, 1.0, 2.0]) == 2.0
