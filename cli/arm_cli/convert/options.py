"""Shared parts of the commands of `arm convert`: options, opening a model, writing a model."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from arm_cli.show import echo

if TYPE_CHECKING:
    from arm_convert.checkpoint_source import CheckpointSource
    from arm_convert.importing import Resolved
    from arm_core.files.safetensors import Tensor
    from arm_core.model.spec import ModelSpec

F = TypeVar("F", bound=Callable[..., Any])

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class ImageSize(click.ParamType):  # type: ignore[type-arg]  # generic in newer clicks only
    """`224` for a square or `192x256` for height and width, pixels."""

    name = "HxW"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", str(value))
        if match is None:
            self.fail(f"expected a size like 224 or 192x256, found {value!r}", param, ctx)
        return int(match[1]), int(match[2] or match[1])


class FileSize(click.ParamType):  # type: ignore[type-arg]
    """`5GB`, `500MB`: bytes, in powers of ten."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([KMG]?B?)", str(value).upper())
        if match is None or (match[2] and match[2] not in UNITS):
            self.fail(f"expected a size like 5GB or 500MB, found {value!r}", param, ctx)
        size = int(float(match[1]) * UNITS[match[2]])
        if size < 1:
            self.fail("expected a size above 0", param, ctx)
        return size


force_option = click.option("--force", is_flag=True, help="Replace OUT if it is a model.")
shard_option = click.option(
    "--shard-size",
    type=FileSize(),
    default="5GB",
    show_default=True,
    help="Split the weights into files of at most this size.",
)
image_size_option = click.option("--image-size", type=ImageSize(), help="224, or height x width: 192x256.")


def writing_options(command: F) -> F:
    """Add --force and --shard-size to a command that writes a model folder."""
    return force_option(shard_option(command))


def resolve_model(name: str, weights: str = "raw") -> Resolved:
    """A model in any format, under the names of the parameter table; its tensors are read on demand."""
    from arm_convert.importing import resolve
    from arm_core.training.model_source import Weights

    return resolve(open_named(name), weights=Weights(weights))


def open_named(name: str) -> CheckpointSource:
    """Open a MODEL of the command line; warnings go to stderr."""
    from arm_convert.checkpoint_source import open_checkpoint_source

    return open_checkpoint_source(name, warn=lambda text: echo(f"Warning: {name}: {text}", err=True))


def write_changed(
    out: str,
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    force: bool,
    shard_size: int,
) -> None:
    """Write a model folder with its card, and print its size."""
    from arm_convert.card import model_card
    from arm_core.files.model_folder import write_model
    from arm_core.model.parameters import count_parameters

    card = model_card(spec, metadata)
    write_model(out, spec, tensors, metadata=metadata, force=force, shard_size=shard_size, card=card)
    echo(f"{Path(out)}: {count_parameters(spec):,} trainable parameters")


def changes_model(command: F) -> F:
    """Check that OUT can be written before a long conversion begins, then run the command."""

    @functools.wraps(command)
    def checked(*args: Any, out: str, force: bool, **others: Any) -> Any:
        from arm_core.files.model_folder import check_new

        check_new(Path(out), force=force)
        return command(*args, out=out, force=force, **others)

    return checked  # type: ignore[return-value]
