"""Malicious images and folders: other formats, memory bombs, special files, cycles of links."""

from __future__ import annotations

import io
import os
import re
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arm_core.data import EvalTransform, ImageFolder, Item, decode
from arm_core.data.decode import MAX_PIXELS, BadImage
from arm_core.data.walk import find_images, read_file

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 10 10
%%EndComments
0 0 10 10 rectfill showpage
%%EOF
"""


def png(width: int, height: int, *, depth: int = 8, color: int = 0, fill: int = 0) -> bytes:
    """A PNG of one value: small for its size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    channels = {0: 1, 2: 3, 6: 4}[color]
    row = b"\0" + bytes([fill]) * (width * channels * depth // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def webp_header(width: int, height: int, kind: bytes) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "WEBP", lossless=kind == b"VP8L")
    data = bytearray(file.getvalue())
    if kind == b"VP8L":
        data[21:25] = (
            int.from_bytes(data[21:25], "little") & ~0xFFFFFFF | width - 1 | height - 1 << 14
        ).to_bytes(4, "little")
    else:
        data[26:30] = width.to_bytes(2, "little") + height.to_bytes(2, "little")
    return bytes(data)


def limited(code: str, *arguments: object, memory: int = 2**31, seconds: int = 300) -> str:
    """The output of code in a process with limited address space."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        preexec_fn=limit,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.eps"])
def test_postscript_with_an_image_suffix_is_refused_and_starts_no_program(name: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {marker}\nexit 1\n")
    ghostscript.chmod(0o755)
    (tmp_path / name).write_bytes(EPS)
    code = (
        "import os, sys; os.environ['PATH'] = sys.argv[2] + ':' + os.environ['PATH']\n"
        "from arm_core.data import load_image\n"
        "try: load_image(sys.argv[1], (32, 32))\n"
        "except ValueError as error: print(error)\n"
    )
    assert "not a known image format" in limited(code, tmp_path / name, ghostscript.parent)
    assert not marker.exists()


def test_the_test_of_postscript_can_fail(tmp_path: Path) -> None:
    with Image.open(io.BytesIO(EPS)) as image:
        assert image.format == "EPS"


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (lambda: png(60000, 1), r"60000x1 pixels, expected sides of at most 100:1"),
        (lambda: png(1, 1000000), r"1x1000000 pixels, expected sides of at most 100:1"),
        (lambda: png(13300, 13300, depth=16), r"13300x13300 pixels, expected at most 89478485"),
        (lambda: png(50000, 50000, depth=8)[:5000], r"more than 89478485 pixels"),
        (lambda: webp_header(16383, 16383, b"VP8 "), r"16383x16383 pixels, expected at most 89478485"),
        (lambda: webp_header(16383, 16383, b"VP8L"), r"16383x16383 pixels, expected at most 89478485"),
    ],
)
def test_an_image_bomb_is_refused_by_its_header(data: object, named: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(data())  # type: ignore[operator]
    code = (
        "import sys\nfrom arm_core.data import load_image\n"
        "try: load_image(sys.argv[1], (224, 224))\n"
        "except ValueError as error: print(error)\n"
    )
    printed = limited(code, path, memory=2**30)
    assert printed.startswith(f"{path}: cannot be decoded as an image (")

    assert re.search(named, printed)


def test_the_largest_accepted_images_fit_into_their_stated_memory(tmp_path: Path) -> None:
    side = int(MAX_PIXELS**0.5)
    code = (
        "import sys\nfrom arm_core.data import load_image, EvalTransform\n"
        "print(load_image(sys.argv[1], (224, 224), EvalTransform(crop_fraction=0.05)).shape)\n"
    )
    for name, data in (("a.png", png(side, side, color=6)), ("b.png", png(side, side, depth=16))):
        (tmp_path / name).write_bytes(data)
        assert limited(code, tmp_path / name).strip() == "(224, 224, 3)"


def test_only_the_centre_of_a_long_image_is_resized() -> None:
    """The part outside the crop is not computed; the values agree with the usual method."""
    pixels = np.random.default_rng(0).integers(0, 256, (9, 900, 3), np.uint8)
    image = Image.fromarray(pixels)
    found = EvalTransform(crop_fraction=0.05)(Item(image=pixels, label=0, name="long"), (64, 64))
    height, width = 1280, 900 * 1280 // 9
    left, top = round((width - 64) / 2), round((height - 64) / 2)
    plain = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 64, top + 64))
    mean, std = np.array(EvalTransform().mean), np.array(EvalTransform().std)
    values = np.round((found * std + mean) * 255)
    assert np.abs(values - np.asarray(plain, float)).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P"])
def test_conversion_by_bands_equals_conversion_at_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(1)
    if mode == "I;16":
        image = Image.fromarray(draws.integers(0, 2**16, (37, 20), np.uint16))
    else:
        image = Image.fromarray(draws.integers(0, 256, (37, 20, 4), np.uint8))
        if mode == "P":
            image = image.convert("RGB").quantize(16)
            image.info["transparency"] = 3
    whole = np.asarray(decode.to_rgb(image))
    monkeypatch.setattr(decode, "BAND", 100)
    np.testing.assert_array_equal(np.asarray(decode.to_rgb(image)), whole)


def test_a_decode_error_is_a_bad_image() -> None:
    with pytest.raises(BadImage, match=r"x\.png: cannot be decoded"):
        decode.decode(png(10, 10)[:40], "x.png")


# Folders


def save(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def test_cycles_of_links_end_and_each_image_is_listed_once(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "cat" / "deep" / "b.png")
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(".")
        (tmp_path / "cat" / name).symlink_to("..")
        (tmp_path / "cat" / "deep" / name).symlink_to(".")
    with pytest.warns(UserWarning, match="links to folders that are already included"):
        assert len(ImageFolder(tmp_path, labels=False)) == 2
    with pytest.warns(UserWarning, match="links to folders"):
        source = ImageFolder(tmp_path)
    assert (source.classes, len(source)) == (("cat",), 2)


def test_folders_that_link_to_each_other_many_times_are_visited_once(tmp_path: Path) -> None:
    """Thirty folders with two links to the next one have 2^30 paths."""
    for i in range(30):
        save(tmp_path / f"{i:02d}" / "x.png")
        for name in "ab":
            (tmp_path / f"{i:02d}" / name).symlink_to(tmp_path / f"{i + 1:02d}")
    with pytest.warns(UserWarning, match="already included"):
        assert len(ImageFolder(tmp_path, labels=False)) == 30


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path: Path) -> None:
    save(tmp_path / "other" / "a.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "other")
    assert find_images(tmp_path / "data").images == ["cat/a.png"]
    assert len(ImageFolder(tmp_path / "data")) == 1


def test_special_files_are_skipped_with_a_warning(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "gone.jpg").symlink_to("nowhere")
    with pytest.warns(
        UserWarning, match=r"skipped 3 entries that are not regular files: fifo\.png, gone\.jpg"
    ):
        assert len(ImageFolder(tmp_path, labels=False)) == 1


def test_formats_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.HEIC", "c.heic", "d.jxl"):
        save(tmp_path / "x.png")
        (tmp_path / "x.png").rename(tmp_path / name)
    with pytest.warns(UserWarning, match=r"formats that are not read \(2 \.heic, 1 \.jxl\)"):
        assert len(ImageFolder(tmp_path, labels=False)) == 1


@pytest.mark.parametrize("form", ["AVIF", "JPEG2000"])
def test_newer_formats_are_read(form: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(file, form)
    pixels = np.asarray(decode.decode(file.getvalue(), "x"))
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 4


@pytest.mark.parametrize("kind", ["fifo", "device", "large"])
def test_reading_never_waits_and_never_grows_without_limit(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"x" * 3000)
    expected = {
        "fifo": "expected a file, found a named pipe",
        "device": "expected a file, found a device",
        "large": "expected an image file of at most 0 MiB",
    }[kind]
    with pytest.raises(ValueError, match=rf"x\.png: {expected}"):
        read_file(path, 1000)


def test_classes_that_only_differ_by_case_are_named(tmp_path: Path) -> None:
    for name in ("Cat", "cat"):
        save(tmp_path / name / "a.png")
    with pytest.warns(UserWarning, match="'Cat' and 'cat' differ by case only"):
        ImageFolder(tmp_path)
