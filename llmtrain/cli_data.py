"""`llmtrain data ...` on the command line."""

from typing import Annotated, Literal

import typer

from llmtrain.cli_loading import loading
from llmtrain.recipe.loading import load_recipe

data_app = typer.Typer(help="Look at the data of a recipe.", no_args_is_help=True)


@data_app.command("inspect", epilog="Example: llmtrain data inspect quickstart --rows 1 sequence_length=128")
def data_inspect(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A YAML file or the name of a shipped recipe.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings laid over the recipe, e.g. data.train_on=all."),
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show, in the order of training.")] = 2,
    half: Annotated[Literal["train", "validation"], typer.Option(help="Which rows.")] = "train",
    full: Annotated[bool, typer.Option("--full", help="Show long texts whole.")] = False,
    histogram: Annotated[
        bool, typer.Option("--histogram/--no-histogram", help="Show how long the documents are.")
    ] = True,
) -> None:
    """Show the rows that RECIPE trains on: which tokens are trained, where documents begin and are cut.

    Then the lengths of documents, and how many were truncated, split, left out or duplicates.
    Builds the tokenizer and the data as `train` does, and no model. In a pipe, or with NO_COLOR set,
    trained tokens stand in double brackets. Exit code 2 where `train` would refuse the data.
    """
    loaded = load_recipe(recipe, overrides or [])
    with loading():
        from llmtrain.data import inspection

    with loaded.errors_located():
        inspection.inspect(loaded.recipe, num_rows=rows, half=half, full=full, histogram=histogram)
