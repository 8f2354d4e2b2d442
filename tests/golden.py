"""Results of the official code, to which tests compare the engines.

    strong = golden.load("pretrain_strong")          # or "classifier_strong"
    out = engine.forward(strong.images)
    assert strong.error("prediction", out["prediction"]) < 1e-4

The official code ran on a CPU in float32 (width 32, depth 12, decoder width 64). In the *strong* sets
every tensor was noised and rescaled so that a mistake is visible: swapping two directions changes logits by
0.2, a LayerNorm eps of 1e-6 by 0.08. `classifier_steps` holds two AdamW steps with layer decay.

To keep the repository small, numbers are stored in fixed point relative to their tensor's largest value
(the parameters with 24 bits: float32's own rounding), and outputs and gradients as samples: compare
through `error` and `gradient_errors`. If the environment variable ARM_GOLDEN names a folder with the complete
data, `complete()` returns it, for tests that need the official `.pth` files.

`python tests/golden.py FOLDER` rebuilds tests/fixtures from the complete data.
"""

from __future__ import annotations

import json
import lzma
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from arm_convert.official import MASK, canonical_view, official_view, spec_from_official
from arm_core.model.parameters import parameter_table
from arm_core.model.spec import ModelSpec

DATA = Path(__file__).parent / "fixtures"
STATE_BITS, IMAGE_BITS, OUTPUT_BITS, GRADIENT_BITS = 24, 21, 20, 16
"""Bits per stored number, relative to the largest of its tensor."""
SAMPLES = 2048
"""Largest number of kept values of an expected tensor, evenly spaced."""


@dataclass(frozen=True)
class Golden:
    """One official computation."""

    spec: ModelSpec
    parameters: dict[str, np.ndarray]
    """Canonical names and shapes, float32."""
    images: np.ndarray
    """(B, H, W, 3) float32, normalised."""
    labels: np.ndarray | None
    """(B,) class indices; None in pretraining."""
    expected: dict[str, Sample]
    """Outputs and intermediate tensors under the names of `Engine.forward`, and `loss`."""
    gradients: dict[str, Sample]
    """By official name."""
    gradient_norms: dict[str, float]
    """L2 norm of every gradient, by official name."""

    @property
    def targets(self) -> np.ndarray | None:
        """(B, classes) one-hot float32 labels."""
        return None if self.labels is None else np.eye(self.spec.classes, dtype=np.float32)[self.labels]

    def error(self, name: str, actual: np.ndarray) -> float:
        """Largest difference of an output, relative to its largest official value."""
        return self.expected[name].error(actual)

    def gradient_errors(self, gradients: dict[str, np.ndarray]) -> dict[str, float]:
        """The same for the stored gradients, by official name; `gradients` in canonical names."""
        official = official_view(self.spec, gradients)
        return {name: sample.error(official[name]) for name, sample in self.gradients.items()}

    def gradient_norm_errors(self, gradients: dict[str, np.ndarray]) -> dict[str, float]:
        """Relative difference of every gradient's L2 norm, by official name."""
        official = official_view(self.spec, gradients)
        largest = max(self.gradient_norms.values())
        # Gradients that consist of rounding errors are compared with the largest one instead.
        found = {
            name: float(np.linalg.norm(official[name].astype(np.float64))) for name in self.gradient_norms
        }
        return {
            name: abs(found[name] - norm) / max(norm, 1e-6 * largest)
            for name, norm in self.gradient_norms.items()
        }


@dataclass(frozen=True)
class Steps:
    """Two official AdamW steps of the classifier (class token, label smoothing 0.1)."""

    spec: ModelSpec
    parameters: dict[str, np.ndarray]
    images: np.ndarray
    targets: np.ndarray
    """(B, classes) smoothed float32."""
    betas: tuple[float, float]
    weight_decay: float
    layer_decay: float
    ema_decay: float
    lr: list[float]
    """Of each step, before layer scales."""
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Sample]
    """After the two steps, by official name."""
    ema: dict[str, Sample]

    def weight_errors(self, parameters: dict[str, np.ndarray]) -> dict[str, float]:
        """Largest difference of the resulting weights, relative to each tensor's largest.

        AdamW's first steps have the size of the learning rate even for tiny gradients. An element whose
        gradient is rounding noise can therefore differ by far more than the gradients.
        """
        official = official_view(self.spec, parameters)
        return {name: sample.error(official[name]) for name, sample in self.weights.items()}

    def ema_errors(self, ema: dict[str, np.ndarray]) -> dict[str, float]:
        official = official_view(self.spec, ema)
        return {name: sample.error(official[name]) for name, sample in self.ema.items()}


