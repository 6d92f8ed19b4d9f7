"""The even sample: within its budget, independent of order, no favourites."""

import random

from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.sampling import even_sample, pieces
from tests.unit.data.corpora import unicode_text


@given(st.lists(unicode_text), st.integers(1, 2000), st.randoms())
def test_the_budget_holds_and_order_does_not_matter(texts: list[str], max_bytes: int, rng: random.Random) -> None:
    texts = [text for text in texts if text]
    sample = even_sample(texts, max_bytes)
    assert sum(len(text.encode()) for text in sample) <= max_bytes
    shuffled = texts[:]
    rng.shuffle(shuffled)
    assert even_sample(shuffled, max_bytes) == sample


def test_all_of_a_small_corpus_is_taken() -> None:
    texts = [f"text {i}" for i in range(100)]
    assert sorted(even_sample(texts, 100 * 100)) == sorted(texts)


def test_the_sample_is_spread_over_the_stream() -> None:
    texts = [f"text number {i:05d}" for i in range(10_000)]  # 17 bytes each
    sample = even_sample(iter(texts), 17_000)
    assert len(sample) == 1000
    numbers = [int(text[-5:]) for text in sample]
    counts = [sum(low <= number < low + 1000 for number in numbers) for low in range(0, 10_000, 1000)]
    chi_square = sum((count - 100) ** 2 / 100 for count in counts)
    assert chi_square < 27.9  # 9 degrees of freedom, p = 0.001


def test_a_document_above_the_budget_is_sampled_by_parts() -> None:
    lines = [f"line number {i:05d}\n" for i in range(10_000)]
    sample = even_sample(["".join(lines)], 50_000)
    assert 40_000 < sum(map(len, sample)) <= 50_000
    assert all(part.endswith("\n") and part.startswith("line") for part in sample)
    numbers = [int(part[12:17]) for part in sample]
    assert min(numbers) < 1000 and max(numbers) > 9000


@given(unicode_text, st.integers(1, 20))
def test_pieces_are_the_text(text: str, size: int) -> None:
    found = list(pieces(text, size))
    assert "".join(found) == text
    assert all(0 < len(piece) <= size for piece in found)
