"""`arm explain` and `arm complete`: files, refusals, and their pages in a browser."""

import json
import re

import browser
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from arm_cli.explain.influence import rank_correlation
from arm_cli.main import main
from arm_cli.pages.pictures import LESS, MORE, overlay
from arm_cli.pages.shell import LIMIT, render
from arm_core.files.model_folder import write_model
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import classifier_preset

pytestmark = pytest.mark.usefixtures("one_torch_thread")


def arm(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def refused(*words):
    result = arm(*words)
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed, name in enumerate(("a.png", "b.jpg", "c.png")):
        row, column = np.mgrid[:30, :40] / 10
        pixels = 127 + 100 * np.stack([np.sin(column * (seed + 1)), np.cos(row), np.sin(row * column)], -1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    return folder


@pytest.fixture
def models(tmp_path, classifier_spec, pretrain_spec):
    for name, spec in (("cls", classifier_spec), ("pre", pretrain_spec)):
        write_model(tmp_path / name, spec, initial_parameters(spec, 3))
    return tmp_path


def page_data(page):
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text[1])


def check_self_contained(page):
    text = page.read_text()
    assert len(text.encode()) < LIMIT
    assert not re.search(r"""(src|href)=["'](?!data:)|url\(|@import|https?://""", text)
    assert '<html lang="en">' in text
    assert "Content-Security-Policy" in text


def test_explain_writes_a_picture_of_every_map_and_a_page(models, photos, tmp_path):
    out = tmp_path / "out"
    result = arm("explain", models / "cls", photos / "a.png", "--out", out)
    assert result.exit_code == 0, result.output
    names = {file.name for file in out.iterdir()}
    ways = ("mean", "row", "row_reverse", "column", "column_reverse")
    assert names == {
        "index.html",
        "a-rollout.png",
        "a-gradient-times-input.png",
        *(f"a-layer{layer:02d}-{way}.png" for layer in range(6) for way in ways),
    }
    check_self_contained(out / "index.html")
    data = page_data(out / "index.html")
    assert data["target"] == "class"
    assert data["views"] == [*(f"layer {i}" for i in range(6)), "rollout", "gradient times input"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--layer", 2, "--direction", "column"), {"layer02-column", "gradient-times-input"}),
        (("--layer", 2, "--direction", "1"), {"layer02-row_reverse", "gradient-times-input"}),
        (("--layer", 5, "--direction", "mean", "--token", "0,3"), {"layer05-mean", "gradient-times-input"}),
    ],
)
def test_explain_of_one_layer_and_direction(models, photos, tmp_path, words, expected):
    assert arm("explain", models / "cls", photos / "b.jpg", "--out", tmp_path / "o", *words).exit_code == 0
    assert {file.stem for file in (tmp_path / "o").glob("*.png")} == {f"b-{name}" for name in expected}


def test_explain_of_a_pretraining_model_starts_at_the_last_token_it_reads(models, photos, tmp_path):
    assert arm("explain", models / "pre", photos / "a.png", "--out", tmp_path / "o").exit_code == 0
    data = page_data(tmp_path / "o/index.html")
    assert data["target"] == 31
    assert data["classToken"] is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--layer", "6"), "layer 6: the model has layers 0 to 5"),
        (("--layer", "last"), "--layer: expected a number from 0 or all, found 'last'"),
        (
            ("--direction", "4"),
            "--direction: expected all, mean, row, row_reverse, column, column_reverse or 0 to 3",
        ),
        (("--token", "9,0"), "token: patch 9,0 is outside the grid"),
        (("--pca", "--neighbours", "x"), "--pca and --neighbours: expected one of them"),
        (("--neighbours", "x"), "--neighbours: expected the patch to search for; pass --token ROW,COLUMN"),
    ],
)
def test_explain_refuses_layers_directions_and_tokens_that_do_not_exist(
    models, photos, tmp_path, words, sentence
):
    assert sentence in refused("explain", models / "cls", photos / "a.png", "--out", tmp_path / "o", *words)
    assert not (tmp_path / "o").exists()


def test_neighbours_leave_out_the_image_itself(models, photos, tmp_path):
    out = tmp_path / "o"
    words = ("--neighbours", photos, "--token", "1,2", "--out", out)
    assert arm("explain", models / "pre", photos / "a.png", *words).exit_code == 0
    (image,) = page_data(out / "index.html")["images"]
    assert sorted(found["name"] for found in image["found"]) == ["b.jpg", "c.png"]
    assert (out / "a-neighbours.png").exists()
    check_self_contained(out / "index.html")


