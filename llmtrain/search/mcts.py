"""Monte Carlo tree search over steps, with PUCT (AlphaZero, arXiv 1712.01815), guided by a process reward model.

A node is a path; its children are M next steps that were sampled from the policy, those with the same tokens as one.

    choose the child with the largest   Q + c P sqrt(N of the parent) / (1 + N)

Q is the mean value of the answers that were found through the child; before any was, what the judge makes of the child
itself. P is the policy's own probability of the step, normalised over the children. N counts visits.

A simulation goes down from the root until it has a whole answer, and makes the children of what it meets that has none:
a judge of steps values answers that are not whole as well, so nothing is played out at random and thrown away. The
answer's value is added to all nodes on the way. Answers that were visited, and nodes with nothing new below them, are
not entered again. A search of budget N has N / M simulations, and so samples as many steps as N whole answers have at
most; in tokens that may be more, where steps that were not chosen are longer than those that were.

The answer is the whole one of the highest value among all in the tree. AlphaZero takes the most visited child, since
its values are noisy estimates of what follows; here a whole answer's value is final, and it is visited once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmtrain.search.paths import Branch, Driver, Found, Path, distinct

EXPLORATION = 1.25  # c, as AlphaZero's c_init


@dataclass
class _Node:
    """A path in the tree.

    Attributes:
        depth: steps that it has.
        value: the judge's.
        total: sum of the values of the answers that were found through it.
        children: None until they are made.
        closed: there is nothing new below it.
    """

    path: Path
    depth: int = 0
    prior: float = 1.0
    value: float = 0.0
    visits: int = 0
    total: float = 0.0
    children: list["_Node"] | None = None
    closed: bool = False

    @property
    def quality(self) -> float:
        return self.total / self.visits if self.visits else self.value

    def best_child(self) -> "_Node":
        """By PUCT, of those that are not closed; the first of equal ones."""
        assert self.children
        explored = EXPLORATION * math.sqrt(max(1, self.visits))

        def puct(child: _Node) -> float:
            return child.quality + explored * child.prior / (1 + child.visits)

        return max((child for child in self.children if not child.closed), key=puct)


@dataclass
class _Tree:
    """The search of one question."""

    root: _Node
    num_made: int = 0  # nodes that were given children
    whole: list[Found] = field(default_factory=list)

    def walk(self) -> list[_Node]:
        """From the root down to a node without children."""
        nodes = [self.root]
        while nodes[-1].children is not None:
            nodes.append(nodes[-1].best_child())
        return nodes

    def back_up(self, nodes: Sequence[_Node]) -> None:
        """Adds the value of the answer at the end of a walk to all of it."""
        for node in reversed(nodes):
            node.visits += 1
            node.total += nodes[-1].value
            node.closed = node.children is None or all(child.closed for child in node.children)


def tree_search(driver: Driver, budget: int, width: int) -> list[Found]:
    """The best answer of each question; in a round the tree of each grows by the children of one node.

    Args:
        budget: N.
        width: M; N where that is less.
    """
    width = min(width, budget)
    trees = [_Tree(_Node(Path(question))) for question in range(driver.num_questions)]
    left = [budget // width] * len(trees)
    while True:
        waiting: list[tuple[_Tree, _Node]] = []
        for question, tree in enumerate(trees):
            while left[question] and not tree.root.closed:
                nodes = tree.walk()
                if not nodes[-1].path.is_whole:
                    waiting.append((tree, nodes[-1]))
                    break
                tree.back_up(nodes)
                left[question] -= 1
        if not waiting:
            return [max(tree.whole, key=lambda found: found.value) for tree in trees]
        _make_children(driver, waiting, width)


def _make_children(driver: Driver, waiting: Sequence[tuple[_Tree, _Node]], width: int) -> None:
    """Gives each node children: one call of the policy and of the judge for all."""
    branches = []
    for tree, node in waiting:
        branches += [Branch(node.path, tree.num_made * width + number, node.depth) for number in range(width)]
        tree.num_made += 1
    sampled = driver.extend(branches)
    steps = [distinct(sampled[first : first + width]) for first in range(0, len(sampled), width)]
    paths = [path for new in steps for path in new]
    values = iter(driver.values(paths))
    before_after = [(node.path, path) for (_, node), new in zip(waiting, steps, strict=True) for path in new]
    log_probs = iter(driver.log_probs(before_after))
    for (tree, node), new in zip(waiting, steps, strict=True):
        priors = _normalised([next(log_probs) for _ in new])
        pairs = zip(new, priors, strict=True)
        node.children = [_Node(path, node.depth + 1, prior, next(values)) for path, prior in pairs]
        tree.whole += [Found(child.path, child.value) for child in node.children if child.path.is_whole]


def _normalised(log_probs: Sequence[float]) -> list[float]:
    """Probabilities that sum to 1, from logarithms of which any may underflow."""
    largest = max(log_probs)
    weights = [math.exp(number - largest) for number in log_probs]
    return [weight / sum(weights) for weight in weights]
