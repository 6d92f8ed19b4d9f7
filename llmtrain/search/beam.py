"""Step beam search guided by a process reward model (Snell et al., arXiv 2408.03314, section 5.2).

    level 0       N first steps are sampled, or as many as are a multiple of M
    each level    the N / M best paths are kept, and from each that can go on M next steps are sampled

N is the budget, M the width: a level has N steps at most, and so a search about as many as N whole answers. Paths with
the same tokens are one. A whole answer takes the place of a path that could go on, as long as nothing better drives it
out; the search ends when all that are kept are whole. The answer is the best whole one that was seen.
"""

from llmtrain.search.paths import Branch, Driver, Found, Path, distinct


def beam_search(driver: Driver, budget: int, width: int) -> list[Found]:
    """The best answer of each question, all of which go on together, a level at a time.

    Args:
        budget: N.
        width: M; N where that is less.
    """
    width = min(width, budget)
    keep = budget // width
    # Where there is one path, the empty one, it stands for all N / M of them.
    kept = [[Found(Path(question), 0.0)] for question in range(driver.num_questions)]
    best: dict[int, Found] = {}
    depth = 0
    while True:
        fan_out = width if depth else keep * width
        branches = [
            Branch(found.path, rank * fan_out + number, depth)
            for paths in kept
            for rank, found in enumerate(paths)
            if not found.path.is_whole
            for number in range(fan_out)
        ]
        if not branches:
            return [best[question] for question in range(driver.num_questions)]
        for question, steps in enumerate(_valued(driver, branches)):
            if steps:
                pool = [found for found in kept[question] if found.path.is_whole] + steps
                for found in pool:
                    if found.path.is_whole and (question not in best or found.value > best[question].value):
                        best[question] = found
                # Sorting is stable: of equal ones the whole answers come first, then those that were sampled first.
                kept[question] = sorted(pool, key=lambda found: -found.value)[:keep]
        depth += 1


def _valued(driver: Driver, branches: list[Branch]) -> list[list[Found]]:
    """The new paths of each question, each once, with their values."""
    by_question: list[list[Path]] = [[] for _ in range(driver.num_questions)]
    for path in driver.extend(branches):
        by_question[path.question].append(path)
    paths = [path for new in by_question for path in distinct(new)]
    valued: list[list[Found]] = [[] for _ in by_question]
    for path, value in zip(paths, driver.values(paths), strict=True):
        valued[path.question].append(Found(path, value))
    return valued
