"""Where the text comes from."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmtrain.recipe.schema.base import PositiveFloat, Section, Share

LEAST_RATIO_OF_WEIGHTS = 1e-9


class WeightedSource(Section):
    weight: PositiveFloat | None = Field(
        None,
        description="Share of the training rows drawn from this source, relative to the other weights. Given for all "
        "training sources or for none; without weights every row is seen once an epoch.",
    )


Format = Literal[
    "text",
    "messages",
    "sharegpt",
    "alpaca",
    "prompt_completion",
    "preference",
    "ranking",
    "labelled",
    "prompt_only",
    "stepwise",
]


class RecordSource(WeightedSource):
    """A source of records with fields. Pretraining reads one field of them, fine-tuning the whole record."""

    field: str = Field("text", description="The field that holds the text (algorithm causal_lm).")
    format: Literal["auto"] | Format = Field(
        "auto", description="What the records are (fine-tuning); auto finds it from the fields of the first one."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Where the format's fields are called otherwise (fine-tuning), e.g. {prompt: question}.",
    )


class TextSource(WeightedSource):
    """UTF-8 text files."""

    kind: Literal["text"]
    paths: list[str] = Field(min_length=1, description="Files and globs; ** matches any depth.")
    document: Literal["file", "paragraph", "line"] = Field(
        "file", description="What one document is: the file, a block between blank lines, or a line."
    )


class JSONLSource(RecordSource):
    """JSON objects, one a line."""

    kind: Literal["jsonl"]
    paths: list[str] = Field(min_length=1, description="Files and globs.")


class ParquetSource(RecordSource):
    """Parquet files."""

    kind: Literal["parquet"]
    paths: list[str] = Field(min_length=1, description="Files and globs.")


class PythonSource(WeightedSource):
    """A tree of Python files."""

    kind: Literal["python"]
    path: str = Field("stdlib", description="A directory, or stdlib for this interpreter's own library.")
    content: Literal["source", "docstrings", "both"] = Field(
        "source", description="Documents: whole modules, one a docstring, or both."
    )


class HuggingFaceSource(RecordSource):
    """A dataset saved by `datasets` in a directory, or one from the hub."""

    kind: Literal["huggingface"]
    path: str = Field(description="Directory (save_to_disk or data files) or hub name.")
    config: str | None = Field(None, description="Configuration (subset) name.")
    split: str = Field("train", description="Which split to read.")
    revision: str | None = Field(None, description="Hub branch, tag or commit.")


Source = Annotated[
    TextSource | JSONLSource | ParquetSource | PythonSource | HuggingFaceSource, Field(discriminator="kind")
]


class Data(Section):
    """Where the text comes from and how it becomes rows."""

    train: list[Source] = Field(min_length=1, description="Training sources.")
    validation: list[Source] | None = Field(
        None, min_length=1, description="Held-out sources; without them, validation_fraction of train is held out."
    )
    validation_fraction: Share = Field(
        0.01,
        description="Share of the training documents held out, chosen by a hash of their text, or of the prompt of "
        "judged answers, so it never moves.",
    )
    packing: Literal["auto", "documents", "best_fit", "none"] = Field(
        "auto",
        description="documents: the stream of documents is cut into full rows, so that one may go on in the next row. "
        "best_fit: documents stay whole, several to a row, each put where it fits best. In both, attention stays "
        "inside a document. none: one document a row, padded to the longest of its micro-batch (for models with "
        "recurrent state). auto: best_fit for sft, documents otherwise.",
    )
    overflow: Literal["auto", "truncate", "split"] = Field(
        "auto",
        description="Documents longer than a row: truncate drops what is beyond, and counts it; split goes on in "
        "another row, which does not see the first. auto: truncate for sft, split otherwise.",
    )
    group_by_length: bool = Field(
        False, description="With packing none: rows of about the same length share a batch, to save padding."
    )
    deduplicate: bool = Field(
        False,
        description="Leave out documents that were there before in the same source, by a hash of their content; "
        "while they are tokenised it keeps 16 bytes of memory for each.",
    )
    temperature: PositiveFloat | None = Field(
        None,
        description="Instead of weights: sources are drawn in proportion to (their rows) ** (1 / temperature); 1 is "
        "their own share, more evens out (arXiv 1910.10683).",
    )
    chat_template: str | None = Field(
        None,
        description="For sft: a training template by name, or a Jinja file; default: the tokenizer's own, or its "
        "training twin where it marks no assistant turns.",
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        "assistant",
        description="For sft, the tokens that count: of all assistant turns, of the last one, or of all turns. The "
        "token that ends a turn counts with it.",
    )
    max_empty_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.05,
        description="The share of examples without a trained token, or of groups of answers that teach nothing, above "
        "which the run does not begin.",
    )
    cache_dir: str | None = Field(
        None, description="Where tokenised data is kept; default $LLMTRAIN_CACHE or ~/.cache/llmtrain."
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> "Data":
        weights = [source.weight for source in self.train if source.weight is not None]
        if weights and len(weights) < len(self.train):
            raise ValueError("a weight is given for some training sources only; give it for all or for none")
        if weights and min(weights) / max(weights) < LEAST_RATIO_OF_WEIGHTS:
            raise ValueError(
                f"train has a source of weight {min(weights):g} beside one of {max(weights):g}: no run would draw from "
                f"it; leave it out, or give it {LEAST_RATIO_OF_WEIGHTS:g} of the other or more"
            )
        if weights and self.temperature is not None:
            raise ValueError("temperature computes the weights of the training sources; take theirs away, or it")
        if self.group_by_length and self.packing != "none":
            raise ValueError("group_by_length is for rows that are padded; set packing: none, or take it away")
        if any(source.weight is not None for source in self.validation or []):
            raise ValueError("validation sources take no weight: every held-out row is evaluated alike")
        return self
