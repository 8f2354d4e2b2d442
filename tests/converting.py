"""Shared parts of the converters' tests: the command, small models, an official checkpoint."""

from __future__ import annotations

from pathlib import Path

import foreign
from click.testing import CliRunner, Result

from arm_cli.main import main
from arm_core.files.model_folder import write_model
from arm_core.files.safetensors import Tensor
from arm_core.model.parameters import initial_parameters

SPECS = {"pretrain": foreign.PRETRAIN, "classifier": foreign.CLASSIFIER}


def arm(*words: object) -> Result:
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def convert(*words: object) -> Result:
    return arm("convert", *words)


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def same_bytes(first: Path, second: Path) -> bool:
    return names(first) == names(second) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names(first)
    )


def model_folder(path: Path, kind: str, *, dtype: str = "F32", seed: int = 0) -> Path:
    tensors = {n: Tensor.of(a).cast(dtype) for n, a in initial_parameters(SPECS[kind], seed).items()}
    return write_model(path, SPECS[kind], tensors, metadata={"history": '["made"]', "classes": '["a"]'})


def official_checkpoint(folder: Path) -> Path:
    """A checkpoint of the official classifier, with an average of its weights."""
    content = {
        **foreign.checkpoint(foreign.CLASSIFIER, 1, global_pool=False, lr=0.1, data_path="/secret"),
        "model_ema": foreign.official_state(foreign.CLASSIFIER, 2),
        "max_accuracy": 71.5,
        "ema_max_accuracy": 72.5,
    }
    return foreign.save(folder / "official.pth", foreign.torch_zip(content))
