"""The robustness sets of ImageNet, as small made folders whose right answer is computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_cli_evaluate import SIZE

from arm_cli.main import main
from arm_core.data import EvalTransform, Item
from arm_core.files.model_folder import read_model, write_model
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward
from arm_core.model.spec import ClassifierSpec, EncoderSpec
from arm_core.training.robustness import ALEXNET_ERRORS, SEVERITIES, mean_corruption_error, real_correct

CLASSES = ("n01", "n02", "n03", "n04", "n05")


def arm(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


def save(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)).save(path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    spec = ClassifierSpec(encoder=EncoderSpec(width=32, depth=2, patch=4), classes=5, image_size=SIZE)
    parameters = initial_parameters(spec, 3)
    parameters["head.weight"] = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
    write_model(tmp_path / "model", spec, parameters, metadata={"classes": json.dumps(CLASSES)})
    return tmp_path / "model"


def logits_of(model: Path, files: list[Path]) -> np.ndarray:
    opened = read_model(model)
    items = [Item(image=file.read_bytes(), label=0, name=file.name) for file in files]
    return forward(opened.spec, opened.load(), np.stack([EvalTransform()(item, SIZE) for item in items]))[
        "logits"
    ]


def evaluated(model: Path, data: Path, *words: object) -> dict:
    result = arm("evaluate", model, "--data", data, *words, "--json")
    assert result.exit_code == 0, (result.output, result.stderr)
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
@pytest.mark.filterwarnings("ignore:.*has 200 classes")
def test_the_classes_that_a_subset_lacks_are_ignored(name: str, model: Path, tmp_path: Path) -> None:
    subset = ("n02", "n05")
    files = [tmp_path / "data" / subset[i % 2] / f"{i:02d}.png" for i in range(16)]
    for i, file in enumerate(files):
        save(file, i)
    values = logits_of(model, files)
    labels = np.array([(1, 4)[i % 2] for i in range(16)])
    restricted = np.array([1, 4])[values[:, [1, 4]].argmax(-1)]
    found = evaluated(model, tmp_path / "data", "--labels", name)
    assert found["top1"] == pytest.approx((restricted == labels).mean())
    plain = evaluated(model, tmp_path / "data")
    assert plain["top1"] == pytest.approx((values.argmax(-1) == labels).mean())
    assert plain["top1"] < found["top1"]  # else the test shows nothing
    assert {row["predicted"] for row in found["confusions"]} <= set(subset)


@pytest.mark.filterwarnings("default:.*has 1000 classes")
def test_a_subset_of_another_size_is_noticed(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "data" / "n01" / "a.png", 0)
    result = arm("evaluate", model, "--data", tmp_path / "data", "--labels", "imagenet-sketch", "--json")
    assert result.exit_code == 0
    assert "imagenet-sketch has 1000 classes, found 1" in result.stderr


def test_the_folders_of_imagenet_v2_are_numbers_of_classes(model: Path, tmp_path: Path) -> None:
    files = [tmp_path / "data" / str(i % 5) / f"{i}.png" for i in range(10)]
    for i, file in enumerate(files):
        save(file, i)
    found = evaluated(model, tmp_path / "data", "--labels", "imagenet-v2")
    right = logits_of(model, files).argmax(-1) == np.arange(10) % 5
    assert found["top1"] == pytest.approx(right.mean())
    assert found["images"] == 10
    assert arm("evaluate", model, "--data", tmp_path / "data").exit_code == 2


def test_real_takes_any_label_of_an_image_for_right_and_leaves_images_without_out(
    model: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "data" / CLASSES[i % 5] / f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(10)]
    for i, file in enumerate(files):
        save(file, i)
    predicted = logits_of(model, files).argmax(-1).tolist()
    # Images 1 and 2 have the prediction among others, 3 has it alone, 4 and 5 have none, the rest is wrong.
    real = [[(p + 1) % 5, p] for p in predicted[:2]] + [[predicted[2]], [], []]
    real += [[(p + 1) % 5, (p + 2) % 5] for p in predicted[5:]]
    (tmp_path / "real.json").write_text(json.dumps(real))
    words = ("--labels", "imagenet-real", "--real-labels", tmp_path / "real.json")
    found = evaluated(model, tmp_path / "data", *words)
    assert (found["real_top1"], found["real_images"]) == (3 / 8, 8)
    assert "ReaL 37.50 %" in arm("evaluate", model, "--data", tmp_path / "data", *words).stdout
    assert arm("evaluate", model, "--data", tmp_path / "data", *words[:2]).exit_code == 2
    (tmp_path / "real.json").write_text('{"a": 1}')
    refused = arm("evaluate", model, "--data", tmp_path / "data", *words)
    assert (refused.exit_code, "expected a list of lists" in refused.stderr) == (2, True)


def test_real_needs_the_names_of_the_validation_images() -> None:
    class Source:
        names = ("a.jpg",)

    class Found:
        indices = predicted = np.array([0])

    with pytest.raises(ValueError, match=r"a\.jpg: expected a file of ImageNet's validation set"):
        real_correct(Found(), Source(), [[0]])  # type: ignore[arg-type]


def test_the_corruption_error_is_relative_to_alexnet(model: Path, tmp_path: Path) -> None:
    expected = {}
    for name in ("fog", "snow"):
        expected[name] = []
        for severity in SEVERITIES:
            files = [tmp_path / "data" / name / severity / CLASSES[i % 5] / f"{i}.png" for i in range(5)]
            for i, file in enumerate(files):
                save(file, 100 * len(name) + 10 * int(severity) + i)
            expected[name].append((logits_of(model, files).argmax(-1) != np.arange(5)).mean())
    found = evaluated(model, tmp_path / "data", "--labels", "imagenet-c")
    for name, row in expected.items():
        assert found["errors"][name] == pytest.approx(row)
    by_hand = (sum(expected["fog"]) / (5 * 0.819324) + sum(expected["snow"]) / (5 * 0.866816)) / 2
    assert found["mean_corruption_error"] == pytest.approx(by_hand)
    printed = arm("evaluate", model, "--data", tmp_path / "data", "--labels", "imagenet-c").stdout
    assert "of 2 corruptions; the published measure takes 15" in printed
    (tmp_path / "data" / "fog" / "3").rename(tmp_path / "data" / "fog" / "x")
    refused = arm("evaluate", model, "--data", tmp_path / "data", "--labels", "imagenet-c")
    assert (refused.exit_code, "fog/3: no such folder" in refused.stderr) == (2, True)


def test_alexnet_itself_has_a_corruption_error_of_one() -> None:
    errors = {name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert len(errors) == 15
    assert mean_corruption_error(errors) == pytest.approx(1.0)


def test_the_label_sets_of_the_command_are_those_of_the_core() -> None:
    from arm_cli.evaluate import LABEL_SETS
    from arm_core.training.robustness import LabelSet

    assert tuple(LabelSet) == LABEL_SETS
