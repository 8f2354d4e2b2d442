"""`arm convert`: import, export, change and compare checkpoints; one module per command."""

from __future__ import annotations

import importlib
import signal
from types import FrameType
from typing import Any

import click

COMMANDS = {
    "import": "import_checkpoint",
    "export": "export",
    "push": "push",
    "to-classifier": "to_classifier",
    "resize": "resize",
    "cast": "cast",
    "quantize": "quantize",
    "average": "average",
    "verify": "verify",
    "inspect": "inspect",
    "diff": "diff",
}
"""Commands in the order of the help: the module, and the name of the command in it."""


class ConvertCommands(click.Group):
    """Loads a command's module on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(f"arm_cli.convert.{name}"), name)
        return command


@click.group(cls=ConvertCommands)
@click.pass_context
def convert(ctx: click.Context) -> None:
    """Import, export, change and compare checkpoints.

    A MODEL is a model folder, a run or one of its checkpoints, an official .pth or .safetensors file, a
    file that `arm convert export` wrote, or hf://user/name[@revision][/file].
    """
    _clean_up_on_sigterm(ctx)


def _clean_up_on_sigterm(ctx: click.Context) -> None:
    """Let SIGTERM end the command like an error does, so that unfinished output is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before: Any = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        return
    ctx.call_on_close(lambda: signal.signal(signal.SIGTERM, before))
