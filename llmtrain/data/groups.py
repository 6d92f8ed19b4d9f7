"""Answers that were judged, as token ids: groups of answers to one prompt, and answers in steps.

A group is one document of the corpus: the prompt once, then each answer. What answers have in common before
anything of one is predicted is the prompt, whichever fields it came from. Marks, in place of whether a token is
trained, say what each token is:

    0           of the prompt
    2k, 2k + 1  of answer k, counted from 1; 2k + 1 where it is to be predicted

Beside the tokens each answer has two values: its level (its rank, less is better; of labelled answers 0 for good
and 1 for bad) and its grade: scores of two answers shall differ by the difference of their grades at least.

Answers in steps are a group of one, whose marks of 3 stand where a step is judged; the values are those of the steps:
(1 for right or 0 for wrong, 0). A step is what `models/steps.py` would cut out of the answer when the model is asked:
separators around it do not count, and one that holds a separator would be several, so that its example is left out.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from llmtrain.data.chat import ExampleEncoder, Tokens
from llmtrain.data.conversations import TOOL, USER, Message
from llmtrain.data.examples import (
    Conversation,
    Example,
    Labelled,
    Preference,
    PromptCompletion,
    PromptOnly,
    Ranking,
    Stepwise,
    Text,
    canonical,
)
from llmtrain.data.formats import read_examples
from llmtrain.data.hashing import hash_settings
from llmtrain.data.tokenizer import num_ids
from llmtrain.errors import InputError
from llmtrain.models.steps import one_step, steps_of
from llmtrain.recipe.schema import Data, Source

log = logging.getLogger(__name__)

FORMAT = 3  # change it with anything that changes marks, values or halves
MOST_ANSWERS = 127  # whose marks a byte holds
_NO_PROMPT = "their answers have no prompt in common"

Wanted = Literal["compared", "labelled", "steps"]
_WANTED: dict[Wanted, str] = {
    "compared": "answers that were compared: format preference (chosen, rejected) or ranking (completions, ranks)",
    "labelled": "answers that are good or bad: format labelled (prompt, completion, label), or preference",
    "steps": "answers in steps: format stepwise (prompt, completions, labels)",
}


class Judged:
    """Documents (see `data/documents.py`) of answers that were judged.

    Args:
        wanted: of the formats.
        separator: stands after each step, for steps.
    """

    masked = judged = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data, wanted: Wanted, separator: str | None = None):
        self._encoder = ExampleEncoder(tokenizer, data.chat_template, data.train_on, separator)
        self._wanted: Wanted = wanted
        self._separator, self._warned = separator, False
        self.fingerprint = hash_settings([FORMAT, wanted, self._encoder.fingerprint])
        self.num_ids, self.chat_template = num_ids(tokenizer), self._encoder.inference_template

    def read(self, source: Source) -> Iterator[Example]:
        """The examples of a source; a preference is two labelled answers where such are wanted."""
        for example in read_examples(source, labelled=self._wanted == "labelled"):
            # What is no two labelled answers is told of as a pair, and left out.
            if self._wanted == "labelled" and isinstance(example, Preference) and not _equal(example):
                prompt, answers = _asked(example.prompt, _answers(example))
                if prompt:
                    self._tell(example, prompt, answers)
                    for answer, label in zip(answers, (True, False), strict=True):
                        yield Labelled(prompt, answer, label, example.where, example.tools)
                    continue
            yield example

    def content(self, document: Example) -> str:
        return document.content

    def halved_by(self, document: Example) -> str:
        """The prompt: what was trained on one answer to it would know it when it is asked to judge another.

        Texts without a prompt decide for themselves: what the two of a pair begin with may be what all begin with.
        """
        match document:
            case Stepwise():
                return canonical(document.prompt)
            case Preference() | Ranking() | Labelled():
                prompt, answers = document.prompt, _answers(document)
                if not prompt and not isinstance(answers[0], str):
                    prompt, _ = _asked(None, answers)
                if prompt:
                    return canonical(prompt, document.tools)
        return document.content

    def encode(self, documents: Sequence[Example]) -> list[Tokens]:
        """A document each; without ids where there is nothing to compare, and why."""
        parts = [self._parts(example) for example in documents]
        encoded = iter(self._encoder.encode([one for part in parts if not isinstance(part, str) for one in part]))
        groups = []
        for example, part in zip(documents, parts, strict=True):
            if isinstance(part, str):
                groups.append(Tokens([], [], why=part))
                continue
            answers = [next(encoded) for _ in part]
            groups.append(_steps(example, answers[0]) if isinstance(example, Stepwise) else _group(example, answers))
        return groups

    def prompt_ids(self, prompt: str) -> list[int]:
        return self._encoder.prompt_ids(prompt)

    def _parts(self, example: Example) -> list[Example] | str:
        """Each answer with its prompt, the best first; or why there is nothing to learn."""
        match self._wanted, example:
            case (("compared" | "labelled"), Preference()) if _equal(example):
                return "their chosen and rejected answers are equal"
            case "compared", Preference():
                return self._each(_answers(example), example)
            case "compared", Ranking():
                return self._ranked(example)
            case "labelled", Preference() if not _asked(example.prompt, _answers(example))[0]:
                return _NO_PROMPT
            case "labelled", Labelled():
                return self._each(_answers(example), example)
            case "steps", Stepwise():
                return self._stepwise(example)
        raise InputError(
            f"the algorithm learns from {_WANTED[self._wanted]}; this is {_kind(example)}",
            where=example.where,
            remedy="give such data, name its fields by `columns` of the source, or choose another algorithm.kind",
        )

    def _ranked(self, example: Ranking) -> list[Example] | str:
        if len(example.completions) > MOST_ANSWERS:
            message = f"{len(example.completions)} answers to one prompt; {MOST_ANSWERS} is the most"
            raise InputError(message, where=example.where, remedy="leave some out")
        if len(example.completions) < 2:
            return "they have a single answer"
        if len(set(example.ranks)) < 2:
            return "all of their answers have the same rank"
        by_rank = sorted(zip(example.ranks, example.completions, strict=True), key=lambda pair: pair[0])
        answers = [answer for _, answer in by_rank]
        if any(_same(one, other) for index, one in enumerate(answers) for other in answers[:index]):
            return "they have an answer twice"
        return self._each(answers, example)

    def _each(self, answers: Sequence[Any], example: Preference | Ranking | Labelled) -> list[Example] | str:
        """The answers as examples to encode, each with the prompt; or why they cannot be compared."""
        asked, rest = _asked(example.prompt, answers)
        if isinstance(answers[0], str):
            return [
                PromptCompletion(asked, answer, example.where) if asked else Text(answer, example.where)
                for answer in rest
            ]
        if not asked:
            return _NO_PROMPT
        self._tell(example, asked, rest)
        return [Conversation([*asked, *one], example.where, example.tools, num_prompt=len(asked)) for one in rest]

    def _tell(self, example: Preference | Ranking | Labelled, asked: Sequence[Any], rest: Sequence[Any]) -> None:
        """Tells once of conversations without a prompt whose answers are more than their last turns."""
        if example.prompt is None and not isinstance(rest[0], str) and max(map(len, rest)) > 1 and not self._warned:
            log.warning(
                "%s: the conversations differ before their last turns; their answers are all that follows the %d "
                "messages that they begin with, there and in what follows",
                example.where,
                len(asked),
            )
            self._warned = True

    def _stepwise(self, example: Stepwise) -> list[Example] | str:
        """The example with its steps as an answer of them would be cut into, or why that would be other ones."""
        assert self._separator is not None
        cut = [one_step(step, self._separator) for step in example.completions]
        steps = [step for step in cut if step is not None]
        if len(steps) < len(cut):
            return f"a step of theirs would be cut by algorithm.separator {self._separator!r}"
        return [replace(example, completions=steps)]


def _answers(example: Preference | Ranking | Labelled) -> list[Any]:
    match example:
        case Preference():
            return [example.chosen, example.rejected]
        case Ranking():
            return list(example.completions)
        case Labelled():
            return [example.completion]


def _same(one: Any, other: Any) -> bool:
    return bool(one.strip() == other.strip() if isinstance(one, str) else one == other)


def _equal(example: Preference) -> bool:
    return _same(example.chosen, example.rejected)


def _kind(example: Example) -> str:
    kinds: dict[type, str] = {
        Text: "a text",
        Conversation: "a conversation",
        PromptCompletion: "a prompt with a completion",
        Preference: "a preference",
        Ranking: "a ranking",
        Labelled: "a labelled answer",
        PromptOnly: "a prompt without an answer",
        Stepwise: "an answer in steps",
    }
    return kinds[type(example)]


def _asked(prompt: Any, answers: Sequence[Any]) -> tuple[Any, list[Any]]:
    """The prompt and what each answer adds; without a prompt, what all answers begin with is it.

    Of texts that is cut back to where a word ends; of conversations to a message that asks. It may be nothing.
    """
    if prompt is not None:
        return prompt, list(answers)
    if isinstance(answers[0], str):
        first = min(answers, key=len)
        start = first[: next((i for i, one in enumerate(first) if any(a[i] != one for a in answers)), len(first))]
        # Something of every answer is left, and words stay whole: a space goes with the word behind it.
        ends = [found.start() for found in re.finditer(r"\s+", start)]
        end = max((place for place in ends if all(answer[place:].strip() for answer in answers)), default=0)
        return start[:end], [answer[end:] for answer in answers]
    num = 0
    shortest = min(len(answer) for answer in answers)
    while num < shortest and all(answer[num] == answers[0][num] for answer in answers):
        num += 1
    while num and (num == shortest or answers[0][num - 1]["role"] not in (USER, TOOL)):
        num -= 1
    return answers[0][:num], [answer[num:] for answer in answers]


def _group(example: Example, answers: Sequence[Tokens]) -> Tokens:
    if not all(any(answer.trained) for answer in answers):
        return Tokens([], [], why="an answer of theirs has no token to predict")
    if len({tuple(answer.ids) for answer in answers}) < len(answers):
        return Tokens([], [], why="two of their answers are the same tokens")
    num_prompt = _num_common(answers)
    ids, marks = list(answers[0].ids[:num_prompt]), [0] * num_prompt
    for number, answer in enumerate(answers, start=1):
        ids += answer.ids[num_prompt:]
        marks += [2 * number + int(trained) for trained in answer.trained[num_prompt:]]
    return Tokens(ids, marks, _values(example))


def _num_common(answers: Sequence[Tokens]) -> int:
    """How many tokens all answers begin with before one of them is predicted.

    Of one answer that is all before its first predicted token. Each keeps a token of its own, which its score is
    read at.
    """
    most = min(min(list(answer.trained).index(1), len(answer.ids) - 1) for answer in answers)
    first = answers[0].ids
    return next((i for i in range(most) if any(answer.ids[i] != first[i] for answer in answers)), most)


def _values(example: Example) -> list[tuple[float, float]]:
    match example:
        case Preference():
            return [(1.0, example.margin), (2.0, 0.0)]
        case Ranking():
            return [(float(rank), 0.0) for rank in sorted(example.ranks)]
        case Labelled():
            return [(0.0 if example.label else 1.0, 0.0)]
    raise TypeError(f"{type(example).__name__} is no group")


def _steps(example: Stepwise, answer: Tokens) -> Tokens:
    """Marks of 3 where steps are judged; what comes before the first step's own tokens cannot be told, and need not."""
    marks = [3 if trained else 2 for trained in answer.trained]
    if sum(map(int, answer.trained)) != len(example.labels):
        return Tokens([], [], why="two of their steps end in one token")
    return Tokens(answer.ids, marks, [(float(label), 0.0) for label in example.labels])


