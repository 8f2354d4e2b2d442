"""`arm predict`, `probe` and `models`: patterns, CSV, a page, ImageNet's names; probes on the digits."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from converting import arm
from PIL import Image

from arm_core.data.imagenet import imagenet_names, imagenet_synsets
from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ClassifierSpec, EncoderSpec

SPEC = ClassifierSpec(encoder=EncoderSpec(width=16, depth=1, patch=8), classes=3, image_size=(16, 16))


@pytest.fixture
def folder(tmp_path):
    metadata = {"classes": json.dumps(["n1", "n2", "n3"]), "class_names": json.dumps(["cat", "dog", "<b>"])}
    write_model(tmp_path / "model", SPEC, initial_parameters(SPEC, 0), metadata=metadata)
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
    return tmp_path


def test_predictions_have_folder_names_and_readable_names(folder):
    result = arm("predict", folder / "model", folder / "images", "--json", "--top", 2)
    rows = json.loads(result.stdout)
    assert len(rows) == 3
    assert {one["class"]: one["name"] for row in rows for one in row["top"]}.items() <= {
        "n1": "cat", "n2": "dog", "n3": "<b>"}.items()  # fmt: skip
    text = arm("predict", folder / "model", folder / "images", "--top", 1).stdout
    assert text.count("%") == 3
    assert "n1" not in text


def test_a_quoted_pattern_is_expanded(folder):
    result = arm("predict", folder / "model", f"{folder}/images/[01].png", "--json")
    assert [row["image"] for row in json.loads(result.stdout)] == [f"{folder}/images/{i}.png" for i in (0, 1)]
    missing = arm("predict", folder / "model", f"{folder}/images/*.jpg")
    assert missing.exit_code == 2
    assert "no file matches this pattern" in missing.stderr


def test_csv_has_a_row_for_each_rank(folder):
    result = arm("predict", folder / "model", folder / "images", "--csv", "--top", 2)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert len(rows) == 6
    assert [row["rank"] for row in rows] == ["1", "2"] * 3
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)


def test_the_page_holds_every_image_and_escapes_names(folder):
    arm("predict", folder / "model", folder / "images", "--html", folder / "out.html")
    page = (folder / "out.html").read_text()
    assert page.count('<img src="data:image/jpeg;base64,') == 3
    assert "&lt;b&gt;" in page
    assert "<b>cat" in page or "<b>dog" in page or "<b>&lt;b&gt;" in page
    assert "http" not in page


def test_imagenets_classes_are_a_thousand_unique_names_in_the_order_of_their_folders():
    synsets, names = imagenet_synsets(), imagenet_names()
    assert len(set(synsets)) == len(set(names)) == 1000
    assert list(synsets) == sorted(synsets)
    assert (synsets[0], names[0]) == ("n01440764", "tench")
    assert (synsets[207], names[207]) == ("n02099601", "golden retriever")
    assert (synsets[999], names[999]) == ("n15075141", "toilet tissue")


def test_a_probe_reports_both_accuracies_with_intervals(tmp_path):
    spec = ClassifierSpec(encoder=EncoderSpec(width=16, depth=1, patch=8), classes=10, image_size=(16, 16))
    write_model(tmp_path / "m", spec, initial_parameters(spec, 0))
    result = arm("probe", tmp_path / "m", "--data", "digits", "--json")
    found = json.loads(result.stdout)["results"]["model"]
    for kind in ("k-NN", "linear"):
        assert found[kind]["low"] < found[kind]["accuracy"] < found[kind]["high"]
        assert found[kind]["total"] == 400
    assert found["linear"]["accuracy"] > 0.15  # chance is 0.1


def test_models_lists_presets_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("ARM_VISION_CACHE", str(tmp_path))
    import arm_convert.published as published

    def refuse(repository):
        raise ValueError("no network")

    monkeypatch.setattr(published, "_ask_hub", refuse)
    found = json.loads(arm("models", "--json").stdout)
    assert found["presets"]["base"] == {"pretraining": 99243008, "classifier": 85031656}
    assert found["unavailable"] == "no network"
    assert "not available: no network" in arm("models").stdout
