"""`arm convert verify` and `diff` detect all differences, and only differences."""

from __future__ import annotations

import json
from dataclasses import replace

import foreign
import numpy as np
import pytest
from converting import convert

from arm_convert.diff import diff
from arm_convert.verify import TOLERANCES, Computed, compare, fixed_batch, usable_backends, verify
from arm_core.engine.registry import installed_backends
from arm_core.files.model_folder import write_model
from arm_core.files.safetensors import Tensor
from arm_core.model.parameters import initial_parameters

SPECS = {"pretrain": foreign.PRETRAIN, "classifier": foreign.CLASSIFIER}
ENGINES = [name for name in ("torch", "mlx") if installed_backends()[name].missing() is None]


def strange(spec, seed=0):
    rng = np.random.default_rng(seed)
    made = initial_parameters(spec, seed)
    return {name: a + rng.normal(size=a.shape).astype(np.float32) / 9 for name, a in made.items()}


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("kind", SPECS)
def test_an_engine_agrees_with_the_reference(kind, backend):
    spec = SPECS[kind]
    found = verify([("m", spec, strange(spec))], ["reference", backend], device="cpu")
    assert found.holds, [line for line in found.lines if not line.within]
    assert {line.quantity for line in found.lines} >= {"loss"}
    assert max(line.relative for line in found.lines) > 0  # they are not the same numbers


@pytest.mark.skipif(len(ENGINES) < 2, reason="needs both engines")
def test_engines_are_compared_in_the_gradients_of_every_part():
    spec = foreign.PRETRAIN
    found = verify([("m", spec, strange(spec))], ENGINES, device="cpu")
    assert found.holds
    parts = [line.quantity for line in found.lines if line.quantity.startswith("gradients")]
    assert len(parts) == 10


@pytest.mark.parametrize("kind", SPECS)
def test_one_changed_weight_is_beyond_tolerance(kind):
    spec = SPECS[kind]
    first = strange(spec)
    second = {**first, "layers.2.mixer.D": first["layers.2.mixer.D"] * np.float32(1.01)}
    same = verify([("a", spec, first), ("b", spec, dict(first))], ["reference"])
    assert same.holds
    assert not any(line.absolute for line in same.lines)
    assert not verify([("a", spec, first), ("b", spec, second)], ["reference"]).holds


def test_the_tolerance_decides_and_can_be_widened():
    spec = foreign.CLASSIFIER
    first = strange(spec)
    second = {**first, "head.bias": first["head.bias"] + np.float32(1e-3)}
    models = [("a", spec, first), ("b", spec, second)]
    worst = max(line.relative / TOLERANCES["outputs"] for line in verify(models, ["reference"]).lines)
    assert not verify(models, ["reference"], scale=0.5 * worst).holds
    assert verify(models, ["reference"], scale=100 * worst).holds


def computed(name, gradients):
    outputs = {"features": np.ones((1, 2)), "logits": np.ones((1, 2))}
    return Computed(name, "", outputs, 1.0, gradients)


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1.002])
@pytest.mark.parametrize("name", ["head.bias", "head.weight"])
def test_nan_and_a_wrong_gradient_of_a_small_tensor_are_detected(broken, name):
    good = {"head.weight": np.full((2, 2), 1.0), "head.bias": np.full(2, 0.01)}
    bad = {key: value * (broken if key == name else 1) for key, value in good.items()}
    assert all(line.within for line in compare(computed("a", good), computed("b", good)))
    lines = compare(computed("a", good), computed("b", bad))
    assert [line.quantity for line in lines if not line.within] == ["gradients: head"]


def test_the_batch_is_the_same_everywhere():
    first, second = (fixed_batch(foreign.CLASSIFIER, 2, 0) for _ in range(2))
    assert np.array_equal(first.images, second.images)
    assert first.images.shape == (2, 16, 16, 3)
    assert np.array_equal(first.targets.sum(1), [1, 1])
    assert not np.array_equal(first.images, fixed_batch(foreign.CLASSIFIER, 2, 1).images)


