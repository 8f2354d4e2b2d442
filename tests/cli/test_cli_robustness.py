"""The robustness sets of ImageNet, as small made folders whose right answer is computed by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from test_cli_evaluate import SIZE

from arm_cli.main import main
from arm_core.data import EvalTransform, Item
from arm_core.data.imagenet import imagenet_subset, imagenet_synsets, real_labels
from arm_core.data.objectnet import ObjectNet
from arm_core.files.model_folder import read_model, write_model
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward
from arm_core.model.spec import ClassifierSpec, EncoderSpec
from arm_core.training.robustness import (
    ALEXNET_ERRORS,
    SEVERITIES,
    Merged,
    mean_corruption_error,
    real_correct,
)

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


def imagenet_model(folder: Path, classes: tuple[str, ...], head: np.ndarray, bias: np.ndarray) -> Path:
    """A classifier of ImageNet's classes, in any order."""
    spec = ClassifierSpec(encoder=EncoderSpec(width=32, depth=2, patch=4), classes=1000, image_size=SIZE)
    parameters = initial_parameters(spec, 3)
    parameters["head.weight"] = head.astype(np.float32)
    parameters["head.bias"] = bias.astype(np.float32)
    write_model(folder, spec, parameters, metadata={"classes": json.dumps(classes)})
    return folder


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    head = np.random.default_rng(0).normal(size=(1000, 32))
    return imagenet_model(tmp_path_factory.mktemp("model") / "m", imagenet_synsets(), head, np.zeros(1000))


@pytest.mark.parametrize("letter", ["a", "r"])
def test_the_lists_of_classes_are_those_of_timm(letter: str) -> None:
    names, synsets = imagenet_subset(f"imagenet-{letter}"), imagenet_synsets()
    assert len(set(names)) == 200
    assert set(names) < set(synsets)
    assert "n01440764" not in names  # the tench
    assert names[0] == {"a": "n01498041", "r": "n01443537"}[letter]  # stingray, goldfish
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is not installed")
    info = Path(found.origin).parent / "data/_info"
    indices = [int(line) for line in (info / f"imagenet_{letter}_indices.txt").read_text().split()]
    assert [synsets[i] for i in indices] == list(names)


def test_the_shipped_labels_of_real_are_those_of_timm() -> None:
    labels = real_labels()
    assert (len(labels), labels[:5]) == (50_000, [[], [795, 970], [230, 231], [809], [516, 850]])
    assert sum(not row for row in labels) == 3163
    found = importlib.util.find_spec("timm")
    if found is None or found.origin is None:
        pytest.skip("timm is not installed")
    stored = json.loads((Path(found.origin).parent / "data/_info/imagenet_real_labels.json").read_text())
    assert labels == [sorted(row) for row in stored]


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
@pytest.mark.filterwarnings("ignore:.*has 200 classes")
def test_the_classes_that_a_subset_lacks_are_ignored(name: str, imagenet: Path, tmp_path: Path) -> None:
    subset, synsets = imagenet_subset(name), imagenet_synsets()
    inside = [synsets.index(synset) for synset in subset]
    # Two classes, of which the restricted prediction of some image is one: chosen by the predictions.
    files = [tmp_path / f"{i:02d}.png" for i in range(8)]
    for i, file in enumerate(files):
        save(file, i)
    values = logits_of(imagenet, files)
    restricted = np.array(inside)[values[:, inside].argmax(-1)]
    assert (restricted != values.argmax(-1)).any()
    labels = np.where(np.arange(8) % 2, restricted, inside[0])
    for file, label in zip(files, labels.tolist(), strict=True):
        folder = tmp_path / "data" / synsets[label]
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name)
    found = evaluated(imagenet, tmp_path / "data", "--labels", name)
    assert found["top1"] == (restricted == labels).mean() >= 0.5
    plain = evaluated(imagenet, tmp_path / "data")
    assert plain["top1"] == (values.argmax(-1) == labels).mean() < found["top1"]
    assert {row["predicted"] for row in found["confusions"]} <= set(subset)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_images_of_other_classes_than_the_subset_are_refused(
    name: str, imagenet: Path, model: Path, tmp_path: Path
) -> None:
    save(tmp_path / "data" / "n01440764" / "a.png", 0)
    refused = arm("evaluate", imagenet, "--data", tmp_path / "data", "--labels", name)
    assert refused.exit_code == 2
    assert f"class 'n01440764' is not one of the 200 classes of {name}" in refused.stderr
    save(tmp_path / "other" / "n01" / "a.png", 0)
    refused = arm("evaluate", model, "--data", tmp_path / "other", "--labels", name)
    assert refused.exit_code == 2
    assert "n01' is not one of the 200 classes" in refused.stderr


