"""Best-fit decreasing bin packing ("Fewer Truncations Improve Language Modeling", arXiv 2404.10830).

From the longest piece to the shortest, each goes into the row with the least room that still takes
it, or opens a row. All pieces of one length are placed together: the row that fits best goes on
fitting best until it has no room for another piece of that length, because its room has become
smaller than that of all others. So the work is a bisection for each visit of a row, not for each piece.
"""

import bisect

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]


def best_fit(lengths: npt.NDArray[np.integer], capacity: int) -> Int64Array:
    """The row of each piece: int64 like `lengths`, rows numbered from 0 as they are opened.

    The same lengths always give the same rows. Memory is a few numbers for each piece.

    Args:
        lengths: of the pieces, 1-D, each in 1..capacity.
        capacity: of a row.
    """
    if not len(lengths):
        return np.empty(0, np.int64)
    assert lengths.min() >= 1 and lengths.max() <= capacity
    by_length = np.argsort(-lengths.astype(np.int64), kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    placed: list[int] = []  # the rows of the pieces, in the order of `by_length`
    rooms: list[int] = []  # of rows that are not full, each amount once, rising
    rows_with: dict[int, list[int]] = {}
    num_rows = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        left = count
        while left:
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):
                room, row = capacity, num_rows
                num_rows += 1
            else:
                room = rooms[at]
                row = rows_with[room].pop()
                if not rows_with[room]:
                    del rows_with[room], rooms[at]
            num = min(left, room // length)
            placed += [row] * num
            left -= num
            room -= num * length
            if room:
                if room not in rows_with:
                    rows_with[room] = []
                    bisect.insort(rooms, room)
                rows_with[room].append(row)
    rows = np.empty(len(lengths), np.int64)
    rows[by_length] = placed
    return rows
