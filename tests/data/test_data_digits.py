"""The built-in digits: the shipped file, the splits, and the drawing."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

from arm_core.data import Digits
from arm_core.data.digits import Split, load_digits, split_members


def test_the_shipped_file_is_small_and_names_its_source_and_licence() -> None:
    assets = resources.files("arm_core.data") / "assets"
    assert len((assets / "digits.npz").read_bytes()) < 200_000
    about = (assets / "README.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in about
    assert "BSD-3-Clause" in about
    assert "UCI Machine Learning Repository" in about


def test_the_shipped_file_holds_the_digits_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="compares with scikit-learn")
    expected = datasets.load_digits()
    images, labels = load_digits()
    np.testing.assert_array_equal(images, expected.images)
    np.testing.assert_array_equal(labels, expected.target)


def test_splits_are_disjoint_and_cover_the_set() -> None:
    parts = {split: Digits(split).members for split in ("train", "validation", "test")}
    assert {split: len(members) for split, members in parts.items()} == {
        "train": 1097,
        "validation": 300,
        "test": 400,
    }
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1797))
    labels = load_digits()[1]
    assert np.bincount(labels[parts["test"]]).tolist() == [40] * 10
    assert np.bincount(labels[parts["validation"]]).tolist() == [30] * 10


def test_the_split_of_each_digit_is_pinned() -> None:
    """Results on different splits are not comparable, so the splits must never change."""
    assert split_members(Split.TEST)[:8].tolist() == [4, 8, 11, 12, 13, 16, 21, 22]
    assert split_members(Split.VALIDATION)[:8].tolist() == [10, 15, 34, 36, 39, 59, 61, 79]


def test_training_digits_are_redrawn_each_epoch_and_depend_on_the_seed() -> None:
    images = [Digits(seed=seed).item(5, epoch).image for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    np.testing.assert_array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    assert not np.array_equal(images[0], images[3])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_held_out_digits_are_the_same_for_every_seed_and_epoch(split: str) -> None:
    for index in (0, 7):
        first, other = Digits(split).item(index, 0), Digits(split, seed=9).item(index, 3)
        np.testing.assert_array_equal(first.image, other.image)


def test_labels_per_class_keeps_this_number_and_a_smaller_choice_is_part_of_a_larger() -> None:
    labels = load_digits()[1]
    few, many = Digits(labels_per_class=20, seed=2), Digits(labels_per_class=50, seed=2)
    assert np.bincount(labels[few.members]).tolist() == [20] * 10
    assert set(few.members) < set(many.members) < set(Digits().members)
    assert set(few.members) != set(Digits(labels_per_class=20, seed=3).members)


def test_labels_of_a_choice_belong_to_its_digits() -> None:
    few = Digits(labels_per_class=3)
    items = [few.item(i) for i in range(len(few))]
    assert [item.label for item in items] == load_digits()[1][few.members].tolist()
    assert items[0].name == f"digit {few.members[0]} (train)"


def test_digits_are_grey_with_both_inks_and_keep_their_contrast() -> None:
    digits = Digits("train", size=(24, 32))
    images = np.stack([np.asarray(digits.item(i).image) for i in range(300)])
    assert images.shape == (300, 24, 32, 3)
    assert images.dtype == np.uint8
    assert np.array_equal(images[..., 0], images[..., 1])
    assert np.array_equal(images[..., 0], images[..., 2])
    grey = images[..., 0].astype(float)
    contrast = np.array([g.max() - g.min() for g in grey])
    assert contrast.min() > 80
    edge = np.concatenate([grey[:, 0], grey[:, -1]], axis=1).mean(1)
    dark_ground = edge < 128
    assert 110 < dark_ground.sum() < 190  # half of 300, plus or minus five standard deviations
    middle = grey[:, 6:18, 12:20].mean((1, 2))
    assert np.mean((middle > edge) == dark_ground) > 0.9


def test_a_digit_can_still_be_recognised() -> None:
    """Nearest class mean on the ink, far above the 10 % of chance: the drawings are recognisable."""
    train, test = Digits(size=(16, 16)), Digits("test", size=(16, 16))

    def ink(digits: Digits) -> tuple[np.ndarray, np.ndarray]:
        items = [digits.item(i) for i in range(len(digits))]
        grey = np.stack([np.asarray(item.image)[..., 0] for item in items]).reshape(len(items), -1) / 255.0
        centred = grey - np.median(grey, axis=1, keepdims=True)
        sign = np.sign((centred**3).sum(1, keepdims=True))  # ink covers less than half of the canvas
        return centred * sign, np.array([item.label for item in items])

    (x, y), (test_x, test_y) = ink(train), ink(test)
    means = np.stack([x[y == digit].mean(0) for digit in range(10)])
    found = ((test_x[:, None] - means) ** 2).sum(-1).argmin(1)
    assert np.mean(found == test_y) > 0.5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"split": "val"}, "split must be one of train, validation, test, found 'val'"),
        ({"labels_per_class": 105}, "labels_per_class must be 1 to 104, found 105"),
        ({"labels_per_class": 0}, "labels_per_class must be 1 to 104, found 0"),
        ({"split": "test", "labels_per_class": 5}, "labels_per_class selects training digits"),
        ({"size": (24, 4)}, "the canvas must be 8x8 pixels or larger, found 24x4"),
    ],
)
def test_impossible_digits_are_refused(arguments: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Digits(**arguments)


def test_varied_digits_are_the_same_digits_at_more_varied_sizes_and_places():
    plain, varied = (Digits("test", name=name) for name in ("digits", "varied-digits"))
    assert (plain.members == varied.members).all()

    def spread(source):
        """Standard deviation of the height of the ink, pixels."""
        heights = []
        for index in range(100):
            grey = source.item(index).image[..., 0].astype(float)
            rows = np.flatnonzero(abs(grey - np.median(grey)).max(1) > 60)
            heights.append(np.ptp(rows))
        return np.std(heights)

    assert spread(varied) > 1.2 * spread(plain)