def test_a_call_with_nothing_to_compare_is_refused():
    models = [("m", foreign.PRETRAIN, strange(foreign.PRETRAIN))]
    with pytest.raises(ValueError, match="nothing to compare"):
        verify(models, ["reference"])
    with pytest.raises(ValueError, match="only the backend torch; pass a second model"):
        verify(models, ["torch", "torch"])
    with pytest.raises(ValueError, match="m and n are different models: pretrain and classifier"):
        verify([*models, ("n", foreign.CLASSIFIER, {})], ["reference"])
    with pytest.raises(ValueError, match="unknown backend 'tpu'"):
        verify(models, ["reference", "tpu"])


def test_the_command_prints_a_parity_report_and_sets_the_exit_code(tmp_path):
    first = strange(foreign.PRETRAIN)
    a = write_model(tmp_path / "a", foreign.PRETRAIN, first)
    write_model(tmp_path / "b", foreign.PRETRAIN, {**first, "prediction.bias": first["prediction.bias"] + 1})
    convert("export", a, tmp_path / "a.pth", "--to", "official")
    good = convert("verify", a, tmp_path / "a.pth", "--backends", "reference")
    assert good.exit_code == 0, good.output
    assert good.output.strip().endswith("agree")
    bad = convert("verify", a, tmp_path / "b", "--backends", "reference")
    assert bad.exit_code == 1
    assert "EXCEEDED" in bad.output
    data = json.loads(convert("verify", a, tmp_path / "b", "--backends", "reference", "--json").output)
    assert data["holds"] is False
    assert {line["quantity"]: line["within"] for line in data["lines"]}["prediction"] is False
    assert {line["quantity"]: line["within"] for line in data["lines"]}["decoder_input"] is True


def test_all_usable_backends_are_compared_by_default(tmp_path):
    folder = write_model(tmp_path / "a", foreign.CLASSIFIER, strange(foreign.CLASSIFIER))
    result = convert("verify", folder, "--no-gradients", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert list(json.loads(result.output)["ran"]) == usable_backends()


# -- diff ----------------------------------------------------------------------------------------------


def test_equal_models_in_different_formats_do_not_differ(tmp_path):
    folder = write_model(tmp_path / "a", foreign.CLASSIFIER, strange(foreign.CLASSIFIER))
    for to, name in (("official", "a.pth"), ("mlx", "a.safetensors"), ("torch", "b.pth")):
        convert("export", folder, tmp_path / name, "--to", to)
        result = convert("diff", folder, tmp_path / name)
        assert result.exit_code == 0, result.output
        assert "tensors equal, 0 changed" in result.output


def test_a_difference_is_listed_by_name_and_size(tmp_path):
    first = strange(foreign.CLASSIFIER)
    second = {**first, "head.bias": first["head.bias"].copy()}
    second["head.bias"][1] += 0.5
    folders = [write_model(tmp_path / str(i), foreign.CLASSIFIER, p) for i, p in enumerate((first, second))]
    result = convert("diff", *folders)
    assert result.exit_code == 1
    assert "1/3" in result.output
    data = json.loads(convert("diff", *folders, "--json").output)
    assert [change["name"] for change in data["changes"]] == ["head.bias"]
    assert np.isclose(data["changes"][0]["largest"], 0.5)


def test_names_shapes_types_and_nan_are_compared():
    def tensors(**arrays):
        return {name: Tensor.of(np.asarray(value, np.float32)) for name, value in arrays.items()}

    found = diff(tensors(a=[1], b=[1, 2], c=[np.nan], d=[1]), tensors(b=[1], c=[np.nan], d=[np.nan], e=[1]))
    assert (found.only_first, found.only_second) == (["a"], ["e"])
    assert found.shapes == {"b": ((2,), (1,))}
    assert found.equal == 1
    assert found.changes[0].name == "d"
    assert found.changes[0].largest == np.inf
    halves = {name: tensor.cast("BF16") for name, tensor in tensors(a=[1]).items()}
    found = diff(tensors(a=[1]), halves)
    assert found.types == {"a": ("F32", "BF16")}
    assert not found.changes
    assert not found.same


def test_classifiers_of_another_size_differ_in_shape(tmp_path):
    other = replace(foreign.CLASSIFIER, classes=4)
    folders = [
        write_model(tmp_path / str(i), spec, strange(spec))
        for i, spec in enumerate((foreign.CLASSIFIER, other))
    ]
    result = convert("diff", *folders)
    assert result.exit_code == 1
    assert "head.weight: shapes (3, 8) and (4, 8)" in result.output
