"""`llmtrain rejection-sample`: a model's own answers, of which the good ones are data to train on.

The third step of DeepSeek-R1's training (arXiv 2501.12948, section 2.3.3): sample several answers to each question,
keep those that are right, and fine-tune on them. Without the rule all answers are kept: sequence-level knowledge
distillation (arXiv 1606.07947), fine-tuning on the teacher's texts.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from llmtrain.data.progress import row_progress
from llmtrain.errors import EXIT_DONE, InputError
from llmtrain.evaluation.questions import Question
from llmtrain.sampling.batched import Request
from llmtrain.sampling.command import ModelChoice
from llmtrain.sampling.partial import Partial, Unit, partial_of
from llmtrain.search.given import Asked, Drawing, RewardChoice, check_inputs, check_outputs, load_questions_task
from llmtrain.search.provenance import header, provenance
from llmtrain.search.scoring import Grader
from llmtrain.tables import print_table


@dataclass(frozen=True)
class Options:
    """What is kept of the answers, and where.

    Attributes:
        output: JSONL file for the kept answers.
        pairs: JSONL file for pairs of a right and a wrong answer.
        keep: answers to a question, at most.
        rule: only answers that the task says are right.
        min_score: only answers to which the reward model gives so much.
    """

    output: Path
    pairs: Path | None = None
    keep: int = 1
    rule: bool = True
    scorer: RewardChoice | None = None
    min_score: float | None = None


@dataclass(frozen=True)
class Sample:
    """An answer that was drawn.

    Attributes:
        number: of the answers to its question.
        correct, formatted: what the task says of it; None where it was not asked, or says nothing.
        score: the reward model's; None without one.
        unread: the reward model could not read it.
    """

    number: int
    text: str
    cut_off: bool
    correct: bool | None = None
    formatted: bool | None = None
    score: float | None = None
    unread: bool = False

    @property
    def is_right(self) -> bool:
        return bool(self.correct) and self.formatted is not False

    @property
    def rank(self) -> tuple[float, bool, int]:
        """Less is better: the score, then that it ended by itself, then the order."""
        return (0.0 if self.score is None else -self.score, self.cut_off, self.number)


def rejection_sample(choice: ModelChoice, file: Path, drawing: Drawing, options: Options) -> int:
    """Draws answers, and writes those that are good; returns the exit code.

    Raises:
        InputError: something that was given is wrong or does not fit together, or no answer is kept.
        TrainingError: the disk is full.
    """
    _check(drawing, options)
    loaded, task = load_questions_task(file)
    check_inputs(options.output, loaded, task)
    grader = None if options.scorer is None else options.scorer.load(choice, drawing.batch_tokens)
    asked = Asked.load(choice, loaded, task, drawing, options.rule)
    if grader is not None:
        grader.check([(question.shown, question.row.where) for question in asked.questions])
    settings = asked.generator.settings()
    partial = Partial(
        options.output, header("rejection-sample", asked.saved, asked.questions, settings, num=drawing.num)
    )
    units: dict[Unit, list[Request]] = {
        (row,): [Request(question.ids, row, sample) for sample in range(drawing.num)]
        for row, question in enumerate(asked.questions)
    }
    work = partial.answer(asked.generator, units, f"{loaded.name}: answers")
    samples = _judged(asked, grader, [partial.completions[unit] for unit in units], options.rule)
    selected = [select(own, options.keep, options.rule, options.min_score) for own in samples]
    _show(samples, selected, options)
    if not any(kept for kept, _ in selected):
        raise _nothing_kept(samples, options)
    source = provenance(loaded, asked.saved, settings) | _scorer_named(options, grader)
    outputs = {options.output: _kept_rows(asked.questions, [kept for kept, _ in selected], source)}
    pairs = [pairs for _, pairs in selected]
    if options.pairs is not None and any(pairs):
        outputs[options.pairs] = _pair_rows(asked.questions, pairs, source)
    partial.finish(outputs)
    before = f"; {work.before} questions were answered before" if work.before else ""
    took = f"{work.tokens} tokens in {work.seconds:.1f} s"
    typer.echo(f"{options.output}: {work.done} questions answered, {took}{before}")
    if options.pairs is not None and not any(pairs):
        typer.echo(f"{options.pairs} is not written: no question has a right and a wrong answer", err=True)
    return EXIT_DONE


def _nothing_kept(samples: Sequence[Sequence[Sample]], options: Options) -> InputError:
    flat = [sample for own in samples for sample in own]
    cut_off = sum(sample.cut_off for sample in flat)
    ways = [f"let answers be longer by --max-new-tokens ({cut_off} were cut off)"] if cut_off else []
    if not options.rule or cut_off < len(flat):
        ways += ["draw more by --num", "train the model until it solves some of the questions"]
    partial = partial_of(options.output)
    return InputError(
        f"none of {len(flat)} answers is kept; the answers are in {partial}, from which the same command with other "
        "--min-score, --scorer or --no-rule goes on",
        where="TASK",
        remedy=f"remove {partial}, and {', or '.join(ways)}",
    )


def _check(drawing: Drawing, options: Options) -> None:
    """What can be said before anything is read."""
    check_outputs({"--output": options.output, "--pairs": options.pairs})
    drawing.check(drawing.num, "--num")
    if options.keep > drawing.num:
        raise InputError(
            f"{options.keep} of {drawing.num} answers to a question cannot be kept",
            where="--keep",
            remedy="draw more by --num, or keep fewer",
        )
    if options.min_score is not None and options.scorer is None:
        raise InputError("needs a reward model", where="--min-score", remedy="give one by --scorer")
    if options.min_score is not None and not math.isfinite(options.min_score):
        raise InputError(
            f"{options.min_score} is no score to reach", where="--min-score", remedy="give a number such as 0.5"
        )
    if options.pairs is not None and not options.rule:
        raise InputError(
            "only the rule says which answers are wrong", where="--pairs", remedy="leave --no-rule or --pairs out"
        )


def select(
    samples: Sequence[Sample], keep: int, rule: bool, min_score: float | None = None
) -> tuple[list[Sample], list[tuple[Sample, Sample]]]:
    """Of the answers to one question those that are kept, the best first, and pairs of these with wrong ones.

    Args:
        keep: at most so many; no answer is in two pairs.
        rule: right ones only, which ended by themselves.
        min_score: of those that are kept.
    """
    usable = [one for one in samples if one.text.strip() and not one.unread and not (rule and one.cut_off)]
    ranked = distinct(sorted(usable, key=lambda one: one.rank))
    good = [one for one in ranked if min_score is None or (one.score is not None and one.score >= min_score)]
    if not rule:
        return good[:keep], []
    kept = [one for one in good if one.is_right][:keep]
    # The wrong ones that the reward model likes best are those that it has to learn of.
    return kept, list(zip(kept, [one for one in ranked if not one.is_right], strict=False))


def distinct(samples: Iterable[Sample]) -> list[Sample]:
    """The first of those that have the same text."""
    found: dict[str, Sample] = {}
    for sample in samples:
        found.setdefault(sample.text.strip(), sample)
    return list(found.values())


def _judged(
    asked: Asked, grader: Grader | None, drawn: Sequence[Sequence[dict[str, Any]]], rule: bool
) -> list[list[Sample]]:
    flat = [
        (question, number, said)
        for question, own in zip(asked.questions, drawn, strict=True)
        for number, said in enumerate(own)
    ]
    scores: list[float | None] = [None] * len(flat)
    unread = [False] * len(flat)
    if grader is not None:
        with row_progress(f"{asked.loaded.name}: scores", len(flat)) as progress:
            given, read = grader.score([(question.shown, said["text"]) for question, _, said in flat], progress.advance)
        scores, unread = list(given), [not num for num in read]
        grader.tell_unread(asked.loaded.name)
    samples = [
        Sample(
            number,
            said["text"],
            said["finish_reason"] == "length",
            asked.is_correct(question, said["text"]) if rule else None,
            asked.is_formatted(said["text"]) if rule else None,
            score,
            missed,
        )
        for (question, number, said), score, missed in zip(flat, scores, unread, strict=True)
    ]
    num = len(drawn[0])
    return [samples[first : first + num] for first in range(0, len(samples), num)]


def _kept_rows(
    questions: Sequence[Question], kept: Sequence[Sequence[Sample]], source: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Format messages, or prompt_completion where texts go on or where a conversation has other answers in it."""
    whole = all(
        not isinstance(question.shown, str) and all(message["role"] != "assistant" for message in question.shown)
        for question in questions
    )
    for number, (question, samples) in enumerate(zip(questions, kept, strict=True)):
        for sample in samples:
            shown, said = question.shown, said_by(question, sample.text)
            example = {"messages": [*shown, *said]} if whole else {"prompt": shown, "completion": said}
            ended = {"cut_off": True} if sample.cut_off else {}
            told = {"question": number, "sample": sample.number, **ended, **_judgement(sample)}
            yield example | told | {"provenance": source}


