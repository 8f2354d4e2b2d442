"""The CUDA benchmarks: their peer computes our mixer, and a trial of each writes its result files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from torch_scans import assert_close  # noqa: E402

from arm_core.model.parameters import initial_parameters  # noqa: E402
from arm_core.model.spec import DIRECTIONS, ClassifierSpec, EncoderSpec  # noqa: E402
from arm_core.model.tokens import direction_orders  # noqa: E402
from arm_cuda.layers import Mixer  # noqa: E402

ROOT = Path(__file__).parents[2]


def script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = ":".join(str(ROOT / part) for part in ("", "backends/cuda"))
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / name, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("directions", [1, 2, 4])
def test_the_official_arrangement_computes_our_mixer(
    directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from cuda_peers import Official, official_mixer

    spec = ClassifierSpec(
        encoder=EncoderSpec(width=32, depth=1), classes=2, image_size=(48, 32),
        scan_directions=DIRECTIONS[directions],
    )  # fmt: skip
    mixer = Mixer(spec.encoder, directions, "reference")
    prefix, values = "layers.0.mixer.", initial_parameters(spec, seed=0)
    state = {n[len(prefix) :]: torch.from_numpy(v) for n, v in values.items() if n.startswith(prefix)}
    mixer.load_state_dict(state)
    order = torch.from_numpy(direction_orders(spec))
    x = torch.randn(2, spec.tokens, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    official = Official.on("cpu")
    expected, found = mixer(x, order), official_mixer(mixer, x, spec.grid, official=official)
    assert_close(found.detach(), expected.detach(), "out", 1e-5)
    tensors = [x, *mixer.parameters()]
    for f, e in zip(
        *(torch.autograd.grad(o.square().sum(), tensors) for o in (found, expected)), strict=True
    ):
        assert_close(f, e, "gradient", 1e-4)


@pytest.mark.parametrize("name", ["cuda_scan", "cuda_step"])
def test_a_trial_without_a_gpu_writes_its_tables(name: str, tmp_path: Path) -> None:
    done = script(f"{name}.py", "--device", "cpu", "--tiny", "--output", str(tmp_path), "--commit", "abc")
    assert done.returncode == 0, done.stderr
    (found,) = tmp_path.glob(f"{name}-*.json")
    results = json.loads(found.read_text())
    assert results["circumstances"]["versions"]["torch"]
    assert results["circumstances"]["commit"] == "abc"
    assert "torch loops in place of mamba-ssm" in results["circumstances"]["peers"]
    text = found.with_suffix(".md").read_text()
    assert text.startswith(f"# {name}, ")
    assert text.count("\n## ") == (4 if name == "cuda_scan" else 2)
    assert all(line in text for line in done.stdout.splitlines() if line.startswith("|"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells of a missing GPU")
def test_without_a_gpu_the_benchmarks_print_how_to_try_them() -> None:
    done = script("cuda_scan.py")
    assert done.returncode == 1
    assert done.stderr == "needs an NVIDIA GPU; a trial of the script without one: --device cpu --tiny\n"


def test_peers_are_built_for_one_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from cuda_builds import for_one_architecture

    setup = (
        '        cc_flag.append("-gencode")\n        cc_flag.append("arch=compute_80,code=sm_80")\n'
        '        if new:\n            cc_flag.append("-gencode")\n'
        '            cc_flag.append("arch=compute_90,code=sm_90")\n'
        '        if newer:\n            cc_flag.append("-gencode")\n'
        '            cc_flag.append("arch=compute_100,code=sm_100")\n        done()\n'
    )
    assert for_one_architecture(setup, "90") == (
        '        pass\n        if new:\n            cc_flag.append("-gencode")\n'
        '            cc_flag.append("arch=compute_90,code=sm_90")\n'
        "        if newer:\n            pass\n        done()\n"
    )
