"""`llmtrain search`: questions answered with more and more samples or search, judged by a reward model.

All that would be refused is looked at before the first token is generated. Methods run one after another; what was
finished is shown and written, also after an interruption or an error.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import typer
from rich.progress import TextColumn

from llmtrain import __version__
from llmtrain.data.progress import WorkProgress, row_progress
from llmtrain.directories import new_file
from llmtrain.errors import EXIT_DONE, EXIT_INTERRUPTED, InputError
from llmtrain.evaluation.asking import Asked
from llmtrain.evaluation.questions import (
    Question,
    Task,
    answer_in,
    check_questions_fit,
    comparison,
    read_questions,
)
from llmtrain.evaluation.tasks import LoadedTask
from llmtrain.models.saved import Saved
from llmtrain.models.steps import Aggregate
from llmtrain.pictures import check_picture
from llmtrain.sampling.autoregressive import GREEDY_BELOW
from llmtrain.sampling.batched import Sampling
from llmtrain.sampling.command import ModelChoice
from llmtrain.search import curve
from llmtrain.search.curve import GREEDY, Point, Result
from llmtrain.search.driver import ModelDriver, Policy
from llmtrain.search.given import RewardChoice, check_outputs, load_questions_task
from llmtrain.search.methods import (
    SAMPLED,
    STEPWISE,
    Pool,
    check_methods,
    check_scorer,
    choose,
    drawn,
    fitting,
    search,
)
from llmtrain.search.scoring import Grader


@dataclass(frozen=True)
class Options:
    """What a user can ask for.

    Attributes:
        scorer: a reward model's run or directory.
        scorer_base: the model under it, where it is an adapter and not the one that it names.
        methods: None is all that the reward model suffices for.
        budgets: answers, or as many steps as they have, that a method may sample.
        aggregate: of a process model's steps; None is product.
        width: next steps that are sampled from where an answer goes on.
        limit: only so many questions.
        output: JSON file for the figures and settings.
        samples: JSONL file for what was said to each question.
        picture: of accuracy against tokens.
    """

    scorer: str | None = None
    scorer_base: str | None = None
    methods: Sequence[str] | None = None
    budgets: Sequence[int] = (1, 2, 4, 8, 16)
    aggregate: Aggregate | None = None
    width: int = 4
    temperature: float = 1.0
    seed: int = 0
    limit: int | None = None
    batch_tokens: int = 8192
    output: Path | None = None
    samples: Path | None = None
    picture: Path | None = None


def run(choice: ModelChoice, file: Path, options: Options) -> int:
    """Runs the methods; returns the exit code.

    Raises:
        InputError: something that was given is wrong, or does not fit together.
        TrainingError: the disk is full.
    """
    _check(options)
    loaded, task = load_questions_task(file)
    grader = None
    if options.scorer is not None:
        reward = RewardChoice(options.scorer, options.scorer_base, options.aggregate)
        grader = reward.load(choice, options.batch_tokens)
    kind: Literal["outcome", "process"] | None = None
    if grader is not None:
        kind = "process" if grader.judges_steps else "outcome"
    methods = fitting(kind) if options.methods is None else list(options.methods)
    check_scorer(methods, kind)
    saved = choice.load()
    if saved.diffusion is not None:
        raise InputError(
            "a diffusion model does not write an answer from its beginning, and this searches so",
            where=saved.location.path,
            remedy="use an autoregressive model; `llmtrain eval` measures diffusion models",
        )
    searching = _Searching(loaded, task, saved, grader, options)
    started, ended = time.monotonic(), False
    try:
        searching.run(methods)
        ended = True
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {len(searching.points)} of {searching.total} figures were finished", err=True)
        return EXIT_INTERRUPTED
    finally:
        if searching.points:
            seconds = round(time.monotonic() - started, 3)
            curve.show(searching.points)  # first: a full disk does not take the figures from who waited for them
            _write(searching, options, {"complete": ended, "seconds": seconds})
    return EXIT_DONE


def _check(options: Options) -> None:
    """What can be said before anything is read."""
    check_outputs({"--output": options.output, "--samples": options.samples, "--picture": options.picture})
    if options.picture is not None:
        check_picture(options.picture, "--picture")
    check_methods(options.methods or ())
    for where, numbers in (("--budgets", options.budgets), ("--width", [options.width])):
        if not numbers or min(numbers) < 1:
            told = ",".join(map(str, numbers)) or "nothing"
            raise InputError(f"{told}, and it takes positive numbers", where=where, remedy="such as 1,2,4,8,16")
    if options.temperature < GREEDY_BELOW:
        raise InputError(
            f"{options.temperature:g}: the samples of a greedy model are all the same",
            where="--temperature",
            remedy="give one above 0, such as 1",
        )
    for key, value in (("--scorer-base", options.scorer_base), ("--aggregate", options.aggregate)):
        if value is not None and options.scorer is None:
            raise InputError("is for a reward model, and none is given", where=key, remedy="give one by --scorer")


class _Searching:
    """The questions, what answers and judges them, and the points so far.

    Raises:
        InputError: a question does not fit the policy or the reward model.
    """

    def __init__(self, loaded: LoadedTask, task: Task, saved: Saved, grader: Grader | None, options: Options):
        self.loaded, self.task, self.saved, self.options = loaded, task, saved, options
        self.questions = read_questions(loaded, task, saved, options.limit)
        self.grader = grader
        self.sampling = Sampling(task.max_new_tokens, options.temperature, task.top_p, options.seed, tuple(task.stop))
        asked = [Asked(question.ids, question.shown) for question in self.questions]
        self.policy = Policy(saved, asked, options.batch_tokens)
        check_questions_fit(saved, self.questions, self.policy.generator(self.sampling))
        if self.grader is not None:
            self.grader.check([(question.shown, question.row.where) for question in self.questions])
        self.budgets = sorted(set(options.budgets))
        self.points: list[Point] = []
        self.total = 0
        self.pools: list[Pool] = []

    def run(self, methods: Sequence[str]) -> None:
        """Greedy answers first, which say how long answers are; then all methods, the smallest budgets first."""
        names = list(dict.fromkeys(methods))
        self.total = 1 + len(names) * len(self.budgets)
        length = self._answer_greedily()
        sampled = [name for name in names if name in SAMPLED]
        if sampled:
            self._draw(any(SAMPLED[name][1] for name in sampled), length)
        for name in sampled:
            for budget in self.budgets:
                self.points.append(Point(name, budget, [choose(name, budget, pool) for pool in self.pools]))
        for budget in self.budgets:
            for name in names:
                if name in STEPWISE:
                    self._search(name, budget, length)

    def _answer_greedily(self) -> float:
        """Returns the mean number of tokens of an answer."""
        with row_progress(f"{self.loaded.name}: greedy answers", len(self.questions)) as progress:
            sampling = replace(self.sampling, temperature=0.0)
            driver = ModelDriver(self.policy, sampling, on_tokens=lambda num: progress.advance())
            paths = [path for [path] in driver.sample(1)]
        samples = [
            drawn(question, path, answer_in(self.task, path.text))
            for question, path in zip(self.questions, paths, strict=True)
        ]
        results = [Result(float(one.is_right), len(one.path.ids), 0.0, one.plain()) for one in samples]
        self.points.append(Point(GREEDY, 1, results))
        return self.points[0].generated.value

    def _draw(self, scored: bool, length: float) -> None:
        """The samples that all methods choose among, as many as the largest budget."""
        num = self.budgets[-1]
        with self._token_progress(f"{num} samples each", num * length) as progress:
            paths = ModelDriver(self.policy, self.sampling, on_tokens=progress.advance).sample(num)
        flat = [(question, path) for question, own in zip(self.questions, paths, strict=True) for path in own]
        scores: list[float | None] = [None] * len(flat)
        lengths = [0] * len(flat)
        grader = self.grader if scored else None
        if grader is not None:
            with row_progress(f"{self.loaded.name}: scores", len(flat)) as rows:
                said = [(question.shown, path.text) for question, path in flat]
                given, lengths = grader.score(said, rows.advance)
                scores = list(given)
        samples = [
            drawn(question, path, answer_in(self.task, path.text), score, read)
            for (question, path), score, read in zip(flat, scores, lengths, strict=True)
        ]
        groups = [samples[first : first + num] for first in range(0, len(samples), num)]
        self.pools = [Pool.of(group, grader, lambda one: comparison(self.loaded, self.task, [one])) for group in groups]

    def _search(self, name: str, budget: int, length: float) -> None:
        with self._token_progress(f"{name}, budget {budget}", budget * length) as progress:
            driver = ModelDriver(self.policy, self.sampling, self.grader, progress.advance)
            results = search(
                name, budget, self.options.width, driver, self.questions, lambda text: answer_in(self.task, text)
            )
        self.points.append(Point(name, budget, results))

    @contextmanager
    def _token_progress(self, what: str, each: float) -> Iterator[WorkProgress]:
        """Progress in tokens, of about `each` for a question."""
        total = round(each * len(self.questions))
        columns = [TextColumn("{task.completed} of about {task.total} tokens")]
        with WorkProgress(
            f"{self.loaded.name}: {what}", total, 0, columns, lambda done, rate: f"{done} tokens at {rate:.0f}/s"
        ) as progress:
            yield progress


def _write(searching: _Searching, options: Options, ending: dict[str, Any]) -> None:
    if options.output is not None:
        with new_file(options.output) as aside:
            aside.write_text(json.dumps(_summary(searching, options) | ending, indent=2) + "\n", encoding="utf-8")
    if options.samples is not None:
        with new_file(options.samples) as aside, aside.open("w", encoding="utf-8") as file:
            for number, question in enumerate(searching.questions):
                entry = _row(searching, number, question)
                file.write(json.dumps(entry, ensure_ascii=False, default=str) + "\n")
    if options.picture is not None:
        with new_file(options.picture) as aside:
            curve.draw(aside, searching.points, f"{searching.loaded.name}, {len(searching.questions)} questions")


def _row(searching: _Searching, number: int, question: Question) -> dict[str, Any]:
    methods = [
        {"method": point.method, "budget": point.budget, **point.results[number].chosen} for point in searching.points
    ]
    pool = searching.pools[number].drawn if searching.pools else ()
    return {
        "row": number,
        "prompt": question.shown,
        "right": question.right,
        "samples": [sample.plain() for sample in pool],
        "methods": methods,
    }


def _summary(searching: _Searching, options: Options) -> dict[str, Any]:
    saved, grader = searching.saved, searching.grader
    scorer = None
    if grader is not None:
        kind = "process" if grader.judges_steps else "outcome"
        scorer = {"model": options.scorer, "base": options.scorer_base, "kind": kind, "aggregate": grader.how}
    return {
        "model": saved.location.path,
        "base": saved.location.base,
        "dtype": str(saved.decoder.dtype).removeprefix("torch."),
        "device": str(saved.device),
        "scorer": scorer,
        "task": {
            "name": searching.loaded.name,
            "file": str(searching.loaded.file),
            "settings": searching.task.model_dump(),
        },
        "temperature": options.temperature,
        "seed": options.seed,
        "width": options.width,
        "limit": options.limit,
        "versions": {"llmtrain": __version__, **{name: version(name) for name in ("torch", "transformers")}},
        "points": [point.plain() for point in searching.points],
    }
