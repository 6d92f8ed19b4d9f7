"""`llmtrain eval`: tasks in, a table and files out."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmtrain import __version__
from llmtrain.errors import InputError, TrainingError
from llmtrain.evaluation import choices, harness, perplexity, questions
from llmtrain.evaluation.figures import Figure
from llmtrain.evaluation.tasks import (
    ExactMatch,
    LMEval,
    LoadedTask,
    Math,
    MultipleChoice,
    Perplexity,
    load_task,
)
from llmtrain.models.saved import Saved
from llmtrain.recipe.problems import Problem, RecipeError
from llmtrain.sampling.command import ModelChoice
from llmtrain.tables import print_table

_HEADER = ("task", "figure", "value", "stderr", "rows")


@dataclass(frozen=True)
class Options:
    """What a user can ask of all tasks alike.

    Attributes:
        output: JSON file for everything.
        samples: JSONL file for what was said to each row.
        limit: only so many rows of each task.
        batch_tokens: about so many positions are computed at once.
    """

    output: Path | None = None
    samples: Path | None = None
    limit: int | None = None
    batch_tokens: int = 8192


@dataclass(frozen=True)
class _Result:
    loaded: LoadedTask
    figures: dict[str, Figure]
    records: list[dict[str, Any]]
    seconds: float


def evaluate(choice: ModelChoice, files: Sequence[Path], options: Options) -> int:
    """Runs the tasks one after another; returns the exit code.

    Raises:
        InputError: a task, its data or the model is wrong. What was measured before is written, where that was asked.
        TrainingError: the disk is full.
    """
    tasks = _load(files)
    for path, where in ((options.output, "--output"), (options.samples, "--samples")):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"no such directory: {path.parent}", where=where, remedy="make it first")
    saved = choice.load()
    generation_config = saved.decoder.generation_config  # each task begins from the model's own
    results = []
    try:
        for loaded in tasks:
            started = time.monotonic()
            saved.decoder.generation_config = generation_config
            figures, records = _run(loaded, saved, options)
            results.append(_Result(loaded, figures, records, time.monotonic() - started))
    finally:
        if results:
            _write(results, saved, options)
    _show(results)
    return 0


def _load(files: Sequence[Path]) -> list[LoadedTask]:
    """All task files; their mistakes are told together."""
    tasks: list[LoadedTask] = []
    problems: list[Problem] = []
    for file in files:
        try:
            tasks.append(load_task(file))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(", ".join(str(file) for file in files), problems)
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise InputError(
                f"two tasks are called {task.name}", where=str(task.file), remedy="give each a name: of its own"
            )
    return tasks


def _run(loaded: LoadedTask, saved: Saved, options: Options) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    match loaded.task:
        case Perplexity() as task:
            return perplexity.measure(loaded, task, saved, options.limit, options.batch_tokens)
        case ExactMatch() | Math() as task:
            return questions.ask(loaded, task, saved, options.limit, options.batch_tokens)
        case MultipleChoice() as task:
            return choices.ask(loaded, task, saved, options.limit, options.batch_tokens)
        case LMEval() as task:
            return harness.run(loaded, task, saved, options.limit)


def _show(results: Sequence[_Result]) -> None:
    figures = [(result.loaded.name, name, figure) for result in results for name, figure in result.figures.items()]
    rows = [(task, name, *_numbers(figure)) for task, name, figure in figures]
    if not any(figure.note for _, _, figure in figures):
        print_table(_HEADER, rows, right=_HEADER[2:])
        return
    noted = [(*row, figure.note) for row, (_, _, figure) in zip(rows, figures, strict=True)]
    print_table((*_HEADER, "note"), noted, right=_HEADER[2:])


def _numbers(figure: Figure) -> tuple[str, str, str]:
    error = "" if figure.stderr is None else f"{figure.stderr:.4g}"
    return f"{figure.value:.4g}", error, str(figure.rows)


def _write(results: Sequence[_Result], saved: Saved, options: Options) -> None:
    if options.output is not None:
        with _writing(options.output) as aside:
            aside.write_text(json.dumps(_summary(results, saved, options), indent=2) + "\n", encoding="utf-8")
    if options.samples is not None:
        with _writing(options.samples) as aside, aside.open("w", encoding="utf-8") as file:
            for result in results:
                for record in result.records:
                    entry = {"task": result.loaded.name, **record}
                    file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")


def _summary(results: Sequence[_Result], saved: Saved, options: Options) -> dict[str, Any]:
    location = saved.location
    return {
        "model": location.path,
        "base": location.base,
        "dtype": str(saved.decoder.dtype).removeprefix("torch."),
        "device": str(saved.device),
        **({} if saved.diffusion is None else {"diffusion": asdict(saved.diffusion)}),
        "limit": options.limit,
        "versions": {"llmtrain": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "tasks": {
            result.loaded.name: {
                "file": str(result.loaded.file),
                "settings": result.loaded.task.model_dump(),
                "figures": {name: _plain(figure) for name, figure in result.figures.items()},
                "seconds": round(result.seconds, 3),
            }
            for result in results
        },
    }


def _plain(figure: Figure) -> dict[str, float | int | str | None]:
    """As JSON has it, which knows no NaN."""
    plain: dict[str, float | int | str | None] = {
        "value": figure.value if math.isfinite(figure.value) else None,
        "stderr": figure.stderr,
        "rows": figure.rows,
    }
    return {**plain, "note": figure.note} if figure.note else plain


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A file to write that takes the place of `path` when it is whole."""
    aside = path.with_name(f".writing-{path.name}")
    try:
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be written: {error.strerror}\n  remedy: make room, or name another file"
        ) from None
    finally:
        aside.unlink(missing_ok=True)
