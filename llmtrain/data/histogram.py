"""How long documents are, in bins that double."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llmtrain.data.cache import TokenCorpus

EIGHTHS = " ▏▎▍▌▋▊▉"
DOCUMENTS_AT_A_TIME = 1 << 20


class Bin(NamedTuple):
    """Documents of `least` to `most` tokens, and how many."""

    least: int
    most: int
    num: int


def length_counts(corpora: Sequence[TokenCorpus], edge: int) -> list[Bin]:
    """Documents by length; bins begin at powers of two, and one of them after `edge` tokens.

    The first and the last bin are not empty. There must be a document.
    """
    powers = [1 << power for power in range(40)]
    edges = np.array(sorted({*powers, edge + 1}))
    counts = np.zeros(len(edges) - 1, np.int64)
    for corpus in corpora:
        for first in range(0, corpus.num_documents, DOCUMENTS_AT_A_TIME):
            counts += np.histogram(corpus.lengths(first, first + DOCUMENTS_AT_A_TIME), edges)[0]
    filled = np.flatnonzero(counts)
    return [
        Bin(int(edges[i]), int(edges[i + 1]) - 1, int(counts[i])) for i in range(int(filled[0]), int(filled[-1]) + 1)
    ]


def bar(share: float, cells: int) -> str:
    """A bar of this share of so many cells, to an eighth of one; any share above zero is seen."""
    eighths = max(round(share * cells * 8), 1 if share > 0 else 0)
    return "█" * (eighths // 8) + (EIGHTHS[eighths % 8] if eighths % 8 else "")
