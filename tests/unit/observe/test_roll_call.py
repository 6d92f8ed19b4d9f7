import pytest

from llmtrain.observe.heartbeat import Beat, Word
from llmtrain.observe.roll_call import named, numbers, roll_call


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([0], "rank 0"),
        ([3, 1, 2], "ranks 1-3"),
        ([0, 2], "ranks 0, 2"),
        ([0, 1, 5, 7, 8], "ranks 0-1, 5, 7-8"),
        (range(0, 100, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, ..."),
    ],
)
def test_numbers(ranks: list[int], text: str) -> None:
    assert numbers(ranks) == text


def test_the_silent_come_first_then_the_few() -> None:
    beats = {rank: Beat(f"node{rank // 8}", "collective of step 12", 59.4) for rank in range(1024)}
    beats[17] = Beat("node2", "compute of step 12", 1.0)
    beats[500] = Beat("node62", "data of step 12", 61.0)
    beats[3] = beats[4] = Beat("node0", "start-up", 0.0)
    assert roll_call(beats, {17: 62.0, 3: 60.0, 4: 60.0}).splitlines() == [
        "  rank 17, on node2: compute of step 12, for 1 s, silent for 62 s",
        "  ranks 3-4: start-up, for 0 s, silent for 60 s",
        "  rank 500, on node62: data of step 12, for 61 s",
        "  ranks 0-2, 5-16, 18-499, 501-1023: collective of step 12, for 59 s",
    ]


def test_ranks_that_have_ended() -> None:
    beats = {
        0: Beat("a", "training of step 2", 0.0, Word(1, "no", "lost")),
        1: Beat("a", "training of step 2", 0.0, Word(2, "no")),
        2: Beat("a", "data of step 2", 9.0, Word(1, "no", "overdue")),
    }
    lines = roll_call(beats, {}).splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "lost a rank, for 0 s",
        "has ended, for 0 s",
        "data of step 2, for 9 s",
    ]


def test_many_groups_are_cut() -> None:
    beats = {rank: Beat("a", f"compute of step {rank}", 0.0) for rank in range(30)}
    assert len(roll_call(beats, {}).splitlines()) == 9
    assert roll_call(beats, {}).endswith("and 22 more groups of ranks")


def test_names() -> None:
    beats = {rank: Beat(f"node{rank // 8}", "", 0.0) for rank in range(32)}
    assert named([1, 8], beats) == "rank 1 on node0, rank 8 on node1"
    assert named(range(2, 20), beats).endswith("rank 9 on node1 and 10 more")
