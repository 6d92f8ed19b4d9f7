"""Lengths in bins, and bars of eighths."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.histogram import bar, length_counts
from tests.unit.data.corpora import corpus_of


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=50), st.integers(2, 6000))
def test_each_document_is_in_one_bin(lengths: list[int], edge: int) -> None:
    bins = length_counts([corpus_of(lengths), corpus_of(lengths[:3])], edge)
    for entry in bins:
        assert entry.num == sum(entry.least <= length <= entry.most for length in [*lengths, *lengths[:3]])
        assert entry.most <= edge or entry.least > edge
    assert sum(entry.num for entry in bins) == len(lengths) + len(lengths[:3])
    assert bins[0].num and bins[-1].num
    assert all(later.least == earlier.most + 1 for earlier, later in pairwise(bins))


def test_bars() -> None:
    assert [bar(share, 2) for share in (0, 1e-9, 1 / 16, 0.5, 9 / 16, 1)] == ["", "▏", "▏", "█", "█▏", "██"]
