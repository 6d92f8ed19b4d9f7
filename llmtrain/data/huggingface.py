"""Datasets that the `datasets` library reads: saved on disk, data files in a directory, or hub."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.data.columns import check_string_column, missing_field
from llmtrain.data.files import why_missing
from llmtrain.errors import InputError, nearest
from llmtrain.recipe.schema import HuggingFaceSource

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

ROWS_IN_A_BATCH = 256


def local_directory(source: HuggingFaceSource) -> Path | None:
    """The directory that the source names, or None for a hub name."""
    path = Path(os.path.expanduser(source.path))
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        remedy = "name its directory, or use a text, jsonl or parquet source"
        raise InputError("is a file, not a directory or hub name", where=source.path, remedy=remedy)
    if path.is_absolute() or source.path.startswith((".", "~")) or source.path.count("/") > 1:
        message = f"{why_missing(path, 'directory')}, and no hub name"
        raise InputError(message, where=source.path, remedy="correct the path")
    return None


def load(source: HuggingFaceSource) -> "Dataset":
    """The split as a table that stays on disk."""
    directory = local_directory(source)
    if directory is not None and any((directory / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _load_saved(source, directory)
    return _load_by_name(source, str(directory) if directory else source.path)


def _load_saved(source: HuggingFaceSource, directory: Path) -> "Dataset":
    # Imported here because it costs a second that no other source should pay.
    from datasets import DatasetDict, load_from_disk

    if source.config is not None or source.revision is not None:
        message = "was saved by save_to_disk, which knows neither config nor revision"
        raise InputError(message, where=source.path, remedy="leave both out")
    try:
        dataset = load_from_disk(str(directory))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as a saved dataset: {error}", where=source.path) from None
    if isinstance(dataset, DatasetDict):
        if source.split not in dataset:
            raise _missing_split(source, [str(name) for name in dataset])
        return dataset[source.split]
    if dataset.split is not None and str(dataset.split) != source.split:
        raise _missing_split(source, [str(dataset.split)])
    return dataset


def _missing_split(source: HuggingFaceSource, present: list[str]) -> InputError:
    hint = nearest(source.split, present)
    message = f"no split {source.split!r}; splits there: {', '.join(present)}{hint}"
    return InputError(message, where=source.path, remedy="set `split` of this source to one of them")


def _load_by_name(source: HuggingFaceSource, path: str) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(path, name=source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(
            f"cannot be loaded (config {source.config}, split {source.split}, revision {source.revision}): {error}",
            where=source.path,
            remedy="correct path, config, split or revision; without a network, name a local directory",
        ) from error


def num_bytes(source: HuggingFaceSource) -> int:
    """Of the text column, or of whole rows where there is none of that name."""
    dataset = load(source)
    if source.field in dataset.column_names:
        dataset = dataset.select_columns([source.field])
    return int(dataset.data.nbytes)


def read(source: HuggingFaceSource) -> Iterator[str]:
    """The text column, row by row; rows without a text are skipped and counted."""
    dataset = load(source)
    if source.field not in dataset.column_names:
        raise missing_field(source.field, dataset.column_names, source.path)
    check_string_column(dataset.features.arrow_schema.field(source.field).type, source.field, source.path)
    num_null = 0
    for batch in _batches(dataset.select_columns([source.field]), source, f"column {source.field!r}"):
        texts = batch[source.field]
        num_null += texts.count(None)
        yield from (text for text in texts if text is not None)
    if num_null:
        log.info("%s: %d of %d rows have no %r and were skipped", source.path, num_null, len(dataset), source.field)


def read_rows(source: HuggingFaceSource) -> Iterator[dict[str, Any]]:
    """Whole rows as dicts by column."""
    for batch in _batches(load(source), source, "a column"):
        names = list(batch)
        yield from (dict(zip(names, row, strict=True)) for row in zip(*batch.values(), strict=True))


def _batches(dataset: "Dataset", source: HuggingFaceSource, what: str) -> Iterator[dict[str, list[Any]]]:
    num_rows = 0
    try:
        for batch in dataset.iter(batch_size=ROWS_IN_A_BATCH):
            yield batch
            num_rows += ROWS_IN_A_BATCH
    except UnicodeDecodeError as error:
        message = f"{what} is not UTF-8 in the {ROWS_IN_A_BATCH} rows after row {num_rows}: {error}"
        raise InputError(message, where=source.path) from None
