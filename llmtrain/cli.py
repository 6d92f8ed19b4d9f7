"""The command line. Commands import what they run when they run, so that help answers at once."""

import io
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from llmtrain import __version__, cli_search, cli_select, cli_use
from llmtrain.cli_checkpoint import checkpoint_app
from llmtrain.cli_data import data_app
from llmtrain.cli_loading import loading
from llmtrain.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    InputError,
    LLMTrainError,
    RankLost,
    TrainingError,
)
from llmtrain.observe.streams import outliving_the_console
from llmtrain.recipe.batch import plan_batch
from llmtrain.recipe.comparison import is_comparison, load_comparison
from llmtrain.recipe.layout import check_layout, smallest_world
from llmtrain.recipe.loading import LoadedRecipe, load_recipe, recipe_file
from llmtrain.recipe.problems import RecipeError
from llmtrain.recipe.resolved import resolved_dump
from llmtrain.recipe.schema import ModelFromConfig, ModelFromGGUF, Recipe, SentencePieceTokenizer
from llmtrain.recipe.shipped import comparison_names, recipe_names
from llmtrain.signals import end_with_launcher

SECONDS_FOR_RANK_0 = 5
_RUNS = ("train", "quickstart", "compare")  # are worth more than what they print

app = typer.Typer(
    name="llmtrain",
    help="Train large language models from a recipe: one loop, under plain torchrun and Slurm.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start with: llmtrain quickstart",
)
tokenizer_app = typer.Typer(help="Make tokenizers.", no_args_is_help=True)
recipes_app = typer.Typer(help="List, show, copy and validate recipes.", no_args_is_help=True)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(recipes_app, name="recipes")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(data_app, name="data")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file or the name of a shipped recipe.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Settings laid over the recipe, e.g. optimizer.lr=1e-3."),
]


@dataclass
class Settings:
    """What holds for every command, and which one it is."""

    debug: bool = False
    command: str | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line, by default this process's; returns its exit code or raises SystemExit."""
    end_with_launcher()
    settings = Settings()
    with outliving_the_console() as unwritten:
        try:
            return _run(arguments, settings)
        except SystemExit as leaving:
            lost = unwritten()
            if leaving.code or lost is None or settings.command in _RUNS:
                raise
            _show(TrainingError(f"standard output cannot be written: {lost.strerror}\n  remedy: make room for it"))
            return EXIT_FAILED


def _run(arguments: Sequence[str] | None, settings: Settings) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a caller may have put another in its place
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: not every terminal takes every character
    try:
        app(args=arguments, obj=settings, prog_name="llmtrain")
    except Exception as error:
        told = error if isinstance(error, LLMTrainError) else _out_of_memory(error)
        if told is not None:
            if settings.debug:
                traceback.print_exc()
            _show(told)
            return told.exit_code
        typer.echo("error: llmtrain failed in a way it does not know; please report the traceback below", err=True)
        raise
    return 0


def _show(error: LLMTrainError) -> None:
    """Prints an error; under several ranks, one that is the same on all of them is rank 0's to print."""
    if isinstance(error, RankLost):
        return  # the watchdog has said it, once for all ranks
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        typer.echo(f"error: {error}", err=True)
        return
    if isinstance(error, InputError):
        # Most often it is rank 0's too, which leaves when it has said so; then torchrun ends the others, here.
        time.sleep(SECONDS_FOR_RANK_0)
    if not isinstance(error, RecipeError):
        typer.echo(f"[rank {rank}] error: {error}", err=True)


def _out_of_memory(error: Exception) -> TrainingError | None:
    """What no memory, of the host or of a GPU, was left for; None for another error."""
    torch = sys.modules.get("torch")  # its error can only come when it is imported
    of_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    if not (isinstance(error, MemoryError) or of_gpu or "can't allocate memory" in str(error)):
        return None
    return TrainingError(
        f"out of memory: {error}\n  remedy: lower batch.micro_sequences or sequence_length, set "
        "engine.activation_checkpointing, or shard the model over more ranks (engine.kind=fsdp)"
    )


@contextmanager
def _interruptible(recipe: Recipe) -> Iterator[None]:
    """Ctrl-C, where the loop does not take it for a request to stop, ends with one line."""
    try:
        yield
    except KeyboardInterrupt:
        saved = any((recipe.run_directory / "checkpoints").glob("step-*"))
        outcome = "the same command goes on from the last checkpoint" if saved else "nothing was trained"
        if os.environ.get("RANK", "0") == "0":
            typer.echo(f"interrupted; {outcome}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmtrain {__version__}")
        raise typer.Exit()


