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


class Likelihood(TaskOptions):
    """How likely texts are. All of this is for diffusion models: what is autoregressive has its likelihood itself."""

    method: Literal["bound", "replay"] = Field(
        "bound",
        description="bound: an upper bound of -log p, estimated from draws of noise. replay: -log p of texts that are "
        "written by unmasking the places of order, whose tokens are drawn from the model (DUEL, arXiv 2603.01367); as "
        "many forwards as there are steps.",
    )
    # Measured on Python's docstrings, of 55 tokens on average, 16 draws make a sixth of the variance of the loss, so
    # that its error is a tenth larger than without noise; on whole modules they make a hundredth.
    samples: PositiveInt = Field(
        16,
        description="Draws of noise for each text, or window of it; with two or more their error is known "
        "(monte_carlo_error). Long texts need fewer.",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="Of the noise.")
    order: Literal["confidence", "place"] = Field(
        "confidence",
        description="Of replay. confidence: first the places whose likeliest token has the most probability. place: "
        "from the left.",
    )
    tokens_per_step: PositiveInt | None = Field(None, description="Of replay: unmasked in a step at most; default: 1.")
    steps: PositiveInt | None = Field(
        None, description="Of replay, in place of tokens_per_step: steps of the whole, as `llmtrain generate` has them."
    )
    threshold: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Of replay by confidence, in place of tokens_per_step: all places of at least this probability are "
        "unmasked, and at least one.",
    )
    block_length: PositiveInt | None = Field(
        None,
        description="Of replay: blocks of so many tokens are unmasked one after another. Default: those of a block "
        "diffusion model, of others 32.",
    )

    @model_validator(mode="after")
    def _is_one_method(self) -> "Likelihood":
        amounts = [key for key in ("tokens_per_step", "steps", "threshold") if self.__dict__[key] is not None]
        replayed = [key for key in ("order", *amounts, "block_length") if key in self.model_fields_set]
        if self.method == "bound" and replayed:
            raise ValueError(f"{replayed[0]} is for method replay")
        if self.method == "replay" and "samples" in self.model_fields_set:
            raise ValueError("samples is for method bound; replay draws nothing")
        if len(amounts) > 1:
            raise ValueError(f"{amounts[0]} and {amounts[1]} exclude each other; give one of them")
        if self.threshold is not None and self.order != "confidence":
            raise ValueError("threshold is for order confidence")
        return self


class Perplexity(Likelihood):
    """Loss, perplexity and bits per byte of texts; of diffusion models upper bounds of them."""

    kind: Literal["perplexity"]
    data: list[Source] = Field(
        min_length=1, description="Sources as in a recipe; paths of files are relative to this one."
    )
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Only documents that training with this data.validation_fraction holds out; default: all."
    )
    sequence_length: Annotated[int, Field(ge=2, le=10**8)] | None = Field(
        None, description="Longer documents are cut into windows of so many tokens; default: the model's, at most 2048."
    )
    overlap: Annotated[int, Field(ge=0)] = Field(
        0, description="Tokens of the window before that each window begins with, as context that is not counted."
    )
    end_of_text: bool = Field(
        False,
        description="Count the end-of-text token of each document, too; with it block diffusion's last blocks are "
        "whole, as in its training.",
    )

    @model_validator(mode="after")
    def _windows_go_on(self) -> "Perplexity":
        if self.sequence_length is not None and self.overlap >= self.sequence_length - 1:
            raise ValueError(f"overlap leaves no new token in a window of sequence_length {self.sequence_length}")
        return self


class Fewshot(Section):
    """Worked examples before each question."""

    data: str = Field(description="A JSONL file with the same fields, relative to this file.")
    num: PositiveInt = Field(description="How many; the first ones of the file.")