@pytest.mark.filterwarnings("default:.*has 5 classes")
def test_a_subset_of_another_size_is_noticed(model: Path, tmp_path: Path) -> None:
    save(tmp_path / "data" / "n01" / "a.png", 0)
    result = arm("evaluate", model, "--data", tmp_path / "data", "--labels", "imagenet-sketch", "--json")
    assert result.exit_code == 0
    assert "imagenet-sketch has 5 classes, found 1" in result.stderr


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
    refused = arm("evaluate", model, "--data", tmp_path / "data", *words[:2])  # the shipped labels
    assert (refused.exit_code, "image 2 has label 970, the model 5 classes" in refused.stderr) == (2, True)
    (tmp_path / "real.json").write_text('{"a": 1}')
    refused = arm("evaluate", model, "--data", tmp_path / "data", *words)
    assert (refused.exit_code, "expected a list of lists" in refused.stderr) == (2, True)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_shipped_labels_of_real_follow_the_order_of_the_classes(reverse: bool, tmp_path: Path) -> None:
    """A model that always predicts class 809: right for image 4 alone, of four images with labels."""
    classes, bias = imagenet_synsets(), np.zeros(1000)
    bias[809] = 100.0
    if reverse:
        classes, bias = classes[::-1], bias[::-1]
    place = imagenet_model(tmp_path / "m", classes, np.zeros((1000, 32)), bias)
    for i in range(1, 6):
        save(tmp_path / "data" / "n01440764" / f"ILSVRC2012_val_{i:08d}.JPEG", i)
    found = evaluated(place, tmp_path / "data", "--labels", "imagenet-real")
    assert (found["real_top1"], found["real_images"]) == (0.25, 4)


def objectnet(root: Path) -> dict[str, list[Path]]:
    """A download of ObjectNet with three folders, one of which has no class of ImageNet."""
    tables = {
        "folder_to_objectnet_label.json": {"clock": "Clock", "banana": "Banana", "loofah": "Loofah"},
        "objectnet_to_imagenet_1k.json": {"Clock": "analog clock; digital clock", "Banana": "banana"},
        "pytorch_to_imagenet_2012_id.json": {"954": 0, "409": 2, "530": 1},
    }
    (root / "mappings").mkdir(parents=True)
    for name, table in tables.items():
        (root / "mappings" / name).write_text(json.dumps(table))
    (root / "mappings" / "imagenet_to_label_2012_v2").write_text("banana\ndigital clock\nanalog clock\n")
    files: dict[str, list[Path]] = {"clock": [], "banana": [], "loofah": []}
    for number, (folder, found) in enumerate(files.items()):
        for i in range(4):
            path = root / "images" / folder / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            inner = np.random.default_rng(10 * number + i).integers(0, 256, (28, 28, 3), np.uint8)
            framed = np.zeros((32, 32, 3), np.uint8)
            framed[..., 0] = 255
            framed[2:-2, 2:-2] = inner
            Image.fromarray(framed).save(path)
            bare = root.parent / "bare" / folder / f"{i}.png"
            bare.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(inner).save(bare)
            found.append(bare)
    return files


