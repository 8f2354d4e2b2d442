"""Finding f: k-NN and a linear classifier on the frozen encoder, over pretraining steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from reproduce_findings import Plan, base_name

from arm_cli.demo.measure import features_of, images_of, test_digits, training_digits
from arm_cli.sweep.folder import SweepFolder
from arm_core.engine.protocol import Backend, EngineOptions, TrainingState
from arm_core.model.parameters import initial_parameters
from arm_core.recipe.recipe import load_recipe
from arm_core.training.checkpoint import FOLDER, load_checkpoint, saved_steps, step_name
from arm_core.training.intervals import Interval, mean_interval, paired_difference
from arm_core.training.probe import knn_probe, linear_probe


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Accuracy of both probes in percent, by pretraining step: one value for each seed."""

    knn: dict[int, list[float]]
    linear: dict[int, list[float]]

    def gain(self, values: dict[int, list[float]]) -> Interval:
        """The last step against random weights."""
        steps = sorted(values)
        first, last = values[steps[0]], values[steps[-1]]
        difference = paired_difference(dict(enumerate(last)), dict(enumerate(first)))
        assert difference is not None
        return difference

    @staticmethod
    def interval(values: list[float]) -> Interval:
        return mean_interval(values)


def probe_steps(folder: SweepFolder, plan: Plan, backend: Backend) -> Probes:
    """Probe the saved checkpoints of every base pretraining run, and its random initial weights."""
    recipe = load_recipe("pretrain-digits")
    test = images_of(test_digits(recipe), recipe)
    train = images_of(training_digits(recipe), recipe)
    found = Probes(knn={}, linear={})
    for seed in range(plan.seeds):
        path = folder.run(base_name(seed, plan))
        for step in [0, *(s for s in saved_steps(path) if s)]:
            if step:
                checkpoint = load_checkpoint(path / FOLDER / step_name(step))
                spec, parameters = checkpoint.spec, checkpoint.state.parameters
            else:
                spec = recipe.spec(None)
                parameters = initial_parameters(spec, seed)
            engine = backend.create_engine(
                spec, TrainingState(parameters=parameters), options=EngineOptions()
            )
            a, b = features_of(engine, train[0]), features_of(engine, test[0])
            mean = a.mean(0)
            knn = knn_probe(a - mean, train[1], b - mean, test[1])
            linear = linear_probe(a, train[1], b, test[1], seed=seed, strengths=(1e-3, 1e-2, 1e-1, 1.0))
            found.knn.setdefault(step, []).append(100 * knn.accuracy)
            found.linear.setdefault(step, []).append(100 * linear.accuracy)
    whole = {step for step, values in found.knn.items() if len(values) == plan.seeds}
    return Probes(
        knn={step: found.knn[step] for step in sorted(whole)},
        linear={step: found.linear[step] for step in sorted(whole)},
    )


def as_array(values: dict[int, list[float]]) -> np.ndarray:
    """(seeds, steps)"""
    return np.array([values[step] for step in sorted(values)]).T
