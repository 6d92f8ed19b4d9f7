"""`llmtrain eval`: tasks in, a table and files out."""

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer

from llmtrain import __version__
from llmtrain.directories import check_file, whole_file
from llmtrain.errors import InputError
from llmtrain.evaluation import choices, harness, pairs, perplexity, questions, steps
from llmtrain.evaluation.figures import Figure, Measured
from llmtrain.evaluation.tasks import (
    SCORED,
    ExactMatch,
    LMEval,
    LoadedTask,
    Math,
    MultipleChoice,
    Pairs,
    Perplexity,
    Steps,
    load_task,
)
from llmtrain.models.saved import Location, Saved
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


class _Model(NamedTuple):
    """A model: what is said of it in results, and how a task is run on it."""

    about: dict[str, Any]
    run: Callable[[LoadedTask], Measured]


@dataclass(frozen=True)
class _Result:
    loaded: LoadedTask
    measured: Measured
    seconds: float


def evaluate(choice: ModelChoice, files: Sequence[Path], options: Options) -> int:
    """Runs the tasks one after another; returns the exit code.

    Raises:
        InputError: a task, its data or the model is wrong. What was measured before is written, where that was asked.
        TrainingError: the disk is full.
    """
    tasks = _load(files)
    for path, where in ((options.output, "--output"), (options.samples, "--samples")):
        if path is not None:
            check_file(path, where)
    model = (_scoring if _are_scored(tasks) else _writing_texts)(choice, options)
    results = []
    try:
        for loaded in tasks:
            started = time.monotonic()
            measured = model.run(loaded)
            results.append(_Result(loaded, measured, time.monotonic() - started))
    finally:
        if results:
            _write(results, model.about, options)
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


def _are_scored(tasks: Sequence[LoadedTask]) -> bool:
    """Whether the tasks are for a reward model.

    Raises:
        InputError: some are, and others are not.
    """
    scored = [task for task in tasks if isinstance(task.task, SCORED)]
    others = [task for task in tasks if not isinstance(task.task, SCORED)]
    if scored and others:
        raise InputError(
            f"{scored[0].name} (kind {scored[0].task.kind}) is for reward models, and {others[0].name} (kind "
            f"{others[0].task.kind}) for language models",
            where=scored[0].where("kind"),
            remedy="evaluate them by two commands, each with a model of its own",
        )
    return bool(scored)


def _writing_texts(choice: ModelChoice, options: Options) -> _Model:
    """A language model."""
    saved = choice.load()
    generation_config = saved.decoder.generation_config  # each task begins from the model's own

    def run(loaded: LoadedTask) -> Measured:
        saved.decoder.generation_config = generation_config
        figures, records = _run(loaded, saved, options)
        return Measured(figures, records, {})

    about = _about(saved.location, saved.decoder.dtype, saved.device)
    return _Model(about if saved.diffusion is None else {**about, "diffusion": asdict(saved.diffusion)}, run)


def _scoring(choice: ModelChoice, options: Options) -> _Model:
    """A reward model."""
    scorer = choice.load_scorer()

    def run(loaded: LoadedTask) -> Measured:
        match loaded.task:
            case Pairs() as task:
                return pairs.measure(loaded, task, scorer, options.limit, options.batch_tokens)
            case Steps() as task:
                return steps.measure(loaded, task, scorer, options.limit, options.batch_tokens)
        raise AssertionError(f"{loaded.task.kind} is for language models")

    return _Model({**_about(scorer.location, scorer.dtype, scorer.device), "reward": asdict(scorer.reward)}, run)


def _about(location: Location, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    return {
        "model": location.path,
        "base": location.base,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
    }


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
    raise AssertionError(f"{loaded.task.kind} is for reward models")


def _show(results: Sequence[_Result]) -> None:
    _show_figures(results)
    bins = [(result.loaded.name, one) for result in results for one in result.measured.details.get("reliability", [])]
    if not bins or not sys.stdout.isatty():  # what reads a pipe finds them in --output
        return
    typer.echo()
    header = ("task", "confidence", "mean", "accuracy", "count")
    rows = [
        (
            name,
            f"{one['low']:.2f} to {one['high']:.2f}",
            f"{one['confidence']:.3f}",
            f"{one['accuracy']:.3f}",
            str(one["count"]),
        )
        for name, one in bins
    ]
    print_table(header, rows, right=header[2:])


def _show_figures(results: Sequence[_Result]) -> None:
    figures = [
        (result.loaded.name, name, figure) for result in results for name, figure in result.measured.figures.items()
    ]
    rows = [(task, name, *_numbers(figure)) for task, name, figure in figures]
    if not any(figure.note for _, _, figure in figures):
        print_table(_HEADER, rows, right=_HEADER[2:])
        return
    noted = [(*row, figure.note) for row, (_, _, figure) in zip(rows, figures, strict=True)]
    print_table((*_HEADER, "note"), noted, right=_HEADER[2:])


def _numbers(figure: Figure) -> tuple[str, str, str]:
    error = "" if figure.stderr is None else f"{figure.stderr:.4g}"
    return f"{figure.value:.4g}", error, str(figure.rows)


def _write(results: Sequence[_Result], about: dict[str, Any], options: Options) -> None:
    if options.output is not None:
        with whole_file(options.output) as aside:
            aside.write_text(json.dumps(_summary(results, about, options), indent=2) + "\n", encoding="utf-8")
    if options.samples is not None:
        with whole_file(options.samples) as aside, aside.open("w", encoding="utf-8") as file:
            for result in results:
                for record in result.measured.records:
                    entry = {"task": result.loaded.name, **record}
                    file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")


def _summary(results: Sequence[_Result], about: dict[str, Any], options: Options) -> dict[str, Any]:
    return {
        **about,
        "limit": options.limit,
        "versions": {"llmtrain": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "tasks": {
            result.loaded.name: {
                "file": str(result.loaded.file),
                "settings": result.loaded.task.model_dump(),
                "figures": {name: _plain(figure) for name, figure in result.measured.figures.items()},
                **result.measured.details,
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
