"""Image folders, synthetic images, and the messages about invalid folders."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arm_core.data import UNLABELLED, ImageFolder, Synthetic
from arm_core.data.loader import epoch_order
from arm_core.model.rng import KeyedRng


def save_image(path: Path, color: tuple[int, int, int] = (10, 20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), color).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for name in ("dog/b.png", "dog/deep/er/a.JPG", "cat/z.webp", "cat/m.gif", "cat/k.tif", "cat/.hidden.png"):
        save_image(root / name)
    (root / "cat" / "notes.txt").write_text("no image")
    (root / ".cache").mkdir()
    return root


def test_sub_folders_are_classes_in_sorted_order_and_images_are_found_at_any_depth(pets: Path) -> None:
    source = ImageFolder(pets)
    items = [source.item(i) for i in range(len(source))]
    assert source.classes == ("cat", "dog")
    assert [(Path(item.name).name, item.label) for item in items] == [
        ("k.tif", 0),
        ("m.gif", 0),
        ("z.webp", 0),
        ("b.png", 1),
        ("a.JPG", 1),
    ]
    assert items[3].image == (pets / "dog" / "b.png").read_bytes()


def test_without_labels_every_image_is_included_without_a_class(pets: Path) -> None:
    save_image(pets / "loose.png")
    source = ImageFolder(pets, labels=False)
    assert source.classes == ()
    assert len(source) == 6
    assert {source.item(i).label for i in range(6)} == {UNLABELLED}


def test_given_classes_fix_the_labels_of_a_folder_that_lacks_some(pets: Path) -> None:
    source = ImageFolder(pets, classes=("bird", "cat", "dog"))
    assert source.classes == ("bird", "cat", "dog")
    assert [source.item(i).label for i in range(len(source))] == [1, 1, 1, 2, 2]


def test_a_class_that_the_caller_does_not_know_is_named(pets: Path) -> None:
    with pytest.raises(ValueError, match="class folder 'dog' is none of the 2 known classes"):
        ImageFolder(pets, classes=("bird", "cat"))


def test_a_missing_folder_and_a_file_are_distinguished(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        ImageFolder(tmp_path / "nowhere")
    save_image(tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"one\.png: is a file, not a folder"):
        ImageFolder(tmp_path / "one.png")


@pytest.mark.parametrize("labels", [True, False])
def test_a_folder_without_images_is_refused_with_the_known_suffixes(tmp_path: Path, labels: bool) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no images found \(looked for jpg jpeg png webp"):
        ImageFolder(tmp_path, labels=labels)


def test_an_empty_class_folder_is_named(pets: Path) -> None:
    (pets / "emu").mkdir()
    with pytest.raises(ValueError, match="emu: no images in this class folder"):
        ImageFolder(pets)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no class folders"):
        ImageFolder(tmp_path)
    assert len(ImageFolder(tmp_path, labels=False)) == 1


def test_a_folder_of_splits_is_not_read_as_classes(tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "cat" / "a.png")
    save_image(tmp_path / "val" / "cat" / "a.png")
    with pytest.raises(ValueError, match=r"holds the splits train, val, not classes; pass one of them"):
        ImageFolder(tmp_path)


def test_a_file_that_vanished_is_named(pets: Path) -> None:
    source = ImageFolder(pets)
    (pets / "dog" / "b.png").unlink()
    with pytest.raises(ValueError, match=r"b\.png: cannot be read"):
        source.item(3)


def test_sources_survive_pickling(pets: Path) -> None:
    for source in (ImageFolder(pets), Synthetic(4, (5, 7))):
        copy = pickle.loads(pickle.dumps(source))
        np.testing.assert_equal(copy.item(2).image, source.item(2).image)


def test_synthetic_images_depend_on_seed_and_index() -> None:
    first, again, other = Synthetic(4, (5, 7)), Synthetic(4, (5, 7)), Synthetic(4, (5, 7), seed=1)
    assert np.shape(first.item(1).image) == (5, 7, 3)
    assert [Synthetic(9, classes=4).item(i).label for i in range(9)] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    np.testing.assert_array_equal(first.item(1).image, again.item(1).image)
    assert not np.array_equal(first.item(1).image, first.item(2).image)
    assert not np.array_equal(first.item(1).image, other.item(1).image)


def test_each_epoch_visits_every_sample_once_in_another_order() -> None:
    orders = [epoch_order(3, epoch, 1000) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_order(4, 0, 1000))


def test_draws_have_the_moments_of_their_distributions() -> None:
    rng, count = KeyedRng(0, "moments"), 4000
    for alpha in (0.3, 0.8, 1.0, 2.5):
        values = np.array([rng.beta(alpha) for _ in range(count)])
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(values.mean() - 0.5) < 5 * np.sqrt(variance / count)
        assert values.var() == pytest.approx(variance, rel=0.08)
    values = np.array([rng.between(-2, 6) for _ in range(count)])
    assert -2 <= values.min() < -1.98
    assert 5.98 < values.max() < 6
    values = np.array([rng.gamma(0.8) for _ in range(count)])
    assert values.mean() == pytest.approx(0.8, rel=0.1)
    assert {rng.below(3) for _ in range(100)} == {0, 1, 2}
    assert abs(np.mean([rng.chance(0.25) for _ in range(count)]) - 0.25) < 0.035
    assert abs(np.mean([rng.gaussian(9, 0.5) for _ in range(count)]) - 9) < 0.04


def test_draws_differ_by_purpose_seed_and_counter() -> None:
    keys = [(0, "a", 1, 2), (0, "a", 2, 1), (0, "a", 12), (1, "a", 1, 2), (0, "b", 1, 2)]
    assert len({KeyedRng(seed, purpose, *at).between(0, 1) for seed, purpose, *at in keys}) == len(keys)