def test_objectnet_takes_any_of_a_classes_own_classes_for_right(tmp_path: Path) -> None:
    files = objectnet(tmp_path / "objectnet")
    head = np.zeros((1000, 32))
    head[[409, 530, 954, 0]] = np.random.default_rng(2).normal(size=(4, 32))
    bias = np.full(1000, -100.0)
    bias[[409, 530, 954, 0]] = 0
    place = imagenet_model(tmp_path / "m", imagenet_synsets(), head, bias)
    predicted = logits_of(place, files["clock"] + files["banana"]).argmax(-1)
    right = [*np.isin(predicted[:4], (409, 530)), *(predicted[4:] == 954)]
    assert 0 < sum(right) < 8
    assert {409, 530} & set(predicted[:4].tolist())
    source = ObjectNet(tmp_path / "objectnet", imagenet_synsets())
    assert (len(source), source.names[4]) == (8, "clock/0.png")
    with Image.open(files["clock"][0]) as inner:
        np.testing.assert_array_equal(source.item(4).image, np.asarray(inner))
    found = evaluated(place, tmp_path / "objectnet", "--labels", "objectnet")
    assert (found["images"], found["top1"]) == (8, np.mean(right))
    (tmp_path / "objectnet/mappings/pytorch_to_imagenet_2012_id.json").unlink()
    refused = arm("evaluate", place, "--data", tmp_path / "objectnet", "--labels", "objectnet")
    assert (refused.exit_code, "part of ObjectNet's download" in refused.stderr) == (2, True)
    refused = arm("evaluate", place, "--data", tmp_path / "objectnet/images", "--labels", "objectnet")
    assert (refused.exit_code, "no folder 'images'" in refused.stderr) == (2, True)


def test_groups_of_classes_are_one_class_with_the_largest_logit() -> None:
    class Engine:
        def forward(self, images: object, **options: object) -> dict[str, np.ndarray]:
            return {"logits": np.array([[1.0, 5, 3, 4], [2, 1, 0, 3]], np.float32)}

    merged = Merged(Engine(), [(2, 1), (0,)])  # type: ignore[arg-type]
    found = merged.forward(np.zeros(1, np.float32))["logits"]
    np.testing.assert_array_equal(found, [[1, -np.inf, 5, 4], [2, -np.inf, 1, 3]])


def test_several_sets_give_one_table(model: Path, tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / "plain" / CLASSES[i % 5] / f"{i}.png", i)
        save(tmp_path / "v2" / str(i % 5) / f"{i}.png", 100 + i)
        save(tmp_path / "val" / CLASSES[i % 5] / f"ILSVRC2012_val_{i + 1:08d}.JPEG", i)
        for severity in SEVERITIES:
            save(tmp_path / "c" / "fog" / severity / CLASSES[i % 5] / f"{i}.png", 7 * i + int(severity))
    (tmp_path / "real.json").write_text(json.dumps([[i % 5] for i in range(10)]))
    sets = {
        "": tmp_path / "plain", "imagenet-v2": tmp_path / "v2", "imagenet-real": tmp_path / "val",
        "imagenet-c": tmp_path / "c",
    }  # fmt: skip
    words: list[object] = ["evaluate", model, "--real-labels", tmp_path / "real.json"]
    for name, path in sets.items():
        words += ["--data", f"{name}={path}" if name else path]
    found = json.loads(arm(*words, "--json").stdout)
    assert [row["set"] for row in found["sets"]] == [str(sets[""]), *list(sets)[1:]]
    alone = [
        evaluated(model, tmp_path / "plain"),
        evaluated(model, tmp_path / "v2", "--labels", "imagenet-v2"),
        evaluated(
            model, tmp_path / "val", "--labels", "imagenet-real", "--real-labels", tmp_path / "real.json"
        ),
        evaluated(model, tmp_path / "c", "--labels", "imagenet-c"),
    ]
    for key in ("top1", "loss", "real_top1", "mean_corruption_error", "errors", "protocol"):
        assert [row.get(key) for row in found["sets"]] == [row.get(key) for row in alone], key
    lines = [line for line in arm(*words).stdout.splitlines() if " % " in f"{line} "][1:]  # after the head
    measures = ("top-1", "top-1", "ReaL", "mCE 1/15")
    for line, row, measure in zip(lines, alone, measures, strict=True):
        value = row.get("real_top1", row.get("mean_corruption_error", row.get("top1")))
        assert measure in line
        assert f"{100 * value:.2f} %" in line
    refused = arm(*words, "--labels", "imagenet-v2")
    assert (refused.exit_code, "--data imagenet-v2=PATH" in refused.stderr) == (2, True)
    assert arm(*words, "--html", tmp_path / "x.html").exit_code == 2


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