@app.callback()
def _settings(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors in the input too.")] = False,
) -> None:
    context.obj.debug, context.obj.command = debug, context.invoked_subcommand


# ------------------------------------------------------------------------------------- training


@app.command(epilog="Example: llmtrain train pretrain/llama-12m steps=2000 optimizer.lr=1e-3")
def train(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Train as RECIPE says, in this process or as one rank of torchrun.

    The same command goes on where a stopped run left off.
    Exit codes: 0 done; 2 bad recipe or input; 75 stopped and checkpointed;
    130 interrupted before the run began; 1 failed.
    """
    loaded = load_recipe(recipe, overrides or [])
    with _interruptible(loaded.recipe):
        with loading():
            from llmtrain import run

        code = run.train(loaded)
    raise typer.Exit(code)


@app.command(epilog="Example: llmtrain quickstart --output /tmp/first steps=50")
def quickstart(
    overrides: OverridesArgument = None,
    output: Annotated[str, typer.Option(metavar="DIR", help="Where the run directory goes.")] = "runs",
) -> None:
    """Train a small model on this machine's own text, in minutes on a CPU, and show what it learnt."""
    with loading():
        from llmtrain.quickstart import quickstart as run_quickstart

    raise typer.Exit(run_quickstart(output, overrides or []))


@app.command(epilog="Example: llmtrain compare diffusion/compare steps=200")
def compare(
    comparison: Annotated[
        str, typer.Argument(metavar="COMPARISON", help="A YAML file with variants, or the name of a shipped one.")
    ],
    overrides: OverridesArgument = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Train only this one, also as one rank of torchrun.")
    ] = None,
) -> None:
    """Train the variants of one recipe, measure them on the same held-out texts, and show them side by side.

    What is finished is not done again: the same command goes on after an interruption.
    """
    loaded = load_comparison(comparison, overrides or [])
    with _interruptible(next(iter(loaded.variants.values())).recipe):
        with loading():
            from llmtrain import compare as comparing

        code = comparing.compare(loaded) if variant is None else comparing.train_variant(loaded, variant)
    raise typer.Exit(code)


cli_use.register(app)
cli_search.register(app)
cli_select.register(app)


@tokenizer_app.command("train", epilog="Example: llmtrain tokenizer train quickstart --output my-tokenizer")
def tokenizer_train(
    recipe: RecipeArgument,
    output: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty directory.")],
    overrides: OverridesArgument = None,
) -> None:
    """Train the tokenizer of RECIPE and save it, in the Hugging Face layout, in --output."""
    loaded = load_recipe(recipe, overrides or [])
    spec = loaded.recipe.tokenizer
    if not isinstance(spec, SentencePieceTokenizer):
        raise InputError(
            f"kind {spec.kind} is not trained",
            where=loaded.where("tokenizer.kind"),
            remedy="use tokenizer.kind=sentencepiece tokenizer.vocab_size=32000",
        )
    from llmtrain.data import build
    from llmtrain.directories import new_directory

    with new_directory(output) as aside:  # tried before the minutes of training
        cache = build.cache_directory(loaded.recipe.data.cache_dir)
        build.prepare_tokenizer(loaded.recipe, cache).tokenizer.save_pretrained(aside)
    typer.echo(f"tokenizer saved in {output}")


@app.command(epilog="Example: llmtrain verdict pretrain/llama-12m")
def verdict(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    since: Annotated[
        float, typer.Option(metavar="TIME", help="Seconds since 1970; what ended before was an earlier start.")
    ] = 0.0,
    wait: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="Wait for a run that has not ended.")] = 0.0,
    stopped: Annotated[bool, typer.Option("--stopped", help="One that did not begin counts as preempted.")] = False,
) -> None:
    """Say how the newest start of RECIPE's run ended, and exit with its code.

    Give the settings that train was given. For scripts: torchrun exits with 1 whatever its workers' codes were.
    """
    from llmtrain.verdict import tell

    line, code = tell(load_recipe(recipe, overrides or []), since, wait, stopped)
    typer.echo(line)
    raise typer.Exit(code)


# -------------------------------------------------------------------------------------- recipes


@recipes_app.command("list", epilog="Example: llmtrain recipes list")
def recipes_list() -> None:
    """List the recipes that come with llmtrain."""
    rows: list[tuple[str, ...]] = []
    for name in recipe_names():
        recipe = load_recipe(name).recipe
        rows.append((name, recipe.description, _architecture(recipe), recipe.algorithm.kind))
    for name in comparison_names():
        comparison = load_comparison(name)
        recipe = next(iter(comparison.variants.values())).recipe
        rows.append((name, comparison.description, _architecture(recipe), f"{len(comparison.variants)} variants"))
    _print_recipes(("name", "description", "architecture", "algorithm"), rows)


