"""The options of `arm explain`, and the choice of the page."""

from __future__ import annotations

import click

from arm_cli.options import EngineChoice, engine_options, weights_option

PAGE = "index.html"


@click.command(short_help="Show what a model looks at.")
@click.argument("model")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--out", required=True, metavar="FOLDER", help="Folder for the page and the pictures.")
@click.option("--layer", default="all", show_default=True, metavar="N|all", help="Layer, counted from 0.")
@click.option("--direction", default="all", show_default=True, metavar="NAME|K|mean|all",
              help="Scan direction by name or number, or only the mean.")  # fmt: skip
@click.option("--token", metavar="class|ROW,COLUMN",
              help="Token whose sources are shown, counted from 0; class by default, in a pretraining "
              "model the last patch that it reads.")  # fmt: skip
@click.option("--pca", is_flag=True, help="Show principal components of the patches' features as colours.")
@click.option(
    "--neighbours", metavar="FOLDER", help="Show the patches of these images most similar to --token."
)
@click.option("--count", type=click.IntRange(min=1, max=100), default=12, show_default=True,
              help="Neighbours to show, at most one for each image.")  # fmt: skip
@weights_option
@engine_options
def explain(
    model: str,
    images: tuple[str, ...],
    out: str,
    layer: str,
    direction: str,
    token: str | None,
    pca: bool,
    neighbours: str | None,
    count: int,
    weights: str,
    engine: EngineChoice,
) -> None:
    """Show what MODEL looks at in each IMAGE, a file or a folder of images.

    Without --pca and --neighbours, it computes influence maps: how much each token contributes to the chosen
    one in each layer and direction. It also computes their rollout over all layers and, as a check, gradient
    times input of the whole model. FOLDER will contain a page (index.html) and PNG files. See
    docs/explain.md for the definitions.
    """
    from arm_cli.explain.features import Query, colour_page, neighbour_page
    from arm_cli.explain.influence import Choice, influence_page
    from arm_cli.images import image_files
    from arm_cli.opening import open_model
    from arm_cli.pages.pictures import ready_folder
    from arm_cli.show import echo
    from arm_core.files.atomic import replace_text

    if pca and neighbours:
        raise ValueError("--pca and --neighbours: expected one of them; run the command once for each")
    opened = open_model(model, weights=weights)
    files = image_files(images)
    choice = Choice.parse(opened.spec, layer=layer, direction=direction, token=token)
    query = Query.parse(opened.spec, token, neighbours, count) if neighbours else None
    folder = ready_folder(out)
    runner = engine.create(opened.spec, opened.parameters)
    if pca:
        page = colour_page(opened, runner, files, folder)
    elif query:
        page = neighbour_page(opened, runner, files, folder, query)
    else:
        page = influence_page(opened, runner, files, folder, choice, engine.threads)
    replace_text(folder / PAGE, page)
    echo(f"wrote {folder / PAGE}", err=True)
