"""Influence maps against automatic differentiation of the mixer with frozen coefficients."""

import dataclasses

import numpy as np
import pytest

from arm_core import cpu_kernels
from arm_core.engine.protocol import TrainingState
from arm_core.engine.registry import choose_backend
from arm_core.explain.influence import gradient_times_input, influence
from arm_core.explain.layout import on_grid, token_patches, token_weights
from arm_core.files.quantized import quantize
from arm_core.model.parameters import initial_parameters
from arm_core.model.reference.influence import contributions, influence_shares
from arm_core.model.reference.model import Weights, forward, layer_norm, mixer
from arm_core.model.reference.scan import sigmoid, silu, softplus
from arm_core.model.spec import ClassifierSpec, EncoderSpec, Pooling, PretrainSpec
from arm_core.model.tokens import direction_orders

TOLERANCE = 1e-5

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ODD = EncoderSpec(width=24, depth=6, patch=4, state=5, conv_width=3)


@pytest.fixture(params=["torch", "mlx"])
def backend(request):
    return choose_backend_or_skip(request.param)


def choose_backend_or_skip(name):
    try:
        return choose_backend(name)
    except ValueError as error:
        pytest.skip(str(error))


def strong(spec, seed=0, scale=0.3):
    """Parameters far from their initial values, so that a mistake is visible."""
    rng = np.random.default_rng(seed)
    return {
        name: (value + scale * rng.standard_normal(value.shape)).astype(np.float32)
        for name, value in initial_parameters(spec, seed).items()
    }


def images_for(spec, count=1, seed=1):
    return np.random.default_rng(seed).standard_normal((count, *spec.image_size, 3)).astype(np.float32)


def mixer_problem(spec, layer=0, seed=0):
    w = Weights(strong(spec, seed), f"layers.{layer}.mixer.")
    x = np.random.default_rng(seed + 9).standard_normal((spec.tokens, spec.encoder.width))
    return w, x, direction_orders(spec)


SPECS = {
    "four directions, 13 tokens": ClassifierSpec(
        encoder=EncoderSpec(width=16, depth=6, patch=4), classes=3, image_size=(12, 16)
    ),
    "two directions, 16 tokens, odd sizes": ClassifierSpec(
        encoder=ODD, classes=3, image_size=(12, 20), scan_directions=("column_reverse", "row")
    ),
    "pretraining, 9 tokens": PretrainSpec(
        encoder=ODD, image_size=(24, 8), cluster=(3, 1), decoder_width=16, decoder_depth=1, decoder_heads=1
    ),
}
cases = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def frozen_coefficients(spec, w, x, order):
    """For each direction: tokens in scan order, sigmoid of the convolution, dt, B, C, A, D, weight, bias."""
    encoder, (length, width) = spec.encoder, x.shape
    inner = np.split(x @ w["in_proj.weight"].T, 2, axis=-1)[0]
    for k, steps in enumerate(order):
        weight, bias = w["conv.weight"][k], w["conv.bias"][k]
        W = weight.shape[-1]
        padded = np.concatenate([np.zeros((W - 1, width)), inner[steps]])
        conv = bias + sum(padded[j : j + length] * weight[:, j] for j in range(W))
        low, B, C = np.split(
            silu(conv) @ w["x_proj.weight"][k].T, [encoder.dt_rank, encoder.dt_rank + encoder.state], axis=-1
        )
        dt = softplus(low @ w["dt_proj.weight"][k].T + w["dt_proj.bias"][k])
        yield steps, sigmoid(conv), dt, B, C, -np.exp(w["A_log"][k]), w["D"][k], weight, bias


