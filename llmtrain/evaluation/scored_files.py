"""`llmtrain generate REWARD_MODEL --score --input answers.jsonl --output scored.jsonl`: scores for the rows of a file.

    completion             adds score
    completions            adds scores, a list; completions are texts, messages, or what `llmtrain generate` wrote
    chosen, rejected       adds score_chosen and score_rejected

A process model adds step_scores (of each answer the probability that each step is right) under the same endings, and
the scores are their aggregate. OUTPUT appears when all rows are done, in the order of the input.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import typer

from llmtrain.data.conversations import (
    Message,
    a_type,
    check_answered,
    check_asks,
    check_order,
    non_blank,
    parse_messages,
    parse_tools,
)
from llmtrain.data.hashing import hash_file
from llmtrain.data.judged_formats import check_same_kind
from llmtrain.data.progress import row_progress
from llmtrain.data.records import Record
from llmtrain.errors import InputError
from llmtrain.evaluation.judging import Answer, Encoded, Judge, Judgement
from llmtrain.models.scorer import Scorer
from llmtrain.models.steps import Aggregate
from llmtrain.sampling.command import Files, ModelChoice
from llmtrain.sampling.completions import named, read_input
from llmtrain.sampling.partial import Partial, Unit, check_output


class _Added(NamedTuple):
    """Names of the fields that get a score and, by process models, those of its steps."""

    score: str
    steps: str


# By the fields with answers; that of completions is for all of them.
_ADDED: dict[tuple[str, ...], tuple[_Added, ...]] = {
    ("completion",): (_Added("score", "step_scores"),),
    ("completions",): (_Added("scores", "step_scores"),),
    ("chosen", "rejected"): (
        _Added("score_chosen", "step_scores_chosen"),
        _Added("score_rejected", "step_scores_rejected"),
    ),
}


class _Row(NamedTuple):
    """A row, its answers, and the fields that they are in."""

    record: Record
    answers: list[Answer]
    there: tuple[str, ...]

    def with_scores(self, judged: Sequence[Mapping[str, Any]], judges_steps: bool) -> dict[str, Any]:
        """The row's fields with those that are added; `judged` has `score` and `steps` of each answer."""
        added: dict[str, Any] = {}
        scores, steps = [one["score"] for one in judged], [one["steps"] for one in judged]
        names = _ADDED[self.there]
        if self.there == ("completions",):
            scores, steps = [scores], [steps]
        for name, score, its_steps in zip(names, scores, steps, strict=True):
            added |= {name.score: score, **({name.steps: its_steps} if judges_steps else {})}
        return self.record.fields | added


@dataclass
class _Summary:
    done: int = 0
    before: int = 0
    skipped: int = 0
    seconds: float = 0.0


def score_file(choice: ModelChoice, files: Files, how: Aggregate | None = None) -> int:
    """Scores the answers of a JSONL file; returns the exit code. An interrupted command goes on when given again.

    Args:
        how: a process model's probabilities of the steps become one number; None is product.

    Raises:
        InputError: a file, a row or the model is wrong, or `how` is not for it.
        TrainingError: the disk is full.
    """
    check_output(files.output, inputs=[files.input])
    rows = [_row(record) for record in read_input(files.input)]
    scorer = choice.load_scorer()
    try:
        judge = Judge(scorer, how, files.batch_tokens)
    except InputError as error:
        raise InputError(error.message, where="--aggregate", remedy="leave it out") from None
    done = _score(judge, scorer, files, rows)
    parts = [f"{done.done} rows scored in {done.seconds:.1f} s"]
    if done.before:
        parts.append(f"{done.before} were done before")
    if done.skipped:
        parts.append(f"{done.skipped} answers did not fit the window of {scorer.window} tokens and have no score")
    typer.echo(f"{files.output}: {'; '.join(parts)}")
    return 0


