"""Each source of a recipe as rows, with what became of its documents, and whether that can be meant."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmtrain.data.cache import TRAIN, VALIDATION, Halves, TokenCorpus, tokenised
from llmtrain.data.documents import Documents, documents_of
from llmtrain.data.group_rows import GroupPlan, GroupRows, GroupSettings, Layout, plan_groups
from llmtrain.data.hashing import hash_settings
from llmtrain.data.packing import PackedRows, PlannedRows, RowPlan, Rows
from llmtrain.data.row_plan import PlanSettings, RowCounts, plan_rows, plan_stream
from llmtrain.data.sources import describe
from llmtrain.data.tokenizer import pad_id
from llmtrain.errors import InputError
from llmtrain.recipe.schema import DIFFUSION, KTO, Data, ProcessReward, Recipe, Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceRows:
    """One half of a source as rows.

    Attributes:
        key: of the source in the recipe.
        documents: read the source.
        plan: what is in each row; None for packing documents, where rows are cut from the stream.
        counts: what became of the documents; None where every token of every one is in a row and trained.
        num_duplicates: documents of the source, in either half, that were there before and are left out.
        nothing_to_learn: documents of the source that were left out before it was halved: why, how many, the first;
            told of the training half.
    """

    key: str
    source: Source
    documents: Documents[Any]
    corpus: TokenCorpus
    rows: Rows
    plan: RowPlan | GroupPlan | None
    counts: RowCounts | None
    num_duplicates: int
    nothing_to_learn: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Prepared:
    """All sources of a recipe. `fingerprint`, `documents`: see Datasets."""

    documents: Documents[Any]
    train: list[SourceRows]
    validation: list[SourceRows]
    fingerprint: dict[str, str]


def plan_settings(recipe: Recipe) -> PlanSettings:
    """How the recipe's documents become rows."""
    lookahead: Literal[0, 1] = 0 if isinstance(recipe.algorithm, DIFFUSION) else 1
    return PlanSettings(recipe.packing, recipe.overflow, recipe.sequence_length, lookahead)


def group_settings(recipe: Recipe) -> GroupSettings:
    """How the recipe's groups of answers become rows."""
    packing: Literal["best_fit", "none"] = "none" if recipe.packing == "none" else "best_fit"
    return GroupSettings(packing, group_layout(recipe), recipe.sequence_length, isinstance(recipe.algorithm, KTO))


def group_layout(recipe: Recipe) -> Layout:
    """How the answers of a group stand in a row."""
    if recipe.shares_prompts:
        return "shared"
    return "padded" if recipe.packing == "none" else "separate"


def held_out_fraction(data: Data) -> float:
    """Of the training sources; none where validation has sources of its own."""
    return 0.0 if data.validation is not None else data.validation_fraction


def prepare_sources(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, cache_dir: Path) -> Prepared:
    """Tokenises and plans what is not in the cache.

    Raises:
        InputError: bad input, or no document to train on or to hold out.
    """
    data, settings = recipe.data, plan_settings(recipe)
    documents = documents_of(recipe, tokenizer)

    def halves_of(sources: Sequence[Source], held_out: float) -> list[Halves]:
        return [tokenised(source, documents, held_out, cache_dir, data.deduplicate) for source in sources]

    def rows(key: str, source: Source, halves: Halves, half: str, offset: int) -> SourceRows:
        corpus = halves.train if half == TRAIN else halves.validation
        length, pad, name = recipe.sequence_length, pad_id(tokenizer), f"{halves.key} {half}"
        if settings.packing == "documents":
            starts = counts = None
            if corpus.trained is not None:
                starts, counts = plan_stream(corpus, name, settings, cache_dir)
            packed = PackedRows(corpus, length, pad, starts)
            return SourceRows(key, source, documents, corpus, packed, None, counts, halves.num_duplicates, {})
        ragged, left_out = settings.packing == "none", halves.nothing_to_learn if half == TRAIN else {}
        if corpus.judged is not None:
            of_groups, counts = plan_groups(corpus, name, group_settings(recipe), cache_dir)
            groups = GroupRows(corpus, of_groups, ragged, offset)
            return SourceRows(
                key, source, documents, corpus, groups, of_groups, counts, halves.num_duplicates, left_out
            )
        plan, counts = plan_rows(corpus, name, settings, cache_dir)
        planned = PlannedRows(corpus, plan, length, pad, ragged)
        return SourceRows(key, source, documents, corpus, planned, plan, counts, halves.num_duplicates, left_out)

    def numbered(keys: str, sources: Sequence[Source], halves: Sequence[Halves], half: str) -> list[SourceRows]:
        made, offset = [], 0
        for number, (source, of_source) in enumerate(zip(sources, halves, strict=True)):
            made.append(rows(f"{keys}.{number}", source, of_source, half, offset))
            judged = made[-1].corpus.judged
            offset += 0 if judged is None else len(judged.values)
        return made

    held_out = held_out_fraction(data)
    halves = halves_of(data.train, held_out)
    _check_training_half(data, halves)
    train = numbered("data.train", data.train, halves, TRAIN)
    # What beside the text decides which rows stand where.
    how = [settings.packing, settings.overflow, data.group_by_length, data.temperature, recipe.shares_prompts]
    fingerprint = {"data.train": hash_settings([*(half.key for half in halves), how])}
    if data.validation is not None:
        others = halves_of(data.validation, 0.0)
        validation = numbered("data.validation", data.validation, others, TRAIN)
        whole = [*how[:2], recipe.shares_prompts]
        fingerprint["data.validation"] = hash_settings([*(half.key for half in others), whole])
    else:
        _check_held_out_half(halves, held_out)
        held = numbered("data.train", data.train, halves, VALIDATION)
        validation = [half for half in held if half.corpus.num_documents]
    return Prepared(documents, train, validation, fingerprint)


