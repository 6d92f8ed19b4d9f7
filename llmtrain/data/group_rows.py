"""Rows of groups of answers: which groups share a row, and what they hold.

    rows/<key>/documents  int64 for each group in a row, which document of the corpus it is
    rows/<key>/rooms      int32 for each, the tokens that it takes
    rows/<key>/partners   int64 for each, the document whose answer is a mismatch for its prompt (KTO; else -1)
    rows/<key>/ends       int64 for each row, where in the groups it ends (exclusive)

A group is never cut: what is judged is a whole answer. One that is longer than a row is left out, and counted.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from llmtrain.data.best_fit import best_fit
from llmtrain.data.built import build_once
from llmtrain.data.cache import INT64, TokenCorpus, map_array
from llmtrain.data.counted_random import Int64Array
from llmtrain.data.hashing import hash_settings
from llmtrain.data.packing import BoolArray
from llmtrain.data.row_plan import INT32, RowCounts

FORMAT = 2  # change it with anything that changes the rows or the files
DOCUMENTS_AT_A_TIME = 1 << 16

# shared: the answers stand behind one prompt. separate: each has a prompt of its own. padded: and a row of its own.
Layout = Literal["shared", "separate", "padded"]


class Group(NamedTuple):
    """A prompt with its answers.

    Attributes:
        prompt: int64 [P] token ids.
        answers: int64 [n] each, the best first where they are compared.
        learnt: bool [n] each, the tokens that are predicted, or where steps are judged.
        values: float32 [answers or steps, 2]; see `data/groups.py`.
        first: the number of its first answer in its half of the data; the others follow.
    """

    prompt: Int64Array
    answers: list[Int64Array]
    learnt: list[BoolArray]
    values: npt.NDArray[np.float32]
    first: int


@dataclass(frozen=True)
class GroupSettings:
    """What decides how groups become rows."""

    packing: Literal["best_fit", "none"]
    layout: Layout
    sequence_length: int
    mismatched: bool


@dataclass(frozen=True)
class GroupPlan:
    """Which groups each row holds; arrays as in the files."""

    documents: Int64Array
    rooms: npt.NDArray[np.int32]
    partners: Int64Array
    row_ends: Int64Array

    def groups_of(self, index: int) -> slice:
        """The groups of a row."""
        return slice(int(self.row_ends[index - 1]) if index else 0, int(self.row_ends[index]))


def plan_groups(
    corpus: TokenCorpus, corpus_key: str, settings: GroupSettings, cache_dir: Path
) -> tuple[GroupPlan, RowCounts]:
    """The plan for a corpus, computed by this process unless it is there or another one computes it."""
    key = hash_settings([FORMAT, "groups", corpus_key, asdict(settings)])
    path = cache_dir / "rows" / key
    about = build_once(path, "plan of rows", lambda directory: _write(corpus, settings, directory))
    num = about["num_groups"]
    plan = GroupPlan(
        map_array(path / "documents", INT64, num),
        map_array(path / "rooms", INT32, num),
        map_array(path / "partners", INT64, num),
        map_array(path / "ends", INT64, about["num_rows"]),
    )
    return plan, RowCounts(**about["counts"])


def _write(corpus: TokenCorpus, settings: GroupSettings, directory: Path) -> dict[str, Any]:
    prompts, learnt = _counted(corpus)
    partners = _partners(corpus, prompts) if settings.mismatched else np.full(corpus.num_documents, -1)
    rooms = _rooms(corpus, prompts, partners, settings)
    fits = (rooms <= settings.sequence_length) & ((partners >= 0) | (not settings.mismatched))
    documents = np.flatnonzero(fits)
    sizes = np.ones(len(documents), np.int64)
    if settings.packing == "best_fit":
        rows = best_fit(rooms[documents], settings.sequence_length)
        documents, sizes = documents[np.argsort(rows, kind="stable")], np.bincount(rows)
    for name, array, dtype in (
        ("documents", documents, INT64),
        ("rooms", rooms[documents], INT32),
        ("partners", partners[documents], INT64),
        ("ends", np.cumsum(sizes), INT64),
    ):
        (directory / name).write_bytes(array.astype(dtype).tobytes())
    left_out = np.flatnonzero(~fits)
    counts = RowCounts(
        num_documents=corpus.num_documents,
        num_tokens=int(rooms[documents].sum()),
        num_trained=int(learnt[documents].sum()),
        longest=int(rooms.max(initial=0)),
        num_cut_off=len(left_out),
        first_empty=int(left_out[0]) if len(left_out) else None,
    )
    return {"num_groups": len(documents), "num_rows": len(sizes), "counts": asdict(counts)}


def _counted(corpus: TokenCorpus) -> tuple[Int64Array, Int64Array]:
    """Tokens of the prompt, and learnt tokens, of each document."""
    assert corpus.trained is not None
    prompts, learnt = np.zeros(corpus.num_documents, np.int64), np.zeros(corpus.num_documents, np.int64)
    for first in range(0, corpus.num_documents, DOCUMENTS_AT_A_TIME):
        lengths = corpus.lengths(first, first + DOCUMENTS_AT_A_TIME)
        last = first + len(lengths)
        start = int(corpus.document_ends[first - 1]) if first else 0
        marks = corpus.trained[start : int(corpus.document_ends[last - 1])]
        begins = np.cumsum(lengths) - lengths
        prompts[first:last] = np.add.reduceat((marks == 0).astype(np.int64), begins)
        learnt[first:last] = np.add.reduceat((marks & 1).astype(np.int64), begins)
    return prompts, learnt


def _rooms(corpus: TokenCorpus, prompts: Int64Array, partners: Int64Array, settings: GroupSettings) -> Int64Array:
    """Tokens that each group takes in a row; of padded groups those of the longest answer with its prompt."""
    lengths = corpus.lengths()
    if settings.mismatched:
        others = np.where(partners >= 0, (lengths - prompts)[partners], 0)
        # A mismatched answer is cut where it does not fit.
        return np.maximum(lengths, np.minimum(prompts + others, settings.sequence_length))
    if settings.layout == "shared":
        return lengths
    assert corpus.judged is not None
    num_answers: Int64Array = np.diff(corpus.judged.ends, prepend=0).astype(np.int64)
    if settings.layout == "separate":
        separate: Int64Array = lengths + (num_answers - 1) * prompts
        return separate
    return np.array([_longest(corpus, document) for document in range(corpus.num_documents)], np.int64)


def _longest(corpus: TokenCorpus, document: int) -> int:
    counts = np.bincount(_marks(corpus, document) >> 1)
    return int(counts[0] + counts[1:].max(initial=0))


def document_span(corpus: TokenCorpus, document: int) -> slice:
    """Where a document is in the corpus."""
    return slice(int(corpus.document_ends[document - 1]) if document else 0, int(corpus.document_ends[document]))


def _marks(corpus: TokenCorpus, document: int) -> npt.NDArray[np.uint8]:
    assert corpus.trained is not None
    return corpus.trained[document_span(corpus, document)]


def _partners(corpus: TokenCorpus, prompts: Int64Array) -> Int64Array:
    """For each document one of the next prompt's (around the end); -1 where all have the same prompt.

    The answers to a prompt get those to the next one in turn, so that these are good and bad as often as the data's
    are, and few are there twice.
    """
    num = corpus.num_documents
    starts = corpus.document_ends - corpus.lengths()

    def same_prompt(one: int, other: int) -> bool:
        a, b = (corpus.tokens[starts[i] : starts[i] + prompts[i]] for i in (one, other))
        return np.array_equal(a, b)

    partners = np.full(num, -1)
    # Documents in a row with the same prompt are a run; index -1 is the last document.
    begins = [one for one in range(num) if not same_prompt(one - 1, one)]
    for run, begin in enumerate(begins):
        following = begins[(run + 1) % len(begins)]
        after = begins[(run + 2) % len(begins)]
        length, others = (following - begin) % num, (after - following) % num
        places = np.arange(length)
        partners[(begin + places) % num] = (following + places % others) % num
    return partners


class GroupRows:
    """Rows of groups (`packing.Rows`), as a plan has them; a row is a list of groups.

    Args:
        offset: added to the numbers of answers, so that those of several sources differ.
    """

    def __init__(self, corpus: TokenCorpus, plan: GroupPlan, ragged: bool, offset: int):
        self._corpus, self._plan, self._offset = corpus, plan, offset
        self.ragged = ragged

    def __len__(self) -> int:
        return len(self._plan.row_ends)

    @property
    def num_answers(self) -> int:
        """Of all documents, those in no row with them."""
        assert self._corpus.judged is not None
        return len(self._corpus.judged.values)

    def lengths(self, indices: Int64Array) -> Int64Array:
        totals = np.concatenate([[0], np.cumsum(self._plan.rooms, dtype=np.int64)])
        ends = self._plan.row_ends[indices]
        firsts = np.where(indices > 0, self._plan.row_ends[indices - 1], 0)
        lengths: Int64Array = totals[ends] - totals[firsts]
        return lengths

    def __getitem__(self, index: int) -> list[Group]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return [self._group(document) for document in self._plan.documents[self._plan.groups_of(index)].tolist()]

    def mismatched(self, index: int) -> list[Group]:
        """The row's prompts, each with an answer to another one; numbered as the answers that they stand for."""
        here = self._plan.groups_of(index)
        rooms, partners = self._plan.rooms[here].tolist(), self._plan.partners[here].tolist()
        groups = []
        for group, room, partner in zip(self[index], rooms, partners, strict=True):
            other = self._group(partner)
            num = room - len(group.prompt)
            groups.append(group._replace(answers=[other.answers[0][:num]], learnt=[other.learnt[0][:num]]))
        return groups

    def _group(self, document: int) -> Group:
        corpus = self._corpus
        assert corpus.judged is not None
        marks, tokens = _marks(corpus, document), corpus.tokens[document_span(corpus, document)].astype(np.int64)
        first = int(corpus.judged.ends[document - 1]) if document else 0
        values = corpus.judged.values[first : int(corpus.judged.ends[document])]
        answers = list(_answers(marks))
        return Group(
            tokens[marks == 0],
            [tokens[mine] for mine in answers],
            [(marks[mine] & 1) == 1 for mine in answers],
            np.asarray(values),
            self._offset + first,
        )


class MismatchedRows:
    """The prompts of other rows (`packing.Rows`), each with an answer to another prompt."""

    def __init__(self, rows: GroupRows):
        self._rows, self.ragged = rows, rows.ragged

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self, indices: Int64Array) -> Int64Array:
        return self._rows.lengths(indices)

    def __getitem__(self, index: int) -> list[Group]:
        return self._rows.mismatched(index)


def _answers(marks: npt.NDArray[np.uint8]) -> Iterator[BoolArray]:
    """Where each answer is."""
    numbers = marks >> 1
    for number in range(1, int(numbers.max()) + 1):
        yield numbers == number
