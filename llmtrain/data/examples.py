"""What a record of fine-tuning data holds, once its format is known and it was checked."""

import json
from dataclasses import dataclass, field
from typing import Any

from llmtrain.data.conversations import Message


def canonical(*values: Any) -> str:
    """The values as one string, equal for equal ones, whatever the order of keys."""
    return json.dumps(values, ensure_ascii=False, sort_keys=True, default=str)


@dataclass(frozen=True)
class Text:
    """A text, all of which is learnt.

    Attributes (of every kind of example):
        where: its record's place, for messages.
        content: what it holds as one string: equal for equal examples, whatever their place or other columns.
    """

    text: str
    where: str = field(compare=False)

    @property
    def content(self) -> str:
        return self.text


@dataclass(frozen=True)
class Conversation:
    """Messages, of which the first `num_prompt` belong to a prompt that is not learnt."""

    messages: list[Message]
    where: str = field(compare=False)
    tools: list[dict[str, Any]] | None = None
    num_prompt: int = 0

    @property
    def content(self) -> str:
        return canonical(self.messages, self.tools, self.num_prompt)


@dataclass(frozen=True)
class PromptCompletion:
    """Two strings, of which the second is learnt."""

    prompt: str
    completion: str
    where: str = field(compare=False)

    @property
    def content(self) -> str:
        return canonical(self.prompt, self.completion)


@dataclass(frozen=True)
class Preference:
    """Two answers to compare; without a prompt, both hold the whole conversation or text.

    Attributes:
        margin: by how much a reward model's scores shall differ at least.
    """

    prompt: str | list[Message] | None
    chosen: str | list[Message]
    rejected: str | list[Message]
    where: str = field(compare=False)
    tools: list[dict[str, Any]] | None = None
    margin: float = 0.0

    @property
    def content(self) -> str:
        return canonical(self.prompt, self.chosen, self.rejected, self.tools, self.margin)


@dataclass(frozen=True)
class Ranking:
    """Answers with their ranks, 1 the best; those of one rank are not compared with each other."""

    prompt: str | list[Message] | None
    completions: list[str] | list[list[Message]]
    ranks: list[int]
    where: str = field(compare=False)
    tools: list[dict[str, Any]] | None = None

    @property
    def content(self) -> str:
        return canonical(self.prompt, self.completions, self.ranks, self.tools)


@dataclass(frozen=True)
class Labelled:
    """An answer that is good or bad."""

    prompt: str | list[Message]
    completion: str | list[Message]
    label: bool
    where: str = field(compare=False)
    tools: list[dict[str, Any]] | None = None

    @property
    def content(self) -> str:
        return canonical(self.prompt, self.completion, self.label, self.tools)


@dataclass(frozen=True)
class PromptOnly:
    """A prompt to answer, with the other columns of its record."""

    prompt: str | list[Message]
    columns: dict[str, Any]
    where: str = field(compare=False)

    @property
    def content(self) -> str:
        return canonical(self.prompt, self.columns)


@dataclass(frozen=True)
class Stepwise:
    """Steps of an answer, each right or wrong."""

    prompt: str | list[Message]
    completions: list[str]
    labels: list[bool]
    where: str = field(compare=False)

    @property
    def content(self) -> str:
        return canonical(self.prompt, self.completions, self.labels)


Example = Text | Conversation | PromptCompletion | Preference | Ranking | Labelled | PromptOnly | Stepwise