def _check_training_half(data: Data, halves: list[Halves]) -> None:
    for number, half in enumerate(halves):
        if not half.train.num_documents:
            message = f"all {half.validation.num_documents} documents of {describe(data.train[number])} are held out"
            remedy = "lower data.validation_fraction, or give more documents"
            raise InputError(message, where=f"data.train.{number}", remedy=remedy)


def _check_held_out_half(halves: list[Halves], held_out: float) -> None:
    if held_out > 0 and not any(half.validation.num_documents for half in halves):
        num = sum(half.train.num_documents for half in halves)
        raise InputError(
            f"a share of {held_out} of {num} documents holds out none",
            where="data.validation_fraction",
            remedy="raise it, split the text into more documents, give data.validation, or set it to 0 for none",
        )


# ------------------------------------------------------------------------- what became of documents


def check_trained(half: SourceRows, recipe: Recipe) -> None:
    """Raises InputError where more documents than data.max_empty_share have no trained token."""
    counts = half.counts
    if half.corpus.judged is not None:
        check_groups(half, recipe)
        return
    if counts is None or not counts.num_empty:
        return
    share = counts.num_empty / counts.num_documents
    if share <= recipe.data.max_empty_share and len(half.rows):
        return
    reasons, remedies = [], []
    if counts.num_untrained:
        reasons.append(f"{counts.num_untrained:,} have none at all")
        remedies.append(
            "check data.chat_template, which must mark the assistant's turns, data.train_on, and that the rows hold "
            "such turns"
        )
    if counts.num_cut_off:
        reasons.append(f"of {counts.num_cut_off:,} all lie beyond sequence_length {recipe.sequence_length}")
        remedies.append("raise sequence_length, shorten the prompts, or set data.overflow=split")
    remedies.append("see them with: llmtrain data inspect RECIPE")
    if len(half.rows):
        remedies.append("or raise data.max_empty_share, if they may be left out")
    raise InputError(
        f"{counts.num_empty:,} of {counts.num_documents:,} documents of {describe(half.source)} ({share:.1%}) have no "
        f"trained token in the rows ({'; '.join(reasons)}); data.max_empty_share is {recipe.data.max_empty_share:g}; "
        f"the first is {place_of(half, counts.first_empty)}",
        where=half.key,
        remedy="; ".join(remedies),
    )


def place_of(half: SourceRows, document: int | None) -> str:
    """Where a document comes from: file and line, read anew, so it is for messages only."""
    assert document is not None
    if half.corpus.numbers is None:
        return f"document {document + 1}"
    return place_of_example(half, int(half.corpus.numbers[document]))


def place_of_example(half: SourceRows, number: int) -> str:
    """Where an example of the source comes from, by its number."""
    example = next(islice(half.documents.read(half.source), number, None), None)
    return f"example {number + 1}" if example is None else example.where


def report(half: SourceRows, recipe: Recipe) -> None:
    """Logs what became of the documents, as warnings where something is lost."""
    counts, length = half.counts, recipe.sequence_length
    if counts is None or not counts.num_documents:
        return
    if half.corpus.judged is not None:
        report_groups(half, counts, recipe)
        return
    what, all_of = describe(half.source), f"{counts.num_documents:,} documents"
    if counts.num_truncated:
        log.warning(
            "%s: %s of %s are longer than a row of %d tokens and were truncated: %s tokens lost; the longest has %s "
            "(data.overflow=split keeps all, sequence_length holds more)",
            what,
            f"{counts.num_truncated:,}",
            all_of,
            length,
            f"{counts.num_dropped:,}",
            f"{counts.longest:,}",
        )
    if counts.num_split:
        level = logging.WARNING if half.corpus.trained is not None else logging.INFO
        text = "%s: %s of %s are longer than a row of %d tokens and were split into rows that do not see each other"
        log.log(level, text, what, f"{counts.num_split:,}", all_of, length)
    if counts.num_empty:
        are = "are trained on nothing" if recipe.packing == "documents" else "were left out"
        text = "%s: %s of %s have no trained token in the rows and %s"
        log.warning(text, what, f"{counts.num_empty:,}", all_of, are)
    if counts.num_pieces_left_out:
        text = "%s: %s pieces of documents that were split have no trained token and were left out"
        log.info(text, what, f"{counts.num_pieces_left_out:,}")
    log.info(
        "%s: %s in %s rows, %.1f%% of whose slots hold tokens",
        what,
        all_of,
        f"{len(half.rows):,}",
        100 * efficiency(half, length),
    )


