"""Which documents were there before, by 128-bit hashes of their content."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16


class Duplicates:
    """Remembers contents: 16 bytes for each different one, 32 while they are merged.

    The hashes lie in sorted runs, each at least twice as long as the next one; a new batch is merged
    with the runs that are not. So a million documents are some twenty runs to look into at most.
    """

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.bytes_]] = []

    def are_new(self, contents: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether each content is neither one of an earlier call nor of an earlier place in this one."""
        digests = b"".join(
            hashlib.blake2b(content.encode("utf-8"), digest_size=DIGEST_BYTES).digest() for content in contents
        )
        # numpy strips zero bytes from the end of S, on both sides of a comparison: equal lengths stay equal.
        hashes = np.frombuffer(digests, f"S{DIGEST_BYTES}")
        unique, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(unique), bool)
        for run in self._runs:
            at = np.minimum(np.searchsorted(run, unique), len(run) - 1)
            known |= run[at] == unique
        new = np.zeros(len(hashes), bool)
        new[first[~known]] = True
        self._remember(unique[~known])
        return new

    def _remember(self, run: npt.NDArray[np.bytes_]) -> None:
        if not len(run):
            return
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # merges the two runs that it finds
        self._runs.append(run)
