"""`llmtrain data inspect`: the rows of a recipe as a person reads them, and what became of its documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal, NamedTuple

import numpy as np
import typer
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from llmtrain.data.build import cache_directory, datasets_of, prepare_tokenizer
from llmtrain.data.group_rows import Group, GroupPlan, document_span
from llmtrain.data.histogram import bar, length_counts
from llmtrain.data.loader import EVALUATION_SEED
from llmtrain.data.order import ShuffledOrder
from llmtrain.data.packing import PackedRows, Row
from llmtrain.data.prepared import (
    Prepared,
    SourceRows,
    check_labels,
    check_trained,
    efficiency,
    groups_left_out,
    place_of_example,
    plan_settings,
    prepare_sources,
)
from llmtrain.data.row_plan import empty_documents
from llmtrain.data.sources import describe
from llmtrain.recipe.schema import KTO, ProcessReward, Recipe

SHOWN_AT_START, SHOWN_AT_END = 600, 200  # characters of a long run of text
BAR_CELLS = 40
# Escape sequences in the data shall not reach the terminal.
_CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}


def inspect(
    recipe: Recipe, *, num_rows: int, half: Literal["train", "validation"], full: bool, histogram: bool
) -> None:
    """Prints rows, a histogram of lengths and figures of each source.

    Raises:
        InputError: bad input; or, when all is printed, what `train` would refuse.
    """
    cache = cache_directory(recipe.data.cache_dir)
    tokenizer = prepare_tokenizer(recipe, cache).tokenizer
    prepared = prepare_sources(recipe, tokenizer, cache)
    halves = prepared.train if half == "train" else prepared.validation
    printer = _Printer(tokenizer, recipe, full)
    if not halves:
        printer.line("no rows are held out: data.validation_fraction is 0")
        return
    if num_rows:
        printer.legend()
    for number, (source, index) in enumerate(_chosen(prepared, recipe, half, num_rows), start=1):
        printer.row(number, halves[source], index)
    for source_rows in halves:
        printer.left_out(source_rows, num_rows)
    if histogram:
        printer.histogram(halves)
    printer.figures(halves)
    if sum(len(source_rows.rows) for source_rows in halves) > num_rows:
        printer.line("more: --rows N, --full, --half validation; other settings: KEY=VALUE, e.g. data.packing=none")
    for source_rows in [*prepared.train, *prepared.validation]:
        check_trained(source_rows, recipe)
    check_labels(prepared.train, recipe)


def _chosen(prepared: Prepared, recipe: Recipe, half: str, num: int) -> list[tuple[int, int]]:
    """(source, row) of the first rows that are trained or evaluated on."""
    lengths = [len(part.rows) for part in (prepared.train if half == "train" else prepared.validation)]
    num = min(num, sum(lengths))
    if not num:
        return []
    if half == "train" and min(lengths):
        order = datasets_of(prepared, recipe).order(recipe.seed)
    else:
        order = ShuffledOrder(lengths, EVALUATION_SEED)
    sources, indices = order.rows_at(np.arange(num))
    return list(zip(sources.tolist(), indices.tolist(), strict=True))


class Piece(NamedTuple):
    """The part of a document that stands in a row: tokens `start` to `stop` of the corpus."""

    document: int
    start: int
    stop: int


def pieces_of_row(half: SourceRows, index: int) -> list[Piece]:
    """The parts of documents in a row, in order, with a last token that is a target only."""
    corpus = half.corpus
    if half.plan is None:
        assert isinstance(half.rows, PackedRows)
        start, stop = half.rows.span(index)
        stop += stop == corpus.num_tokens - 1  # its very last token is a target only
        first, last = np.searchsorted(corpus.document_ends, [start, stop - 1], side="right").tolist()
        edges = [start, *corpus.document_ends[first:last].tolist(), stop]
        return [Piece(first + i, edges[i], edges[i + 1]) for i in range(len(edges) - 1)]
    if isinstance(half.plan, GroupPlan):
        groups = half.plan.documents[half.plan.groups_of(index)].tolist()
        wholes = [document_span(corpus, document) for document in groups]
        return [Piece(document, whole.start, whole.stop) for document, whole in zip(groups, wholes, strict=True)]
    pieces = half.plan.pieces_of(index)
    starts, spans = half.plan.starts[pieces], half.plan.spans[pieces]
    documents = np.searchsorted(corpus.document_ends, starts, side="right")
    return [Piece(*piece) for piece in zip(documents.tolist(), starts.tolist(), (starts + spans).tolist(), strict=True)]


@dataclass(frozen=True)
class _Run:
    text: str
    trained: bool


def runs(tokenizer: PreTrainedTokenizerBase, ids: list[int], trained: list[bool]) -> Iterator[_Run]:
    """The text of the tokens, cut wherever trained ones begin or end; together it is the text of all."""
    edges = [i for i in range(1, len(ids)) if trained[i] != trained[i - 1]]
    done = ""
    for edge in [*edges, len(ids)]:
        # Decoded from the start, since some tokenizers strip what stands first. A character whose bytes lie on
        # both sides of an edge is shown after it.
        text = str(tokenizer.decode(ids[:edge], clean_up_tokenization_spaces=False))
        if edge < len(ids):
            text = text.rstrip("\ufffd")
        yield _Run(text[len(done) :], trained[edge - 1])
        done = text


class _Printer:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, full: bool):
        self._tokenizer, self._recipe, self._full = tokenizer, recipe, full
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._coloured = self._console.is_terminal and not self._console.no_color

    def line(self, text: str, style: str = "") -> None:
        self._print(Text(text, style=style))

    def _print(self, text: Text) -> None:
        if self._coloured:
            self._console.print(text)
        else:
            typer.echo(text.plain)  # as it is: rich would expand tabs

    def legend(self) -> None:
        if self._coloured:
            legend = Text("trained", style="green").append(" tokens are green, ", style="default")
            self._print(legend.append("those that are only read are dim", style="dim"))
        else:
            self.line("[[trained]] tokens stand in double brackets, those that are only read outside")

    def row(self, number: int, half: SourceRows, index: int) -> None:
        length = self._recipe.sequence_length
        pieces = pieces_of_row(half, index)
        row = half.rows[index]
        num_trained = _num_trained(row)
        num_tokens = int(half.rows.lengths(np.array([index]))[0])
        self.line(
            f"\n=== row {number}: {index + 1:,} of {len(half.rows):,} of {describe(half.source)}: "
            f"{len(pieces)} {'document' if len(pieces) == 1 else 'documents'}, {num_tokens:,} of {length:,} tokens, "
            f"{num_trained:,} trained ===",
            "bold",
        )
        for piece in pieces:
            self._piece(half, piece)

    def _piece(self, half: SourceRows, piece: Piece) -> None:
        corpus = half.corpus
        end = int(corpus.document_ends[piece.document])
        start = int(corpus.document_ends[piece.document - 1]) if piece.document else 0
        self.line(f"--- {self._name(half, piece.document)}: {end - start:,} tokens ---", "cyan")
        if piece.start > start:
            self.line(f"... {piece.start - start:,} tokens stand in rows before", "yellow")
        if isinstance(half.plan, GroupPlan):
            self._group(half, piece)
            return
        self._tokens(half, piece.start, piece.stop, start)
        if piece.stop < end:
            if half.plan is not None and plan_settings(self._recipe).overflow == "truncate":
                self.line(f"... truncated: {end - piece.stop:,} tokens are lost", "bold red")
            else:
                self.line(f"... {end - piece.stop:,} tokens go on in another row", "yellow")

    def _group(self, half: SourceRows, piece: Piece) -> None:
        """The prompt, then each answer with how it was judged."""
        marks, judged = half.corpus.trained, half.corpus.judged
        assert marks is not None and judged is not None
        first, last = (
            int(judged.ends[number]) if number >= 0 else 0 for number in (piece.document - 1, piece.document)
        )
        levels = judged.values[first:last, 0].tolist()
        numbers = marks[piece.start : piece.stop] >> 1
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(numbers)]
        for start, stop in pairwise(edges):
            number = int(numbers[start])
            if number:
                self.line(f"- {self._verdict(levels, number)} -", "cyan")
            self._tokens(half, piece.start + start, piece.start + stop, piece.start)

    def _verdict(self, levels: list[float], number: int) -> str:
        algorithm = self._recipe.algorithm
        if isinstance(algorithm, ProcessReward):
            return "steps: " + ", ".join("right" if level else "wrong" for level in levels)
        if isinstance(algorithm, KTO):
            return "bad" if levels[number - 1] else "good"
        return f"rank {levels[number - 1]:g}"

    def _name(self, half: SourceRows, document: int) -> str:
        numbers = half.corpus.numbers
        return f"document {document + 1:,}" if numbers is None else f"example {int(numbers[document]) + 1:,}"

    def _tokens(self, half: SourceRows, start: int, stop: int, document_start: int) -> None:
        corpus = half.corpus
        # Of groups of answers the mark is odd where a token is trained, or a step judged.
        trained = [True] * (stop - start) if corpus.trained is None else (corpus.trained[start:stop] & 1 > 0).tolist()
        if start == document_start:
            trained[0] = False  # nothing predicts it
        text = Text()
        for run in runs(self._tokenizer, corpus.tokens[start:stop].tolist(), trained):
            shown = self._shortened(run.text).translate(_CONTROL)
            if self._coloured:
                text.append(shown, style="green" if run.trained else "dim")
            else:
                text.append(f"[[{shown}]]" if run.trained else shown)
        text.rstrip()
        self._print(text)

    def _shortened(self, text: str) -> str:
        hidden = len(text) - SHOWN_AT_START - SHOWN_AT_END
        if self._full or hidden < SHOWN_AT_END:
            return text
        return f"{text[:SHOWN_AT_START]} <... {hidden:,} characters, see --full ...> {text[-SHOWN_AT_END:]}"

    def left_out(self, half: SourceRows, num: int) -> None:
        """Why groups of answers are left out; else `num` documents without a trained token.

        These are in no row, but for packing documents.
        """
        if half.corpus.judged is not None:
            self._groups_left_out(half)
            return
        if half.counts is None or not half.counts.num_empty or not num:
            return
        what = "trained on nothing" if half.plan is None else "left out"
        self.line(f"\n=== {describe(half.source)}: {half.counts.num_empty:,} documents {what} ===", "bold red")
        for document in islice(empty_documents(half.corpus, plan_settings(self._recipe)), num):
            end = int(half.corpus.document_ends[document])
            start = int(half.corpus.document_ends[document - 1]) if document else 0
            self.line(f"--- {self._name(half, document)}: {end - start:,} tokens ---", "cyan")
            settings = plan_settings(self._recipe)
            is_cut = half.plan is not None and settings.overflow == "truncate"
            stop = min(end, start + settings.sequence_length + settings.lookahead) if is_cut else end
            self._tokens(half, start, stop, start)
            if stop < end:
                assert half.corpus.trained is not None
                num = int(half.corpus.trained[stop:end].sum())
                self.line(f"... truncated: {end - stop:,} tokens are lost, {num:,} trained ones among them", "bold red")

    def _groups_left_out(self, half: SourceRows) -> None:
        left_out = groups_left_out(half, self._recipe)
        if left_out:
            total = sum(reason.num for reason in left_out)
            self.line(f"\n=== {describe(half.source)}: {total:,} groups of answers left out ===", "bold red")
        for reason in left_out:
            self.line(f"{reason.num:,}: {reason.why}; the first is {place_of_example(half, reason.first)}")

    def histogram(self, halves: list[SourceRows]) -> None:
        are_groups = any(half.corpus.judged is not None for half in halves)
        longest = self._recipe.sequence_length + (0 if are_groups else plan_settings(self._recipe).lookahead)
        self.line("\ndocuments by tokens", "bold")
        bins = length_counts([half.corpus for half in halves], longest)
        most, total = max(entry.num for entry in bins), sum(entry.num for entry in bins)
        labels = [
            f"{entry.least:,}" if entry.least == entry.most else f"{entry.least:,}-{entry.most:,}" for entry in bins
        ]
        width = max(len(label) for label in labels)
        for label, entry in zip(labels, bins, strict=True):
            note = "  longer than a row" if entry.least > longest else ""
            shown = bar(entry.num / most, BAR_CELLS).ljust(BAR_CELLS)
            line = f"  {label:>{width}} {shown} {entry.num:,} ({entry.num / total:.1%}){note}"
            self.line(line, "yellow" if note else "")

    def figures(self, halves: list[SourceRows]) -> None:
        length = self._recipe.sequence_length
        figures: dict[str, list[str]] = {"source": [describe(half.source) for half in halves]}

        def add(name: str, values: list[int]) -> None:
            figures[name] = [f"{value:,}" for value in values]

        counts = [half.counts for half in halves]
        add("documents", [half.corpus.num_documents for half in halves])
        if self._recipe.data.deduplicate:
            add("duplicates left out of the source", [half.num_duplicates for half in halves])
        add("tokens", [half.corpus.num_tokens for half in halves])
        figures["trained"] = [_share(half) for half in halves]
        add(f"rows of {length:,}", [len(half.rows) for half in halves])
        figures["slots filled"] = [f"{efficiency(half, length):.1%}" for half in halves]
        add("truncated", [0 if count is None else count.num_truncated for count in counts])
        add("tokens lost by it", [0 if count is None else count.num_dropped for count in counts])
        add("split", [_num_split(half, length) for half in halves])
        if all(half.corpus.judged is None for half in halves):
            add("without a trained token", [0 if count is None else count.num_empty for count in counts])
        else:
            left_out = [{reason.why: reason.num for reason in groups_left_out(half, self._recipe)} for half in halves]
            for why in dict.fromkeys(why for reasons in left_out for why in reasons):
                add(f"left out: {why}", [reasons.get(why, 0) for reasons in left_out])
        self.line("\nfigures", "bold")
        if not self._console.is_terminal:  # for programs: tabs between the columns
            for name, values in figures.items():
                self.line("\t".join([name, *values]))
            return
        width = max(len(name) for name in figures)
        columns = [max(len(values[i]) for values in figures.values()) for i in range(len(halves))]
        for name, values in figures.items():
            cells = [value.rjust(column) for value, column in zip(values, columns, strict=True)]
            self.line("  ".join([f"  {name:<{width}}", *cells]))


def _num_trained(row: Row | list[Group]) -> int:
    if isinstance(row, Row):
        return int((row.targets >= 0).sum())
    return sum(int(learnt.sum()) for group in row for learnt in group.learnt)


def _share(half: SourceRows) -> str:
    """Of the documents' tokens, those that are a target in some row."""
    num = half.corpus.num_tokens - half.corpus.num_documents if half.counts is None else half.counts.num_trained
    return f"{num / half.corpus.num_tokens:.1%}"


def _num_split(half: SourceRows, length: int) -> int:
    if half.plan is not None:
        assert half.counts is not None
        return half.counts.num_split
    # The stream is cut wherever a row ends: documents that begin and end in different rows.
    ends = half.corpus.document_ends
    starts = np.concatenate([[0], ends[:-1]])
    return int((starts // length != (ends - 1) // length).sum())