def efficiency(half: SourceRows, sequence_length: int) -> float:
    """Tokens over slots of the rows; those of ragged rows are counted before their padding is cut."""
    slots = len(half.rows) * sequence_length
    num = half.corpus.num_tokens if half.counts is None else half.counts.num_tokens
    return num / slots if slots else 0.0


class LeftOut(NamedTuple):
    """Groups of answers of a source that are in no row for the same reason.

    Attributes:
        first: the first one's number in the source.
        remedy: what a user may do.
    """

    why: str
    num: int
    first: int
    remedy: str


def groups_left_out(half: SourceRows, recipe: Recipe) -> list[LeftOut]:
    """Groups of answers of the source that teach nothing, by reason."""
    counts = half.counts
    assert counts is not None and half.corpus.numbers is not None
    remedy = "leave them out of the data"
    if isinstance(recipe.algorithm, ProcessReward):
        remedy += ", or choose another algorithm.separator"
    left_out = [LeftOut(why, num, first, remedy) for why, (num, first) in half.nothing_to_learn.items()]
    if not counts.num_cut_off:
        return left_out
    why = f"they do not fit in a row of {recipe.sequence_length} tokens"
    remedy = f"raise sequence_length (the longest takes {counts.longest:,})"
    # Of one source they have a mismatch all, or none.
    if counts.longest <= recipe.sequence_length:
        why = "there is no other prompt whose answer a mismatch could be made of"
        remedy = f"give answers to other prompts{', or hold out more' if held_out_fraction(recipe.data) else ''}"
    assert counts.first_empty is not None
    return [*left_out, LeftOut(why, counts.num_cut_off, int(half.corpus.numbers[counts.first_empty]), remedy)]


def check_groups(half: SourceRows, recipe: Recipe) -> None:
    """Raises InputError where more groups of answers than data.max_empty_share teach nothing."""
    counts = half.counts
    assert counts is not None
    left_out = groups_left_out(half, recipe)
    num = sum(reason.num for reason in left_out)
    num_all = num + counts.num_documents - counts.num_cut_off
    if not num or (num / num_all <= recipe.data.max_empty_share and len(half.rows)):
        return
    reasons = [
        f"{reason.num:,}: {reason.why}, the first is {place_of_example(half, reason.first)}" for reason in left_out
    ]
    remedies = dict.fromkeys(reason.remedy for reason in left_out)
    raise InputError(
        f"{num:,} of {num_all:,} groups of answers of {describe(half.source)} ({num / num_all:.1%}) teach nothing "
        f"({'; '.join(reasons)}); data.max_empty_share is {recipe.data.max_empty_share:g}",
        where=half.key,
        remedy="; ".join([*remedies, *(["or raise data.max_empty_share"] if len(half.rows) else [])]),
    )


def check_labels(train: Sequence[SourceRows], recipe: Recipe) -> None:
    """Raises InputError where all answers that KTO would train on are good, or all are bad."""
    if not isinstance(recipe.algorithm, KTO):
        return
    levels = set[float]()
    for half in train:
        assert isinstance(half.plan, GroupPlan) and half.corpus.judged is not None
        # Each document is one answer.
        levels |= set(np.unique(half.corpus.judged.values[half.plan.documents, 0]).tolist())
    if len(levels) != 1:
        return
    half = next(half for half in train if len(half.rows))
    assert isinstance(half.plan, GroupPlan)
    first = place_of(half, int(half.plan.documents.min()))
    kind, other, label = ("bad", "good", "true") if levels.pop() else ("good", "bad", "false")
    remedy = f"add {other} answers (label {label})"
    if held_out_fraction(recipe.data):
        remedy += ", or hold out less if they are there"
    if kind == "good":
        remedy += "; answers that are only to be imitated are for algorithm.kind sft"
    raise InputError(
        f"all answers to train on are {kind}, and kto learns from good and bad ones; the first is {first}",
        where="data.train",
        remedy=remedy,
    )


def report_groups(half: SourceRows, counts: RowCounts, recipe: Recipe) -> None:
    """Logs what became of groups of answers."""
    what = describe(half.source)
    for reason in groups_left_out(half, recipe):
        log.warning(
            "%s: %s groups of answers were left out: %s; the first is %s",
            what,
            f"{reason.num:,}",
            reason.why,
            place_of_example(half, reason.first),
        )
    log.info(
        "%s: %s groups of answers in %s rows, %.1f%% of whose slots hold tokens",
        what,
        f"{counts.num_documents - counts.num_cut_off:,}",
        f"{len(half.rows):,}",
        100 * efficiency(half, recipe.sequence_length),
    )
