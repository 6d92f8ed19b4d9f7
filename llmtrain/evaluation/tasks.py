"""The task file: every key that a user may write, and reading it with file and line of each mistake.

Task files are trusted as recipes are: their regular expressions are run as they stand, and tasks of lm-eval may
bring code of their own. What a model says is only ever compared.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from llmtrain.errors import InputError
from llmtrain.evaluation.templates import fields_of
from llmtrain.recipe.complaints import complaints
from llmtrain.recipe.loading import read_mapping
from llmtrain.recipe.problems import Problem, RecipeError
from llmtrain.recipe.schema import Section, Source
from llmtrain.recipe.schema.base import PositiveInt
from llmtrain.recipe.yaml_tree import Node


class TaskOptions(Section):
    name: str | None = Field(None, description="In tables and results; default: the file's, or its directory's.")


class Perplexity(TaskOptions):
    """Loss, perplexity and bits per byte of texts."""

    kind: Literal["perplexity"]
    data: list[Source] = Field(
        min_length=1, description="Sources as in a recipe; paths of files are relative to this one."
    )
    sequence_length: Annotated[int, Field(ge=2, le=10**8)] | None = Field(
        None, description="Longer documents are cut into windows of so many tokens; default: the model's, at most 2048."
    )
    overlap: Annotated[int, Field(ge=0)] = Field(
        0, description="Tokens of the window before that each window begins with, as context that is not counted."
    )
    end_of_text: bool = Field(False, description="Count the end-of-text token of each document, too.")

    @model_validator(mode="after")
    def _windows_go_on(self) -> "Perplexity":
        if self.sequence_length is not None and self.overlap >= self.sequence_length - 1:
            raise ValueError(f"overlap leaves no new token in a window of sequence_length {self.sequence_length}")
        return self


class Fewshot(Section):
    """Worked examples before each question."""

    data: str = Field(description="A JSONL file with the same fields, relative to this file.")
    num: PositiveInt = Field(description="How many; the first ones of the file.")


class Questions(TaskOptions):
    """Rows with a question and its answer."""

    data: str = Field(description="A JSONL file, relative to this file.")
    prompt: str | None = Field(
        None, description="The question: a text with {field} where a field of the row goes; {{ and }} are brackets."
    )
    messages: str | None = Field(
        None, description="In place of prompt: the field with the messages; an assistant turn at their end is dropped."
    )
    chat: bool = Field(False, description="Ask the prompt as a user turn of the chat template.")
    system: str | None = Field(None, description="A system message before the conversation.")
    answer: str = Field("answer", description="The field with the right answer, or a list of right ones.")
    target: str | None = Field(
        None, description="An example's answer in few-shot prompts, with {field}; default: ' ' and the answer field."
    )
    separator: str = Field("\n\n", description="Between few-shot examples of a prompt that is no chat.")
    fewshot: Fewshot | None = None
    extract: str | None = Field(
        None,
        description="A regular expression that finds the answer in the completion: its group `answer`, else its first "
        "group, else all of it; without a match there is no answer. Default: the whole completion is the answer.",
    )
    match: Literal["first", "last"] = Field("last", description="Which match of extract counts.")
    answer_extract: str | None = Field(None, description="As extract, for the answer field.")
    format: str | None = Field(
        None,
        description="A regular expression; the share of completions that it matches as a whole is the format rate.",
    )
    max_new_tokens: PositiveInt = Field(256, description="Tokens of an answer at most.")
    temperature: Annotated[float, Field(ge=0)] = Field(0.0, description="0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="Nucleus sampling; 1 is off.")
    samples: PositiveInt = Field(1, description="Answers to each question; the accuracy is their mean (pass@1).")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Of the sampling.")
    stop: list[str] = Field(default_factory=list, description="Texts that end an answer.")

    @model_validator(mode="after")
    def _is_sound(self) -> "Questions":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        if self.messages is not None and (self.chat or self.target is not None):
            raise ValueError("chat and target are for prompt; messages say themselves who says what")
        if self.system is not None and self.messages is None and not self.chat:
            raise ValueError("system is for conversations; set chat: true, or write it into prompt")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples of a greedy model are all the same; set temperature")
        for key in ("extract", "answer_extract", "format"):
            _check_pattern(key, self.__dict__[key])
        for key in ("prompt", "target"):
            if self.__dict__[key] is not None:
                _check_template(key, self.__dict__[key])
        return self


def _check_pattern(key: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"{key} is no regular expression: {error}") from None


def _check_template(key: str, template: str) -> None:
    try:
        fields_of(template)
    except ValueError as error:
        raise ValueError(f"{key} is no template: {error}") from None


class ExactMatch(Questions):
    """The share of answers that equal the right one."""

    kind: Literal["exact_match"]
    normalize: list[Literal["strip", "lower", "numeric"]] = Field(
        default_factory=lambda: list[Literal["strip", "lower", "numeric"]](["strip"]),
        description="Before they are compared. strip: no white space around; lower: lower case; numeric: by value.",
    )


class Math(Questions):
    """The share of answers that are mathematically equal to the right one, by math-verify."""

    kind: Literal["math"]


class LMEval(TaskOptions):
    """Tasks of EleutherAI's lm-eval, from local task files or those that come with it."""

    kind: Literal["lm_eval"]
    tasks: list[str] = Field(min_length=1, description="Their names.")
    include_path: str | None = Field(
        None, description="A directory of task files, relative to this file; then no others are looked at."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="Default: the task's own.")
    chat: bool = Field(False, description="Ask through the chat template.")
    batch_size: PositiveInt = Field(8, description="Requests computed at once.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(1234, description="Of few-shot examples and sampling.")


Task = Annotated[Perplexity | ExactMatch | Math | LMEval, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[Perplexity | ExactMatch | Math | LMEval] = TypeAdapter(Task)


@dataclass(frozen=True)
class LoadedTask:
    """A checked task and where it came from."""

    task: Perplexity | ExactMatch | Math | LMEval
    file: Path
    tree: Node

    @property
    def name(self) -> str:
        """Its own name, else the file's; of task.yaml the directory's."""
        named = self.file.resolve()
        return self.task.name or (named.parent.name if named.stem == "task" else named.stem)

    def where(self, key: str) -> str:
        """`key`, dotted, with the file and line that set it."""
        path: tuple[Any, ...] = tuple(int(part) if part.isdigit() else part for part in key.split("."))
        return f"{self.tree.place_of(path)}: {key}"

    def beside(self, path: str) -> Path:
        """A path of the file, which is relative to its directory."""
        return self.file.parent / Path(path).expanduser()

    @contextmanager
    def errors_located(self, key: str) -> Iterator[None]:
        """An error in here that names no place is at `key`."""
        try:
            yield
        except InputError as error:
            raise InputError(error.message, where=error.where or self.where(key), remedy=error.remedy) from None


def load_task(file: Path) -> LoadedTask:
    """Reads and checks a task file.

    Raises:
        RecipeError: naming every mistake, each with file and line.
    """
    problems: list[Problem] = []
    tree = read_mapping(file, problems, "task")
    if tree is None:
        raise RecipeError(str(file), problems)
    try:
        task = _ADAPTER.validate_python(tree.plain())
    except ValidationError as error:
        raise RecipeError(str(file), [*problems, *complaints(error, tree, Task)]) from None
    if problems:
        raise RecipeError(str(file), problems)
    return LoadedTask(task, file, tree)
