"""Batches of bytes: every engine computes the same values as NumPy, to the last bit."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from byte_batches import MIXES, by_hand, byte_images

import arm_cuda
import arm_mlx
from arm_core.data import FINETUNE, IMAGENET_MEAN, IMAGENET_STD, OFFICIAL_MIXING, Synthetic, TrainLoader
from arm_core.engine.byte_images import ByteImages, Mix
from arm_core.engine.optimizer import OptimizerSettings
from arm_core.engine.protocol import Batch, EngineOptions, TrainingState
from arm_core.model.parameters import initial_parameters
from arm_core.model.spec import ClassifierSpec, ModelSpec


def on_torch(images: ByteImages) -> np.ndarray:
    torch = pytest.importorskip("torch")
    from arm_cuda.images import prepare

    return prepare(images, lambda array: torch.from_numpy(array.copy())).numpy()


def on_mlx(images: ByteImages) -> np.ndarray:
    if reason := arm_mlx.backend.missing():
        pytest.skip(reason)
    import mlx.core as mx

    from arm_mlx.images import prepare

    with mx.stream(mx.cpu):
        return np.array(prepare(images))


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize(
    "prepare", [ByteImages.normalised, np.asarray, on_torch, on_mlx], ids=["NumPy", "asarray", "torch", "MLX"]
)
def test_bytes_become_the_same_values_as_by_hand(
    prepare: Callable[[ByteImages], np.ndarray], mix: Mix
) -> None:
    images = byte_images(mix)
    found = prepare(images)
    assert found.dtype == np.float32
    assert found.tobytes() == by_hand(images).tobytes()


def test_every_batch_of_training_is_the_same_on_both_frameworks() -> None:
    loader = TrainLoader(
        Synthetic(64, (40, 60)), FINETUNE, size=(32, 48), batch_size=8, seed=3, classes=10,
        mixing=OFFICIAL_MIXING,
    )  # fmt: skip
    erased, kinds = 0, set()
    with loader:
        for _ in range(12):
            images = next(loader).images
            assert isinstance(images, ByteImages)
            erased += len(images.erased)
            kinds.add(images.mix.box is None)
            expected = by_hand(images).tobytes()
            assert on_torch(images).tobytes() == on_mlx(images).tobytes() == expected
    assert erased > 10
    assert kinds == {False, True}


def test_mirror_images_are_mirrored_after_normalisation() -> None:
    images = ByteImages(pixels=byte_images(Mix()).pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    expected = np.asarray(images)[:, :, ::-1].tobytes()
    for prepare in (np.asarray, on_torch, on_mlx):
        assert prepare(images.flipped()).tobytes() == expected


@pytest.fixture(params=[arm_cuda.backend, arm_mlx.backend], ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Any:
    if reason := request.param.missing():
        pytest.skip(reason)
    return request.param


@pytest.mark.usefixtures("one_torch_thread")
@pytest.mark.parametrize("stage", ["pretrain", "classifier"])
def test_an_engine_takes_bytes_and_floats_alike(
    backend: Any, stage: str, request: pytest.FixtureRequest
) -> None:
    spec: ModelSpec = request.getfixturevalue(f"{stage}_spec")
    targets = None
    if isinstance(spec, ClassifierSpec):
        targets = np.random.default_rng(0).dirichlet(np.ones(spec.classes), 5).astype(np.float32)
    results = []
    images = byte_images(MIXES["mixup"], size=spec.image_size)
    for form in (images, np.asarray(images, np.float32)):
        engine = backend.create_engine(
            spec,
            TrainingState(parameters=initial_parameters(spec, 3)),
            optimizer=OptimizerSettings(),
            options=EngineOptions(device="cpu", threads=1),
        )
        outputs = engine.forward(form)
        batch = Batch(images=form, targets=targets)
        loss, gradients = engine.loss_and_gradients(batch)
        step = engine.train_step([batch, batch], step=1, lr=1e-3).result()
        arrays = {**outputs, **gradients, **engine.export_state().parameters}
        results.append((loss, step, {name: array.tobytes() for name, array in arrays.items()}))
    assert results[0] == results[1]
