"""Pages that run a model in the browser: their content, and their results in a headless Chromium."""

import json
import re

import chromium
import numpy as np
import pytest
from converting import arm
from PIL import Image

from arm_core.data.sources import Item
from arm_core.data.transforms import EvalTransform
from arm_core.engine.protocol import TrainingState
from arm_core.engine.registry import installed_backends
from arm_core.explain.influence import influence
from arm_core.explain.layout import on_grid
from arm_core.files.model_folder import write_model
from arm_core.files.safetensors import as_tensors
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import classifier_preset
from arm_core.model.reference.model import forward
from arm_core.model.spec import ClassifierSpec, EncoderSpec

pytest.importorskip("onnx", reason="needs onnx, of the extra 'onnx'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime, of the extra 'onnx'")

from arm_convert.browser import runtime

SPEC = ClassifierSpec(encoder=EncoderSpec(width=32, depth=6, patch=4), classes=10, image_size=(24, 24))
NAMES = [f"kind <{i}>" for i in range(10)]
READY = "document.body?.dataset.ready"


def model_folder(path, spec=SPEC, names=NAMES):
    tensors = as_tensors(initial_parameters(spec, 0))
    return write_model(path, spec, tensors, metadata={"classes": json.dumps(names)})


@pytest.fixture
def no_runtime(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "VENDORED", tmp_path / "none")


@pytest.fixture
def fake_runtime(tmp_path):
    """Files with the right names, for tests of the page's text."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text('{"version": "9.9.9"}')
    (folder / "dist" / runtime.SCRIPT).write_text("export const fake = 1;")
    (folder / "dist" / runtime.WASM).write_bytes(b"\0asm")
    return folder


@pytest.fixture
def browser():
    """Skips if no Chromium or no runtime is installed."""
    if reason := chromium.missing():
        pytest.skip(reason)
    try:
        runtime.find_runtime()
    except ValueError as error:
        pytest.skip(f"needs onnxruntime-web: {error}")


def test_a_page_is_one_file_without_network_requests(tmp_path, fake_runtime):
    out = tmp_path / "page.html"
    words = ("--browser", out, "--runtime", fake_runtime, "--title", "Kinds & <more>")
    result = arm("export", model_folder(tmp_path / "model"), *words)
    assert result.exit_code == 0, result.output
    assert "with onnxruntime-web 9.9.9" in result.stdout
    text = out.read_text()
    assert "<title>Kinds &amp; &lt;more&gt;</title>" in text
    assert "Permission is hereby granted" in text
    assert "onnxruntime-web 9.9.9" in text
    assert not re.search(r"@[A-Z]+@", text)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    (config,) = re.findall(r'id="config">(.*?)</script>', text)
    expected = {"classes": NAMES, "draw": False, "size": [24, 24], "covered": [27, 27]}
    assert json.loads(config) == expected
    again = arm("export", tmp_path / "model", *words)
    assert again.exit_code == 2
    assert "already exists" in again.output
    assert arm("export", tmp_path / "model", *words, "--force").exit_code == 0
    assert out.read_text() == text  # the same model gives the same page


def test_without_the_runtime_the_message_says_how_to_get_it(tmp_path, no_runtime):
    result = arm("export", model_folder(tmp_path / "model"), tmp_path / "page.html")
    assert result.exit_code == 2
    assert "needs onnxruntime-web, which this installation does not contain" in result.output
    assert "make browser-runtime" in result.output
    result = arm("export", tmp_path / "model", tmp_path / "page.html", "--runtime", tmp_path)
    assert "expected an unpacked onnxruntime-web package" in result.output


def test_a_pretraining_model_gets_no_page(tmp_path, fake_runtime, pretrain_spec):
    model = model_folder(tmp_path / "model", pretrain_spec)
    result = arm("export", model, tmp_path / "page.html", "--runtime", fake_runtime)
    assert result.exit_code == 2
    assert "no classes to show in a page" in result.output


def test_the_page_gives_a_photo_the_same_class_as_the_model(tmp_path, browser):
    out = tmp_path / "page.html"
    assert arm("export", model_folder(tmp_path / "model"), out).exit_code == 0
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    image = EvalTransform()(Item(image=pixels, label=-1, name=""), SPEC.image_size)
    logits = forward(SPEC, initial_parameters(SPEC, 0), image[None])["logits"][0]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    with chromium.Page(out) as page:
        page.wait_for(READY, timeout=120)
        page.set_files("#files", tmp_path / "photo.png")
        page.wait_for("document.querySelectorAll('#answers li').length === 5", timeout=60)
        shown = page.evaluate("[...document.querySelectorAll('#answers .line')].map((e) => e.textContent)")
        assert shown[0] == f"{NAMES[probabilities.argmax()]}{100 * probabilities.max():.1f} %"
        label = page.evaluate("document.getElementById('view').getAttribute('aria-label')")
        assert label == f"photo.png: {NAMES[probabilities.argmax()]}"
        (tmp_path / "broken.png").write_bytes(b"no image")
        page.set_files("#files", tmp_path / "broken.png")
        page.wait_for("document.getElementById('status').textContent.includes('cannot be read as an image')")
        assert page.evaluate("document.querySelector('.draw').hidden")
        assert not page.errors
        assert all(url.startswith(("file:", "data:", "blob:", "about:")) for url in page.requests)


def test_the_page_shows_the_influence_map_over_the_photo(tmp_path, browser):
    out = tmp_path / "page.html"
    assert arm("export", model_folder(tmp_path / "model"), out).exit_code == 0
    pixels = np.full((30, 40, 3), 128, np.uint8)
    pixels[5:15, 8:20] = (200, 30, 90)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    image = EvalTransform()(Item(image=pixels, label=-1, name=""), SPEC.image_size)
    backend = next((b for b in installed_backends().values() if b.missing() is None), None)
    if backend is None:
        pytest.skip("needs an engine")
    engine = backend.create_engine(SPEC, TrainingState(parameters=initial_parameters(SPEC, 0)))
    maps = influence(engine, image[None], layers=[5]).to("class").mean[:, 0, 0]
    expected = on_grid(SPEC, maps).ravel()
    with chromium.Page(out) as page:
        page.wait_for(READY, timeout=120)
        assert page.evaluate("$('maps').hidden")
        page.set_files("#files", tmp_path / "photo.png")
        page.wait_for("shown?.map && !$('maps').hidden", timeout=60)
        found = np.array(page.evaluate("Array.from(shown.map.values)"))
        assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()  # rounded pixels
        strongest = int(np.abs(expected).argmax())
        row, column = divmod(strongest, 6)
        crop = 240 * 24 / 27  # the photo is shown as 320 x 240; the model reads a square in its center
        x, y = 160 + crop * ((column + 0.5) / 6 - 0.5), 120 + crop * ((row + 0.5) / 6 - 0.5)
        point = f"pen.getImageData({x}, {y}, 1, 1).data.join()"
        outside = "pen.getImageData(5, 120, 1, 1).data.join()"
        with_map, edge = page.evaluate(point), page.evaluate(outside)
        page.evaluate("$('influence').click()")
        assert page.evaluate(point) != with_map
        assert page.evaluate(outside) == edge
        assert not page.errors


CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
"""Chromium's own moving test picture in place of a camera, without a question to the user."""


