"""`arm models`: presets, and the checkpoints that are published on the Hugging Face hub."""

from __future__ import annotations

import click

from arm_cli.options import json_option


@click.command(short_help="List presets and published checkpoints.")
@click.option("--offline", is_flag=True, help="Do not contact the hub; show the last known list.")
@json_option
def models(offline: bool, as_json: bool) -> None:
    """List the presets, and the checkpoints in the official repository on the Hugging Face hub.

    Commands that take a MODEL take these names directly; `arm pull NAME` downloads one.
    """
    from arm_cli.show import echo, print_json, print_table
    from arm_convert.published import list_models
    from arm_core.model.parameters import count_parameters
    from arm_core.model.presets import PRESETS, classifier_preset, pretrain_preset

    presets = {
        name: (count_parameters(pretrain_preset(name)), count_parameters(classifier_preset(name)))
        for name in PRESETS
    }
    reason = None
    try:
        published = list_models(refresh=not offline)
    except ValueError as error:
        published, reason = [], str(error)
    if as_json:
        print_json(
            {
                "presets": {n: {"pretraining": p, "classifier": c} for n, (p, c) in presets.items()},
                "published": [{"name": one.name, "address": one.address} for one in published],
                "unavailable": reason,
            }
        )
        return
    rows = [(name, f"{p:,}", f"{c:,}") for name, (p, c) in presets.items()]
    print_table(("preset", "parameters, pretraining", "classifier"), rows)
    if reason is not None:
        echo(f"published checkpoints: not available: {reason}")
    else:
        print_table(("published", "address"), [(one.name, one.address) for one in published], left=2)
