"""Beats: what each rank says of itself every second, also while its main thread sits in a collective.

Every rank writes its own beat into a store that rank 0 hosts; rank 0 reads all of them in one call,
the others read rank 0's. Nothing here goes through the process group.
"""

import json
import threading
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from llmtrain.distributed import SideStore, World
from llmtrain.observe.phases import START_UP

_BEAT_SECONDS = 1.0
_BEATS_IN_A_SILENCE = 4
_RANKS_A_SECOND = 256  # that rank 0 reads: it looks every 4 s at 1,024 ranks
_LEAVING_SECONDS = 3.0  # rank 0 waits so long for the others to have read how the run ended


class Word(NamedTuple):
    """How a rank's part in the run ended, or the whole run.

    Attributes:
        code: exit code.
        message: why; empty for a good end.
        kind: ended: its main thread came to this end. lost: it did only because another rank could not
            be reached. overdue: it did not; it was too long in a phase.
    """

    code: int
    message: str = ""
    kind: Literal["ended", "lost", "overdue"] = "ended"


class Beat(NamedTuple):
    """What a rank says of itself.

    Attributes:
        host: its node.
        doing: its phase, and of which step.
        seconds: for how long.
        word: how its part ended, once it has.
        left: whether it knows how the run ended, and asks no more.
        number: of the beat, so that no two are equal.
    """

    host: str
    doing: str
    seconds: float
    word: Word | None = None
    left: bool = False
    number: int = 0


class Heartbeat(threading.Thread):
    """The thread that exchanges beats, and may be blocked for ever if rank 0 is stopped.

    Args:
        store: for this thread alone.
        world: the ranks, two or more.
        hosts: node of each rank.
        silence: seconds in which several beats shall come.
        beat: what this rank says of itself now.
        clock: seconds.

    Attributes:
        beats: newest of each other rank that is listened to: on rank 0 all, elsewhere rank 0.
        heard: when each of them came, by the clock.
        said: when the first with a word came, of those that said one.
        end: how the run ended, as rank 0 tells.
        connected: False when rank 0's store is gone.
    """

    def __init__(
        self,
        store: SideStore,
        world: World,
        hosts: Sequence[str],
        silence: float,
        beat: Callable[[], Beat],
        clock: Callable[[], float],
    ):
        super().__init__(name="heartbeat", daemon=True)
        self._store, self._world, self._beat, self._clock = store, world, beat, clock
        others = [rank for rank in range(world.size) if rank != world.rank] if world.is_main else [0]
        self._raw = dict.fromkeys(others, b"")
        self.beats = {rank: Beat(hosts[rank], START_UP, 0.0) for rank in others}
        self.heard = dict.fromkeys(others, clock())
        self.said: dict[int, float] = {}
        self.end: Word | None = None
        self.connected = True
        self.interval = min(_BEAT_SECONDS, silence / _BEATS_IN_A_SILENCE)
        if world.is_main:
            self.interval = max(self.interval, world.size / _RANKS_A_SECOND)
        self._hurry = 0.1 + world.size / (10 * _RANKS_A_SECOND)
        self._wake, self._hurried = threading.Event(), False
        self._closing_since: float | None = None
        self._number = 0
        self._sought = False

    def hurry(self) -> None:
        """The run is ending: from here on exchanges follow upon each other, the next at once."""
        self._hurried = True
        self._wake.set()

    def publish(self, end: Word) -> None:
        """Rank 0: tells all ranks how the run ended."""
        self.end = end
        self.hurry()

    def close(self) -> None:
        """Ends the thread: on rank 0 when the others know how the run ended, or after some seconds."""
        self._closing_since = self._clock()
        self.hurry()
        # Not for long: a call of the store that hangs ends with the process.
        self.join(2 * _LEAVING_SECONDS if self._world.is_main else 1.0)

    def run(self) -> None:
        try:
            while not self._exchange():
                self._wake.wait(self._hurry if self._hurried else self.interval)
                self._wake.clear()
        except (ConnectionError, TimeoutError):
            self.connected = False

    def _exchange(self) -> bool:
        """Says and hears what is new; returns whether that was the last time."""
        since = self._closing_since  # read once: the last beat is the one that says so
        self._number += 1
        beat = self._beat()._replace(left=since is not None, number=self._number)
        if beat.word is not None and beat.word.kind == "lost" and not self._sought:
            self._sought = True
            self._store.seek()
        self._store.set(_key(self._world.rank), json.dumps(beat))
        if not self._world.is_main:
            if since is None:
                of_rank_0, end = self._store.get([_key(0), "end"])
                self._hear([of_rank_0])
                self.end = Word(*json.loads(end)) if end else None
            return since is not None
        if self.end is not None:
            self._store.set("end", json.dumps(self.end))
        self._hear(self._store.get([_key(rank) for rank in self._raw]))
        if since is None:
            return False
        now = self._clock()
        there = [rank for rank, beat in self.beats.items() if not beat.left and now - self.heard[rank] < 2]
        return not there or now - since > _LEAVING_SECONDS

    def _hear(self, raws: Sequence[bytes]) -> None:
        for rank, raw in zip(self._raw, raws, strict=True):
            if raw == self._raw[rank]:
                continue
            self._raw[rank] = raw
            host, doing, seconds, word, left, number = json.loads(raw)
            beat = Beat(host, doing, seconds, None if word is None else Word(*word), left, number)
            self.beats[rank], self.heard[rank] = beat, self._clock()
            if beat.word is not None:
                self.said.setdefault(rank, self._clock())


def prepare_keys(store: SideStore, world: World) -> None:
    """Rank 0, before any heartbeat: a store's readers wait for keys that nobody has written."""
    for rank in range(world.size):
        store.set(_key(rank), "")
    store.set("end", "")


def _key(rank: int) -> str:
    return f"beat/{rank}"