def test_the_camera_is_classified_until_it_is_stopped(tmp_path, browser):
    out = tmp_path / "page.html"
    assert arm("export", model_folder(tmp_path / "model"), out).exit_code == 0
    status, button = "$('status').textContent", "$('camera')"
    with chromium.Page(out, flags=CAMERA) as page:
        page.wait_for(READY, timeout=120)
        page.evaluate(f"{button}.click()")
        page.wait_for(f"/^Camera: [0-9.]+ images\\/s$/.test({status})", timeout=120)
        assert page.evaluate(f"{button}.textContent") == "Stop the camera"
        assert page.evaluate("document.querySelectorAll('#answers li').length") == 5
        colours = "new Set(pen.getImageData(0, 0, view.width, view.height).data).size"
        assert page.evaluate(colours) > 3  # a frame is shown
        page.evaluate(f"{button}.click()")
        assert page.evaluate(f"{button}.textContent") == "Use the camera"
        assert page.evaluate("stream === null")
        assert not page.errors


def test_without_a_camera_the_page_says_so(tmp_path, browser):
    out = tmp_path / "page.html"
    assert arm("export", model_folder(tmp_path / "model"), out).exit_code == 0
    with chromium.Page(out) as page:
        page.wait_for(READY, timeout=120)
        page.evaluate("$('camera').click()")
        page.wait_for("$('status').textContent.startsWith('The camera cannot be used: ')", timeout=60)
        assert page.evaluate("$('camera').textContent") == "Use the camera"
        assert not page.errors


def test_a_drawing_is_classified_with_the_mouse_and_with_the_keyboard(tmp_path, browser):
    out = tmp_path / "page.html"
    assert arm("export", model_folder(tmp_path / "model"), out, "--draw").exit_code == 0
    answers = "document.querySelectorAll('#answers li').length"
    with chromium.Page(out) as page:
        page.wait_for(READY, timeout=120)
        box = page.evaluate("(({x, y, width}) => [x, y, width])(view.getBoundingClientRect())")
        x, y, width = box
        page.mouse("mousePressed", x + width / 4, y + width / 4)
        page.mouse("mouseMoved", x + width / 2, y + width / 2)
        page.mouse("mouseReleased", x + width / 2, y + width / 2)
        page.wait_for(f"{answers} === 5", timeout=60)
        grey = "pen.getImageData(view.width * 3 / 8, view.height * 3 / 8, 1, 1).data[0]"
        assert page.evaluate(grey) == 0xE0
        page.evaluate("document.getElementById('clear').click()")
        assert page.evaluate(grey) == 0x40
        assert page.evaluate(answers) == 0
        press = "(key) => view.dispatchEvent(new KeyboardEvent('keydown', {key}))"
        page.evaluate(f"[' ', 'ArrowDown', 'ArrowRight'].forEach({press})")
        page.wait_for(f"{answers} === 5", timeout=60)
        assert not page.errors


def test_a_page_of_the_tiny_preset_loads_and_runs(tmp_path, browser):
    spec = classifier_preset("tiny")
    model = model_folder(tmp_path / "model", spec, [str(i) for i in range(1000)])
    assert arm("export", model, tmp_path / "page.html", "--quantize", "int8").exit_code == 0
    assert (tmp_path / "page.html").stat().st_size < 25e6
    with chromium.Page(tmp_path / "page.html") as page:
        page.wait_for(READY, timeout=200)
        assert page.evaluate("arm.benchmark(2)", timeout=200) > 0  # images/s; benchmarks/export.py measures
        assert not page.errors
