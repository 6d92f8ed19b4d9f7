"""`llmtrain search`: questions answered with more and more samples or search, judged by a reward model.

All that would be refused is looked at before the first token is generated. Methods run one after another; what was
finished is shown, also after an interruption or an error, and is kept in OUTPUT.partial, so that the same command goes
on from there.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import typer
from rich.progress import TextColumn

from llmtrain import __version__
from llmtrain.data.progress import WorkProgress, row_progress
from llmtrain.errors import EXIT_DONE, InputError
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
from llmtrain.sampling.batched import Request, Sampling
from llmtrain.sampling.command import ModelChoice
from llmtrain.sampling.completions import named
from llmtrain.sampling.partial import Partial, Unit, Write, outcome, rows_writer, text_writer
from llmtrain.search import curve
from llmtrain.search.curve import GREEDY, Point, Result
from llmtrain.search.driver import ModelDriver, Policy
from llmtrain.search.given import RewardChoice, check_inputs, check_outputs, load_questions_task
from llmtrain.search.methods import (
    METHODS,
    SAMPLED,
    STEPWISE,
    Drawn,
    Pool,
    check_methods,
    check_scorer,
    choose,
    drawn,
    fitting,
    search,
)
from llmtrain.search.provenance import digest, header
from llmtrain.search.scoring import Grader

MOST = 10_000  # answers to a question that are ever worth their time (arXiv 2407.21787), and that a memory holds

# Units of the work that are kept: each is a tuple of these and numbers.
_GREEDY, _SAMPLED, _SEARCHED = range(3)


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
        output: JSON file for the figures and settings; what is done is kept in OUTPUT.partial until then.
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
    if options.output is not None:
        check_inputs(options.output, loaded, task)
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
    started = time.monotonic()
    try:
        searching.run(methods)
    finally:
        num = len(searching.points)
        if num:
            curve.show(searching.points)  # first: a full disk does not take the figures from who waited for them
        if num < searching.total:
            typer.echo(f"{num} of {searching.total} figures were finished", err=True)
    searching.partial.finish_by(_outputs(searching, options, round(time.monotonic() - started, 3)))
    return EXIT_DONE


def interrupted(output: Path | None) -> str:
    """What an interrupted search leaves, and how to go on."""
    return "nothing is kept: with --output the same command would go on" if output is None else outcome(output)


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
    if max(options.budgets) > MOST:
        raise InputError(
            f"{max(options.budgets)} answers to each question, and {MOST} are the most",
            where="--budgets",
            remedy="give fewer",
        )
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
        InputError: a question does not fit the policy or the reward model, or OUTPUT.partial is of another command.
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
        self.partial = Partial(options.output, self._header())
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
            self._draw(any(SAMPLED[name][1] for name in sampled))
        for name in sampled:
            for budget in self.budgets:
                self.points.append(Point(name, budget, [choose(name, budget, pool) for pool in self.pools]))
        for budget in self.budgets:
            for name in names:
                if name in STEPWISE:
                    self._search(name, budget, length)

    def _header(self) -> dict[str, Any]:
        """All that decides what a method with a budget finds."""
        judge: dict[str, Any] = {}
        if self.grader is not None:
            scorer = self.grader.scorer
            judge = named(scorer.location, scorer.dtype) | asdict(scorer.reward) | {"aggregate": self.grader.how}
        judged_by = digest([self.task.model_dump(mode="json"), [question.right for question in self.questions]])
        settings = asdict(self.sampling) | {"width": self.options.width, "scorer": judge, "task_sha256": judged_by}
        return header("search", self.saved, self.questions, settings)

    def _answer_greedily(self) -> float:
        """Returns the mean number of tokens of an answer."""
        samples = [own[0] for own in self._answered(_GREEDY, 1, replace(self.sampling, temperature=0.0), "greedy")]
        results = [Result(float(one.is_right), one.said["tokens"], 0.0, one.plain()) for one in samples]
        self.points.append(Point(GREEDY, 1, results))
        return self.points[0].generated.value

    def _answered(self, kind: int, num: int, sampling: Sampling, what: str) -> list[list[Drawn]]:
        """`num` whole answers to each question: those that `llmtrain eval` has with this seed."""
        units: dict[Unit, list[Request]] = {
            (kind, num, row): [Request(question.ids, row, sample) for sample in range(num)]
            for row, question in enumerate(self.questions)
        }
        self.partial.answer(self.policy.generator(sampling), units, f"{self.loaded.name}: {what} answers")
        return [
            [drawn(question, said, answer_in(self.task, said["text"])) for said in self.partial.completions[unit]]
            for unit, question in zip(units, self.questions, strict=True)
        ]

    def _draw(self, scored: bool) -> None:
        """The samples that all methods choose among, as many as the largest budget."""
        num = self.budgets[-1]
        groups = self._answered(_SAMPLED, num, self.sampling, f"{num} sampled")
        grader = self.grader if scored else None
        if grader is not None:
            groups = self._scored(groups, grader)
        self.pools = [Pool.of(group, grader, lambda one: comparison(self.loaded, self.task, [one])) for group in groups]

    def _scored(self, groups: Sequence[Sequence[Drawn]], grader: Grader) -> list[list[Drawn]]:
        num = self.budgets[-1]
        said = [
            (question.shown, sample.said["text"])
            for question, group in zip(self.questions, groups, strict=True)
            for sample in group
        ]
        with row_progress(f"{self.loaded.name}: scores", len(said)) as progress:
            scores, lengths = grader.score(said, progress.advance)
        grader.tell_unread(f"{self.loaded.name}, {num} samples each")
        flat = [sample for group in groups for sample in group]
        judged = [
            replace(sample, score=score, read=read) for sample, score, read in zip(flat, scores, lengths, strict=True)
        ]
        return [judged[first : first + num] for first in range(0, len(judged), num)]

    def _search(self, name: str, budget: int, length: float) -> None:
        unit = (_SEARCHED, METHODS.index(name), budget)
        if unit not in self.partial.completions:
            what = f"{name}, budget {budget}"
            with self.partial.appending() as keep, self._token_progress(what, budget * length) as progress:
                driver = ModelDriver(self.policy, self.sampling, self.grader, progress.advance)
                width, extract = self.options.width, partial(answer_in, self.task)
                results = search(name, budget, width, driver, self.questions, extract)
                keep(unit, [result._asdict() for result in results])
            if self.grader is not None:
                self.grader.tell_unread(f"{self.loaded.name}, {what}")
        self.points.append(Point(name, budget, [Result(**one) for one in self.partial.completions[unit]]))

    @contextmanager
    def _token_progress(self, what: str, each: float) -> Iterator[WorkProgress]:
        """Progress in tokens, of about `each` for a question."""
        total = round(each * len(self.questions))
        columns = [TextColumn("{task.completed} of about {task.total} tokens")]
        with WorkProgress(
            f"{self.loaded.name}: {what}", total, 0, columns, lambda done, rate: f"{done} tokens at {rate:.0f}/s"
        ) as progress:
            yield progress


def _outputs(searching: _Searching, options: Options, seconds: float) -> dict[Path, Write]:
    """What writes each of the files that were asked for."""
    outputs: dict[Path, Write] = {}
    if options.output is not None:
        outputs[options.output] = text_writer(json.dumps(_summary(searching, options) | {"seconds": seconds}, indent=2))
    if options.samples is not None:
        rows = (_row(searching, number, question) for number, question in enumerate(searching.questions))
        outputs[options.samples] = rows_writer(rows)
    if options.picture is not None:
        title = f"{searching.loaded.name}, {len(searching.questions)} questions"
        outputs[options.picture] = lambda file: curve.draw(file, searching.points, title)
    return outputs


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
