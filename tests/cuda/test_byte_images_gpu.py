"""Batches of bytes on an NVIDIA GPU."""

import pytest

torch = pytest.importorskip("torch")

from byte_batches import MIXES, by_hand, byte_images  # noqa: E402

from arm_core.engine.byte_images import Mix  # noqa: E402
from arm_core.engine.protocol import EngineOptions, TrainingState  # noqa: E402
from arm_core.model.parameters import initial_parameters  # noqa: E402
from arm_core.model.spec import ClassifierSpec, EncoderSpec  # noqa: E402
from arm_cuda.engine import TorchEngine  # noqa: E402


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_bytes_become_the_same_values_on_a_gpu_as_by_hand(mix: Mix, deterministic: bool) -> None:
    spec = ClassifierSpec(encoder=EncoderSpec(width=64, depth=6, patch=4), classes=10, image_size=(24, 24))
    options = EngineOptions(device="cuda", scan="reference", deterministic=deterministic)
    engine = TorchEngine(
        spec, TrainingState(parameters=initial_parameters(spec, 0)), optimizer=None, options=options
    )
    try:
        images = byte_images(mix, count=64)
        found = engine._put_images(images)
        assert found.is_cuda
        assert found.cpu().numpy().tobytes() == by_hand(images).tobytes()
    finally:
        torch.use_deterministic_algorithms(False)