@dataclass(frozen=True)
class Sample:
    """Evenly spaced numbers of a tensor and its largest magnitude."""

    shape: tuple[int, ...]
    values: np.ndarray
    largest: float

    @staticmethod
    def where(shape: tuple[int, ...]) -> np.ndarray:
        """Flat indices that are kept: all, or an odd stride that covers every row and column."""
        size = int(np.prod(shape))
        stride = max(1, -(-size // SAMPLES)) | 1 if size > SAMPLES else 1
        return np.arange(0, size, stride)

    def error(self, actual: np.ndarray) -> float:
        actual = np.asarray(actual)
        assert actual.shape == self.shape, f"expected {self.shape}, found {actual.shape}"
        found = actual.reshape(-1)[self.where(self.shape)].astype(np.float64)
        return float(np.abs(found - self.values).max() / (self.largest or 1.0))


STORED_NAMES = {"encoder": "decoder_input"}
"""Outputs that have another name in the stored sets."""


@cache
def load(name: str) -> Golden:
    """`pretrain_strong` or `classifier_strong`."""
    arrays, plain = unpack(DATA / f"{name}.xz")
    spec, parameters = _state(arrays, plain)
    return Golden(
        spec=spec,
        parameters=parameters,
        images=arrays["images"],
        labels=np.array(plain["labels"]) if "labels" in plain else None,
        expected={
            STORED_NAMES.get(key, key): value for key, value in _samples(arrays, plain, "expected/").items()
        },
        gradients=_samples(arrays, plain, "grad/"),
        gradient_norms=plain["gradient_norms"],
    )


_STEP_FIELDS = ("weight_decay", "layer_decay", "ema_decay", "lr", "losses", "grad_norms")


@cache
def steps() -> Steps:
    """The two stored steps."""
    arrays, plain = unpack(DATA / "classifier_steps.xz")
    spec, parameters = _state(arrays, plain)
    return Steps(
        spec=spec,
        parameters=parameters,
        images=load("classifier_strong").images,
        targets=np.array(plain["targets"], np.float32),
        **{field: plain[field] for field in _STEP_FIELDS},
        betas=tuple(plain["betas"]),
        weights=_samples(arrays, plain, "after/"),
        ema=_samples(arrays, plain, "ema/"),
    )


def complete() -> Path | None:
    """The folder with the complete official data, if ARM_GOLDEN names one."""
    folder = os.environ.get("ARM_GOLDEN")
    return Path(folder) if folder else None


def official_names(kind: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official base model's state dict (`pretrain` or `classifier`)."""
    lines = (DATA / f"official_{kind}_base.txt").read_text().splitlines()
    found = {}
    for line in lines:
        name, shape, _ = line.split("\t")
        found[name] = tuple(int(size) for size in shape.strip("()").split(",") if size.strip())
    return found


def _state(arrays: dict[str, np.ndarray], plain: dict[str, Any]) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    official = {name[6:]: value for name, value in arrays.items() if name.startswith("state/")}
    for name, original in plain["copies"].items():
        official[name] = official[original]
    shapes = {name: tuple(shape) for name, shape in plain["shapes"].items()}
    spec = spec_from_official(shapes, plain["args"])
    parameters = canonical_view(spec, official)
    return spec, {name: np.ascontiguousarray(parameters[name]) for name in parameter_table(spec)}


def _samples(arrays: dict[str, np.ndarray], plain: dict[str, Any], prefix: str) -> dict[str, Sample]:
    return {
        name[len(prefix) :]: Sample(tuple(shape), arrays[name].astype(np.float64), largest)
        for name, (shape, largest) in plain["samples"].items()
        if name.startswith(prefix)
    }


# -- storage -------------------------------------------------------------------------------------------


def pack(path: Path, arrays: dict[str, np.ndarray], bits: dict[str, int], plain: dict[str, Any]) -> None:
    """Write float arrays in fixed point, byte planes together, and plain values, xz-compressed."""
    header, body = [], []
    for name, array in arrays.items():
        assert np.isfinite(array).all(), name
        largest = float(np.abs(array).max(initial=0.0))
        step = 2.0 ** (np.ceil(np.log2(largest)) - bits[name] + 1) if largest else 1.0
        fixed = np.round(array.astype(np.float64) / step).astype(np.int32)
        smooth = array.ndim == 4 and name == "images"
        if smooth:
            for axis in (1, 1, 2, 2):  # images are smooth: second differences are small
                fixed = np.diff(fixed, axis=axis, prepend=np.int32(0))
        header.append({"name": name, "shape": array.shape, "step": step, "smooth": smooth})
        body.append(np.ascontiguousarray(fixed.reshape(-1).view(np.uint8).reshape(-1, 4).T).tobytes())
    text = json.dumps({"arrays": header, "plain": plain}).encode()
    content = len(text).to_bytes(8, "little") + text + b"".join(body)
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def unpack(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The reverse: float32 arrays and plain values."""
    content = lzma.decompress(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    arrays = {}
    for entry in header["arrays"]:
        count = int(np.prod(entry["shape"]))
        planes = np.frombuffer(content, np.uint8, 4 * count, start).reshape(4, count)
        fixed = np.ascontiguousarray(planes.T).view(np.int32).reshape(entry["shape"])
        for axis in (2, 2, 1, 1) if entry["smooth"] else ():
            fixed = np.cumsum(fixed, axis=axis, dtype=np.int32)
        arrays[entry["name"]] = (fixed * entry["step"]).astype(np.float32)
        start += 4 * count
    return arrays, header["plain"]


# -- rebuilding tests/fixtures -----------------------------------------------------------------------------

OUR_NAMES = {
    "features": "decoder_input",
    "pred": "prediction",
    "loss_token": "loss_per_token",
    "loss": "loss",
    "loss_ce": "loss",
    "pooled": "features",
    "logits": "logits",
    "inter/tokens_in": "tokens",
    "inter/layer0_mixer_out": "layers.0.mixer",
    "inter/layer0_out": "layers.0",
    "inter/layer5_out": "layers.5",
    "inter/layer11_out": "layers.11",
    "inter/tap1_before_norm": "layers.5",
    "inter/tap2_before_norm": "layers.7",
    "inter/tap3_before_norm": "layers.9",
    "inter/tap4_before_norm": "layers.11",
    "inter/enc2dec_out": "taps_to_decoder",
    "inter/dec_query_in": "queries",
    "inter/dec_block0_out": "decoder.0",
    "inter/dec_block3_out": "decoder.3",
    "inter/norm_f_out": "norm_f",
}


class _Pack:
    def __init__(self, args: dict[str, Any]) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.bits: dict[str, int] = {}
        self.plain: dict[str, Any] = {"args": args, "copies": {}, "shapes": {}, "samples": {}}

    def add(self, name: str, array: np.ndarray, bits: int = STATE_BITS) -> None:
        self.arrays[name], self.bits[name] = array, bits

    def state(self, state: dict[str, np.ndarray], bits: int = STATE_BITS) -> None:
        """Official state without the mask, which is computed, and without equal directions."""
        for name, value in state.items():
            self.plain["shapes"][name] = value.shape
            if name == MASK:
                continue
            first = name.replace("_c_b", "").replace("_b_log", "_log").replace("_c_log", "_log")
            first = first.replace("_b.", ".").replace("_c.", ".").removesuffix("_b").removesuffix("_c")
            if first != name and first in state and np.array_equal(state[first], value):
                self.plain["copies"][name] = first
            else:
                self.add(f"state/{name}", value, bits)

    def sample(self, name: str, array: np.ndarray, bits: int = GRADIENT_BITS) -> None:
        self.plain["samples"][name] = (array.shape, float(np.abs(array).max()))
        self.add(name, array.reshape(-1)[Sample.where(array.shape)], bits)

    def write(self, path: Path) -> None:
        pack(path, self.arrays, self.bits, self.plain)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


def _rebuild(source: Path) -> None:
    def read(name: str) -> dict[str, np.ndarray]:
        with np.load(source / name) as file:
            return {key: file[key] for key in file.files}

    for name, stem in (("pretrain_strong", "pretrain_strong"), ("classifier_strong", "ft_cls_strong")):
        golden, out = read(f"{stem}_golden.npz"), _Pack({"global_pool": False})
        out.state(read(f"{stem}_state.npz"))
        images = golden["images"] if "images" in golden else read("ft_cls_golden.npz")["images"]
        out.add("images", np.ascontiguousarray(images.transpose(0, 2, 3, 1)), IMAGE_BITS)
        if "labels" in golden:
            out.plain["labels"] = golden["labels"].tolist()
        norms = zip(golden["gradstat_names"].tolist(), golden["gradstat_l2"].tolist(), strict=True)
        out.plain["gradient_norms"] = {key: float(f"{value:.8g}") for key, value in norms}
        for key, ours in OUR_NAMES.items():
            if key in golden:
                out.sample(f"expected/{ours}", golden[key], OUTPUT_BITS)
        for key, value in golden.items():
            if key.startswith("grad/"):
                out.sample(key, value)
        out.write(DATA / f"{name}.xz")

    golden, out = read("ft_cls_golden.npz"), _Pack({"global_pool": False})
    out.state(read("ft_cls_expanded_state.npz"), bits=22)
    rates = golden["steps_group_lr"]
    out.plain |= {
        "targets": (0.9 * np.eye(10)[golden["labels"]] + 0.01).tolist(),
        "betas": (0.9, 0.999),
        "weight_decay": 0.05,
        "layer_decay": 0.75,
        "ema_decay": 0.99992,
        "lr": rates.max(1).tolist(),
        "losses": golden["steps_loss"].tolist(),
        "grad_norms": golden["steps_gradnorm"].tolist(),
    }
    import torch

    after = torch.load(source / "ft_cls_checkpoint-10.pth", weights_only=False)
    for kind, key in (("after", "model"), ("ema", "model_ema")):
        for name, tensor in after[key].items():
            if not name.startswith("layers.") or name.startswith(("layers.0.", "layers.11.")):
                out.sample(f"{kind}/{name}", tensor.numpy(), OUTPUT_BITS)
    out.write(DATA / "classifier_steps.xz")


if __name__ == "__main__":
    _rebuild(Path(sys.argv[1]))
