"""The findings that `reproduce.py` tests, as variants of three recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from arm_cli.sweep.members import Member
from arm_core.recipe.recipe import Recipe, load_recipe, override

FEW, MORE = 10, 50
"""Labels per class."""
LABELS = 20
"""Labels per class where only one number is used."""

SHORT, CONVERGED = 140, 400
"""Finetuning steps: while the accuracy still rises, and where it has stopped rising."""

TAUGHT = ("schedule.base_lr=0.1", "optimizer.layer_decay=0.55")
UNTAUGHT = ("schedule.base_lr=0.04", "optimizer.layer_decay=0.7")
"""Tuned settings of classifiers, pretrained and from scratch (benchmarks/results/demo_tuning-*.md)."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One setting of a finding: changes to pretraining (None: from scratch) and to finetuning."""

    label: str
    pretraining: Mapping[str, str] | None = field(default_factory=dict)
    finetuning: Mapping[str, str] = field(default_factory=dict)
    steps: int = SHORT


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement that is tested: the first variant is better than the second."""

    better: str
    worse: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding of the paper, and how it is tested here."""

    key: str
    question: str
    paper: str
    variants: Sequence[Variant]
    claims: Sequence[Claim]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Seeds, and factors on the lengths of the runs."""

    seeds: int
    pretraining: float
    finetuning: float


def _labels(count: int) -> dict[str, str]:
    return {"data.labels_per_class": str(count)}


def _either_start(count: int) -> list[Variant]:
    return [
        Variant(label=f"pretrained, {count} labels", finetuning=_labels(count), steps=CONVERGED),
        Variant(
            label=f"from scratch, {count} labels",
            pretraining=None,
            finetuning=_labels(count),
            steps=CONVERGED,
        ),
    ]


FINDINGS = (
    Finding(
        key="a",
        question="Is a pretrained classifier better than one from scratch after both have converged?",
        paper="ARM-B reaches 83.2 % on ImageNet, the supervised model 81.2 %.",
        variants=[*_either_start(FEW), *_either_start(MORE)],
        claims=[
            Claim(better=f"pretrained, {n} labels", worse=f"from scratch, {n} labels") for n in (FEW, MORE)
        ],
    ),
    Finding(
        key="b",
        question="Are clusters of patches better than single patches?",
        paper="Clusters of 4x4 patches are 0.8 points better than single patches.",
        variants=[
            Variant(label="clusters of 2x2"),
            Variant(label="clusters of 1x1", pretraining={"model.cluster": "1x1"}),
            Variant(label="clusters of 3x3", pretraining={"model.cluster": "3x3"}),
        ],
        claims=[
            Claim(better="clusters of 2x2", worse="clusters of 1x1"),
            Claim(better="clusters of 3x3", worse="clusters of 1x1"),
        ],
    ),
    Finding(
        key="c",
        question="Does the prediction order of the clusters matter?",
        paper="Row by row, forwards, is the best order; a random order is worse.",
        variants=[
            Variant(label="row"),
            *(
                Variant(label=order.replace("_", " "), pretraining={"model.prediction_order": order})
                for order in ("row_reverse", "column", "random")
            ),
        ],
        claims=[Claim(better="row", worse=other) for other in ("row reverse", "column", "random")],
    ),
    Finding(
        key="d",
        question="Are targets that are normalised per patch better than raw pixels?",
        paper="Normalised targets are the setting of the paper and of its code.",
        variants=[
            Variant(label="normalised"),
            Variant(label="raw pixels", pretraining={"model.target": "raw"}),
        ],
        claims=[Claim(better="normalised", worse="raw pixels")],
    ),
    Finding(
        key="e",
        question="Are four scan directions better in the classifier?",
        paper="Classifiers scan in four directions, which is better than one.",
        variants=[
            Variant(label="4 directions"),
            Variant(label="2 directions", finetuning={"model.directions": "2"}),
            Variant(label="1 direction", finetuning={"model.directions": "1"}),
        ],
        claims=[
            Claim(better="4 directions", worse="1 direction"),
            Claim(better="4 directions", worse="2 directions"),
        ],
    ),
)


def members_of(findings: Sequence[Finding], plan: Plan) -> list[Member]:
    """All runs, pretraining first; equal runs of several findings once."""
    pretraining, finetuning = {}, {}
    for seed in range(plan.seeds):
        base = _pretraining(Variant(label=""), seed, plan)
        pretraining[base.name] = base  # its encoders are probed
        for finding in findings:
            for variant in finding.variants:
                if variant.pretraining is not None:
                    start = _pretraining(variant, seed, plan)
                    pretraining[start.name] = start
                member = finetuning_of(variant, seed, plan)
                finetuning[member.name] = member
    return [*pretraining.values(), *finetuning.values()]


def base_name(seed: int, plan: Plan) -> str:
    """The pretraining run with the recipe's own settings."""
    return _pretraining(Variant(label=""), seed, plan).name


def _pretraining(variant: Variant, seed: int, plan: Plan) -> Member:
    changes = dict(variant.pretraining or {})
    recipe = load_recipe("pretrain-digits")
    steps = _steps(recipe.training.length.amount, plan.pretraining)
    every = max(1, steps // 6)
    settings = {
        "training.seed": seed,
        "training.length": f"{steps} steps",
        "schedule.warmup": f"{_steps(recipe.schedule.warmup.amount, plan.pretraining)} steps",
        "training.save_every": f"{steps} steps",
        **changes,
    }
    if not changes:
        settings["training.keep_every"] = f"{every} steps"
    return Member(
        name=f"pretrain/{_name(changes) or 'base'}_{steps}-steps_seed-{seed}",
        recipe=_changed(recipe, settings),
    )


def finetuning_of(variant: Variant, seed: int, plan: Plan) -> Member:
    """The finetuning run of a variant."""
    scratch = variant.pretraining is None
    recipe = load_recipe("scratch-digits" if scratch else "finetune-digits")
    steps = _steps(variant.steps, plan.finetuning)
    rates = dict(text.split("=") for text in (UNTAUGHT if scratch else TAUGHT))
    settings = {
        "training.seed": seed,
        "training.length": f"{steps} steps",
        "training.save_every": f"{steps} steps",
        "training.evaluate_every": f"{steps} steps",
        "schedule.warmup": f"{min(steps, 8)} steps",
        **rates,
        **_labels(LABELS),
        **variant.finetuning,
    }
    start = None if scratch else _pretraining(variant, seed, plan).name
    words = [start.split("/")[1].rpartition("_")[0] if start else "scratch", _name(variant.finetuning)]
    return Member(
        name=f"finetune/{'_'.join(w for w in words if w)}_{steps}-steps_seed-{seed}",
        recipe=_changed(recipe, settings),
        after=start,
        evaluate_on="test",
    )


def _name(changes: Mapping[str, str]) -> str:
    return "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in changes.items())


def _steps(amount: float, factor: float) -> int:
    return max(1, round(amount * factor))


def _changed(recipe: Recipe, settings: Mapping[str, object]) -> Recipe:
    return override(recipe, [f"{key}={value}" for key, value in settings.items()])
