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


class TextSource(WeightedSource):
    """UTF-8 text files."""

    kind: Literal["text"]
    paths: list[str] = Field(min_length=1, description="Files and globs; ** matches any depth.")
    document: Literal["file", "paragraph", "line"] = Field(
        "file", description="What one document is: the file, a block between blank lines, or a line."
    )


class JSONLSource(WeightedSource):
    """JSON objects, one a line."""

    kind: Literal["jsonl"]
    paths: list[str] = Field(min_length=1, description="Files and globs.")
    field: str = Field("text", description="The field that holds the text.")


class ParquetSource(WeightedSource):
    """Parquet files."""

    kind: Literal["parquet"]
    paths: list[str] = Field(min_length=1, description="Files and globs.")
    field: str = Field("text", description="The column that holds the text.")


class PythonSource(WeightedSource):
    """A tree of Python files."""

    kind: Literal["python"]
    path: str = Field("stdlib", description="A directory, or stdlib for this interpreter's own library.")
    content: Literal["source", "docstrings", "both"] = Field(
        "source", description="Documents: whole modules, one a docstring, or both."
    )


class HuggingFaceSource(WeightedSource):
    """A dataset saved by `datasets` in a directory, or one from the hub."""

    kind: Literal["huggingface"]
    path: str = Field(description="Directory (save_to_disk or data files) or hub name.")
    config: str | None = Field(None, description="Configuration (subset) name.")
    split: str = Field("train", description="Which split to read.")
    field: str = Field("text", description="The column that holds the text.")
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
        0.01, description="Share of the training documents held out, chosen by a hash of their text so it never moves."
    )
    packing: Literal["documents", "none"] = Field(
        "documents",
        description="documents: rows are filled with several documents, and attention stays inside each. "
        "none: one piece of one document a row, padded (for models with recurrent state).",
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
        if any(source.weight is not None for source in self.validation or []):
            raise ValueError("validation sources take no weight: every held-out row is evaluated alike")
        return self