class Prompted(TaskOptions):
    """Rows that a model is asked about."""

    data: str = Field(description="A JSONL file, relative to this file.")
    prompt: str | None = Field(
        None, description="The question: a text with {field} where a field of the row goes; {{ and }} are brackets."
    )
    messages: str | None = Field(
        None, description="In place of prompt: the field with the messages; an assistant turn at their end is dropped."
    )
    chat: bool = Field(False, description="Ask the prompt as a user turn of the chat template.")
    system: str | None = Field(None, description="A system message before the conversation.")
    separator: str = Field("\n\n", description="Between few-shot examples of a prompt that is no chat.")
    fewshot: Fewshot | None = None

    @model_validator(mode="after")
    def _asks_in_one_way(self) -> "Prompted":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        if self.messages is not None and self.chat:
            raise ValueError("chat is for prompt; messages say themselves who says what")
        if self.system is not None and self.messages is None and not self.chat:
            raise ValueError("system is for conversations; set chat: true, or write it into prompt")
        _check_template("prompt", self.prompt)
        return self


class DiffusionSampling(Section):
    """How a diffusion model writes, as the options of `llmtrain generate` of the same names say."""

    sampler: Literal["llada", "threshold", "ancestral", "first-hitting"] | None = None
    steps: PositiveInt | None = None
    block_length: PositiveInt | None = None
    remasking: Literal["low-confidence", "random"] | None = None
    cfg: Annotated[float, Field(ge=0)] | None = None
    threshold: Annotated[float, Field(gt=0, le=1)] | None = None
    cache: bool | None = None


class Questions(Prompted):
    """Rows with a question and its answer."""

    answer: str = Field("answer", description="The field with the right answer, or a list of right ones.")
    target: str | None = Field(
        None, description="An example's answer in few-shot prompts, with {field}; default: ' ' and the answer field."
    )
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
    diffusion: DiffusionSampling | None = Field(None, description="Only for diffusion models: how they write.")

    @model_validator(mode="after")
    def _is_sound(self) -> "Questions":
        if self.messages is not None and self.target is not None:
            raise ValueError("target is for prompt; messages say themselves what was answered")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples of a greedy model are all the same; set temperature")
        for key in ("extract", "answer_extract", "format"):
            _check_pattern(key, self.__dict__[key])
        _check_template("target", self.target)
        return self


def _check_pattern(key: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"{key} is no regular expression: {error}") from None


def _check_template(key: str, template: str | None) -> None:
    try:
        fields_of(template or "")
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


class MultipleChoice(Prompted, Likelihood):
    """The share of rows whose right choice is the likeliest one, as it stands and for its length."""

    kind: Literal["multiple_choice"]
    choices: str = Field("choices", description="The field with the list of choices.")
    answer: str = Field("answer", description="The field with the right one: its number, from 0, or its text.")
    choice: str = Field(
        " {choice}",
        description="What comes after the prompt, with {choice} and fields of the row; in chats, without "
        "the space around it, what the assistant says.",
    )

    @model_validator(mode="after")
    def _says_the_choice(self) -> "MultipleChoice":
        _check_template("choice", self.choice)
        if "choice" not in fields_of(self.choice):
            raise ValueError("choice does not hold {choice}")
        return self


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


Aggregate = Annotated[
    Literal["product", "min", "last"] | None,
    Field(
        description="Only for process reward models: how the probabilities that the steps are right become one of the "
        "whole answer; default: product."
    ),
]


class Pairs(TaskOptions):
    """How often a reward model gives the better answer the higher score."""

    kind: Literal["pairs"]
    data: str = Field(
        description="A JSONL file of preferences (chosen, rejected) or rankings (answers, ranks), relative to this one."
    )
    aggregate: Aggregate = None


class Steps(TaskOptions):
    """How well a process reward model tells right steps from wrong ones."""

    kind: Literal["steps"]
    data: str = Field(description="A JSONL file of steps with labels (completions, labels), relative to this file.")
    aggregate: Aggregate = None


SCORED = (Pairs, Steps)  # are for models that score, the others for those that write
AnyTask = Perplexity | ExactMatch | Math | MultipleChoice | LMEval | Pairs | Steps
Task = Annotated[AnyTask, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[AnyTask] = TypeAdapter(Task)


@dataclass(frozen=True)
class LoadedTask:
    """A checked task and where it came from."""

    task: AnyTask
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
