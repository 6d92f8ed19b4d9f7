"""Finding the answer in what a model said, and comparing it. Nothing that a model says is run."""

import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from llmtrain.errors import InputError

_MAX_DIGITS = 400  # of a number that is compared by value
_MAX_CHARACTERS = 500  # of an answer that is parsed as mathematics
# Seconds. What is cut off counts as unequal, so a limit near what a comparison takes would make figures depend on what
# else the machine does; math-verify's own is 5, which a first call on a busy machine has exceeded.
_PATIENCE = 60
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_LATEX = re.compile(r"\\boxed|\$|\\\(|\\\[")
# math-verify computes what it reads: a tower of powers of whole numbers would take all memory.
_POWER = re.compile(r"(?:\^|\*\*)\s*[{(]*\s*-?(?:\d{4,}|\d+\s*[})]*\s*(?:\^|\*\*))|\d\s*!\s*!|\d{4,}\s*!")


def find(text: str, pattern: str | None, which: Literal["first", "last"]) -> str | None:
    """The answer in a text; None where the pattern is not in it."""
    if pattern is None:
        return text
    matches = list(re.finditer(pattern, text, re.DOTALL))
    if not matches:
        return None
    found = matches[0 if which == "first" else -1]
    if "answer" in found.re.groupindex:
        return found["answer"]
    return found[1] if found.re.groups else found[0]


def normalized(text: str, steps: Sequence[str]) -> str:
    """The text as it is compared."""
    if "strip" in steps:
        text = text.strip()
    if "lower" in steps:
        text = text.lower()
    return _by_value(text) if "numeric" in steps else text


def _by_value(text: str) -> str:
    """The one spelling of a number, "1,200.50" and "$1200.5" alike; other text as it is."""
    bare = text.strip().removesuffix(".").replace("$", "").replace(",", "").replace("\u2212", "-").strip()
    try:
        number = Decimal(bare)
    except InvalidOperation:
        return text
    if not number.is_finite() or abs(number.adjusted()) > _MAX_DIGITS or "_" in bare:
        return text
    plain = format(number, "f")
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain in ("-0", "") else plain.removeprefix("+")


def equals(right: Sequence[str], steps: Sequence[str]) -> Callable[[str], bool]:
    """Whether an answer equals one of the right ones."""
    allowed = {normalized(text, steps) for text in right}
    return lambda answer: normalized(answer, steps) in allowed


def mathematically_equals(right: Sequence[str]) -> Callable[[str], bool]:
    """Whether an answer is mathematically equal to one of the right ones.

    Raises:
        InputError: math-verify is not installed.
    """
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise InputError(
            f"math-verify is not installed: {error}", remedy="python -m pip install 'llmtrain[eval]'"
        ) from None
    # LaTeX only, which has a grammar of its own. math-verify's other way to read an expression gives it to
    # sympy's parse_expr, which evaluates it as a program.
    config = [LatexExtractionConfig()]

    def parsed(text: str) -> Any:
        if len(text) > _MAX_CHARACTERS or _POWER.search(text):
            return []
        return parse(_as_latex(text), extraction_config=config, fallback_mode="no_fallback", parsing_timeout=_PATIENCE)

    golds = [gold for gold in (parsed(text) for text in right) if gold]

    def equal(answer: str) -> bool:
        if answer.strip() in {text.strip() for text in right}:
            return True
        target = parsed(answer)
        return bool(target) and any(verify(gold, target, timeout_seconds=_PATIENCE) for gold in golds)

    return equal


def _as_latex(text: str) -> str:
    return text if _LATEX.search(text) else f"${text.strip()}$"


def find_mathematics(text: str) -> str | None:
    """What a model gave as its result where the task has no pattern: the last \\boxed{...}, else the last number."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : end]
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None
