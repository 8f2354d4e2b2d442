"""`arm embed` and `arm predict` on the command line, against the float64 reference."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from arm_cli.main import main
from arm_core.data.transforms import EvalTransform, load_image
from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.model import forward

CLASSES = [f"kind {i}" for i in range(10)]


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def model_folder(folder, spec, **metadata):
    # A larger head than the initial one, so that classes differ.
    parameters = {
        name: value * (20 if name == "head.weight" else 1)
        for name, value in initial_parameters(spec, 3).items()
    }
    write_model(folder, spec, parameters, metadata=metadata)
    return parameters


@pytest.fixture
def classifier(tmp_path, classifier_spec):
    return model_folder(tmp_path / "classifier", classifier_spec, classes=json.dumps(CLASSES))


@pytest.fixture
def pretrained(tmp_path, pretrain_spec):
    return model_folder(tmp_path / "pretrained", pretrain_spec)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    (folder / "deeper").mkdir(parents=True)
    files = [folder / "a.png", folder / "b.jpg", folder / "deeper/c.png"]
    for seed, file in enumerate(files):
        pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(file)
    (folder / "notes.txt").write_text("no image")
    return files


def batch(count=5):
    return np.random.default_rng(1).standard_normal((count, 3, 24, 24), np.float32)


def near(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("batch_size", [2, 5])
def test_embed_array_of_a_classifier_equals_the_reference(tmp_path, classifier, classifier_spec, batch_size):
    np.save(tmp_path / "x.npy", batch())
    out = tmp_path / "out.npz"
    result = arm(
        "embed",
        tmp_path / "classifier",
        "--array",
        tmp_path / "x.npy",
        "--out",
        out,
        "--batch-size",
        batch_size,
    )
    assert result.exit_code == 0, result.output
    assert "backend torch" in result.stderr or "backend mlx" in result.stderr
    assert ", scan " in result.stderr
    expected = forward(classifier_spec, classifier, batch().transpose(0, 2, 3, 1))
    with np.load(out) as found:
        assert set(found) == {"features", "logits"}
        for name in found:
            assert found[name].dtype == np.float32
            near(found[name], expected[name])


@pytest.mark.parametrize("batch_size", [2, 5])
def test_embed_array_of_a_pretraining_model_equals_the_reference(
    tmp_path, pretrained, pretrain_spec, batch_size
):
    np.save(tmp_path / "x.npy", batch())
    out = tmp_path / "out.npz"
    result = arm(
        "embed",
        tmp_path / "pretrained",
        "--array",
        tmp_path / "x.npy",
        "--out",
        out,
        "--batch-size",
        batch_size,
    )
    assert result.exit_code == 0, result.output
    expected = forward(pretrain_spec, pretrained, batch().transpose(0, 2, 3, 1))
    with np.load(out) as found:
        assert {name: found[name].shape for name in found} == {
            "decoder_input": (5, 32, 16, 2),
            "encoder": (5, 32, 16, 2),
            "prediction": (5, 32, 48),
            "loss_per_token": (32,),
            "loss": (),
        }
        np.testing.assert_array_equal(found["encoder"], found["decoder_input"])
        for name in expected.keys() & set(found):
            near(found[name], expected[name])


def test_embed_reads_image_files_and_folders(tmp_path, classifier, classifier_spec, images):
    out = tmp_path / "out.npz"
    result = arm("embed", tmp_path / "classifier", images[1], tmp_path / "images", "--out", out)
    assert result.exit_code == 0, result.output
    with np.load(out) as found:
        order = [images[1], *images]
        assert found["images"].tolist() == [str(file) for file in order]
        pixels = np.stack([load_image(file, (24, 24)) for file in order])
        near(found["logits"], forward(classifier_spec, classifier, pixels)["logits"])


def test_predict_lists_the_most_likely_classes_by_name(tmp_path, classifier, classifier_spec, images):
    words = ["predict", tmp_path / "classifier", *images, "--top", 3]
    found = json.loads(arm(*words, "--json").stdout)
    logits = forward(classifier_spec, classifier, np.stack([load_image(file, (24, 24)) for file in images]))[
        "logits"
    ]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for row, file, expected in zip(found, images, probabilities, strict=True):
        assert row["image"] == str(file)
        assert [best["index"] for best in row["top"]] == np.argsort(-expected)[:3].tolist()
        assert [best["class"] for best in row["top"]] == [CLASSES[best["index"]] for best in row["top"]]
        near([best["probability"] for best in row["top"]], np.sort(expected)[::-1][:3])
    text = arm(*words).stdout.splitlines()
    assert text[0].startswith(f"{images[0]}: {found[0]['top'][0]['class']} ")
    assert len(text) == 3
    earlier = arm("predict", *images, "--model", tmp_path / "classifier", "--top", 3)
    assert earlier.stdout.splitlines() == text


def test_images_are_prepared_by_the_transform_of_the_model(tmp_path, classifier_spec, images):
    transform = {"crop_fraction": 0.5, "mean": [0.2, 0.3, 0.4], "std": [0.5, 0.6, 0.7]}
    parameters = model_folder(tmp_path / "own", classifier_spec, eval_transform=json.dumps(transform))
    assert arm("embed", tmp_path / "own", *images, "--out", tmp_path / "out.npz").exit_code == 0
    pixels = [load_image(file, (24, 24), EvalTransform(**transform)) for file in images]
    with np.load(tmp_path / "out.npz") as found:
        near(found["logits"], forward(classifier_spec, parameters, np.stack(pixels))["logits"])


def test_classes_without_names_are_numbers_and_top_may_exceed_them(tmp_path, classifier_spec, images):
    model_folder(tmp_path / "nameless", classifier_spec)
    (row,) = json.loads(arm("predict", tmp_path / "nameless", images[0], "--top", 99, "--json").stdout)
    assert sorted(best["class"] for best in row["top"]) == sorted(str(i) for i in range(10))


@pytest.fixture
def broken(tmp_path, classifier, pretrained, images):
    """A folder with all files that the mistakes below name."""
    (tmp_path / "broken.png").write_bytes(images[0].read_bytes()[:90])
    (tmp_path / "weights.pth").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "small.npy", np.zeros((2, 3, 16, 16), np.float32))
    np.save(tmp_path / "double.npy", np.zeros((2, 3, 24, 24)))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "nan.npy", np.full((1, 3, 24, 24), np.nan, np.float32))
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    (tmp_path / "text.npy").write_text("no array")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict missing images/a.png", "missing: no such model; expected"),
        ("predict base images/a.png", "base: no such model; a preset has no weights"),
        (
            "predict weights.pth images/a.png",
            "weights.pth: ",
        ),
        ("predict classifier/model.safetensors images/a.png", "pass classifier"),
        ("predict images images/a.png", "found no config.json"),
        ("predict pretrained images/a.png", "a pretraining model has no classes"),
        ("predict classifier images/z.png", "images/z.png: no such image"),
        ("predict classifier empty", "empty: no images in this folder"),
        ("predict classifier broken.png", "broken.png: cannot be decoded"),
        ("predict classifier images/notes.txt", "images/notes.txt: cannot be decoded"),
        ("predict classifier images/a.png --ema", "classifier"),
        ("predict classifier images/a.png --scan warp", "unknown scan 'warp'"),
        ("predict classifier images/a.png --device tpu", "tpu"),
        ("predict classifier images/a.png --backend jax", "unknown backend 'jax'; expected auto, "),
        ("predict classifier images/a.png --top 0", "0 is not in the range"),
        ("predict", "Missing argument 'MODEL IMAGE...'"),
        ("predict classifier", "expected MODEL IMAGE..., found only 'classifier'"),
        ("embed classifier --out o.npz", "pass either IMAGE... or --array"),
        ("embed classifier images/a.png --array nan.npy --out o.npz", "pass either IMAGE... or --array"),
        ("embed classifier images/a.png --out nowhere/o.npz", "the folder nowhere does not exist"),
        ("embed classifier --array none.npy --out o.npz", "none.npy: No such file"),
        (
            "embed classifier --array small.npy --out o.npz",
            "(images, 3, 24, 24), found <f4 (2, 3, 16, 16)",
        ),
        ("embed classifier --array double.npy --out o.npz", "found <f8"),
        ("embed classifier --array objects.npy --out o.npz", "objects.npy: expected float32"),
        ("embed classifier --array nan.npy --out o.npz", "nan.npy: contains NaN or infinite values"),
        ("embed classifier --array x.npz --out o.npz", "found an .npz archive"),
        ("embed classifier --array text.npy --out o.npz", "text.npy: expected float32"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(broken, monkeypatch, words, message):
    monkeypatch.chdir(broken)
    result = arm(*words.split())
    assert result.exit_code == 2, (result.output, result.exception)
    errors = [line for line in result.stderr.splitlines() if not line.startswith("backend ")]
    assert len(errors) == 1, errors
    assert message in errors[0]
    assert result.stdout == ""
    assert not list(broken.glob("*o.npz*"))