def _architecture(recipe: Recipe) -> str:
    if isinstance(recipe.model, ModelFromConfig):
        return recipe.model.architecture
    return recipe.model.file if isinstance(recipe.model, ModelFromGGUF) else recipe.model.path


def _print_recipes(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty() and shutil.get_terminal_size().columns < 90:  # too narrow for columns side by side
        for name, description, *rest in rows:
            typer.secho(name, bold=True)
            typer.echo(f"  {description}\n  {', '.join(rest)}")
        return
    from llmtrain.tables import print_table

    print_table(header, rows)


@recipes_app.command("show", epilog="Example: llmtrain recipes show quickstart --resolved")
def recipes_show(
    recipe: RecipeArgument,
    resolved: Annotated[bool, typer.Option("--resolved", help="With `extends` and every default filled in.")] = False,
) -> None:
    """Print a recipe."""
    text = resolved_dump(load_recipe(recipe).recipe) if resolved else recipe_file(recipe).read_text("utf-8", "replace")
    if not sys.stdout.isatty():
        typer.echo(text, nl=False)
        return
    from rich.console import Console
    from rich.syntax import Syntax

    Console().print(Syntax(text, "yaml", background_color="default", word_wrap=True))


@recipes_app.command("copy", epilog="Example: llmtrain recipes copy pretrain/llama-12m mine.yaml")
def recipes_copy(
    recipe: RecipeArgument,
    destination: Annotated[Path | None, typer.Argument(metavar="DEST", help="A new file, or a directory.")] = None,
) -> None:
    """Copy a recipe to edit it; nothing is overwritten."""
    source = recipe_file(recipe)
    target = destination or Path(source.name)
    if os.path.isdir(target):
        target = target / source.name
    try:
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise InputError(f"{target} exists", where="DEST", remedy="name a new file, or remove it first") from None
    except OSError as error:
        raise InputError(f"{target} cannot be written: {error.strerror}", where="DEST") from None
    typer.echo(f"{target}: edit it, then run: llmtrain train {target}")


@recipes_app.command("validate", epilog="Example: llmtrain recipes validate mine.yaml steps=10 --world-size 8")
def recipes_validate(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE|KEY=VALUE", help="Files or names; settings.")],
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks to split the global batch over; else the fewest that can run it.")
    ] = None,
) -> None:
    """Check recipes without loading anything, and show what is derived from them.

    Every mistake is shown with its file and line; exit code 2 if there is any.
    """
    overrides = [text for text in recipes if "=" in text and not Path(text).is_file()]
    names = [text for text in recipes if text not in overrides]
    if not names:
        raise InputError("no recipe is named, only settings", where="RECIPE", remedy="name a file or shipped recipe")
    failed = False
    for name in names:
        try:
            for variant, loaded in _recipes_in(name, overrides):
                typer.echo(f"ok: {name}{variant}: {_derived(loaded, world_size)}")
        except InputError as error:
            failed = True
            typer.echo(f"error: {error}", err=True)
    raise typer.Exit(EXIT_BAD_INPUT if failed else 0)


def _recipes_in(name: str, overrides: list[str]) -> list[tuple[str, LoadedRecipe]]:
    """The recipe of that name, or the variants of the comparison, each with what tells it from the others."""
    if not is_comparison(name):
        return [("", load_recipe(name, overrides))]
    variants = load_comparison(name, overrides).variants
    return [(f" {variant}", loaded) for variant, loaded in variants.items()]


def _derived(loaded: LoadedRecipe, asked_world_size: int | None) -> str:
    recipe = loaded.recipe
    world_size = asked_world_size or smallest_world(recipe)
    with loaded.errors_located():
        check_layout(recipe, world_size, None if recipe.device == "auto" else recipe.device)
        plan = plan_batch(recipe, world_size)
    tokens = plan.sequences * recipe.sequence_length
    length = (
        f"{recipe.steps:,} steps"
        if recipe.steps is not None
        else f"{recipe.epochs:g} epoch{'s' * (recipe.epochs != 1)}"
    )
    total = f", {recipe.steps * tokens:,} tokens in all" if recipe.steps is not None else ""
    return (
        f"{length}, global batch {plan.sequences} x {recipe.sequence_length} = {tokens:,} tokens, "
        f"{plan.world_size} {'rank' if plan.world_size == 1 else 'ranks'} x {plan.accumulation} accumulation "
        f"x {plan.micro_sequences} micro{total}"
    )
