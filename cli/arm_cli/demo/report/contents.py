"""What the page of `arm demo` shows: measured values and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from arm_core.model.spec import PretrainSpec

Floats = npt.NDArray[np.floating]
Grey = npt.NDArray[np.uint8]
"""(..., H, W)."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Accuracy on the test images, in percent, at one number of labels per class."""

    labels: int
    """Labelled images per class."""
    steps: Sequence[int]
    """Finetuning steps at which the runs were evaluated."""
    arms: Mapping[str, Floats]
    """By name of the starting point: (seeds, steps)."""
    baselines: Mapping[str, Floats]
    """By name of the method: (seeds,)."""


@dataclass(frozen=True, kw_only=True)
class Parity:
    """The same weights and images in two engines."""

    engines: tuple[str, str]
    logits: float
    """Largest difference of a logit, relative to the largest logit."""
    gradient: float
    """Largest difference of a gradient, relative to the largest value of its tensor."""
    same_class: float
    """Part of the images that get the same class."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The classifier's answer for a test image."""

    image: Grey
    label: int
    predicted: int
    probability: float
    """Of the predicted class."""
    of_label: float
    """Probability of the true class."""


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Features of the test images, projected to the plane of their largest variance."""

    title: str
    points: Floats
    """(images, 2)"""
    accuracy: float
    """k-NN on all features, in percent."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """Contents of the page."""

    seconds: float
    """Time from the start of the command."""
    spec: PretrainSpec
    loss_steps: Sequence[int]
    losses: Sequence[float]
    truth: Grey
    """(B, H, W)"""
    predicted: Grey
    """(B, H, W): each cluster predicted from the true ones before it."""
    comparisons: Sequence[Comparison]
    rates: Mapping[str, str]
    """By name of the starting point: its learning rate and layer decay, in words."""
    answers: Sequence[Answer]
    planes: Sequence[Plane]
    labels: npt.NDArray[np.int64]
    """Classes of the images in the planes."""
    parity: Parity | None
    """None if only one engine is installed."""
    predict: str
    """A command that classifies the digits in the folder."""
    costs: str
    """A sentence on the time that the commands for own images take."""
    facts: Mapping[str, str]
    """Machine, versions, times."""
