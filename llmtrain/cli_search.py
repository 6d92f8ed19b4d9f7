"""Search at inference on the command line."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llmtrain.cli_loading import loading
from llmtrain.cli_use import BaseOption, BatchTokens, Device, DType, ModelArgument
from llmtrain.signals import interruptible

ScorerBase = Annotated[
    str | None, typer.Option(metavar="DIR", help="The model under a reward model that is an adapter.")
]
Aggregates = Annotated[
    Literal["product", "min", "last"] | None,
    typer.Option(help="How a process reward model's steps become one score. Default: product."),
]


def search(
    context: typer.Context,
    model: ModelArgument,
    task: Annotated[Path, typer.Argument(metavar="TASK", help="A YAML file, of kind exact_match or math.")],
    scorer: Annotated[
        str | None, typer.Option(metavar="DIR", help="A reward model's run, directory or adapter, or a hub name.")
    ] = None,
    scorer_base: ScorerBase = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Of best-of-n, vote, weighted-vote, beam and mcts, with commas; default: all that the reward model "
            "suffices for. beam and mcts need one that judges steps.",
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option(metavar="NUMBERS", help="How many answers, or as many steps, a method samples; with commas.")
    ] = "1,2,4,8,16",
    aggregate: Aggregates = None,
    width: Annotated[int, typer.Option(min=1, help="beam and mcts: next steps sampled from each place.")] = 4,
    temperature: Annotated[float, typer.Option(min=0, help="Of the samples, in place of the task's.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the samples, in place of the task's.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions, from the first.")] = None,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write figures and settings as JSON.")] = None,
    samples: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write each question's answers as JSONL.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw accuracy against tokens: .svg, .png or .pdf.")
    ] = None,
    base: BaseOption = None,
    device: Device = "auto",
    dtype: DType = "auto",
    batch_tokens: BatchTokens = 8192,
) -> None:
    """Answer the questions of a task with more and more tokens, and see what that brings.

    Best-of-n and votes choose among whole answers; beam search and MCTS go on step by step, as a process reward
    model says. Prints accuracy with its standard error against the tokens that a question takes, beside greedy
    decoding; in a pipe one line a figure, with tabs between the columns. With --output a command that was interrupted
    goes on when it is given again.
    """
    try:
        numbers = [int(number) for number in budgets.split(",")]
    except ValueError:
        context.fail(f"--budgets is {budgets!r}, and takes whole numbers such as 1,2,4,8,16")
    with loading():
        from llmtrain.sampling.command import ModelChoice
        from llmtrain.search import command

    names = None if methods is None else [name.strip() for name in methods.split(",")]
    options = command.Options(
        scorer, scorer_base, names, numbers, aggregate, width, temperature, seed, limit, batch_tokens, output, samples,
        picture,
    )  # fmt: skip
    with interruptible(lambda: command.interrupted(output)):
        raise typer.Exit(command.run(ModelChoice(model, base, dtype, device), task, options))


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command(
        epilog="Example: llmtrain search runs/my-sft chain-sum/task.yaml --scorer runs/my-prm --picture curve.svg"
    )(search)