def test_complete_prints_the_losses_and_writes_the_pictures(models, photos, tmp_path):
    out = tmp_path / "o"
    result = arm("complete", models / "pre", photos, "--out", out, "--from", 3)
    assert result.exit_code == 0, result.output
    assert re.search(r"a\.png: loss \d\.\d{4} from true clusters, \d\.\d{4} in the rollout", result.stdout)
    assert {file.name for file in out.iterdir()} == {"index.html", "a.png", "b.png", "c.png"}
    image = page_data(out / "index.html")["images"][0]
    assert [value is None for value in image["rolloutLoss"]] == [True] * 3 + [False] * 6
    assert "nearest patch in the clusters before" in (out / "index.html").read_text()
    check_self_contained(out / "index.html")


def test_complete_refuses_a_classifier_and_too_many_given_clusters(models, photos, tmp_path):
    out = tmp_path / "o"
    assert "expected a pretraining model" in refused("complete", models / "cls", photos, "--out", out)
    assert "--from: expected 1 to 8 of 9 clusters, found 9" in refused(
        "complete", models / "pre", photos, "--out", out, "--from", 9
    )


@pytest.mark.parametrize(
    ("command", "words", "most"),
    [
        ("explain", (), 12),
        ("explain", ("--pca",), 24),
        ("explain", ("--neighbours", "x", "--token", "1,1", "--count", "59"), 2),
        ("complete", (), 40),
    ],
)
def test_more_images_than_a_page_holds_are_refused_at_once(models, photos, tmp_path, command, words, most):
    many = [photos / "a.png"] * (most + 1)
    sentence = f"a page holds at most {most} images, found {most + 1}; give fewer images"
    assert sentence in refused(command, models / "pre", *many, "--out", tmp_path / "o", *words)


def test_a_page_over_the_limit_is_refused():
    with pytest.raises(ValueError, match="more than 3; pass fewer images"):
        render("Page", [], "neighbours.js", "x" * LIMIT)


def test_text_of_a_page_cannot_end_its_script_or_its_markup():
    page = render("<b>", ["</p><script>"], "neighbours.js", {"name": "</script><img src=x>"})
    assert "<b>" not in page
    assert "</p><script>" not in page
    assert "<img src=x>" not in page


def test_overlay_is_orange_for_positive_and_blue_for_negative_values():
    grey = np.full((192, 192, 3), 100, np.uint8)
    found = overlay(grey, np.array([[1.0, -1.0], [0.0, np.nan]]))
    np.testing.assert_allclose(found[0, 0], 0.9 * np.array(MORE) + 10, atol=1)
    np.testing.assert_allclose(found[0, -1], 0.9 * np.array(LESS) + 10, atol=1)
    assert (found[-1] == 100).all()


def test_rank_correlation_ignores_scale():
    values = np.array([3.0, 1.0, 2.0, 9.0])
    assert rank_correlation(values, np.exp(values)) == pytest.approx(1)
    assert rank_correlation(values, -values) == pytest.approx(-1)


MOVE = """
  const move = (element, value) => { element.value = value; element.dispatchEvent(new Event("input")); };
  const press = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const settle = () => new Promise(done => setTimeout(done, 100));
  const named = element => element.getAttribute("aria-label") || element.alt || element.textContent
    || (element.labels && element.labels.length && element.labels[0].textContent);
  const unnamed = [...document.querySelectorAll("button:not([hidden]), input, select, img, [role=img]")]
    .filter(element => !named(element)).map(element => element.outerHTML);
  const wide = document.documentElement.scrollWidth > innerWidth;
"""
PHONE = {"width": 500, "height": 900}  # the narrowest window that headless Chromium opens


@pytest.mark.parametrize("window", [{}, PHONE], ids=["desktop", "phone"])
def test_the_influence_page_works_in_a_browser(models, photos, tmp_path, window):
    browser.chromium()
    out = tmp_path / "o"
    assert arm("explain", models / "cls", photos / "a.png", "--out", out, "--layer", "3").exit_code == 0
    script = """
      const [slider, readout, board, marker] = ["input[type=range]", ".readout", ".board.pick",
        ".board.pick .marker"].map(name => document.querySelector(name));
      const said = [readout.textContent];
      const box = board.getBoundingClientRect();
      board.dispatchEvent(new MouseEvent("click", { bubbles: true,
        clientX: box.left + box.width * 4.5 / 6, clientY: box.top + box.height * 1.5 / 6 }));
      said.push(readout.textContent);
      press(marker, "ArrowDown");
      said.push(readout.textContent);
      const select = document.querySelector("select");
      select.value = "row";
      select.dispatchEvent(new Event("change"));
      said.push(readout.textContent);
      move(slider, 1);
      said.push(readout.textContent);
      return { said, unnamed, wide, label: marker.getAttribute("aria-label"), slider: slider.ariaValueText };
    """
    found = browser.run(out / "index.html", MOVE + script, tmp_path, **window)
    first, clicked, moved, row, gradient = found["said"]
    assert first.startswith("layer 3, mean of directions. Target: the class. Most influence: row ")
    assert "Target: row 1, column 4." in clicked
    assert "Target: row 2, column 4." in moved
    assert row.startswith("layer 3, row. Target: row 2, column 4.")
    assert "stores this map for the class only" in gradient
    assert found["label"] == "Target patch: row 2, column 4. Arrow keys move it."
    assert found["slider"] == "gradient times input"
    assert found["unnamed"] == []
    assert not found["wide"]


