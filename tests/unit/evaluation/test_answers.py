import pytest

from llmtrain.evaluation.answers import equals, find, find_mathematics, mathematically_equals, normalized

ANSWER = r"<answer>\s*(?P<answer>.*?)\s*</answer>"


@pytest.mark.parametrize(
    ("text", "pattern", "which", "found"),
    [
        ("so <answer> 42 </answer>", ANSWER, "last", "42"),
        ("<answer>1</answer> no, <answer>2</answer>", ANSWER, "last", "2"),
        ("<answer>1</answer> no, <answer>2</answer>", ANSWER, "first", "1"),
        ("<answer>a\nb</answer>", ANSWER, "last", "a\nb"),
        ("it is 42", ANSWER, "last", None),
        ("it is 42 or 43", r"(\d+) or", "last", "42"),
        ("it is 42", r"\d+", "last", "42"),
        (" as it is ", None, "last", " as it is "),
    ],
)
def test_find(text: str, pattern: str | None, which: str, found: str | None) -> None:
    assert find(text, pattern, which) == found  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("1,200.50", "1200.5"),
        ("$42", "42"),
        ("42.", "42.0"),
        ("-0", "0"),
        ("\u22123", "-3"),
        ("+7", "7"),
        ("1e3", "1000"),
        ("007", "7"),
    ],
)
def test_numbers_are_compared_by_value(text: str, same: str) -> None:
    assert normalized(text, ["numeric"]) == normalized(same, ["numeric"])
    assert equals([same], ["numeric"])(text)
    assert not equals([same], ["strip"])(text)


@pytest.mark.parametrize("text", ["nan", "inf", "1e999999999", "1_000", "__import__('os')", "4 + 2", "seven", ""])
def test_what_is_no_number_stays_as_it_is(text: str) -> None:
    assert normalized(text, ["numeric"]) == text


def test_steps_of_normalizing() -> None:
    assert normalized(" Yes\n", ["strip", "lower"]) == "yes"
    assert normalized(" Yes", []) == " Yes"
    right = equals(["Paris", "paris, France"], ["strip"])
    assert right(" Paris ") and right("paris, France") and not right("paris")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so $\boxed{\frac{1}{2}}$, not \boxed", None),
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        ("first 3, then 1,200.5 in all", "1,200.5"),
        ("none at all", None),
    ],
)
def test_find_mathematics(text: str, found: str | None) -> None:
    if found is None and "boxed" in text:
        found = "2"  # the last box is not closed: what counts is the last number
        text += "{2"
    assert find_mathematics(text) == found


def test_mathematical_equality() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed: python -m pip install 'llmtrain[eval]'")
    half = mathematically_equals([r"\frac{1}{2}"])
    assert half("0.5") and half(r"$\frac{2}{4}$") and half("1/2") and half(r"\boxed{0.5}")
    assert not half("0.51") and not half("") and not half("(")
    assert mathematically_equals(["x^2 + 2x + 1"])("(x+1)^2")
    assert mathematically_equals(["3", "4"])("4")


@pytest.mark.parametrize(
    "text",
    ["9^{9^{9^9}}", "2^{99999999}", "9**9**9**9", "99999!", "9!!!", "1" * 600, "__import__('os').system('touch made')"],
)
def test_what_would_be_computed_for_ever_or_run_is_not(
    text: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed: python -m pip install 'llmtrain[eval]'")
    from pathlib import Path

    monkeypatch.chdir(str(tmp_path))
    assert not mathematically_equals(["2"])(text)
    assert not Path("made").exists()