def frozen_jacobian(spec, w, x, order):
    """torch.func.jacrev of the mixer with dt, B, C, silu(z) and the sigmoid of the
    convolution frozen, (K, T, D, T, D)."""
    torch = pytest.importorskip("torch")

    def tensor(array):
        return torch.tensor(np.asarray(array, np.float64))

    length, width = x.shape
    z = np.split(x @ w["in_proj.weight"].T, 2, axis=-1)[1]
    gate, into = tensor(silu(z)), tensor(w["in_proj.weight"][:width])
    out_proj = tensor(w["out_proj.weight"])
    jacobians = []
    for steps, *arrays in frozen_coefficients(spec, w, x, order):
        opening, dt, B, C, A, D, weight, bias = map(tensor, arrays)
        back = torch.tensor(np.argsort(steps))

        def run(x, steps, opening, dt, B, C, A, D, weight, bias, back):
            tokens = (x @ into.T)[steps]
            tokens = torch.cat([tokens.new_zeros((weight.shape[1] - 1, width)), tokens])
            h, ys = tokens.new_zeros((width, B.shape[1])), []
            for t in range(length):
                u = opening[t] * (bias + (tokens[t : t + weight.shape[1]] * weight.T).sum(0))
                h = torch.exp(dt[t, :, None] * A) * h + (dt[t] * u)[:, None] * B[t]
                ys.append(h @ C[t] + D * u)
            return (gate * torch.stack(ys)[back]) @ out_proj.T

        jacobian = torch.func.jacrev(run)(tensor(x), steps, opening, dt, B, C, A, D, weight, bias, back)
        jacobians.append(jacobian.numpy())
    return np.stack(jacobians)


@cases
def test_contributions_add_up_to_the_output_of_the_mixer(spec):
    w, x, order = mixer_problem(spec)
    parts = contributions(spec.encoder, w, x, order)
    np.testing.assert_allclose(parts.output, mixer(spec.encoder, w, x[None], order)[0], atol=1e-11)


@cases
def test_contributions_are_the_frozen_jacobian_by_autodiff_times_the_token(spec):
    w, x, order = mixer_problem(spec)
    jacobian = frozen_jacobian(spec, w, x, order)
    expected = np.einsum("ktdse,se->ktsd", jacobian, x)
    found = contributions(spec.encoder, w, x, order).tokens
    np.testing.assert_allclose(found, expected, atol=1e-11 * np.abs(expected).max())


@cases
def test_maps_of_every_layer_equal_the_frozen_jacobian_by_autodiff_on_both_engines(spec, backend):
    """From the inputs that the engine's blocks have: rounding of earlier layers does not count."""
    parameters, images, order = strong(spec), images_for(spec), direction_orders(spec)
    engine = backend.create_engine(spec, TrainingState(parameters=parameters))
    found, recorded = influence(engine, images), engine.forward(images, intermediates=True)
    recorded = {name: value.astype(np.float64) for name, value in recorded.items()}
    block_input = recorded["tokens"]
    for i in found.layers:
        w = Weights(parameters, f"layers.{i}.")
        x = layer_norm(block_input, w.at("norm1"), spec.encoder.norm_eps)[0]
        block_input = recorded[f"layers.{i}"]
        output = mixer(spec.encoder, w.at("mixer"), x[None], order)[0]
        if i == spec.encoder.depth - 1:
            jacobian = frozen_jacobian(spec, w.at("mixer"), x, order)
            shares = np.einsum("ktdse,se,td->kts", jacobian, x, output) / (output**2).sum(-1)[:, None]
        else:
            shares = influence_shares(contributions(spec.encoder, w.at("mixer"), x, order))
        assert np.abs(found.maps[0, i] - shares).max() < TOLERANCE * np.abs(shares).max()


@cases
def test_shares_of_tokens_and_of_the_bias_add_up_to_one(spec, backend):
    parameters, images = strong(spec), images_for(spec, 2)
    found = influence(backend.create_engine(spec, TrainingState(parameters=parameters)), images, layers=[3])
    recorded = forward(spec, parameters, images)
    w = Weights(parameters, "layers.3.")
    for b in range(2):
        x = layer_norm(recorded["layers.2"], w.at("norm1"), spec.encoder.norm_eps)[b]
        parts = contributions(spec.encoder, w.at("mixer"), x, direction_orders(spec))
        output = parts.output
        bias = (parts.bias.mean(0) * output).sum(-1) / (output**2).sum(-1)
        np.testing.assert_allclose(found.mean[b, 0].sum(-1) + bias, 1, atol=2e-4)