@pytest.mark.parametrize("window", [{}, PHONE], ids=["desktop", "phone"])
def test_the_completion_page_steps_through_the_clusters(models, photos, tmp_path, window):
    browser.chromium()
    out = tmp_path / "o"
    assert arm("complete", models / "pre", photos / "a.png", "--out", out, "--from", "2").exit_code == 0
    script = """
      const slider = document.querySelector("input[type=range]");
      const live = document.querySelector("[aria-live]"), canvases = document.querySelectorAll("canvas");
      const grey = canvas => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let i = 0; i < data.length; i += 4) count += data[i] === 128 && data[i + 1] === 128 && data[i +
        2] === 128; return count / (data.length / 4);
      };
      const seen = [];
      for (const step of [1, 4, 8]) {
        move(slider, step);
        await settle();
        seen.push([live.textContent, canvases[2].getAttribute("aria-label"), grey(canvases[2])]);
      }
      press(document.body, "ArrowLeft");
      const current = document.querySelector("tr[aria-current]").textContent;
      return { seen, unnamed, wide, keyed: slider.value, current };
    """
    found = browser.run(out / "index.html", MOVE + script, tmp_path, **window)
    steps = [1, 4, 8]
    for step, (live, label, grey) in zip(steps, found["seen"], strict=True):
        assert live.startswith(f"Cluster {step + 1} of 9 begins at row ")
        assert (
            label == f"a.png: clusters 1 to {min(2, step + 1)} given, the others predicted from predictions"
        )
        assert grey == pytest.approx((8 - step) / 9, abs=0.02)
    assert found["keyed"] == "7"
    assert found["current"].startswith("8")
    assert found["unnamed"] == []
    assert not found["wide"]


@pytest.mark.parametrize("model", ["cls", "pre"])
def test_the_features_page_compares_a_chosen_patch(models, photos, tmp_path, model):
    browser.chromium()
    out = tmp_path / "o"
    assert arm("explain", models / model, photos, "--out", out, "--pca").exit_code == 0
    assert (out / "b-pca.png").exists()
    script = """
      const readout = document.querySelector(".readout"), before = readout.textContent;
      press(document.querySelectorAll(".board.pick .marker")[1], "ArrowLeft");
      return { before, after: readout.textContent, unnamed, wide };
    """
    found = browser.run(out / "index.html", MOVE + script, tmp_path)
    assert found["before"] == "No patch is chosen."
    assert re.match(r"Chosen: row \d, column \d of b\.jpg\. Most similar: row", found["after"])
    assert found["unnamed"] == []
    check_self_contained(out / "index.html")


def test_the_browser_test_notices_errors_and_requests(tmp_path):
    browser.chromium()
    page = tmp_path / "page.html"
    for body in ("<script>throw new Error('planted')</script>", "<script>console.warn('planted')</script>"):
        page.write_text(f"<!doctype html><html><head></head><body>{body}</body></html>")
        with pytest.raises(AssertionError, match="planted"):
            browser.run(page, "return 1", tmp_path)
    rules = "default-src 'none'; script-src 'unsafe-inline'"
    policy = f'<meta http-equiv="Content-Security-Policy" content="{rules}">'
    image = "<img src='http://127.0.0.1:9/x.png'>"
    page.write_text(f"<!doctype html><html><head>{policy}</head><body>{image}</body></html>")
    with pytest.raises(AssertionError, match="blocked"):
        browser.run(page, "return 1", tmp_path)


def test_a_page_of_the_base_model_with_all_layers_stays_under_the_limit():
    """By its sizes: 13 maps for all targets, the others for one."""
    tokens = classifier_preset("base").tokens
    from arm_cli.explain.influence import STORED

    assert 13 * tokens * (tokens + 1) < STORED
    assert STORED * 4 / 3 + 200_000 < LIMIT
