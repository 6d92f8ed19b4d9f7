"""A model's own answers as data on the command line: rejection sampling, and labels for steps."""

from pathlib import Path
from typing import Annotated

import typer

from llmtrain.cli_loading import loading
from llmtrain.cli_search import Aggregates, ScorerBase
from llmtrain.cli_use import BaseOption, BatchTokens, Device, DType, ModelArgument
from llmtrain.signals import interruptible

TaskArgument = Annotated[Path, typer.Argument(metavar="TASK", help="A YAML file, of kind exact_match or math.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy. In place of the task's.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1, help="Nucleus sampling; 1 is off. In place of the task's.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Of an answer at most; default: the task's.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling, in place of the task's.")]


def rejection_sample(
    context: typer.Context,
    model: ModelArgument,
    task: TaskArgument,
    output: Annotated[Path, typer.Option(metavar="FILE", help="A new JSONL file for the answers that are kept.")],
    num: Annotated[int, typer.Option(min=1, help="Answers to each question.")] = 8,
    keep: Annotated[int, typer.Option(min=1, help="Answers to a question that are kept, at most.")] = 1,
    rule: Annotated[
        bool,
        typer.Option(
            "--rule/--no-rule", help="Keep only what the task says is right, and in its format if it has one."
        ),
    ] = True,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write each kept answer with a wrong one to the same question, too."),
    ] = None,
    scorer: Annotated[
        str | None, typer.Option(metavar="DIR", help="A reward model; the answers that it scores highest are kept.")
    ] = None,
    scorer_base: ScorerBase = None,
    min_score: Annotated[float | None, typer.Option(help="Keep only what the reward model gives so much.")] = None,
    aggregate: Aggregates = None,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions, from the first.")] = None,
    seed: Seed = 0,
    base: BaseOption = None,
    device: Device = "auto",
    dtype: DType = "auto",
    batch_tokens: BatchTokens = 8192,
) -> None:
    """Let a model answer the questions of a task several times, and keep the good answers as data to train on.

    The output is data for algorithm sft, --pairs for dpo and reward_model. With --no-rule every answer is good, which
    is distillation of the model's texts. A command that was interrupted goes on when it is given again.
    """
    if scorer is None and (scorer_base is not None or aggregate is not None):
        context.fail("--scorer-base and --aggregate are for a reward model: give one by --scorer")
    with loading():
        from llmtrain.sampling.command import ModelChoice
        from llmtrain.sampling.partial import outcome
        from llmtrain.search import rejection
        from llmtrain.search.given import Drawing, RewardChoice

    drawing = Drawing(num, temperature, top_p, max_new_tokens, seed, limit, batch_tokens)
    reward = None if scorer is None else RewardChoice(scorer, scorer_base, aggregate)
    options = rejection.Options(output, pairs, keep, rule, reward, min_score)
    with interruptible(lambda: outcome(output)):
        raise typer.Exit(rejection.rejection_sample(ModelChoice(model, base, dtype, device), task, drawing, options))


def label_steps(
    context: typer.Context,
    model: ModelArgument,
    task: TaskArgument,
    output: Annotated[Path, typer.Option(metavar="FILE", help="A new JSONL file for the steps with their labels.")],
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="JSONL solutions to the task's questions: prompt and completion, or messages. Default: the model's.",
        ),
    ] = None,
    num: Annotated[
        int | None, typer.Option(min=1, help="Solutions to each question, without --input. Default: 1.")
    ] = None,
    rollouts: Annotated[int, typer.Option(min=1, help="Completions from the end of each step.")] = 8,
    separator: Annotated[str, typer.Option(metavar="TEXT", help=r"Between steps; \n is a line break.")] = r"\n",
    all_steps: Annotated[
        bool,
        typer.Option(
            "--all-steps", help="Roll out from every step; else not from what follows a step that leads nowhere."
        ),
    ] = False,
    temperature: Temperature = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: MaxNewTokens = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions, or rows of --input.")] = None,
    seed: Seed = 0,
    base: BaseOption = None,
    device: Device = "auto",
    dtype: DType = "auto",
    batch_tokens: BatchTokens = 8192,
) -> None:
    """Find out which steps of solutions are right, by letting the model go on from them (Math-Shepherd).

    A step is right if any of the answers that are rolled out from its end is. The output is data for algorithm
    process_reward. A command that was interrupted goes on when it is given again.
    """
    if input_file is not None and num is not None:
        context.fail("--num is for solutions of the model, and --input has solutions")
    with loading():
        from llmtrain.sampling.command import ModelChoice
        from llmtrain.sampling.partial import outcome
        from llmtrain.search import labelling
        from llmtrain.search.given import Drawing

    drawing = Drawing(num or 1, temperature, top_p, max_new_tokens, seed, limit, batch_tokens)
    between = separator.replace(r"\n", "\n").replace(r"\t", "\t")
    options = labelling.Options(output, input_file, rollouts, between, all_steps)
    with interruptible(lambda: outcome(output)):
        raise typer.Exit(labelling.label_steps(ModelChoice(model, base, dtype, device), task, drawing, options))


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    example = "llmtrain rejection-sample runs/my-sft chain-sum/task.yaml --output kept.jsonl --pairs pairs.jsonl"
    app.command("rejection-sample", epilog=f"Example: {example}")(rejection_sample)
    app.command(
        "label-steps", epilog="Example: llmtrain label-steps runs/my-sft chain-sum/task.yaml --output steps.jsonl"
    )(label_steps)
