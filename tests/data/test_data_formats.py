"""The same images in every format give the same batches; bad files of every format get one clear line."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from arm_core.data import FINETUNE, OFFICIAL_MIXING, BadImage, TrainLoader
from arm_core.data.combine import Joined, Subset, split
from arm_core.data.folder import ImageFolder
from arm_core.data.identity import differences, identity
from arm_core.data.opening import Format, absolute, expand, open_images, together
from arm_core.data.pack import MANIFEST, PARTIAL, PackSettings, pack
from arm_core.data.parquet import HubImages
from arm_core.data.shards import cache_folder
from arm_core.data.sources import ListedSource

CLASSES = ("ant", "bee", "cat", "dog")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def jpeg(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i % 7, 24, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_parquet(
    path: Path, rows: list[dict], *, names: tuple[str, ...] | None = CLASSES, group: int = 16
) -> None:
    """The layout of imagenet-1k."""
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow, part of the dev extra")
    from pyarrow import parquet

    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    label = pa.int64() if isinstance(rows[0]["label"], int) else pa.string()
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    schema = pa.schema({"image": struct, "label": label}, metadata=metadata)
    parquet.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """200 images of 4 classes, 50 each, in every format."""
    root = tmp_path_factory.mktemp("formats")
    folder = root / "folder"
    listed = []
    for i in range(200):
        name = f"{CLASSES[i // 50]}/img_{i:03d}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(i))
        listed.append((name, i // 50))
    with (root / "images.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("path", "label"), *((f"folder/{name}", CLASSES[label]) for name, label in listed)]
        )
    lines = [json.dumps({"file_name": f"folder/{name}", "label": CLASSES[label]}) for name, label in listed]
    (root / "images.jsonl").write_text("\n".join(lines) + "\n")
    (root / "parquet" / "data").mkdir(parents=True)
    rows = [
        {"image": {"bytes": (folder / name).read_bytes(), "path": Path(name).name}, "label": label}
        for name, label in listed
    ]
    for part in range(3):
        file = root / "parquet" / "data" / f"train-0000{part}-of-00003.parquet"
        write_parquet(file, rows[part * 70 : (part + 1) * 70])
    import pyarrow as pa

    (root / "arrow").mkdir()
    table = pa.Table.from_pylist(rows)
    features = {"label": {"names": CLASSES}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with pa.ipc.new_stream(str(root / "arrow" / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=30)
    for name in ("state.json", "dataset_info.json"):
        (root / "arrow" / name).write_text("{}")
    (root / "tar").mkdir()
    for part in range(4):
        members = {}
        for name, label in listed[part * 50 : (part + 1) * 50]:
            members[name] = (folder / name).read_bytes()
            members[name.replace(".jpg", ".cls")] = str(label).encode()
        tar(root / "tar" / f"shard-{part:03d}.tar", members)
    tar(root / "classes.tar", {f"./{name}": (folder / name).read_bytes() for name, _ in listed})
    pack(ImageFolder(folder), root / "pack", PackSettings(shards=3), workers=2)
    for name, _ in listed[:100]:
        for copy in ("first", "second"):
            (root / copy / name).parent.mkdir(parents=True, exist_ok=True)
    for i, (name, _) in enumerate(listed):
        copy = root / ("first" if i < 100 else "second") / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((folder / name).read_bytes())
    for empty in [path for path in (root / "second").iterdir() if not any(path.iterdir())]:
        empty.rmdir()
    return {
        "folder": str(folder),
        "csv": str(root / "images.csv"),
        "jsonl": str(root / "images.jsonl"),
        "parquet": str(root / "parquet"),
        "parquet pattern": str(root / "parquet" / "data" / "train-*.parquet"),
        "arrow": str(root / "arrow"),
        "tar": str(root / "tar"),
        "tar pattern": str(root / "tar" / "shard-{000..003}.tar"),
        "tar of class folders": str(root / "classes.tar"),
        "pack": str(root / "pack"),
        "two folders": f"{{{root / 'first'},{root / 'second'}}}",
    }


NAMES = (
    "csv",
    "jsonl",
    "parquet",
    "parquet pattern",
    "arrow",
    "tar",
    "tar pattern",
    "tar of class folders",
    "pack",
    "two folders",
)


def batches(source: ListedSource, start: int = 0, workers: int = 0) -> list:
    loader = TrainLoader(
        source, FINETUNE, size=(16, 16), batch_size=8, seed=3, classes=4, mixing=OFFICIAL_MIXING,
        start=start, workers=workers,
    )  # fmt: skip
    with loader:
        return list(islice(loader, 30 - start))  # more than an epoch


@pytest.fixture(scope="module")
def expected(formats: dict[str, str]) -> list:
    return batches(open_images(formats["folder"]))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_images_in_any_format_give_bit_identical_batches(
    name: str, formats: dict[str, str], expected: list
) -> None:
    source = open_images(formats[name])
    assert len(source) == 200
    for start, workers in ((0, 0), (13, 2)):  # resumed in the middle of an epoch, by threads
        found = batches(source, start, workers)
        assert len(found) == 30 - start
        for a, b in zip(found, expected[start:], strict=True):
            assert np.asarray(a.images).tobytes() == np.asarray(b.images).tobytes()
            assert a.targets.tobytes() == b.targets.tobytes()
    names = ("0", "1", "2", "3") if name.startswith("tar p") or name == "tar" else CLASSES
    assert source.classes == names


@pytest.mark.parametrize("name", NAMES[:-1])  # a folder lists its images in the order of the classes
def test_the_classes_of_a_model_fix_the_labels_of_any_format(name: str, formats: dict[str, str]) -> None:
    order = ("zebra", *reversed(CLASSES)) if not name.startswith("tar p") and name != "tar" else CLASSES
    source = open_images(formats[name], classes=order)
    assert source.classes == tuple(order)
    assert [order[label] for label in source.labels.tolist()] == [CLASSES[i // 50] for i in range(200)]


@pytest.mark.parametrize("name", NAMES)
def test_any_format_can_be_read_without_labels(name: str, formats: dict[str, str]) -> None:
    source = open_images(formats[name], labels=False)
    assert (source.classes, set(source.labels.tolist()), len(source)) == ((), {-1}, 200)


def test_a_class_that_the_model_lacks_is_named_in_any_format(formats: dict[str, str]) -> None:
    for name in ("csv", "jsonl", "parquet", "arrow", "tar of class folders", "pack", "two folders"):
        with pytest.raises(ValueError, match=r"class(?: folder)? 'dog' is none of the 3 known classes"):
            open_images(formats[name], classes=CLASSES[:3])
    with pytest.raises(ValueError, match="image 150 has label 3, expected 0 to 2"):
        open_images(formats["tar"], classes=CLASSES[:3])


# Paths


def test_patterns_find_files_in_order_and_name_missing_ones(tmp_path: Path) -> None:
    for name in ("a-0.tar", "a-1.tar", "b,c"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/a-{{0..1}}.tar") == [f"{tmp_path}/a-0.tar", f"{tmp_path}/a-1.tar"]
    assert expand(f"{tmp_path}/a-*.tar") == [f"{tmp_path}/a-0.tar", f"{tmp_path}/a-1.tar"]
    assert expand(str(tmp_path / "b,c")) == [str(tmp_path / "b,c")]
    with pytest.raises(ValueError, match=r"a-2\.tar: no such file"):
        expand(f"{tmp_path}/a-{{0..2}}.tar")
    with pytest.raises(ValueError, match=r"c-\*: no such file"):
        expand(f"{tmp_path}/c-*")


def test_several_paths_become_one_that_works_from_any_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert absolute("a") == str(tmp_path / "a")
    assert absolute("hf://datasets/x/y") == "hf://datasets/x/y"
    assert absolute(together(["a", "/b"])) == f"{{{tmp_path}/a,/b}}"
    with pytest.raises(ValueError, match="no path can contain them"):
        together(["a,b", "c"])


def test_a_missing_path_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        open_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"expected hf://datasets/USER/NAME"):
        open_images("hf://datasets/only-one-part")


def test_a_folder_of_splits_in_one_parquet_data_set_is_refused(tmp_path: Path) -> None:
    for name in ("train-0.parquet", "validation-0.parquet"):
        write_parquet(tmp_path / name, [{"image": {"bytes": jpeg(0), "path": None}, "label": 0}])
    with pytest.raises(ValueError, match=r"holds the splits train, validation; pass one, such as '.*train\*"):
        open_images(tmp_path)
    assert len(open_images(f"{tmp_path}/train*.parquet")) == 1


def test_a_given_format_overrides_the_detected_one(tmp_path: Path) -> None:
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "a.jpg").write_bytes(jpeg(0))
    tar(tmp_path / "x.tar", {"bee/b.jpg": jpeg(1)})
    assert open_images(tmp_path).classes == ("ant",)
    assert open_images(tmp_path, form=Format.TAR).classes == ("bee",)


# Bad files


def test_a_truncated_tar_file_is_named(tmp_path: Path) -> None:
    whole = tar(tmp_path / "x.tar", {f"ant/{i}.jpg": jpeg(i) for i in range(4)}).read_bytes()
    for length in (len(whole) // 2, 700):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.tar: cut off, after \d images"):
            open_images(tmp_path / "cut.tar")


def test_other_files_with_the_suffix_tar_are_refused(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(tar(tmp_path / "y.tar", {"a.jpg": jpeg(0)}).read_bytes()))
    with pytest.raises(ValueError, match=r"x\.tar: a compressed tar file cannot be read in random order"):
        open_images(path)
    path.write_bytes(b"no tar file" * 100)
    with pytest.raises(ValueError, match=r"x\.tar: not a valid tar file"):
        open_images(path)
    tar(path, {"notes.txt": b"x"})
    with pytest.raises(ValueError, match=r"x\.tar: holds no images"):
        open_images(path)
    tar(path, {"a.jpg": jpeg(0)})
    with pytest.raises(ValueError, match=r"x\.tar: no labels; expected a \.cls"):
        open_images(path)
    tar(path, {"a.jpg": jpeg(0), "a.cls": b"1", "b.jpg": jpeg(1)})
    with pytest.raises(ValueError, match=r"b\.jpg has no label"):
        open_images(path)
    tar(path, {"a.jpg": jpeg(0), "a.cls": b"-1"})
    with pytest.raises(ValueError, match=r"has label -1"):
        open_images(path)


def test_an_index_of_another_or_a_corrupt_file_is_built_again(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {f"ant/{i}.jpg": jpeg(i) for i in range(4)})
    assert len(open_images(path)) == 4
    (index,) = cache_folder().iterdir()
    index.write_bytes(b"damaged")
    assert len(open_images(path)) == 4
    tar(path, {f"ant/{i}.jpg": jpeg(i) for i in range(3)})
    source = open_images(path)
    assert [source.item(i).image for i in range(3)] == [jpeg(i) for i in range(3)]


def test_an_index_is_used_if_it_matches_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tar(tmp_path / "x.tar", {"ant/a.jpg": jpeg(0)})
    open_images(path)
    monkeypatch.setattr("arm_core.data.shards.build_index", lambda path: pytest.fail("built again"))
    assert open_images(path).item(0).image == jpeg(0)


def test_parquet_with_other_columns_names_them(tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"expected an image column .*, found text, label"):
        open_images(tmp_path / "x.parquet")
    parquet.write_table(pa.table({"image": [b"a"], "caption": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"expected a label column .*, found image, caption"):
        open_images(tmp_path / "x.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"x\.parquet: cannot be read"):
        open_images(tmp_path / "x.parquet")


def test_threads_read_a_group_of_rows_once_and_other_groups_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": {"bytes": jpeg(i), "path": None}, "label": 0} for i in range(8)]
    write_parquet(tmp_path / "x.parquet", rows, group=4)
    source = open_images(tmp_path / "x.parquet")
    assert isinstance(source, HubImages)
    read, groups, both = HubImages._read_group, list[int](), threading.Barrier(2, timeout=20)

    def reading(self: HubImages, path: Path, number: int) -> Any:
        groups.append(number)
        both.wait()  # fails unless the other group is read at the same time
        return read(self, path, number)

    monkeypatch.setattr(HubImages, "_read_group", reading)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(source.read, range(8)))
    assert found == [row["image"]["bytes"] for row in rows]
    assert sorted(groups) == [0, 1]


def test_an_error_of_a_group_reaches_all_threads_and_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "x.parquet", [{"image": {"bytes": jpeg(0), "path": None}, "label": 0}])
    source = open_images(tmp_path / "x.parquet")

    def failing(self: HubImages, path: Path, number: int) -> Any:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(HubImages, "_read_group", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            source.read(0)
    assert source.read(0) == jpeg(0)


def test_parquet_of_the_test_split_has_no_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", [{"image": {"bytes": jpeg(0), "path": "a.jpg"}, "label": -1}])
    with pytest.raises(ValueError, match="image 0 has label -1, expected 0 to 3; -1 marks images without"):
        open_images(tmp_path / "x.parquet")
    assert len(open_images(tmp_path / "x.parquet", labels=False)) == 1


def test_without_pyarrow_the_message_names_the_extra(fresh_python, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").touch()
    printed = fresh_python(
        "import sys; sys.modules['pyarrow'] = None\n"
        "from arm_core.data.opening import open_images\n"
        f"try: open_images({str(tmp_path / 'x.parquet')!r})\n"
        "except ValueError as error: print(error)\n"
    )
    assert "reading it needs pyarrow; install it with: pip install 'arm-vision[parquet]'" in printed


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "lists no images"),
        ("path,label\n", "lists no images"),
        ("a,b\nx.jpg,cat\n", "expected one column of path, image.* found the columns a, b"),
        ("path,file,label\nx.jpg,y,cat\n", "expected one column of path"),
        ("path,label\nx.jpg,\n", "row 1: expected text in the column 'label'"),
        ("path,label\nx.jpg\n", "row 1: expected text in the column 'label', found None"),
        (
            "path,label\n" + "".join(f"{i}.jpg,cat\n" for i in range(5)),
            r"5 of 5 files do not exist in .*: 0\.jpg, 1\.jpg, 2\.jpg, \.\.\.",
        ),
    ],
)
def test_a_table_without_images_is_refused_with_the_expected_columns(
    text: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.csv: .*{sentence}"):
        open_images(tmp_path / "x.csv")


@pytest.mark.parametrize("text", ["{", "[]", '{"path": 1.5, "label": "a"}', "\xff"])
def test_lines_that_are_not_json_objects_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"x\.jsonl"):
        open_images(tmp_path / "x.jsonl")


# Splitting


def test_a_split_takes_its_part_of_every_class_and_does_not_depend_on_the_location(
    formats: dict[str, str], tmp_path: Path
) -> None:
    train, held = split(open_images(formats["folder"]), 0.1)
    assert (len(train), len(held)) == (180, 20)
    assert np.bincount(held.labels).tolist() == [5, 5, 5, 5]
    assert not set(train.names) & set(held.names)
    moved = tmp_path / "elsewhere"
    moved.symlink_to(formats["folder"])
    assert split(open_images(moved), 0.1)[1].names == held.names
    assert held.item(3).image == (Path(formats["folder"]) / held.names[3]).read_bytes()


def test_a_split_keeps_groups_together(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    for i in range(60):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    rows = "".join(f"{i}.jpg,{'ab'[i % 2]},patient{i // 6}\n" for i in range(60))
    (tmp_path / "x.csv").write_text("path,label,group\n" + rows)
    source = open_images(tmp_path / "x.csv")
    train, held = split(source, 0.3)
    assert len(held) == 18
    sides = [{int(name.split(".")[0]) // 6 for name in part.names} for part in (train, held)]
    assert not sides[0] & sides[1]


def test_a_split_with_an_empty_part_is_refused(formats: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"val_fraction of 0\.001 leaves no images to evaluate on, of 200"):
        split(open_images(formats["folder"]), 0.001)


def test_parts_of_a_source_and_joined_sources_give_their_items(formats: dict[str, str]) -> None:
    whole = open_images(formats["folder"])
    part = Subset(whole, np.array([7, 3]))
    joined = Joined([part, whole])
    assert len(joined) == 202
    assert [joined.item(i).name for i in (0, 1, 2)] == [whole.item(i).name for i in (7, 3, 0)]


# Packing


def test_a_pack_keeps_names_classes_and_files(formats: dict[str, str]) -> None:
    packed, folder = open_images(formats["pack"]), open_images(formats["folder"])
    assert identity(packed) == identity(folder)
    manifest = json.loads((Path(formats["pack"]) / MANIFEST).read_text())
    assert [shard["images"] for shard in manifest["shards"]] == [66, 67, 67]


def test_a_smaller_pack_holds_resized_jpegs(formats: dict[str, str], tmp_path: Path) -> None:
    pack(open_images(formats["folder"]), tmp_path, PackSettings(size=12, quality=80))
    source = open_images(tmp_path)
    sizes = []
    for i in range(len(source)):
        with Image.open(io.BytesIO(source.item(i).image)) as image:
            sizes.append(min(image.size))
    assert set(sizes) == {12}
    assert source.classes == CLASSES


def test_an_interrupted_pack_is_resumed_and_equals_an_uninterrupted_one(
    formats: dict[str, str], tmp_path: Path
) -> None:
    source, settings = open_images(formats["folder"]), PackSettings(shards=4)
    whole = pack(source, tmp_path / "whole", settings)

    done = 0

    def stop(images: int) -> None:
        nonlocal done
        done += images
        if done == 130:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "other", settings, packed=stop)
    assert (tmp_path / "other" / PARTIAL).exists()
    read: list[str] = []
    original = type(source).read
    type(source).read = lambda self, index: read.append(index) or original(self, index)  # type: ignore[method-assign]
    try:
        found = pack(source, tmp_path / "other", settings)
    finally:
        type(source).read = original  # type: ignore[method-assign]
    assert found == whole
    assert len(read) in (50, 100)  # two shards were done, or three
    assert not (tmp_path / "other" / PARTIAL).exists()


def test_a_pack_of_other_images_or_in_a_folder_in_use_is_refused(
    formats: dict[str, str], tmp_path: Path
) -> None:
    source = open_images(formats["folder"])
    with pytest.raises(ValueError, match="holds a pack of other images or settings"):
        pack(source, Path(formats["pack"]), PackSettings(shards=2))
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match="not empty"):
        pack(source, tmp_path, PackSettings())


def test_a_bad_image_stops_packing_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "in" / "ant").mkdir(parents=True)
    (tmp_path / "in" / "ant" / "x.jpg").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"x\.jpg: cannot be decoded"):
        pack(ImageFolder(tmp_path / "in"), tmp_path / "out", PackSettings())


# Identity


def test_the_identity_of_data_depends_on_names_labels_and_counts(formats: dict[str, str]) -> None:
    folder = open_images(formats["folder"])
    before = identity(folder)
    assert differences(before, identity(open_images(formats["folder"]))) == (None, None)
    fewer = identity(Subset(folder, np.arange(199)))
    assert differences(before, fewer) == (None, "199 images instead of 200")
    others = identity(Subset(folder, np.arange(200)[::-1]))
    assert differences(before, others) == (None, "200 images of other names or labels")
    renamed = {**before, "classes": ["ant", "bee", "cow", "dog"]}
    classes, _ = differences(before, renamed)
    assert classes == "4 classes, without cat and with cow; the run has 4"
    assert "in another order" in str(differences(before, {**before, "classes": list(reversed(CLASSES))})[0])
