"""`arm data`: a folder with every kind of defect, packing, and the page of a preview."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from arm_cli.main import main


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def arm(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def picture(seed: int, size: tuple[int, int] = (12, 12)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


@pytest.fixture
def defects(tmp_path: Path) -> Path:
    """One image with each kind of defect, and two without."""
    root = tmp_path / "images"
    for name in ("a", "b", "A", "empty"):
        (root / name).mkdir(parents=True)
    for name in ("a/plain.png", "b/other.jpg"):
        picture(len(name)).save(root / name)
    picture(3).save(root / "A" / "third.png")
    (root / "a" / "empty.png").touch()
    (root / "a" / "text.jpg").write_text("no image")
    (root / "a" / "cut.png").write_bytes((root / "a" / "plain.png").read_bytes()[:60])
    header = struct.pack(">IIBBBBB", 50000, 50000, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    (root / "a" / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    )
    picture(4).convert("CMYK").save(root / "b" / "cmyk.jpg")
    Image.fromarray(np.arange(100, dtype=np.uint16).reshape(10, 10) * 600).save(root / "b" / "deep.png")
    picture(5).quantize(8).save(root / "b" / "palette.png")
    picture(6).convert("L").save(root / "b" / "grey.png")
    picture(7).convert("RGBA").save(root / "b" / "alpha.png")
    frames = [picture(8), picture(9)]
    frames[0].save(root / "b" / "film.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(10).save(root / "b" / "turned.jpg", exif=exif)
    (root / "b" / "copy.png").write_bytes((root / "a" / "plain.png").read_bytes())
    (root / "b" / "phone.heic").touch()
    os.mkfifo(root / "b" / "pipe.png")
    return root


EXPECTED = {
    "empty file": ["a/empty.png"],
    "cannot be decoded": ["a/cut.png", "a/text.jpg"],
    "too large": ["a/bomb.png"],
    "CMYK": ["b/cmyk.jpg"],
    "16-bit": ["b/deep.png"],
    "palette": ["b/film.gif", "b/palette.png"],
    "grey": ["b/grey.png"],
    "transparent": ["b/alpha.png"],
    "animation": ["b/film.gif"],
    "EXIF rotation": ["b/turned.jpg"],
    "duplicate": ["b/copy.png"],
    "empty class folder": ["empty"],
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_every_kind_of_defect_in_a_folder_is_reported(defects: Path) -> None:
    result = arm("data", "check", defects, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    found = report["findings"]
    for kind, names in EXPECTED.items():
        assert len(found[kind]["names"]) == len(names), (kind, found[kind])
        for text, name in zip(found[kind]["names"], names, strict=True):
            assert text.removeprefix(f"{defects}/").startswith(name), (kind, text)
    assert "'A'" in str(found["classes that differ by case"]) or "A, a" in str(found)
    skipped = " ".join(found["skipped"]["names"])
    assert "1 .heic" in skipped
    assert "b/pipe.png" in skipped
    assert set(found) == {*EXPECTED, "classes that differ by case", "skipped"}
    assert report["bad"] == 5
    assert report["classes"] == {"A": 1, "a": 5, "b": 9, "empty": 0}
    plain = arm("data", "check", defects)
    for kind in found:
        assert f"\n{kind}: " in plain.stdout
    assert "5 findings stop training" in plain.stdout


def test_images_without_defects_pass(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    result = arm("data", "check", tmp_path)
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "nothing stops training")
    assert arm("data", "check", tmp_path / "nowhere").exit_code == 2


def test_packed_images_are_checked_and_train_like_their_folder(tmp_path: Path) -> None:
    for i in range(12):
        path = tmp_path / "images" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    out = tmp_path / "pack"
    result = arm("data", "pack", tmp_path / "images", out, "--shards", 2, "--json")
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["images"], summary["shards"]) == (12, 2)
    assert set(summary["read_images_per_s"]) == {"before", "after"}
    again = arm("data", "pack", tmp_path / "images", out, "--shards", 2)
    assert "12 images in 2 shards" in again.stdout
    checked = json.loads(arm("data", "check", out, "--json").stdout)
    assert checked["classes"] == {"a": 6, "b": 6}
    refused = arm("data", "pack", tmp_path / "images", out, "--size", 8)
    assert refused.exit_code == 2
    assert "holds a pack of other images or settings" in refused.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    from arm_core.recipe.recipe import load_recipe, override, to_toml

    changes = ["model.width=8", "model.depth=2", "model.patch=4", "model.image_size=16"]
    changes += ["training.batch_size=6", "augmentation.flip=1", "augmentation.rand_augment.probability=1"]
    changes += ["augmentation.erase=1", "mixing.mixup=0.8", "mixing.cutmix=1.0"]
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(override(load_recipe("finetune-digits"), changes)))
    return path


def test_a_preview_shows_training_images_and_their_random_operations(tmp_path: Path, recipe: Path) -> None:
    for i in range(20):
        path = tmp_path / "images" / ("<b>", "c")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    out = tmp_path / "grid.html"
    result = arm("data", "preview", recipe, "--data", tmp_path / "images", "--out", out, "--count", 8)
    assert result.exit_code == 0, result.output
    page = out.read_text()
    augmented, _, mixed = page.partition("<h2>Mixed</h2>")
    assert augmented.count("<figure>") == 8
    assert augmented.count("crop ") == augmented.count("; flip") == augmented.count("; erase") == 8
    assert re.search(r"(cutmix|mixup)", mixed)
    assert re.search(r"\d+ % (&lt;b&gt;|c), \d+ % (&lt;b&gt;|c)", mixed)
    assert "<b>" not in page
    from arm_core.data import ImageFolder, TrainLoader, denormalize
    from arm_core.recipe.recipe import load_recipe

    stored = load_recipe(recipe)
    loader = TrainLoader(
        ImageFolder(tmp_path / "images"),
        stored.augmentation,
        size=(16, 16),
        batch_size=6,
        seed=stored.training.seed,
    )
    first = np.asarray(next(loader).images)[0]
    file = io.BytesIO()
    Image.fromarray(denormalize(first)).save(file, "PNG")
    import base64

    assert base64.b64encode(file.getvalue()).decode() in page
    assert arm("data", "preview", recipe, "--data", tmp_path / "images", "--out", out).exit_code == 2
