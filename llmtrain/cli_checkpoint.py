"""`llmtrain checkpoint ...` on the command line."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llmtrain.cli_loading import loading

checkpoint_app = typer.Typer(help="Look at the checkpoints of a run, and convert them.", no_args_is_help=True)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or one checkpoint in it.")]


@checkpoint_app.command("list", epilog="Example: llmtrain checkpoint list runs/quickstart")
def checkpoint_list(run: RunArgument) -> None:
    """List the checkpoints of a run; exit code 1 if one is visibly broken."""
    with loading():
        from llmtrain.checkpoint import command

    raise typer.Exit(command.show(run))


@checkpoint_app.command("verify", epilog="Example: llmtrain checkpoint verify runs/quickstart")
def checkpoint_verify(run: RunArgument) -> None:
    """Read every file of a run's checkpoints and compare its hash; exit code 1 if one is broken."""
    with loading():
        from llmtrain.checkpoint import command

    raise typer.Exit(command.verify(run))


@checkpoint_app.command(
    "convert", epilog="Example: llmtrain checkpoint convert runs/quickstart for-deepspeed --to universal"
)
def checkpoint_convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run or a checkpoint; or what to bring back.")],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A new directory; or a run's checkpoints/.")],
    to: Annotated[Literal["universal", "llmtrain"], typer.Option(help="The layout to write.")],
) -> None:
    """Bring a checkpoint into DeepSpeed's universal layout, or back from it.

    To resume on other ranks or another engine of llmtrain nothing is to be converted.
    --to universal writes DEST for engine.load_checkpoint(DEST) with checkpoint.load_universal.
    --to llmtrain writes DEST/step-NNNNNNNN from what --to universal wrote.
    """
    with loading():
        from llmtrain.checkpoint import convert

    if to == "universal":
        convert.to_universal(source, dest)
    else:
        convert.to_llmtrain(source, dest)