def said_by(question: Question, text: str) -> Any:
    """An answer in the kind of its question: a text, or messages."""
    return text if isinstance(question.shown, str) else [{"role": "assistant", "content": text}]


def _judgement(sample: Sample) -> dict[str, Any]:
    told = {"correct": sample.correct, "formatted": sample.formatted, "score": sample.score}
    return {key: value for key, value in told.items() if value is not None}


def _pair_rows(
    questions: Sequence[Question], pairs: Sequence[Sequence[tuple[Sample, Sample]]], source: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    for number, (question, own) in enumerate(zip(questions, pairs, strict=True)):
        for right, wrong in own:
            yield {
                "prompt": question.shown,
                "chosen": said_by(question, right.text),
                "rejected": said_by(question, wrong.text),
                "question": number,
                "samples": [right.number, wrong.number],
                **({} if right.score is None else {"scores": [right.score, wrong.score]}),
                "provenance": source,
            }


def _scorer_named(options: Options, grader: Grader | None) -> dict[str, Any]:
    if options.scorer is None or grader is None:
        return {}
    return {"scorer": options.scorer.name, **({"aggregate": grader.how} if grader.judges_steps else {})}


def _show(
    samples: Sequence[Sequence[Sample]], selected: Sequence[tuple[list[Sample], list[Any]]], options: Options
) -> None:
    flat = [sample for own in samples for sample in own]
    counts = {"questions": len(samples), "answers": len(flat)}
    if options.rule:
        counts["right"] = sum(sample.is_right for sample in flat)
        counts["questions without a right answer"] = sum(not any(one.is_right for one in own) for own in samples)
    counts |= {
        "duplicates": sum(len(own) - len(distinct(own)) for own in samples),
        "cut off": sum(sample.cut_off for sample in flat),
        "empty": sum(not sample.text.strip() for sample in flat),
    }
    if options.scorer is not None:
        counts["not read by the reward model"] = sum(sample.unread for sample in flat)
    counts |= {
        "kept": sum(len(kept) for kept, _ in selected),
        "questions without a kept answer": sum(not kept for kept, _ in selected),
    }
    if options.pairs is not None:
        counts["pairs"] = sum(len(pairs) for _, pairs in selected)
    print_table(("figure", "number"), [(name, str(count)) for name, count in counts.items()], right=("number",))