def _score(judge: Judge, scorer: Scorer, files: Files, rows: Sequence[_Row]) -> _Summary:
    encoded = [[judge.encode(answer) for answer in row.answers] for row in rows]
    every = [one for answers in encoded for one in answers]
    places = [answer.where for row in rows for answer in row.answers]
    too_long = judge.too_long(places, every, "shorten them, or leave them without a score by --skip-long")
    if too_long is not None and not files.skip_long:
        raise too_long
    header = {
        "input": hash_file(files.input),
        "scored_by": named(scorer.location, scorer.dtype) | asdict(scorer.reward),
        "aggregate": judge.how,
        "skip_long": files.skip_long,
    }
    partial = Partial(files.output, header)
    before = len(partial.completions)
    todo = [
        (index, place)
        for index, answers in enumerate(encoded)
        for place, one in enumerate(answers)
        if (index,) not in partial.completions and judge.fits(one)
    ]
    left = Counter(index for index, _ in todo)
    found: dict[int, dict[int, Judgement]] = {index: {} for index in left}
    with partial.appending() as keep, row_progress("scoring", before + len(left), before) as progress:

        def take(number: int, judgement: Judgement) -> None:
            index, place = todo[number]
            found[index][place] = judgement
            if len(found[index]) == left[index]:
                keep((index,), [found[index][place]._asdict() for place in sorted(found[index])])
                progress.advance()

        judge.judge([encoded[index][place] for index, place in todo], take)
        seconds = progress.seconds
    partial.finish({files.output: _with_scores(judge, rows, encoded, partial.completions)})
    return _Summary(len(left), before, sum(not judge.fits(one) for one in every), seconds)


def _with_scores(
    judge: Judge, rows: Sequence[_Row], encoded: Sequence[Sequence[Encoded]], done: Mapping[Unit, list[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for index, row in enumerate(rows):
        scored = iter(done.get((index,), []))
        found = [next(scored) if judge.fits(one) else {"score": None, "steps": None} for one in encoded[index]]
        yield row.with_scores(found, judge.judges_steps)


# ----------------------------------------------------------------------------------- rows


def _row(record: Record) -> _Row:
    """What is to be scored of a row; a field that is null counts as missing.

    Raises:
        InputError: it has no answers, or more than one kind of them, or they or their prompt are wrong.
    """
    fields, where = {name: value for name, value in record.fields.items() if value is not None}, record.where
    there = tuple(name for names in _ADDED for name in names if name in fields)
    if there not in _ADDED:
        raise InputError(
            "a row has either completion, or completions, or chosen and rejected; this one has "
            + (", ".join(there) or "no answer to score"),
            where=where,
            remedy='write {"prompt": "...", "completion": "..."}; `llmtrain generate --input` writes rows with '
            "completions",
        )
    for name in (name for added in _ADDED[there] for name in added):
        if name in record.fields:
            raise InputError(f"field {name!r} is what the output adds", where=where, remedy="rename the field")
    prompt, tools = _prompt(fields, where, needed=len(there) == 1), parse_tools(fields.get("tools"), where)
    given = {name: fields[name] for name in there}
    if there == ("completions",):
        if not isinstance(fields["completions"], list):
            message = f"completions is {a_type(fields['completions'])}, not an array"
            raise InputError(message, where=where, remedy="write an array of answers, or one answer as completion")
        given = {f"completions[{index}]": value for index, value in enumerate(fields["completions"])}
    answers = [Answer(prompt, _given(value, name, prompt, where), where, tools) for name, value in given.items()]
    return _Row(record, answers, there)


def _prompt(fields: Mapping[str, Any], where: str, needed: bool) -> str | list[Message] | None:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if (prompt is None) == (messages is None) and (needed or prompt is not None):
        raise InputError(
            f"a row has either a prompt or messages; it has {'both' if prompt is not None else 'neither'}",
            where=where,
            remedy='write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}',
        )
    if prompt is None and messages is None:
        return None
    if prompt is not None and not isinstance(prompt, list):
        return non_blank(prompt, "prompt", where, "write it, or leave the row out")
    name, asked = ("messages", messages) if prompt is None else ("prompt", prompt)
    parsed = parse_messages(asked, name, where)
    check_order(parsed, name, where)
    check_asks(parsed, name, where)
    return parsed


def _given(value: Any, name: str, prompt: str | list[Message] | None, where: str) -> str | list[Message]:
    """An answer: a text, an object with its text, or messages."""
    if isinstance(value, dict):
        value, name = value.get("text"), f"{name}.text"
        if isinstance(value, str):  # what a model wrote, which may be nothing
            return value
    if not isinstance(value, list):
        return non_blank(value, name, where, "leave the answer or the row out")
    messages = parse_messages(value, name, where)
    if isinstance(prompt, str):
        check_same_kind({"prompt": prompt, name: messages}, where)
    before = prompt[-1]["role"] if isinstance(prompt, list) else None
    check_answered(messages, name, where)
    check_order(messages, name, where, after=before)
    return messages
