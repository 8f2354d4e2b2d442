"""Recipes: shipped ones, TOML round trip, overrides, refusals."""

import dataclasses
import re
import types
import typing
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arm_core.data.augment import RandAugment
from arm_core.data.mixing import OFFICIAL_MIXING, Mixing
from arm_core.data.transforms import FINETUNE, PRETRAIN, TrainTransform
from arm_core.engine.optimizer import OptimizerSettings, parameter_groups
from arm_core.engine.protocol import Precision
from arm_core.model.machines import estimate, parse_machines
from arm_core.model.presets import PRESETS, classifier_preset, pretrain_preset
from arm_core.model.spec import Direction, Pooling, PredictionOrder
from arm_core.recipe.recipe import (
    Recipe,
    Stage,
    fingerprint,
    from_toml,
    load_recipe,
    override,
    recipe_text,
    shipped_recipes,
    to_toml,
)
from arm_core.recipe.sections import (
    ClassifierModel,
    DataSettings,
    PretrainModel,
    ScheduleSettings,
    TrainingSettings,
)
from arm_core.recipe.toml import Span, field_types

SECTIONS = (
    PretrainModel,
    ClassifierModel,
    DataSettings,
    RandAugment,
    TrainTransform,
    Mixing,
    OptimizerSettings,
    ScheduleSettings,
    TrainingSettings,
)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_round_trip_and_name_their_source(name):
    recipe = load_recipe(name)
    assert from_toml(to_toml(recipe)) == recipe
    assert recipe.stage == {"pretrain": "pretrain"}.get(name.split("-")[0], "finetune")
    recipe.spec(classes=10)
    header = recipe_text(name).split("stage =")[0]
    assert all(word in header for word in ("# Source:", "# Hardware:", "# Expected:"))


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if not name.endswith("-digits")])
def test_the_hours_of_a_recipe_are_those_of_the_cost_model(name):
    """The header states them with the machine; the digits take seconds."""
    (line,) = [line for line in recipe_text(name).splitlines() if line.startswith("# Hours:")]
    hours, machine = re.search(r"about ([\d.]+) on (\S+)", line).groups()
    if machine == "2":  # CPU cores, which the cost model does not know
        assert "s of CPU time per step, which were measured" in line
        return
    assert "estimated by the cost model, not measured" in line
    recipe = load_recipe(name)
    training, length = recipe.training, recipe.training.length
    found = estimate(
        recipe.spec(1000),
        *parse_machines(machine),
        batch_size=training.batch_size,
        accumulation=training.accumulation,
        average=recipe.optimizer.ema_decay is not None,
        bfloat16=training.precision is Precision.BFLOAT16,
    )
    assert ("for ImageNet-1k" in line) == (length.unit == "epochs")
    steps = float(length.steps(Fraction(1_281_167, training.batch_size)))
    assert float(hours) == pytest.approx(steps * found.seconds / 3600, rel=0.06)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_recipes_at_384_finetune_the_official_model_on_larger_images(size):
    small, large = load_recipe(f"finetune-{size}"), load_recipe(f"finetune-{size}-384")
    assert large.spec(1000) == classifier_preset(size, image_size=(384, 384))
    assert (large.mixing, large.augmentation) == (small.mixing, small.augmentation)
    assert large.lr == pytest.approx(5e-6)


