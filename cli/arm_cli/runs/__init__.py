"""`arm runs`: list, show and compare runs; one module per command."""

from __future__ import annotations

import importlib

import click

MODULES = {"list": "listing", "show": "show", "compare": "compare"}
"""Module of each command in `arm_cli.runs`, in the order of the help."""


class RunsCommands(click.Group):
    """Loads a command's module on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        module = importlib.import_module(f"arm_cli.runs.{MODULES[cmd_name]}")
        command: click.Command = module.command
        return command


@click.group(cls=RunsCommands, short_help="List, show and compare runs.")
def runs() -> None:
    """List, show and compare runs.

    A run is a folder that `arm pretrain` or `arm finetune` has written; the commands read it while it trains,
    too. `arm report RUN` writes a page about one run.
    """
