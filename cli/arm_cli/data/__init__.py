"""`arm data`: pack, check and preview images; one module per command."""

from __future__ import annotations

import importlib

import click

COMMANDS = ("check", "pack", "preview")
"""Commands in the order of the help; `arm_cli.data.NAME` holds the command NAME."""


class DataCommands(click.Group):
    """Loads a command's module on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"arm_cli.data.{cmd_name}"), cmd_name)
        return command


@click.group(cls=DataCommands)
def data() -> None:
    """Check images before training, pack them for fast reading, and preview their augmentation.

    A PATH is a folder (of class folders, or of images), a CSV, TSV or JSONL file, parquet or tar files (also
    as a pattern), or hf://datasets/USER/NAME.
    """