def test_maps_of_mlx_equal_mlx_derivatives_along_every_token():
    """`mx.jvp` of the mixer with frozen coefficients, along the input of one token at a time."""
    backend = choose_backend_or_skip("mlx")
    import mlx.core as mx

    spec = SPECS["four directions, 13 tokens"]
    parameters, images, order = strong(spec), images_for(spec), direction_orders(spec)
    engine = backend.create_engine(spec, TrainingState(parameters=parameters))
    found, recorded = influence(engine, images, layers=[0]), engine.forward(images, intermediates=True)
    w = Weights(parameters, "layers.0.")
    x = layer_norm(recorded["tokens"].astype(np.float64), w.at("norm1"), spec.encoder.norm_eps)[0]
    w, (length, width) = w.at("mixer"), x.shape
    z = np.split(x @ w["in_proj.weight"].T, 2, axis=-1)[1]
    output = mixer(spec.encoder, w, x[None], order)[0]
    shares = np.zeros((len(order), length, length))
    with mx.stream(mx.cpu):  # float64

        def tensor(array):
            return mx.array(np.asarray(array, np.float64), mx.float64)

        gate, into, out_proj = (
            tensor(a) for a in (silu(z), w["in_proj.weight"][:width], w["out_proj.weight"])
        )
        for k, (steps, *arrays) in enumerate(frozen_coefficients(spec, w, x, order)):
            opening, dt, B, C, A, D, weight, bias = map(tensor, arrays)
            forwards, back = mx.array(steps), mx.array(np.argsort(steps))
            W = weight.shape[1]

            def run(x, forwards=forwards, back=back, opening=opening, dt=dt, B=B, C=C, A=A, D=D,
                    weight=weight, bias=bias, W=W):  # fmt: skip
                tokens = mx.concatenate([mx.zeros((W - 1, width), mx.float64), (x @ into.T)[forwards]])
                h, ys = mx.zeros((width, B.shape[1]), mx.float64), []
                for t in range(length):
                    u = opening[t] * (bias + (tokens[t : t + W] * weight.T).sum(0))
                    h = mx.exp(dt[t, :, None] * A) * h + (dt[t] * u)[:, None] * B[t]
                    ys.append(h @ C[t] + D * u)
                return (gate * mx.stack(ys)[back]) @ out_proj.T

            for s in range(length):
                tangent = np.zeros_like(x)
                tangent[s] = x[s]
                _, (moved,) = mx.jvp(run, [tensor(x)], [tensor(tangent)])
                shares[k, :, s] = (np.array(moved) * output).sum(-1) / (output**2).sum(-1)
    assert np.abs(found.maps[0, 0] - shares).max() < TOLERANCE * np.abs(shares).max()


def kernel_problem(length, channels, states, directions=2, W=4, dt_scale=1.0, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "x": normal(length, channels),
        "dt": (dt_scale * rng.random((directions, length, channels)) + 1e-3).astype(np.float32),
        "opening": rng.random((directions, length, channels)).astype(np.float32),
        "weight": normal(directions, channels, W),
        "A": -np.exp(normal(directions, channels, states)),
        "B": normal(directions, length, states),
        "C": normal(directions, length, states),
        "D": normal(directions, channels),
        "q": normal(length, channels),
        "order": np.stack([rng.permutation(length) for _ in range(directions)]).astype(np.int32),
    }


def slow_map(x, dt, opening, weight, A, B, C, D, q, order):
    """The kernel's function as a float64 loop over source tokens."""
    x, dt, opening, weight, A, B, C, D, q = (
        a.astype(np.float64) for a in (x, dt, opening, weight, A, B, C, D, q)
    )
    (directions, length, _), W = dt.shape, weight.shape[-1]
    out = np.zeros((directions, length, length))
    for k, steps in enumerate(order):
        for place, s in enumerate(steps):
            h = np.zeros(A.shape[1:])
            for t in range(place, length):
                p = steps[t]
                h = np.exp(dt[k, p, :, None] * A[k]) * h
                lag = t - place
                v = opening[k, p] * weight[k, :, W - 1 - lag] * x[s] if lag < W else np.zeros_like(x[s])
                h += (dt[k, p] * v)[:, None] * B[k, p]
                out[k, p, s] = ((h @ C[k, p] + D[k] * v) * q[p]).sum()
    return out


