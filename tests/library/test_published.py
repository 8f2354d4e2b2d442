"""Published checkpoints by name, through the real huggingface_hub against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub, part of the dev extra")

from arm_hub import serve
from converting import official_checkpoint

NAME = "official/arm_b_finetune"
CALL = """
import json, sys
import arm_vision
{code}
"""


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "hub/OliverRen/ARM"
    folder.mkdir(parents=True)
    official_checkpoint(tmp_path).rename(folder / "arm_b_finetune.pth")
    (folder / "README.md").write_text("weights")
    with serve(tmp_path / "hub") as served:
        yield served


def run(tmp_path, code: str, url: str, *, fails: bool = False) -> str:
    """In a separate process, since huggingface_hub reads its settings at import."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(tmp_path / "hf"),
        "ARM_VISION_CACHE": str(tmp_path / "arm"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", CALL.format(code=code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout.splitlines()[-1]


def test_checkpoints_of_the_official_repository_are_listed_by_name(hub, tmp_path):
    code = "print(json.dumps([[m.name, m.address] for m in arm_vision.list_models()]))"
    expected = [[f"{NAME}.pth", "hf://OliverRen/ARM/arm_b_finetune.pth"]]
    assert json.loads(run(tmp_path, code, hub.url)) == expected
    # Without a network, the last known list is used.
    assert json.loads(run(tmp_path, code, "http://127.0.0.1:9")) == expected


def test_the_first_list_needs_a_network(tmp_path):
    error = run(tmp_path, "arm_vision.list_models()", "http://127.0.0.1:9", fails=True)
    assert "ValueError: hf://OliverRen/ARM" in error.splitlines()[-1]


def test_a_published_name_is_pulled_converted_and_found_again_offline(hub, tmp_path):
    code = (
        f"print(json.dumps([str(arm_vision.pull({NAME!r})), arm_vision.load_model({NAME!r}).spec.classes]))"
    )
    folder, classes = json.loads(run(tmp_path, code, hub.url))
    assert sorted(path.name for path in Path(folder).iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert json.loads(run(tmp_path, code, "http://127.0.0.1:9")) == [folder, classes]


def test_an_interrupted_download_is_resumed(hub, tmp_path):
    hub.cut_after = 20_000
    code = f"print(json.dumps(str(arm_vision.pull({NAME!r}, {str(tmp_path / 'out')!r}))))"
    assert json.loads(run(tmp_path, code, hub.url)) == str(tmp_path / "out")
    downloads = [path for method, path, _ in hub.requests if method == "GET" and "resolve" in path]
    assert len(downloads) >= 2


def test_an_unknown_name_lists_near_matches(hub, tmp_path):
    error = run(tmp_path, "arm_vision.load_model('official/arm_b_finetun')", hub.url, fails=True)
    assert f"did you mean {NAME}.pth?" in error.splitlines()[-1]
    error = run(tmp_path, "arm_vision.pull('tiny')", hub.url, fails=True)
    assert "expected a published name" in error.splitlines()[-1]
