"""Multiple choice by likelihood: of each row the choice that the model finds likeliest after the prompt.

Autoregressive models have log p(choice | prompt). Diffusion models have its bound, in which the prompt stays clean:
the choices of a row are seen under the same noise, so that what the draws err by is mostly common to them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmtrain.data.counted_random import Float64Array
from llmtrain.data.progress import row_progress
from llmtrain.data.records import Record
from llmtrain.data.tokenizer import prompt_ids
from llmtrain.errors import InputError
from llmtrain.evaluation.asking import Asked, ask_about, check_all_fit, field_of, filled, read_examples
from llmtrain.evaluation.figures import Figure, mean, ratio
from llmtrain.evaluation.likelihood import combined
from llmtrain.evaluation.scoring import Scorer, Span, estimated, score, scorer_for
from llmtrain.evaluation.tasks import LoadedTask, MultipleChoice
from llmtrain.models.saved import Saved
from llmtrain.sampling.prompts import check_is_text
from llmtrain.sampling.rows import read_rows

_ERRORS_APART = 2.0  # of the two best choices, for the draws of noise to tell which is the better


@dataclass(frozen=True)
class _Question:
    """A row: its prompt, its choices as they are written after it and as tokens, and which is right."""

    prompt: Any
    texts: list[str]
    spans: list[Span]
    right: int


def ask(
    loaded: LoadedTask, task: MultipleChoice, saved: Saved, limit: int | None, batch_tokens: int
) -> tuple[dict[str, Figure], list[dict[str, Any]]]:
    """The figures, and a row a question with the likelihood of each choice.

    Raises:
        InputError: a file or a row is wrong, or does not fit the model, or the method is not for it.
    """
    with loaded.errors_located("data"):
        rows = read_rows(loaded.beside(task.data), loaded.where("data"))[:limit]
    examples = read_examples(loaded, task)
    scorer = scorer_for(loaded, task, saved)
    questions = []
    for key, row in enumerate(rows):
        texts, right = _texts(loaded, task, row)
        asked = ask_about(loaded, task, saved, row, examples, lambda example: _target(loaded, task, example))
        texts = [text.strip() for text in texts] if isinstance(asked.shown, list) else texts
        spans = _spans(saved.tokenizer, row, asked, texts, key, scorer.mask_id)
        questions.append(_Question(asked.shown, texts, spans, right))
    lengths = [max(len(span.ids) for span in question.spans) for question in questions]
    fits = [saved.window is None or length <= saved.window for length in lengths]
    check_all_fit(saved, rows, lengths, fits, "prompts with their choices")
    spans = [span for question in questions for span in question.spans]
    with row_progress(f"{loaded.name}: choices", len(spans) * scorer.samples) as progress:
        drawn = score(scorer, spans, batch_tokens, progress.advance)
    records, start = [], 0
    for index, question in enumerate(questions):
        end = start + len(question.texts)
        records.append(_record(index, question, scorer, drawn[start:end]))
        start = end
    return _figures(records, scorer), records


def _record(index: int, question: _Question, scorer: Scorer, drawn: Float64Array) -> dict[str, Any]:
    """What is said of a question; `drawn` are nats [choices, samples]."""
    nats, variances = estimated(scorer, drawn)
    tokens = np.asarray([int(span.counted.sum()) for span in question.spans])
    num_bytes = np.asarray([len(text.encode()) for text in question.texts])
    chosen = {
        "chosen": nats.argmin(),
        "chosen_per_token": (nats / tokens).argmin(),
        "chosen_per_byte": (nats / num_bytes).argmin(),
    }
    record = {
        "row": index,
        "prompt": question.prompt,
        "choices": question.texts,
        "right": question.right,
        "nats": [float(number) for number in nats],
        "tokens": tokens.tolist(),
        **{name: int(number) for name, number in chosen.items()},
    }
    if not scorer.exact and scorer.samples > 1:
        record["nats_stderr"] = [math.sqrt(number) for number in variances]
        best, second = nats.argsort(kind="stable")[:2]
        apart = combined((drawn[second] - drawn[best])[None])
        record["undecided"] = bool(apart.nats[0] < _ERRORS_APART * math.sqrt(apart.variances[0]))
    return record


def _figures(records: Sequence[dict[str, Any]], scorer: Scorer) -> dict[str, Figure]:
    figures = {
        name.replace("chosen", "accuracy"): mean([float(record[name] == record["right"]) for record in records])
        for name in ("chosen", "chosen_per_token", "chosen_per_byte")
    }
    right = [(record["nats"][record["right"]], record["tokens"][record["right"]]) for record in records]
    figures["loss"] = ratio(*zip(*right, strict=True))
    figures = {name: figure._replace(note=scorer.note and f"by {scorer.note}") for name, figure in figures.items()}
    figures["loss"] = figures["loss"]._replace(note=scorer.note)
    if "undecided" in records[0]:
        undecided = mean([float(record["undecided"]) for record in records])
        figures["undecided"] = undecided._replace(note="more samples may choose otherwise")
    return figures


# ----------------------------------------------------------------------------------- rows


def _target(loaded: LoadedTask, task: MultipleChoice, row: Record) -> str:
    texts, right = _texts(loaded, task, row)
    return texts[right]


def _texts(loaded: LoadedTask, task: MultipleChoice, row: Record) -> tuple[list[str], int]:
    """What each choice adds to the prompt, and which is right."""
    remedy = f"correct the row, or name another field at {loaded.where('choices')}"
    given = field_of(loaded, row, task.choices, "choices")
    if not isinstance(given, list) or len(given) < 2 or not all(isinstance(c, str | int | float) for c in given):
        raise InputError(f"field {task.choices!r} is no list of two choices or more", where=row.where, remedy=remedy)
    texts: list[str] = []
    for choice in given:
        text = filled(loaded, row._replace(fields={**row.fields, "choice": choice}), task.choice, "choice")
        check_is_text(text, row.where)
        if not text.strip():
            raise InputError(f"choice {len(texts)} of {task.choices!r} is empty", where=row.where, remedy=remedy)
        texts.append(text)
    answer = field_of(loaded, row, task.answer, "answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(given):
        return texts, answer
    if isinstance(answer, str) and answer in given:
        return texts, given.index(answer)
    raise InputError(
        f"field {task.answer!r} is {answer!r}: neither the number of a choice, 0 to {len(given) - 1}, nor its text",
        where=row.where,
        remedy=f"correct the row, or name another field at {loaded.where('answer')}",
    )


def _spans(
    tokenizer: PreTrainedTokenizerBase,
    row: Record,
    asked: Asked,
    texts: Sequence[str],
    key: int,
    mask_id: int | None,
) -> list[Span]:
    """The choices after the prompt; a mask that is itself text cannot be predicted, and is not counted.

    A token may stand across the end of the prompt, in one choice and not in another. All of them are therefore
    counted from where their tokens first differ from the prompt's, so that each stands for the same text.
    """
    if isinstance(asked.shown, str):
        wholes = [prompt_ids(tokenizer, asked.shown + text) for text in texts]
    else:
        wholes = [[*asked.ids, *tokenizer.encode(text, add_special_tokens=False)] for text in texts]
    first = min(_common(asked.ids, whole) for whole in wholes)
    spans = []
    for whole, text in zip(wholes, texts, strict=True):
        ids = np.asarray(whole, dtype=np.int64)
        counted = (np.arange(len(ids)) >= first) & (ids != (-1 if mask_id is None else mask_id))
        if first == 0 or not counted.any():
            raise InputError(
                f"the choice {text!r} has no token of its own after the prompt",
                where=row.where,
                remedy="write prompt and choice so that they are tokens apart",
            )
        spans.append(Span(ids, counted, key))
    return spans


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens they begin with alike."""
    same = (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1])
    return next(same, min(len(one), len(other)))
