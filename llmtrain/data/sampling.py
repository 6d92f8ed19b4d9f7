"""An even sample of documents that fits into a number of bytes, from one pass over a stream."""

import heapq
from collections.abc import Iterable, Iterator

from llmtrain.data.hashing import uniform

PARTS_OF_LONG_DOCUMENTS = 100  # a document above 1/100 of the budget is sampled by parts of this size


def even_sample(documents: Iterable[str], max_bytes: int) -> list[str]:
    """Texts of at most `max_bytes` together, chosen by a hash of their content.

    All of the documents where they fit. The choice and its order do not depend on the order of
    the documents. Memory is that of the sample.
    """
    chosen: list[tuple[float, str, int]] = []  # a heap with the largest hash on top
    bar = (-1.0, "", 0)  # the last that was thrown out; nothing of a larger hash may come in after it
    total = 0
    for text in documents:
        for part in _parts(text, max(1, max_bytes // PARTS_OF_LONG_DOCUMENTS)):
            entry = (-uniform(part, "sample"), part, len(part.encode("utf-8")))
            if entry <= bar:
                continue
            heapq.heappush(chosen, entry)
            total += entry[2]
            while total > max_bytes:
                bar = heapq.heappop(chosen)
                total -= bar[2]
    return [text for _, text, _ in sorted(chosen, reverse=True)]


def _parts(text: str, max_bytes: int) -> Iterator[str]:
    if len(text) * 4 <= max_bytes or len(text.encode("utf-8")) <= max_bytes:
        yield text
    else:
        yield from pieces(text, max(1, max_bytes // 4))  # a character has at most four bytes


def pieces(text: str, max_characters: int) -> Iterator[str]:
    """The text in pieces of at most `max_characters`, cut after a line where there is an end of one."""
    start = 0
    while start < len(text):
        end = min(start + max_characters, len(text))
        if end < len(text):
            line_end = text.rfind("\n", start, end)
            end = line_end + 1 if line_end >= 0 else end
        yield text[start:end]
        start = end