def test_the_linear_probe_trains_only_the_last_norm_and_the_head():
    recipe = load_recipe("linear-probe")
    groups = parameter_groups(recipe.spec(10), recipe.optimizer)
    trained = {name for group in groups if group.lr_scale > 0 for name in group.names}
    assert trained == {"norm_f.weight", "norm_f.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_has_both_recipes_of_its_model(name):
    assert load_recipe(f"pretrain-{name}").spec() == pretrain_preset(name)
    assert load_recipe(f"finetune-{name}").spec(PRESETS[name].classes) == classifier_preset(name)
    assert PretrainModel(preset=name).spec() == pretrain_preset(name)
    assert ClassifierModel(preset=name).spec(10) == classifier_preset(name, classes=10)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_official_recipes_have_the_official_models_and_settings(size):
    pretrain, finetune = load_recipe(f"pretrain-{size}"), load_recipe(f"finetune-{size}")
    assert pretrain.spec() == pretrain_preset(size)
    assert finetune.spec(1000) == classifier_preset(size)
    assert pretrain.optimizer == OptimizerSettings(betas=(0.9, 0.95), weight_decay=0.05, clip=3.0)
    assert pretrain.lr == pytest.approx(1.5e-4 * (2048 if size == "base" else 1024) / 256)
    assert finetune.lr == pytest.approx(2e-3)
    assert finetune.optimizer.layer_decay == (0.65 if size == "base" else 0.75)
    assert finetune.training.drop_path == (0.1 if size == "base" else 0.3)
    assert (pretrain.augmentation, finetune.augmentation) == (PRETRAIN, FINETUNE)
    assert finetune.mixing == OFFICIAL_MIXING
    assert pretrain.training.precision is Precision.BFLOAT16
    assert ("not released" in recipe_text(f"pretrain-{size}")) == (size == "huge")


def test_optional_settings_default_to_none_since_toml_has_no_null():
    for cls in SECTIONS:
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, hint in field_types(cls).items():
            if typing.get_origin(hint) is types.UnionType:
                assert fields[name].default is None, f"{cls.__name__}.{name}"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(
    path=st.none() | TEXT,
    lr=st.floats(1e-300, 1e300),
    seed=st.integers(0, 2**62),
    clip=st.none() | st.floats(1e-12, 1e12),
    length=st.builds(Span, st.integers(1, 10**12), st.just("steps"))
    | st.builds(Span, st.floats(0.25, 1e12), st.just("epochs")),
    order=st.none() | st.sampled_from(list(PredictionOrder)),
    side=st.none() | st.integers(1, 9).map(lambda n: (16 * n, 32)),
)
def test_any_recipe_survives_toml_exactly(path, lr, seed, clip, length, order, side):
    recipe = Recipe(
        stage=Stage.PRETRAIN,
        model=PretrainModel(preset="tiny", image_size=side, prediction_order=order),
        schedule=ScheduleSettings(base_lr=lr),
        training=TrainingSettings(length=length, batch_size=6, accumulation=3, seed=seed),
        data=DataSettings(path=path),
        optimizer=OptimizerSettings(clip=clip),
    )
    assert from_toml(to_toml(recipe)) == recipe


@pytest.fixture
def recipe() -> Recipe:
    return load_recipe("pretrain-tiny")


@pytest.fixture
def finetune() -> Recipe:
    return load_recipe("finetune-tiny")


def test_overrides_take_the_type_of_their_field(recipe, finetune):
    changed = override(
        recipe,
        [
            "optimizer.weight_decay=1e-1",
            "optimizer.clip=none",
            "optimizer.betas=0.8, .9",
            "model.image_size=96x192",
            "model.cluster=2",
            "model.prediction_order=column",
            "model.width=64",
            "training.length=30 steps",
            "training.precision=bfloat16",
            "data.path=/data/my images",
            "training.seed=7",
        ],
    )
    assert changed.optimizer == OptimizerSettings(weight_decay=0.1, clip=None, betas=(0.8, 0.9))
    assert changed.spec().image_size == (96, 192)
    assert changed.spec().cluster == (2, 2)
    assert changed.spec().prediction_order is PredictionOrder.COLUMN
    assert changed.spec().encoder.width == 64
    assert changed.training.length == Span(30, "steps")
    assert changed.training.precision is Precision.BFLOAT16
    assert (changed.data.path, changed.training.seed) == ("/data/my images", 7)
    assert override(recipe, ["augmentation.rand_augment.magnitude=5"]).augmentation == TrainTransform(
        rand_augment=RandAugment(magnitude=5)
    )
    assert override(finetune, ["augmentation.rand_augment=none"]).augmentation.rand_augment is None
    classifier = override(finetune, ["model.directions=2", "model.pooling=cls"]).spec(5)
    assert classifier.scan_directions == (Direction.ROW, Direction.ROW_REVERSE)
    assert (classifier.pooling, classifier.classes) == (Pooling.CLS, 5)


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("optimizer.weight_dacay=1", "unknown key optimizer.weight_dacay; did you mean 'weight_decay'?"),
        ("optimiser.clip=1", "unknown key optimiser; did you mean 'optimizer'?"),
        ("stage=finetune", "expected section.key=value, found 'stage=finetune'"),
        ("stage.x=1", "unknown key stage"),
        ("data.path.x=1", "data.path is text and has no key x"),
        (
            "augmentation.rand_augment=on",
            "rand_augment is a table; set one of its keys: augmentation.rand_augment.operations",
        ),
        ("optimizer.clip", "expected section.key=value"),
        ("optimizer.clip=-1", "optimizer.clip: expected above 0, found -1.0"),
        ("training.seed=1.5", "training.seed: expected a whole number, found 1.5"),
        ("training.seed=none", "training.seed: expected a whole number, found 'none'"),
        ("schedule.base_lr=fast", "schedule.base_lr: expected a number, found 'fast'"),
        ("schedule.base_lr=nan", "schedule.base_lr: expected a number"),
        ("training.length=40", "training.length: expected a length such as '40 epochs' or '100 steps'"),
        ("training.length=1.5 steps", "training.length: expected a length"),
        ("training.precision=half", "training.precision: expected 'float32' or 'bfloat16', found 'half'"),
        ("training.accumulation=3", "batch_size 256 is not divisible by accumulation 3"),
        ("model.cluster=2,2,2", "model.cluster: expected a list of 2, each a whole number"),
        ("model.pooling=cls", "unknown key model.pooling; expected one of: preset, width"),
        ("mixing.mixup=0.8", "pretraining has no labels to mix or smooth"),
        ("training.drop_path=1", "drop_path: expected 0 or more and below 1, found 1.0"),
        ("training.length=0 steps", "training.length: expected more than 0 steps, found '0 steps'"),
        ("training.length=" + "9" * 400 + " epochs", "training.length: expected a length"),
        ("training.batch_size=" + "9" * 400, "training.batch_size: expected 1 to 16777216, found a whole"),
        ("data.workers=100000", "data.workers: expected 0 to 1024, found 100000"),
        ("data.eval_crop=1e-5", "data.eval_crop: expected 0.05 to 1, found 1e-05"),
        (
            "schedule.base_lr=" + "9" * 400,
            "schedule.base_lr: expected a number, found a whole number of more",
        ),
        ("schedule.base_lr=" + "9" * 5000, "schedule.base_lr: expected a number"),
        ("model.cluster=" + "[" * 100_000, "model.cluster: expected"),
        ("model.width=" + "[" * 100_000, "model.width: expected a whole number, found '[[["),
        (".".join(["a"] * 100_000) + "=1", "unknown key a; expected one of: "),
        (".".join(["model"] * 100_000) + "=1", "unknown key model.model; expected one of: "),
        ("model.width." + "a." * 100_000 + "b=1", "model.width is a whole number and has no key a.a."),
        ("x" * 100_000, "expected section.key=value, found 'xxx"),
        ("x" * 100_000 + ".y=1", "unknown key xxx"),
    ],
)
def test_a_wrong_override_is_refused_with_a_sentence(recipe, assignment, sentence):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        override(recipe, [assignment])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stage = ", "not valid TOML"),
        ("", "stage: expected 'pretrain' or 'finetune', found None"),
        ("stage = 'pretrain'", "model: expected a table"),
        ("stage = 'pretrain'\n[model]", "missing section [schedule], [training]"),
        ("stage = 'pretrain'\n[model]\n[modle]", "unknown key modle; did you mean 'model'?"),
        ("stage = 'pretrain'\n[model]\n[schedule]", "missing schedule.base_lr"),
        ("stage = 'pretrain'\ndata = 'images'\n[model]", "data: expected a table [data], found 'images'"),
        ("stage = 'pretrain'\n[model]\n[[optimizer]]", "optimizer: expected a table [optimizer], found [{}]"),
        ("stage = []\n[model]", "stage: expected 'pretrain' or 'finetune', found []"),
        (
            "stage = 'pretrain'\n[model]\n[schedule]\nbase_lr = 1\n[training]\nbatch_size = 1\nlength = 400",
            "training.length: expected a length such as '40 epochs' or '100 steps', found 400",
        ),
        (
            "stage = 'pretrain'\n[model]\n[schedule]\nbase_lr = " + "9" * 400,
            "schedule.base_lr: expected a numbe",
        ),
        ("stage = 'pretrain'\n[model]\nwidth = " + "9" * 5000, "not valid TOML"),
        ("stage = " + "[" * 1000, "not valid TOML: nested too deeply"),
        ("a." * 20_000 + "b = 1", "not a recipe: expected at most 100000 characters, and 100 dots in a line"),
        ("#" * 100_001, "not a recipe: expected at most 100000 characters"),
        ("stage = 'pretrain'\n[model]\nwidth = true", "model.width: expected a whole number, found True"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path, text, sentence):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_recipe(path)
    assert sentence in str(error.value)
    assert "mine.toml" in str(error.value)