class AnswerEncoder:
    """Single answers as models that score were trained on them: for asking such a model.

    Args:
        tokenizer: of the model that scores.
        separator: stands after each step, for process reward models.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str | None = None):
        self._encoder, self._separator = ExampleEncoder(tokenizer, separator=separator), separator

    def answer(
        self,
        prompt: str | list[Message] | None,
        answer: str | list[Message],
        where: str,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of the whole; the score is read at the last.

        Args:
            prompt: None where the answer is the whole text or conversation.
            answer: of the kind of the prompt; after messages it may be the text of the assistant's message.
        """
        example: Example
        if isinstance(answer, str) and not isinstance(prompt, list):
            example = PromptCompletion(prompt, answer, where) if prompt else Text(answer, where)
        else:
            asked: list[Any] = list(prompt or [])
            answered: list[Any] = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
            example = Conversation([*asked, *answered], where, tools, num_prompt=len(asked))
        return self._encoder.encode([example])[0].ids

    def steps(self, prompt: str | list[Message], steps: Sequence[str], where: str) -> tuple[list[int], list[int]]:
        """Ids of the whole, and where each step is judged.

        Raises:
            InputError: a step is not one to the separator, or the tokenizer does not keep the steps apart.
        """
        assert self._separator is not None
        # An answer of nothing is a step of nothing. The last one may end in the beginning of a separator.
        cut = [steps_of(step, self._separator) if step.strip() else [""] for step in steps]
        for number, pieces in enumerate(cut, start=1):
            if len(pieces) != 1:
                raise InputError(
                    f"step {number} would be cut by the separator {self._separator!r}",
                    where=where,
                    remedy="leave the answer out, or use a model with another separator",
                )
        whole = [piece for pieces in cut for piece in pieces]
        tokens = self._encoder.encode([Stepwise(prompt, whole, [False] * len(whole), where)])[0]
        ends = [place for place, judged in enumerate(tokens.trained) if judged]
        if len(ends) != len(steps):
            raise InputError(
                f"{len(steps)} steps end in {len(ends)} tokens: the tokenizer drops the separator or joins steps",
                where=where,
                remedy="train with a separator that the tokenizer keeps",
            )
        return tokens.ids, ends
