"""`arm evaluate`: its protocol, its numbers for each image, and its page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from arm_cli.main import main
from arm_core.data import EvalTransform, ImageFolder
from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward
from arm_core.model.spec import ClassifierSpec, EncoderSpec, PretrainSpec

CLASSES = ("ant", "bee", "<cat>")
SIZE = (24, 24)


def arm(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A random classifier of three classes, and 10 images for it."""
    monkeypatch.chdir(tmp_path)
    spec = ClassifierSpec(encoder=EncoderSpec(width=32, depth=2, patch=4), classes=3, image_size=SIZE)
    parameters = initial_parameters(spec, 3)
    parameters["head.weight"] = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    write_model(tmp_path / "model", spec, parameters, metadata={"classes": json.dumps(CLASSES)})
    for i in range(10):
        path = tmp_path / "data" / CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (30, 26, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return tmp_path


def logits(place: Path, transform: EvalTransform, flip: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the reference model for each image, and the labels."""
    from arm_core.files.model_folder import read_model

    model = read_model(place / "model")
    source = ImageFolder(place / "data", classes=CLASSES)
    images = np.stack([transform(source.item(i), SIZE) for i in range(len(source))])
    images = images[:, :, ::-1] if flip else images
    return forward(model.spec, model.load(), images)["logits"], source.labels


def test_the_json_holds_the_protocol_and_the_numbers_of_each_class(place: Path) -> None:
    result = arm("evaluate", "model", "--data", "data", "--batch-size", 4, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    values, labels = logits(place, EvalTransform())
    predicted = values.argmax(-1)
    assert found["top1"] == pytest.approx((predicted == labels).mean())
    assert found["images"] == 10
    assert found["top1_interval"][0] <= found["top1"] <= found["top1_interval"][1]
    for row, name in zip(found["per_class"], CLASSES, strict=True):
        own = labels == CLASSES.index(name)
        assert row == {
            "class": name,
            "images": own.sum(),
            "top1": pytest.approx((predicted == labels)[own].mean()),
        }
    assert sum(row["images"] for row in found["confusions"]) == (predicted != labels).sum()
    protocol = found["protocol"]
    assert protocol["image_size"] == [24, 24]
    assert protocol["crop_fraction"] == 0.875
    assert {"data": "data", "tta": "none", "weights": "raw", "processes": 1}.items() <= protocol.items()
    assert protocol["interpolation"] == "bicubic"


@pytest.mark.parametrize("flags", [["--crop", "1.0"], ["--tta", "flip"]])
def test_the_protocol_is_followed(place: Path, flags: list[str]) -> None:
    result = arm("evaluate", "model", "--data", "data", *flags, "--json")
    found = json.loads(result.stdout)
    values, labels = logits(
        place, EvalTransform(crop_fraction=1.0) if flags[0] == "--crop" else EvalTransform()
    )
    if flags[0] == "--tta":
        values = (values + logits(place, EvalTransform(), flip=True)[0]) / 2
    shifted = values - values.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - shifted[np.arange(10), labels]
    assert found["loss"] == pytest.approx(losses.mean(), rel=1e-4)
    plain = json.loads(arm("evaluate", "model", "--data", "data", "--json").stdout)
    assert plain["loss"] != pytest.approx(found["loss"], rel=1e-4)


def test_a_model_is_evaluated_at_another_image_size(place: Path) -> None:
    result = arm("evaluate", "model", "--data", "data", "--image-size", 32, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["protocol"]["image_size"] == [32, 32]


def test_the_page_shows_confusions_and_mistakes_with_names_escaped(place: Path) -> None:
    result = arm("evaluate", "model", "--data", "data", "--html", "page.html")
    assert result.exit_code == 0, result.output
    page = (place / "page.html").read_text()
    values, labels = logits(place, EvalTransform())
    assert page.count("<figure>") == (values.argmax(-1) != labels).sum()
    assert page.count('<img class=map alt="confusion matrix"') == 1
    assert "&lt;cat&gt;" in page
    assert "<cat>" not in page
    assert "top-1" in result.stdout
    assert "most frequent confusions: " in result.stdout


def test_few_classes_are_printed_as_a_table(place: Path) -> None:
    values, labels = logits(place, EvalTransform())
    lines = [line.strip() for line in arm("evaluate", "model", "--data", "data").stdout.splitlines()]
    for label, name in enumerate(CLASSES):
        right = (values.argmax(-1) == labels)[labels == label]
        (line,) = [line for line in lines if line.startswith(name) and line.endswith("%")]
        assert line.split()[1:] == [str(len(right)), f"{100 * right.mean():.1f}", "%"]


def test_an_interrupted_call_continues_when_it_is_repeated(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arm_core.training import evaluation

    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    words = ("evaluate", "model", "--data", "data", "--batch-size", 3)
    whole = json.loads(arm(*words, "--json").stdout)
    counts, before = [], evaluation.classes_before

    def interrupting(*arguments):
        counts.append(1)
        if len(counts) == 3:
            raise KeyboardInterrupt
        return before(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "classes_before", interrupting)
        stopped = arm(*words, "--json")
    assert stopped.exit_code != 0
    assert "repeat the command to continue" in stopped.stderr
    other = arm(*words[:-1], 2, "--json")
    assert "continues" not in other.stderr  # another protocol
    again = arm(*words, "--json")
    assert "data: continues after 6 images" in again.stderr
    found = json.loads(again.stdout)
    for result in (whole, found):
        del result["images_per_s"]
    assert found == whole
    assert "continues" not in arm(*words, "--json").stderr


def test_any_format_of_images_is_evaluated(place: Path) -> None:
    rows = [f"{name}/{path.name},{name}" for name in CLASSES for path in (place / "data" / name).iterdir()]
    (place / "data" / "list.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    folder, table = (
        json.loads(arm("evaluate", "model", "--data", path, "--json").stdout)
        for path in ("data", "data/list.csv")
    )
    assert folder["per_class"] == table["per_class"]
    assert folder["loss"] == pytest.approx(table["loss"], rel=1e-6)


def test_a_pretraining_model_has_a_loss_and_no_classes(place: Path) -> None:
    spec = PretrainSpec(
        encoder=EncoderSpec(width=32, depth=6, patch=4), image_size=SIZE, cluster=(2, 2),
        decoder_width=16, decoder_depth=2, decoder_heads=2,
    )  # fmt: skip
    write_model(place / "pre", spec, initial_parameters(spec, 0))
    found = json.loads(arm("evaluate", "pre", "--data", "data", "--json").stdout)
    assert set(found) == {"model", "images", "loss", "images_per_s", "protocol"}
    assert arm("evaluate", "pre", "--data", "data").stdout.startswith("loss ")
    refused = arm("evaluate", "pre", "--data", "data", "--tta", "flip")
    assert (refused.exit_code, "has no classes" in refused.stderr) == (2, True)
