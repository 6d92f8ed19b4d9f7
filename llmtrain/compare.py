"""`llmtrain compare`: the variants of one recipe, trained one after another and measured on the same texts."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from llmtrain import run
from llmtrain.checkpoint.files import written_aside
from llmtrain.distributed import choose_device, ranks_from_environment
from llmtrain.errors import EXIT_DONE, InputError
from llmtrain.evaluation import perplexity
from llmtrain.evaluation.figures import Figure, ratio
from llmtrain.evaluation.tasks import LoadedTask, Perplexity
from llmtrain.models.saved import load_saved
from llmtrain.observe.metrics import read_metrics
from llmtrain.recipe.comparison import LoadedComparison, Measurement
from llmtrain.recipe.loading import LoadedRecipe
from llmtrain.tables import print_table

RESULT, MEASURED = "comparison.json", "measured.json"
_BITS = "bits_per_byte"
_BATCH_TOKENS = 8192
_BAR = 20  # characters
_HEADER = ("variant", "starts from", "tokens", "minutes", "bits/byte", "stderr", "to best", "stderr of it")
_NUMBERS = _HEADER[2:]


def train_variant(comparison: LoadedComparison, name: str) -> int:
    """Trains one variant, in this process or as one rank of torchrun; returns the exit code.

    Raises:
        InputError: there is no such variant, or the one that it starts from is not finished.
    """
    if name not in comparison.variants:
        known = ", ".join(comparison.variants)
        raise InputError(f"there is no variant {name!r}", where="--variant", remedy=f"choose from {known}")
    start = comparison.start_from.get(name)
    if start is not None and not (comparison.variants[start].recipe.run_directory / "final").is_dir():
        raise InputError(
            f"variant {name} starts from {start}, which is not finished",
            where="--variant",
            remedy=f"train {start} first",
        )
    return run.train(comparison.variants[name])


def compare(comparison: LoadedComparison) -> int:
    """Trains what is not finished, measures what is not measured, and shows all; returns the exit code.

    Raises:
        InputError: it is one of several ranks, each of which would measure and write the same.
    """
    _, size, _, _ = ranks_from_environment()
    if size > 1:
        raise InputError(
            f"a whole comparison is run by one process, and there are {size}",
            where="environment",
            remedy="train each variant with --variant NAME under torchrun, and then run this without it",
        )
    console = Console(stderr=True, highlight=False)
    rows, documents = dict[str, dict[str, Any]](), dict[str, list[dict[str, Any]]]()
    for number, (name, loaded) in enumerate(comparison.variants.items()):
        console.print(f"[bold]{name}[/] ({number + 1} of {len(comparison.variants)}): {loaded.recipe.algorithm.kind}")
        code = train_variant(comparison, name)
        if code != EXIT_DONE:
            return code
        rows[name], documents[name] = _measured(comparison, name, loaded)
    best = min(rows, key=lambda name: rows[name]["figures"][_BITS]["value"])
    for name, row in rows.items():
        row["to_best"] = _plain(_difference(documents[name], documents[best]))
    with written_aside(comparison.directory / RESULT) as file:
        file.write(json.dumps({"measurement": comparison.measurement.model_dump(), "variants": rows}, indent=2) + "\n")
    _show(comparison, rows)
    return EXIT_DONE


def _measured(
    comparison: LoadedComparison, name: str, loaded: LoadedRecipe
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a finished variant, and its documents'; kept beside its model, so that they are measured once."""
    directory = loaded.recipe.run_directory
    settings = comparison.measurement.model_dump()
    file = directory / MEASURED
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["settings"] == settings:
            return dict(known["row"]), list(known["documents"])
    task = _task(loaded, comparison.measurement)
    figures, documents = perplexity.measure(
        LoadedTask(task, loaded.path, loaded.tree),
        task,
        load_saved(str(directory), device=choose_device(loaded.recipe.device, 0)),
        settings["documents"],
        _BATCH_TOKENS,
    )
    row = {
        "algorithm": loaded.recipe.algorithm.kind,
        "start_from": comparison.start_from.get(name),
        **_trained(directory),
        "figures": {figure: _plain(value) for figure, value in figures.items()},
    }
    with written_aside(file) as opened:
        opened.write(json.dumps({"settings": settings, "row": row, "documents": documents}) + "\n")
    return row, documents


def _difference(own: Sequence[Mapping[str, Any]], best: Sequence[Mapping[str, Any]]) -> Figure:
    """Bits a byte more than the best variant's on the same documents.

    Its error is smaller than the variants' own: that some documents are harder for every model does not count.
    """
    more = [(mine["nats"] - other["nats"]) / math.log(2) for mine, other in zip(own, best, strict=True)]
    return ratio(more, [document["bytes"] for document in own])


def _task(loaded: LoadedRecipe, measurement: Measurement) -> Perplexity:
    recipe = loaded.recipe
    data = recipe.data
    return Perplexity(
        kind="perplexity",
        name=recipe.name,
        # A recipe's paths are the working directory's, and a task's those of its file.
        data=[perplexity.beside(Path.cwd(), source) for source in data.validation or data.train],
        held_out_fraction=None if data.validation else data.validation_fraction,
        sequence_length=recipe.sequence_length,
        samples=measurement.samples,
        end_of_text=True,
    )


def _trained(directory: Path) -> dict[str, float]:
    """What the training took, from its record: tokens, and seconds of its steps."""
    records = [record for record in read_metrics(directory / "metrics.jsonl") if "step_seconds" in record]
    return {"tokens": records[-1]["tokens"], "seconds": math.fsum(record["step_seconds"] for record in records)}


def _plain(figure: Figure) -> dict[str, float | None]:
    return {"value": figure.value, "stderr": figure.stderr}


def _show(comparison: LoadedComparison, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """A table, the best first, with a bar for each; in a pipe one line a variant."""
    best = sorted(rows, key=lambda name: rows[name]["figures"][_BITS]["value"])
    lines = [_line(name, rows[name]) for name in best]
    if not sys.stdout.isatty():
        print_table(_HEADER, lines)
        return
    console = Console(highlight=False)
    num = comparison.measurement.documents
    console.print(f"[bold]{comparison.name}[/]: {num} held-out documents, bits per byte (of diffusion an upper bound)")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in _HEADER:
        table.add_column(column, justify="right" if column in _NUMBERS else "left")
    table.add_column("")
    for name, line in zip(best, lines, strict=True):
        share = rows[name]["figures"][_BITS]["value"] / rows[best[-1]]["figures"][_BITS]["value"]
        table.add_row(*line, ProgressBar(total=1, completed=share, width=_BAR, complete_style="cyan"))
    console.print(table)
    console.print(f"runs and {RESULT} lie in {comparison.directory}")


def _line(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    figures = (row["figures"][_BITS], row["to_best"])
    shown = [("" if number is None else f"{number:.4f}") for one in figures for number in (one["value"], one["stderr"])]
    return (name, row["start_from"] or "", f"{row['tokens']:.0f}", f"{row['seconds'] / 60:.1f}", *shown)
