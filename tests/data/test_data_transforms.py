"""Decoding, cropping, normalising: against Pillow, against the definitions, and for broken files."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arm_core.data import (
    FINETUNE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    PRETRAIN,
    EvalTransform,
    Item,
    RandAugment,
    TrainTransform,
    denormalize,
    load_image,
)
from arm_core.data.transforms import center_crop, crop_box, decode, erased_box
from arm_core.model.rng import KeyedRng

BICUBIC = Image.Resampling.BICUBIC
WHOLE = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def item(pixels: np.ndarray) -> Item:
    return Item(image=pixels, label=0, name="test image")


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def by_hand(image: Image.Image) -> np.ndarray:
    return (np.asarray(image, np.float64) / 255 - IMAGENET_MEAN) / IMAGENET_STD


# Cropping


@pytest.mark.parametrize("size", [(375, 500), (500, 333), (64, 64)])
def test_random_crops_stay_inside_and_within_their_area_and_ratio(size: tuple[int, int]) -> None:
    height, width = size
    boxes = np.array([crop_box(size, (0.2, 1.0), (3 / 4, 4 / 3), KeyedRng(0, "t", i)) for i in range(3000)])
    left, top, w, h = boxes.T
    assert left.min() >= 0
    assert top.min() >= 0
    assert (left + w).max() <= width
    assert (top + h).max() <= height
    area, ratio = w * h / (width * height), w / h
    assert 0.2 - 0.02 <= area.min() < 0.22
    assert area.max() > 0.8
    assert 3 / 4 - 0.04 <= ratio.min() < 0.8
    assert 1.25 < ratio.max() <= 4 / 3 + 0.04
    # Before rejection the logarithm of the ratio is uniform, so it stays centred on a square image.
    if height == width:
        assert abs(np.log(ratio).mean()) < 0.02
        assert abs((left - (width - w - left)).mean()) < 1.0


def test_an_image_that_no_crop_fits_is_cut_to_the_nearest_ratio() -> None:
    assert crop_box((10, 1000), (0.9, 1.0), (3 / 4, 4 / 3), KeyedRng(0, "t")) == (493, 0, 13, 10)
    assert crop_box((1000, 10), (0.9, 1.0), (3 / 4, 4 / 3), KeyedRng(0, "t")) == (0, 493, 10, 13)
    assert crop_box((1, 1), (0.9, 1.0), (3 / 4, 4 / 3), KeyedRng(0, "t")) == (0, 0, 1, 1)


def test_a_crop_of_scale_and_ratio_one_keeps_a_square_image_whole() -> None:
    pixels = noise(24, 24)
    out = TrainTransform(**WHOLE, flip=0)(item(pixels), (24, 24), KeyedRng(0, "t"))
    np.testing.assert_allclose(out, by_hand(Image.fromarray(pixels)), atol=2e-6)


def test_the_crop_is_cut_first_and_then_resized_bicubically() -> None:
    image = Image.fromarray(noise(90, 120))
    left, top, w, h = crop_box((90, 120), (0.2, 1.0), (3 / 4, 4 / 3), KeyedRng(5, "t"))
    expected = image.crop((left, top, left + w, top + h)).resize((48, 32), BICUBIC)
    out = TrainTransform(flip=0)(item(np.asarray(image)), (32, 48), KeyedRng(5, "t"))
    np.testing.assert_allclose(out, by_hand(expected), atol=2e-6)


def test_half_of_the_images_are_flipped() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, :4] = 255
    flipped = 0
    for i in range(1000):
        out = TrainTransform(**WHOLE)(item(pixels), (8, 8), KeyedRng(0, "t", i))
        flipped += bool(out[0, -1, 0] > out[0, 0, 0])
    assert abs(flipped - 500) < 80
    never = TrainTransform(**WHOLE, flip=0)(item(pixels), (8, 8), KeyedRng(0, "t"))
    always = TrainTransform(**WHOLE, flip=1)(item(pixels), (8, 8), KeyedRng(0, "t"))
    np.testing.assert_array_equal(always, never[:, ::-1])


# Evaluation


@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (256, 256), (100, 77), (301, 1000)])
@pytest.mark.parametrize(("size", "resized"), [(224, 256), (192, 219), (384, 384)])
def test_official_evaluation_resizes_the_short_side_and_cuts_the_centre(
    shape: tuple[int, int], size: int, resized: int
) -> None:
    image = Image.fromarray(noise(*shape))
    height, width = shape
    short = min(shape)
    big = image.resize((int(resized * width / short), int(resized * height / short)), BICUBIC)
    left, top = round((big.width - size) / 2), round((big.height - size) / 2)
    expected = big.crop((left, top, left + size, top + size))
    out = EvalTransform()(item(np.asarray(image)), (size, size))
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, by_hand(expected), atol=2e-6)


@pytest.mark.parametrize("shape", [(90, 120), (120, 90), (40, 200)])
def test_a_rectangular_evaluation_covers_the_whole_frame_and_keeps_the_proportions(
    shape: tuple[int, int],
) -> None:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    ramp = np.stack([rows * 2 % 256, columns % 256, np.full(shape, 200)], -1).astype(np.uint8)
    out = center_crop(Image.fromarray(ramp), (32, 64), 1.0)
    assert out.size == (64, 32)
    pixels = np.asarray(out, float)
    assert pixels[..., 2].min() == 200  # no blank border
    inner = pixels[2:-2, 2:-2]
    step_down, step_right = np.diff(inner[..., 0], axis=0).mean() / 2, np.diff(inner[..., 1], axis=1).mean()
    assert step_down == pytest.approx(step_right, rel=0.05)


def test_a_crop_fraction_overrides_the_official_margin() -> None:
    pixels = noise(24, 24)
    out = EvalTransform(crop_fraction=1.0)(item(pixels), (24, 24))
    np.testing.assert_allclose(out, by_hand(Image.fromarray(pixels)), atol=2e-6)
    assert not np.allclose(out, EvalTransform()(item(pixels), (24, 24)))


def test_denormalize_undoes_normalisation_exactly() -> None:
    pixels = noise(16, 16)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.5, 1.0)
    out = EvalTransform(crop_fraction=1.0, mean=mean, std=std)(item(pixels), (16, 16))
    np.testing.assert_array_equal(denormalize(out, mean, std), pixels)
    assert denormalize(np.array([[-9.0, 9.0, 0.0]])).tolist() == [[0, 255, 104]]


# Erasing and the whole chain


def test_erasing_fills_one_rectangle_of_the_right_size_with_normal_noise() -> None:
    noises = []
    for i in range(300):
        box, noise = erased_box((60, 80), KeyedRng(0, "t", i))
        assert box is not None
        assert 0 <= box.top < box.bottom <= 60
        assert 0 <= box.left < box.right <= 80
        height, width = box.bottom - box.top, box.right - box.left
        assert noise.shape == (height * width, 3)
        assert noise.dtype == np.float32
        assert 0.015 < height * width / 4800 < 0.345
        assert 0.25 < height / width < 4.0
        noises.append(noise.ravel())
    values = np.concatenate(noises)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01


def test_erasing_happens_after_normalisation_with_its_probability() -> None:
    flat = np.full((32, 32, 3), 128, np.uint8)
    transform = TrainTransform(**WHOLE, erase=0.25)
    erased = [np.ptp(transform(item(flat), (32, 32), KeyedRng(0, "t", i))[..., 0]) > 0 for i in range(1000)]
    assert abs(sum(erased) - 250) < 70


def test_the_same_draws_give_the_same_image_and_other_draws_another() -> None:
    source = item(noise(50, 60))
    first, again = (FINETUNE(source, (32, 32), KeyedRng(0, "t", 1)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, FINETUNE(source, (32, 32), KeyedRng(0, "t", 2)))


def test_the_official_transforms_match_the_recipes() -> None:
    assert (PRETRAIN.crop_scale, PRETRAIN.flip, PRETRAIN.rand_augment, PRETRAIN.erase) == (
        (0.2, 1.0),
        0.5,
        None,
        0.0,
    )
    assert FINETUNE.crop_scale == (0.08, 1.0)
    assert FINETUNE.rand_augment == RandAugment(
        operations=2, magnitude=9.0, magnitude_std=0.5, probability=0.5
    )
    assert FINETUNE.erase == 0.25
    assert PRETRAIN.crop_ratio == FINETUNE.crop_ratio == (3 / 4, 4 / 3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"crop_scale": (0.5, 0.2)}, "crop_scale: expected the lower limit first, found 0.5, 0.2"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
        ({"flip": 1.5}, "flip: expected 0 to 1, found 1.5"),
        ({"erase": -0.1}, "erase: expected 0 to 1, found -0.1"),
        ({"std": (1.0, 0.0, 1.0)}, "std: expected above 0"),
        ({"mean": (0.5, 0.5)}, "mean: expected 3 numbers"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings: dict, named: str) -> None:
    with pytest.raises(ValueError, match=r"^augmentation\.") as caught:
        TrainTransform(**settings)
    assert named in str(caught.value)


def test_an_evaluation_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"crop_fraction: expected 0.05 to 1, found 1\.2"):
        EvalTransform(crop_fraction=1.2)
    with pytest.raises(ValueError, match=r"crop_fraction: expected 0.05 to 1, found 1e-05"):
        EvalTransform(crop_fraction=1e-5)


# Decoding


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb_of_the_same_picture(mode: str) -> None:
    greys = np.array([0, 255] if mode == "1" else range(0, 256, 4), np.uint8)
    grey = Image.fromarray(np.repeat(greys[None], 8, 0)).convert("RGB")
    form = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    out = decode(encoded(grey.convert(mode, palette=Image.Palette.ADAPTIVE), form), "x")
    assert out.mode == "RGB"
    assert np.abs(np.asarray(out, int) - np.asarray(grey, int)).max() <= 1


def test_transparent_parts_become_white() -> None:
    hidden = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    hidden.paste((0, 0, 200, 255), (0, 0, 2, 4))
    out = np.asarray(decode(encoded(hidden), "x"))
    assert out[0, 0].tolist() == [0, 0, 200]
    assert out[0, 3].tolist() == [255, 255, 255]
    palette = hidden.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    blue = palette.getpixel((0, 0))
    out = np.asarray(decode(encoded(palette, transparency=blue), "x"))
    assert out[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_greys_keep_their_high_byte() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for form in ("PNG", "TIFF"):
        out = np.asarray(decode(encoded(Image.fromarray(values), form), "x"))
        assert out[0, :, 1].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    pixels = np.array([[0, 1_000_000]], np.float32 if mode == "F" else np.int32)
    with pytest.raises(ValueError, match=r"wide\.tif: cannot be decoded.*save it with 8 or 16 bits"):
        decode(encoded(Image.fromarray(pixels), "TIFF"), "wide.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_rotated_upright(orientation: int) -> None:
    upright = np.zeros((6, 4, 3), np.uint8)
    upright[0, 0], upright[0, -1], upright[-1, 0] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    np.testing.assert_array_equal(np.asarray(decode(file, "x")), upright)


def test_an_image_with_a_corrupt_exif_block_is_read() -> None:
    pixels = noise(8, 8)
    file = encoded(Image.fromarray(pixels), exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff")
    np.testing.assert_array_equal(np.asarray(decode(file, "x")), pixels)


JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")
BROKEN = {
    "cut": JPEG[: len(JPEG) // 2],
    "empty": b"",
    "text": b"this is not an image",
    "png": encoded(Image.fromarray(noise(64, 64)))[:200] + b"\0" * 50,
    "gif": b"GIF89a" + b"\xff" * 40,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_names_its_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match=r"broken\.jpg: cannot be decoded as an image") as caught:
        load_image(path, (32, 32))
    assert "\n" not in str(caught.value)


def test_load_image_names_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.png: cannot be read \(No such file"):
        load_image(tmp_path / "nowhere.png", (32, 32))
    with pytest.raises(ValueError, match="expected a file, found a folder"):
        load_image(tmp_path, (32, 32))


def test_load_image_equals_the_evaluation_transform(tmp_path: Path) -> None:
    pixels = noise(60, 50)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    out = load_image(tmp_path / "a.png", (32, 32))
    assert out.shape == (32, 32, 3)
    np.testing.assert_array_equal(out, EvalTransform()(item(pixels), (32, 32)))
    assert math.isclose(float(out.mean()), float(by_hand(Image.fromarray(pixels)).mean()), abs_tol=0.2)


# Fast decoding


def photograph(height: int, width: int, **options: object) -> Item:
    coarse = Image.fromarray(noise(12, 16, seed=4)).resize((width, height), BICUBIC)
    return Item(image=encoded(coarse, "JPEG", quality=95, **options), label=0, name="photograph")


@pytest.mark.parametrize("turned", [False, True])
def test_fast_decoding_draws_the_same_crops_and_nearly_the_same_pixels(turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    image = photograph(600, 800, exif=exif)
    exact, fast = TrainTransform(), TrainTransform(fast_decode=True)
    for i in range(8):
        traces: list[list[str]] = [[], []]
        images = [
            transform.augment(image, (40, 56), KeyedRng(0, "t", i), trace).pixels.astype(int)
            for transform, trace in zip((exact, fast), traces, strict=True)
        ]
        assert traces[0] == traces[1]
        assert np.abs(images[0] - images[1]).mean() < 1.5
        assert not np.array_equal(*images)


def test_fast_decoding_is_exact_if_no_smaller_scale_covers_the_crop() -> None:
    small = photograph(60, 80)
    png = Item(image=encoded(Image.fromarray(noise(600, 800))), label=0, name="png")
    for image in (small, png, item(noise(600, 800))):
        exact, fast = (
            TrainTransform(fast_decode=value)(image, (40, 56), KeyedRng(0, "t", 1)) for value in (False, True)
        )
        np.testing.assert_array_equal(exact, fast)


def test_fast_decoding_computes_fewer_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    from arm_core.data import decode as decoding

    sizes = []
    original = decoding.to_rgb
    monkeypatch.setattr(decoding, "to_rgb", lambda image: sizes.append(image.size) or original(image))
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (4 / 3, 4 / 3)}
    for side in (300, 299, 150, 75, 20):
        TrainTransform(fast_decode=True, **whole)(photograph(600, 800), (side, side), KeyedRng(0, "t"))
    assert sizes == [(400, 300), (400, 300), (200, 150), (100, 75), (100, 75)]
