"""The table of scan implementations, the choice among them, and the check of shapes that engines share."""

from types import SimpleNamespace

import pytest

from arm_core.engine.scans import Implementation, Implementations, check_axes, choose_scan


def implementation(**options: object) -> Implementation[object]:
    return Implementation(directional_conv=lambda x: x, selective_scan=lambda x: x, **options)


TABLE = Implementations(
    {
        "fast": implementation(
            unusable=lambda device: None if device in ("cuda", "cuda:1") else "needs a GPU"
        ),
        "noted": implementation(note=lambda width: f"width {width}" if width > 4 else None),
    }
)


def test_a_scan_is_checked_on_the_device_with_its_number() -> None:
    assert TABLE.usable("cuda:1") == {"fast": None, "noted": None}
    assert TABLE.usable("cuda:2") == {"fast": "needs a GPU", "noted": None}
    assert TABLE.usable("cpu") == {"fast": "needs a GPU", "noted": None}


def test_auto_takes_the_first_usable_scan_and_an_unusable_one_is_refused() -> None:
    assert choose_scan(TABLE.usable("cuda"), "auto") == "fast"
    assert choose_scan(TABLE.usable("cpu"), "auto") == "noted"
    with pytest.raises(ValueError, match=r"^scan 'fast' cannot run here: needs a GPU$"):
        choose_scan(TABLE.usable("cpu"), "fast")
    with pytest.raises(ValueError, match=r"^no scan can run here: fast: needs a GPU$"):
        choose_scan({"fast": "needs a GPU"}, "auto")


def test_an_unknown_scan_is_refused_with_the_known_names() -> None:
    with pytest.raises(ValueError, match=r"^unknown scan 'warp'; expected fast, noted$"):
        TABLE["warp"]
    with pytest.raises(ValueError, match=r"^unknown scan 'warp' for this backend; expected auto, fast"):
        choose_scan(TABLE.usable("cpu"), "warp")


def test_the_printed_name_of_a_scan_has_its_note() -> None:
    assert TABLE.label("noted", 5) == "noted (width 5)"
    assert TABLE.label("noted", 4) == "noted"
    assert TABLE.label("fast", 5) == "fast"


def array(*shape: int) -> SimpleNamespace:
    return SimpleNamespace(shape=shape)


def test_axes_that_fit_give_the_size_of_each_letter() -> None:
    assert check_axes(u=(array(2, 3, 5), "KBL"), D=(array(2), "K")) == {"K": 2, "B": 3, "L": 5}


@pytest.mark.parametrize(
    ("shape", "found"),
    [((2, 4), r"\(2, 4\)"), ((3, 7), r"\(3, 7\)"), ((2,), r"\(2,\)"), ((2, 7, 1), r"\(2, 7, 1\)")],
)
def test_the_first_tensor_that_does_not_fit_is_named_with_the_known_sizes(
    shape: tuple[int, ...], found: str
) -> None:
    with pytest.raises(ValueError, match=rf"^scan: order: expected \(K=2, L=7\), found {found}$"):
        check_axes("scan: ", u=(array(2, 3, 7), "KBL"), order=(array(*shape), "KL"))