@pytest.mark.parametrize(
    ("length", "channels", "states", "W"),
    [(1, 1, 1, 1), (2, 3, 2, 4), (63, 65, 5, 4), (64, 64, 16, 4), (65, 7, 16, 3), (130, 66, 3, 70 - 9)],
)
@pytest.mark.parametrize("dt_scale", [0.01, 1.0, 300.0])
def test_kernel_equals_the_loop_at_odd_sizes_and_extreme_steps(length, channels, states, W, dt_scale):
    problem = kernel_problem(length, channels, states, W=W, dt_scale=dt_scale)
    expected, found = slow_map(**problem), cpu_kernels.influence_map(**problem)
    assert np.isfinite(found).all()
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def test_kernel_is_bit_identical_for_any_number_of_threads():
    problem = kernel_problem(70, 130, 8)
    first = cpu_kernels.influence_map(**problem, threads=1)
    assert (first == cpu_kernels.influence_map(**problem, threads=2)).all()


def test_later_tokens_have_no_influence_on_earlier_ones_in_the_kernel():
    problem = kernel_problem(90, 5, 3)
    for k, found in enumerate(cpu_kernels.influence_map(**problem)):
        steps = problem["order"][k]
        assert (np.triu(found[np.ix_(steps, steps)], 1) == 0).all()


def test_kernel_refuses_wrong_shapes_by_name():
    problem = kernel_problem(9, 5, 3)
    with pytest.raises(ValueError, match=r"q: expected float32"):
        cpu_kernels.influence_map(**{**problem, "q": problem["q"][:, :4]})
    with pytest.raises(ValueError, match="weight: expected a convolution width of at most 64, found 65"):
        cpu_kernels.influence_map(**kernel_problem(9, 5, 3, W=65))


def test_a_silent_mixer_has_no_influence(classifier_spec, backend):
    parameters = strong(classifier_spec)
    parameters["layers.2.mixer.out_proj.weight"][:] = 0
    found = influence(
        backend.create_engine(classifier_spec, TrainingState(parameters=parameters)),
        images_for(classifier_spec),
    )
    assert (found.maps[:, 2] == 0).all()
    assert np.isfinite(found.rollout()).all()


def test_weights_may_be_quantized_matrices(classifier_spec, backend):
    packed = strong(classifier_spec)
    for name in ("layers.1.mixer.in_proj.weight", "layers.1.mixer.out_proj.weight"):
        packed[name] = quantize(packed[name], 8, 32)
    plain = {name: np.asarray(value, np.float32) for name, value in packed.items()}
    engine = backend.create_engine(classifier_spec, TrainingState(parameters=plain))
    images = images_for(classifier_spec)
    found, expected = (influence(engine, images, layers=[1], parameters=p).maps for p in (packed, plain))
    assert (found == expected).all()


def test_rollout_rows_add_up_to_one_and_follow_the_definition(classifier_spec, backend):
    found = influence(
        backend.create_engine(classifier_spec, TrainingState(parameters=strong(classifier_spec))),
        images_for(classifier_spec, 2),
    )
    rollout = found.rollout()
    np.testing.assert_allclose(rollout.sum(-1), 1, atol=1e-5)
    assert (rollout >= 0).all()
    expected = np.eye(classifier_spec.tokens)
    for i in range(classifier_spec.encoder.depth):
        size = np.abs(found.maps[1, i].mean(0))
        share = found.mixing[1, i][:, None]
        expected = (1 - share) * expected + share * (size / size.sum(-1, keepdims=True)) @ expected
    np.testing.assert_allclose(rollout[1], expected, atol=1e-5)


