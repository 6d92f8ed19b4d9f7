"""Worked answers with a slip: one result is wrong and carried through, so that all else looks as in a right answer.

What preferences are learnt from: pairs of a right and a wrong answer, and steps that are right up to the slip.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from llmtrain.fetch.expressions import Operation, Worked, apply, work_out

_MISTAKEN_FOR = {"+": "-", "-": "+", "*": "+", "/": "-"}


class Slip(NamedTuple):
    """A wrong working.

    Attributes:
        operation: the number, from 0, of the first operation whose result is wrong.
        kind: off by one, wrong operation or swapped digits.
    """

    worked: Worked
    operation: int
    kind: str


def slip(expression: str, chooser: random.Random) -> Slip | None:
    """A working of the expression that goes wrong somewhere, to another value than the right one.

    Returns:
        None where no slip changes the value, as with all that is multiplied by zero.
    """
    right = work_out(expression)
    assert right is not None, "only what can be worked out is asked"
    numbers = list(range(len(right.operations)))
    chooser.shuffle(numbers)
    for number in numbers:
        kinds = list(_wrong_results(right.operations[number], chooser))
        chooser.shuffle(kinds)
        for kind, result in kinds:
            wrong = work_out(expression, {number: result})
            if wrong is not None and wrong.value != right.value:
                return Slip(wrong, number, kind)
    return None


def _wrong_results(operation: Operation, chooser: random.Random) -> Iterator[tuple[str, int]]:
    """Each kind of slip that is possible there, with the result that it gives."""
    right = operation.result
    yield "off by one", right + chooser.choice((-1, 1))
    mistaken = apply(operation.left, _MISTAKEN_FOR[operation.operator], operation.right)
    if mistaken is not None and mistaken != right:
        yield "wrong operation", mistaken
    digits = str(abs(right))
    swapped = {f"{digits[:i]}{digits[i + 1]}{digits[i]}{digits[i + 2 :]}" for i in range(len(digits) - 1)}
    swapped = {other for other in swapped if other != digits and not other.startswith("0")}
    if swapped:
        number = int(chooser.choice(sorted(swapped)))
        yield "swapped digits", -number if right < 0 else number
