"""`llmtrain quickstart`: an ordinary recipe, run by ordinary commands, and what came of it."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmtrain import run
from llmtrain.errors import EXIT_DONE
from llmtrain.observe.metrics import read_metrics
from llmtrain.recipe.loading import load_recipe

RECIPE = "quickstart"
FIGURES = {
    "eval_loss": "held-out loss (nats per token)",
    "eval_perplexity": "held-out perplexity (per token)",
    "eval_bits_per_byte": "held-out bits per byte",
}


def quickstart(output: str, overrides: list[str]) -> int:
    """Trains the shipped quickstart recipe into `output`, and shows held-out figures before and after.

    A run that was interrupted goes on; one that is finished is only shown again.
    """
    console = Console(stderr=True, highlight=False)
    overrides = [f"output_dir={json.dumps(output)}", *overrides]  # JSON is YAML, with any character in it
    loaded = load_recipe(RECIPE, overrides)
    console.print(
        "[bold]llmtrain quickstart[/]: train a tokenizer and a small Llama on the Python standard library\n"
        f"the same by hand: [cyan]llmtrain train {RECIPE} {shlex.join(overrides)}[/]"
    )
    exit_code = run.train(loaded)
    if exit_code == EXIT_DONE:
        directory = loaded.recipe.run_directory
        _show(console, directory)
    return exit_code


def _show(console: Console, directory: Path) -> None:
    evaluated = [record for record in read_metrics(directory / "metrics.jsonl") if "eval_loss" in record]
    if evaluated:  # else nothing was held out
        _show_figures(console, evaluated[0], evaluated[-1])
    console.print(
        f"Everything lies in [bold]{directory}[/]: model in final/, figures in metrics.jsonl, curves in tensorboard/.\n"
        f"Try next: [cyan]llmtrain generate {directory} --prompt 'def '[/]\n"
        f"          [cyan]llmtrain recipes copy {RECIPE} my.yaml[/], edit it, and [cyan]llmtrain train my.yaml[/]"
    )


def _show_figures(console: Console, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    table = Table(title="before and after, on documents the model was not trained on", title_justify="left")
    table.add_column("figure")
    table.add_column(f"step {before['step']}", justify="right")
    table.add_column(f"step {after['step']}", justify="right")
    for key, label in FIGURES.items():
        table.add_row(label, f"{before[key]:.2f}", f"{after[key]:.2f}")
    console.print(table)
