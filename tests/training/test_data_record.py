"""How a run treats bad images and changed data."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_trainer import SMALL, Recorder, make_engine
from thread_ranks import run_ranks

from arm_core.data.bad_images import BadImages
from arm_core.data.decode import BadImage
from arm_core.data.folder import ImageFolder
from arm_core.data.loader import EvalLoader, TrainLoader
from arm_core.data.pack import PackSettings, pack
from arm_core.data.transforms import PRETRAIN, EvalTransform
from arm_core.engine.ranks import Ranks
from arm_core.recipe.images import open_sources
from arm_core.recipe.recipe import load_recipe, override
from arm_core.training.checkpoint import newest_checkpoint
from arm_core.training.data_record import DataRecord
from arm_core.training.plan import BatchFailed
from arm_core.training.run_folder import DATA, resume_run, start_run
from arm_core.training.trainer import Trainer

COUNT = 120


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """120 images of two classes; number 7 of the second one is truncated."""
    root = tmp_path / "images"
    for i in range(COUNT):
        path = root / "ab"[i % 2] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)).save(path)
    return root


def damage(root: Path) -> Path:
    path = root / "b" / "015.png"
    path.write_bytes(path.read_bytes()[:50])
    return path


def recipe_of(images: Path, *changes: str):
    settings = ["data.source=folder", f"data.path={images}", "model.classes=none", "data.workers=2"]
    return override(load_recipe("finetune-digits"), [*SMALL, *settings, *changes])


def train(path: Path, recipe, *, resume: bool = False, overrides=(), accept: bool = False):
    observer = Recorder()
    opened = resume_run(path, overrides, warn=pytest.fail) if resume else None
    if opened is not None:
        recipe = opened.recipe
    sources = open_sources(recipe)
    with opened or start_run(path, recipe, recipe.spec(len(sources[0].classes))) as run:
        trainer = Trainer(run, make_engine(run), *sources, observer=observer, accept_changed_data=accept)
        return trainer.train(), observer


def final(path: Path):
    return newest_checkpoint(path, pytest.fail).state.parameters


# Bad images


def test_at_a_bad_image_the_run_is_saved_and_the_message_says_how_to_continue(
    images: Path, tmp_path: Path
) -> None:
    bad, run = damage(images), tmp_path / "run"
    with pytest.raises(BatchFailed) as failed:
        train(run, recipe_of(images))
    assert f"{bad}: cannot be decoded" in str(failed.value)
    assert f"--resume {run} --on-bad-image skip" in str(failed.value)
    assert f"saved step {newest_checkpoint(run, pytest.fail).progress.step}, " in str(failed.value)
    outcome, observer = train(run, None, resume=True, overrides=["data.on_bad_image=skip"])
    assert outcome.finished
    (warning,) = observer.warnings
    assert warning.startswith(f"{bad}: cannot be decoded")
    assert warning.endswith("; skipped")
    whole = tmp_path / "whole"
    train(whole, recipe_of(images, "data.on_bad_image=skip"))
    for name, value in final(whole).items():
        assert final(run)[name].tobytes() == value.tobytes()


def test_a_skipped_image_is_named_once_in_the_run(images: Path, tmp_path: Path) -> None:
    bad, run = damage(images), tmp_path / "run"
    recipe = recipe_of(images, "data.on_bad_image=skip", f"data.eval_path={images}")
    _, observer = train(run, recipe)
    assert [str(bad) in text for text in observer.warnings] == [True]
    (recorded,) = json.loads((run / DATA).read_text())["bad_images"]
    assert recorded.startswith(f"{bad}: cannot be decoded")
    _, observer = train(run, None, resume=True, overrides=["training.length=4 epochs"])
    assert observer.warnings == []


def test_a_bad_image_is_replaced_by_the_next_good_one(images: Path) -> None:
    damage(images)
    source = ImageFolder(images)
    bad = source.names.index("b/015.png")
    noted = BadImages(COUNT)
    settings = {"size": (8, 8), "batch_size": 4, "seed": 1}
    with TrainLoader(source, PRETRAIN, **settings, bad=noted) as loader:
        position = next(p for p in range(30) if bad in loader.batches.indices(p))
        slot = loader.batches.indices(position).tolist().index(bad)
        found = list(loader.batches.samples(position))[slot]
    assert found[0].name == source.where(bad + 1)
    assert len(noted) == 1


def test_an_evaluation_can_skip_bad_images(images: Path) -> None:
    damage(images)
    source, noted = ImageFolder(images), BadImages(COUNT)
    loader = EvalLoader(source, EvalTransform(), size=(8, 8), batch_size=1, bad=noted)
    indices = np.concatenate([batch.indices for batch in loader]).tolist()
    assert indices == [i for i in range(COUNT) if source.names[i] != "b/015.png"]
    with pytest.raises(BadImage):
        list(EvalLoader(source, EvalTransform(), size=(8, 8), batch_size=1))


def test_more_than_one_percent_of_bad_images_stops_training() -> None:
    noted = BadImages(250)
    noted.add(["a", "b", "a"])
    noted.add(["b"])
    assert noted.take_new() == ["a", "b"]
    assert noted.take_new() == []
    with pytest.raises(BadImage, match="3 of 250 images cannot be decoded, more than 1 %; the last one: c"):
        noted.add(["c"])
    BadImages(10).add(["a single one"])
    with pytest.raises(BadImage):
        BadImages(10).add(["one", "and another"])


# Changed data


@pytest.fixture
def begun(images: Path, tmp_path: Path) -> Path:
    train(tmp_path / "run", recipe_of(images, "training.length=1 epoch", "schedule.warmup=0 epochs"))
    return tmp_path / "run"


LONGER = ["training.length=2 epochs"]


def test_unchanged_data_elsewhere_resumes_without_a_warning(
    images: Path, begun: Path, tmp_path: Path
) -> None:
    images.rename(tmp_path / "moved")
    _, observer = train(begun, None, resume=True, overrides=[f"data.path={tmp_path / 'moved'}", *LONGER])
    assert observer.warnings == []


@pytest.mark.parametrize("recorded", [True, False])
def test_a_renamed_class_folder_is_refused(images: Path, begun: Path, recorded: bool) -> None:
    """This includes runs of an older version, by the class names of their checkpoints."""
    (images / "a").rename(images / "z")
    if not recorded:
        (begun / DATA).unlink()
    with pytest.raises(ValueError, match="training data have 2 classes, without a and with z; the run has 2"):
        train(begun, None, resume=True, overrides=LONGER, accept=True)


def test_other_images_are_named_in_a_warning_until_they_are_accepted(images: Path, begun: Path) -> None:
    shutil.copy(images / "a" / "000.png", images / "a" / "new.png")
    for _ in range(2):
        _, observer = train(begun, None, resume=True, overrides=LONGER)
        (warning,) = observer.warnings
        assert "the training data have 121 images instead of 120" in warning
        assert "--accept-changed-data" in warning
    _, observer = train(begun, None, resume=True, overrides=LONGER, accept=True)
    assert observer.warnings == []
    _, observer = train(begun, None, resume=True, overrides=LONGER)
    assert observer.warnings == []


def test_renamed_images_are_detected(images: Path, begun: Path) -> None:
    (images / "a" / "000.png").rename(images / "a" / "zzz.png")
    _, observer = train(begun, None, resume=True, overrides=LONGER)
    assert "120 images of other names or labels" in observer.warnings[0]


def test_a_record_that_cannot_be_read_is_reported_in_one_line(images: Path, begun: Path) -> None:
    (begun / DATA).write_text("{")
    with pytest.raises(ValueError, match=r"data\.json: cannot be read .* remove it to record the data again"):
        train(begun, None, resume=True, overrides=LONGER)


def test_a_part_of_the_images_is_held_out_for_evaluation(images: Path, tmp_path: Path) -> None:
    recipe = recipe_of(images, "data.val_fraction=0.1")
    training, held = open_sources(recipe)
    assert (len(training), len(held)) == (108, 12)
    outcome, _ = train(tmp_path / "run", recipe)
    assert outcome.best is not None
    assert outcome.best["eval_images"] == 12


@pytest.mark.parametrize("form", ["csv", "pack", "tar of class folders"])
def test_a_run_resumes_bit_identically_from_another_format_of_the_same_images(
    form: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(whole, recipe_of(images))
    train(moved, recipe_of(images, "training.length=1 epoch", "schedule.warmup=1 epoch"))
    source = ImageFolder(images)
    if form == "csv":
        path = tmp_path / "images.csv"
        rows = [
            f"images/{name},{'ab'[label]}" for name, label in zip(source.names, source.labels, strict=True)
        ]
        path.write_text("path,label\n" + "\n".join(rows) + "\n")
    elif form == "pack":
        path = tmp_path / "pack"
        pack(source, path, PackSettings(shards=3))
    else:
        path = tmp_path / "images.tar"
        with tarfile.open(path, "w") as archive:
            for name in source.names:
                archive.add(images / name, name)
    _, observer = train(moved, None, resume=True, overrides=[f"data.path={path}", "training.length=3 epochs"])
    assert len(observer.warnings) == (form == "csv")  # whose names begin with the folder
    for name, value in final(whole).items():
        assert final(moved)[name].tobytes() == value.tobytes()


def test_bad_images_of_all_ranks_are_recorded_once(images: Path, tmp_path: Path) -> None:
    recipe = recipe_of(images)
    with start_run(tmp_path / "run", recipe, recipe.spec(2)) as run:

        def work(ranks: Ranks) -> tuple[list[str], int]:
            record = DataRecord(run, {"train": ImageFolder(images)}, warn=lambda text: None)
            bad = BadImages(1000)
            bad.add([f"only {ranks.rank}", "both"])
            record.note(bad, ranks)
            record.note(bad, ranks)
            return record.bad_images, len(bad)

        found = run_ranks(2, work)
    assert found == [(["only 0", "both", "only 1"], 3)] * 2
    assert json.loads((tmp_path / "run" / DATA).read_text())["bad_images"] == ["only 0", "both", "only 1"]