def test_an_unknown_recipe_is_refused_with_a_near_match(tmp_path):
    with pytest.raises(ValueError, match="unknown recipe 'pretrain-bse'; did you mean 'pretrain-base'"):
        load_recipe("pretrain-bse")
    with pytest.raises(ValueError, match=r"none\.toml: cannot be read"):
        load_recipe(tmp_path / "none.toml")


def test_class_count_of_recipe_and_data_must_agree(finetune):
    assert finetune.spec(7).classes == 7
    assert override(finetune, ["model.classes=7"]).spec().classes == 7
    with pytest.raises(ValueError, match="the recipe has 7 classes, but the data has 5"):
        override(finetune, ["model.classes=7"]).spec(5)
    with pytest.raises(ValueError, match=r"the data has no classes; pass --set model\.classes=N"):
        finetune.spec()


def test_fingerprint_ignores_bookkeeping_and_covers_everything_else(recipe):
    same = ["data.path=/elsewhere", "data.workers=0", "training.keep=9", "training.evaluate_every=1 epoch"]
    assert fingerprint(override(recipe, same)) == fingerprint(recipe)
    for change in ("training.seed=1", "model.width=64", "optimizer.clip=none", "data.source=synthetic"):
        assert fingerprint(override(recipe, [change])) != fingerprint(recipe)


def test_a_span_counts_steps_exactly():
    assert Span.parse("0.1 epochs").steps(Fraction(10, 3)) == Fraction(1, 3)
    assert Span.parse("1 step").steps(Fraction(99)) == 1
    assert [str(Span.parse(text)) for text in ("1 epochs", "2 epoch", "5 steps")] == [
        "1 epoch",
        "2 epochs",
        "5 steps",
    ]
