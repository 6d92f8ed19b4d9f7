"""Two heartbeats on a real store, as two ranks have them."""

import time
from collections.abc import Callable

import pytest
import torch
from torch.distributed import TCPStore

from llmtrain.distributed import SideStore, World
from llmtrain.observe.heartbeat import Beat, Heartbeat, Word, prepare_keys

SILENCE = 1.0


def world(rank: int, size: int = 2) -> World:
    return World(rank, size, rank, size, torch.device("cpu"))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Rank:
    """A heartbeat, and what it says."""

    def __init__(self, server: TCPStore, rank: int, size: int = 2):
        self.doing, self.word = "start-up", None
        client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
        self.store = SideStore(client, None)
        self.heartbeat = Heartbeat(self.store, world(rank, size), ["here"] * size, SILENCE, self._beat, time.monotonic)

    def _beat(self) -> Beat:
        return Beat("here", self.doing, 0.5, self.word)


@pytest.fixture
def server() -> TCPStore:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    prepare_keys(SideStore(server, None), world(0, 4))
    return server


def test_ranks_hear_each_other_and_how_the_run_ended(server: TCPStore) -> None:
    ranks = [Rank(server, 0), Rank(server, 1)]
    main, other = (rank.heartbeat for rank in ranks)
    for heartbeat in (main, other):
        heartbeat.start()
    until(lambda: main.beats[1].number and other.beats[0].number)
    ranks[1].doing = "data of step 7"
    until(lambda: main.beats[1].doing == "data of step 7")
    assert main.said == {} and other.end is None

    ranks[1].word = Word(2, "no such file")
    other.hurry()
    until(lambda: 1 in main.said)
    assert main.beats[1].word == Word(2, "no such file")

    end = Word(2, "rank 1: no such file")
    main.publish(end)
    until(lambda: other.end == end)
    other.close()
    main.close()
    assert not main.is_alive() and not other.is_alive()
    assert main.beats[1].left and other.connected


def test_every_beat_is_news(server: TCPStore) -> None:
    """A rank that does the same for hours is heard all the same."""
    ranks = [Rank(server, 0), Rank(server, 1)]
    main, other = (rank.heartbeat for rank in ranks)
    main.start()
    other.start()
    until(lambda: main.beats[1].number)
    heard = main.heard[1]
    until(lambda: main.heard[1] > heard)
    other.close()
    before = main.heard[1]
    time.sleep(0.5)
    heard = main.heard[1]
    time.sleep(2 * main.interval)
    assert main.heard[1] == heard >= before
    main.close()


def test_rank_0_hears_all_and_the_others_only_rank_0(server: TCPStore) -> None:
    ranks = [Rank(server, rank, size=4) for rank in range(4)]
    for rank in ranks:
        rank.heartbeat.start()
    until(lambda: all(beat.number for beat in ranks[0].heartbeat.beats.values()))
    assert set(ranks[0].heartbeat.beats) == {1, 2, 3}
    assert all(set(rank.heartbeat.beats) == {0} for rank in ranks[1:])
    for rank in reversed(ranks):
        rank.heartbeat.close()


def test_a_store_that_is_gone_is_noticed() -> None:
    server: TCPStore | None = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert server is not None
    prepare_keys(SideStore(server, None), world(0))
    rank = Rank(server, 1)
    rank.heartbeat.start()
    probe = server
    until(lambda: probe.get("beat/1"))
    assert rank.heartbeat.connected
    server = probe = None  # closes it
    rank.word = Word(1, "a collective failed", "lost")  # seeks it before it speaks
    until(lambda: not rank.heartbeat.connected)
    assert not rank.heartbeat.is_alive()
    rank.heartbeat.close()


def test_rank_0_looks_rarely_where_there_are_many(server: TCPStore) -> None:
    store = SideStore(server, None)
    intervals = [
        Heartbeat(store, world(rank, size), [""] * size, 60, lambda: Beat("", "", 0), time.monotonic).interval
        for rank, size in ((0, 2), (0, 1024), (1, 1024))
    ]
    assert intervals == [1.0, 4.0, 1.0]
