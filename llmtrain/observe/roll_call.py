"""Where the ranks are, in a few lines however many they are."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from llmtrain.observe.heartbeat import Beat

_SHOWN = 8  # groups of ranks, and ranks by name


def roll_call(beats: Mapping[int, Beat], silent: Mapping[int, float]) -> str:
    """One line for the ranks in each phase, the silent ones and the smallest groups first.

    Args:
        beats: what each rank last said.
        silent: seconds since each of those was heard that are not heard any more.
    """
    groups: dict[tuple[bool, str], list[int]] = defaultdict(list)
    for rank, beat in beats.items():
        groups[rank not in silent, _state(beat)].append(rank)
    lines = []
    for (answers, doing), ranks in sorted(groups.items(), key=lambda group: (group[0][0], len(group[1]))):
        longest = max(beats[rank].seconds for rank in ranks)
        where = f", on {beats[ranks[0]].host}" if len(ranks) == 1 else ""
        quiet = "" if answers else f", silent for {max(silent[rank] for rank in ranks):.0f} s"
        lines.append(f"  {numbers(ranks)}{where}: {doing}, for {longest:.0f} s{quiet}")
    if len(lines) > _SHOWN:
        lines[_SHOWN:] = [f"  and {len(lines) - _SHOWN} more groups of ranks"]
    return "\n".join(lines)


def _state(beat: Beat) -> str:
    if beat.word is None or beat.word.kind == "overdue":
        return beat.doing
    return "lost a rank" if beat.word.kind == "lost" else "has ended"


def named(ranks: Iterable[int], beats: Mapping[int, Beat]) -> str:
    """The ranks with their nodes: "rank 1 on node3, rank 5 on node3"."""
    wanted = list(ranks)
    names = [f"rank {rank} on {beats[rank].host}" for rank in wanted[:_SHOWN]]
    more = len(wanted) - len(names)
    return ", ".join(names) + (f" and {more} more" if more > 0 else "")


def numbers(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if len(texts) > 2 * _SHOWN:
        texts[2 * _SHOWN :] = ["..."]
    alone = len(runs) == 1 and runs[0][0] == runs[0][1]
    return f"{'rank' if alone else 'ranks'} {', '.join(texts)}"