def test_rollout_of_some_layers_only_is_refused(classifier_spec, backend):
    engine = backend.create_engine(classifier_spec, TrainingState(parameters=strong(classifier_spec)))
    with pytest.raises(ValueError, match="expected maps of all layers from 0 on, found 1, 3"):
        influence(engine, images_for(classifier_spec), layers=[3, 1]).rollout()
    with pytest.raises(ValueError, match="layer 6: the model has layers 0 to 5"):
        influence(engine, images_for(classifier_spec), layers=[6])


def test_the_class_stands_for_the_pooled_tokens(classifier_spec):
    weights = token_weights(classifier_spec, "class")
    assert weights[classifier_spec.class_position] == 0
    assert weights.sum() == pytest.approx(1)
    cls = dataclasses.replace(classifier_spec, pooling=Pooling.CLS)
    assert token_weights(cls, "class").argmax() == cls.class_position


def test_tokens_that_do_not_exist_are_refused(classifier_spec, pretrain_spec):
    with pytest.raises(ValueError, match="outside the grid; rows go from 0 to 5"):
        token_weights(classifier_spec, (6, 0))
    with pytest.raises(ValueError, match="predicts but never reads"):
        token_weights(pretrain_spec, "5,5")
    with pytest.raises(ValueError, match="has no class token"):
        token_weights(pretrain_spec, "class")
    for wrong in ("5", "a,b", "-1,2", (1, 2, 3)):
        with pytest.raises(ValueError, match="expected 'class' or ROW,COLUMN"):
            token_weights(classifier_spec, wrong)


def test_tokens_return_to_their_patches(classifier_spec, pretrain_spec):
    for spec in (classifier_spec, pretrain_spec):
        grid = on_grid(spec, np.arange(spec.tokens, dtype=np.float32))
        for t, patch in enumerate(token_patches(spec)):
            assert patch < 0 or grid.ravel()[patch] == t
    assert np.isnan(grid[-2:, -2:]).all()  # the last cluster


def test_gradient_times_input_is_the_derivative_along_each_patch(backend):
    classifier_spec = SPECS["four directions, 13 tokens"]
    parameters, images = strong(classifier_spec, scale=0.1), images_for(classifier_spec)
    engine = backend.create_engine(classifier_spec, TrainingState(parameters=parameters))
    found = gradient_times_input(engine, images)
    best = forward(classifier_spec, parameters, images)["logits"][0].argmax()
    for row, column in ((0, 0), (2, 3), (1, 1)):
        step = np.zeros(images.shape)
        cut = np.s_[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        step[cut] = 1e-5 * images[cut]
        up, down = (forward(classifier_spec, parameters, images + s)["logits"] for s in (step, -step))
        expected = (up - down)[0, best] / 2e-5
        assert found[0, row, column] == pytest.approx(expected, abs=1e-4 * float(np.abs(found).max()))


def test_gradient_times_input_of_a_patch_that_follows_is_zero_in_pretraining(pretrain_spec, backend):
    engine = backend.create_engine(pretrain_spec, TrainingState(parameters=strong(pretrain_spec, scale=0.1)))
    found = gradient_times_input(engine, images_for(pretrain_spec), token=(2, 1))
    order = token_patches(pretrain_spec)
    place = int(np.flatnonzero(order == 2 * 6 + 1)[0])
    flat = found[0].ravel()
    assert (flat[order[place + 1 :]] == 0).all()
    assert (flat[order[: place + 1]] != 0).all()


def test_input_gradient_refuses_unknown_outputs_and_other_shapes(classifier_spec, backend):
    engine = backend.create_engine(classifier_spec, TrainingState(parameters=strong(classifier_spec)))
    images = images_for(classifier_spec)
    with pytest.raises(ValueError, match="unknown output 'logit'; known are"):
        engine.input_gradient(images, "logit", np.zeros((1, 10), np.float32))
    with pytest.raises(ValueError, match=r"towards: expected \(1, 10\) for output 'logits', found \(1, 3\)"):
        engine.input_gradient(images, "logits", np.zeros((1, 3), np.float32))
