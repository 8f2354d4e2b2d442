"""`arm convert`: checkpoints in and out, models made from models, and proof that nothing was lost."""

from __future__ import annotations

import click

from arm_cli.convert.change import average, cast, quantize, resize, to_classifier
from arm_cli.convert.check import diff, inspect, verify
from arm_cli.convert.transfer import export_command, import_command, push


class InOrder(click.Group):
    """Lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder)
def convert() -> None:
    """Bring checkpoints in and out, change models, and compare them.

    A MODEL is a model folder, a run or one of its checkpoints, an official .pth or .safetensors file, a
    file that `arm convert export` wrote, or hf://user/name[@revision][/file].
    """


for command in (import_command, export_command, push):
    convert.add_command(command)
for command in (to_classifier, resize, cast, quantize, average, verify, inspect, diff):
    convert.add_command(command)
