"""Time of influence maps of all layers and directions on a CPU.

    python benchmarks/influence.py [--model base] [--repeats 5]

First compares one layer's maps of a small classifier with the float64 reference. Then times
`arm_core.explain.influence.influence` on one image, including the model's forward pass, and prints elapsed
and CPU seconds. Exits with 1 if the median is over 3 s on two cores or more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time

import numpy as np
from hardware import header

from arm_core.engine.protocol import TrainingState
from arm_core.engine.registry import choose_backend
from arm_core.explain.influence import influence
from arm_core.model.parameters import initial_parameters
from arm_core.model.presets import PRESETS, classifier_preset
from arm_core.model.reference.influence import contributions, influence_shares
from arm_core.model.reference.model import Weights, layer_norm
from arm_core.model.spec import ClassifierSpec, EncoderSpec
from arm_core.model.tokens import direction_orders

TARGET = 3.0
"""Seconds."""


def check() -> None:
    """Raise AssertionError if the maps differ from those of the reference."""
    spec = ClassifierSpec(encoder=EncoderSpec(width=32, depth=6, patch=4), classes=3, image_size=(24, 24))
    parameters = initial_parameters(spec, 0)
    engine = choose_backend("torch").create_engine(spec, TrainingState(parameters=parameters))
    images = np.random.default_rng(0).standard_normal((1, 24, 24, 3)).astype(np.float32)
    w, tokens = Weights(parameters, "layers.0."), engine.forward(images, intermediates=True)["tokens"][0]
    x = layer_norm(tokens.astype(np.float64), w.at("norm1"), spec.encoder.norm_eps)
    expected = influence_shares(contributions(spec.encoder, w.at("mixer"), x, direction_orders(spec)))
    error = np.abs(influence(engine, images, layers=[0]).maps[0, 0] - expected).max() / np.abs(expected).max()
    print(f"layer 0 of a small classifier against the reference: {error:.1e}")
    assert error < 1e-5


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=PRESETS, default="base")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"command   {' '.join(sys.argv)}\n{header('numpy', 'numba', 'torch')}")
    check()
    spec = classifier_preset(options.model)
    parameters = initial_parameters(spec, 0)
    engine = choose_backend("torch").create_engine(spec, TrainingState(parameters=parameters))
    images = np.random.default_rng(0).standard_normal((1, *spec.image_size, 3)).astype(np.float32)
    clock, processor = [], []
    for repeat in range(options.repeats + 1):  # the first one compiles
        start = time.perf_counter(), time.process_time()
        influence(engine, images, parameters=parameters)
        if repeat:
            clock.append(time.perf_counter() - start[0])
            processor.append(time.process_time() - start[1])
    layers, tokens = spec.encoder.depth, spec.tokens
    print(f"{options.model}: {layers} layers, {spec.directions} directions, {tokens} tokens, one image")
    for name, seconds in (("clock", clock), ("processor", processor)):
        print(f"{name:10} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    print(f"load of the machine: {os.getloadavg()[0]:.1f}")
    return int(statistics.median(clock) > TARGET)


if __name__ == "__main__":
    sys.exit(main())
