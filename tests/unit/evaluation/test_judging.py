"""Answers as a reward model reads them."""

from pathlib import Path

import pytest

from llmtrain.errors import InputError
from llmtrain.evaluation.judging import Answer, Judge, Judgement
from llmtrain.models.scorer import Scorer, load_scorer
from tests import counting


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    return load_scorer(str(counting.write(tmp_path_factory.mktemp("judging") / "outcome", "outcome")))


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    directory: Path = tmp_path_factory.mktemp("judging") / "process"
    return load_scorer(str(counting.write(directory, "process", slope=-1.0, offset=2.0)))


def test_what_is_read(outcome: Scorer, process: Scorer) -> None:
    assert Judge(outcome).encode(Answer("w3 w4", " w5", "here")) == ([0, 3, 4, 5, 1], [4])
    assert Judge(outcome).encode(Answer(None, "w3 w4 w5", "here")) == ([0, 3, 4, 5, 1], [4])
    assert Judge(process).encode(Answer("w3", " w5 w90 w6 w7", "here")) == ([0, 3, 5, 90, 6, 7, 90, 1], [3, 6])
    assert Judge(process).encode(Answer("w3", "", "here")) == ([0, 3, 90, 1], [2])


@pytest.mark.parametrize("batch_tokens", [1, 12, 8192])
def test_the_longest_are_judged_first_and_batches_change_nothing(outcome: Scorer, batch_tokens: int) -> None:
    judge = Judge(outcome, batch_tokens=batch_tokens)
    texts = [" w50 w4", " w4", " w50 w50 w4 w4 w4", " w50 w5 w6 w7"]
    taken: dict[int, Judgement] = {}
    judge.judge([judge.encode(Answer("w3", text, "here")) for text in texts], taken.__setitem__)
    assert list(taken) == [2, 3, 0, 1]
    for index, text in enumerate(texts):
        expected = counting.seen(counting.ids_of(f"w3{text}"))
        assert taken[index] == Judgement(pytest.approx(expected, rel=1e-4, abs=1e-5), None)


def test_answers_that_a_process_model_cannot_judge(process: Scorer) -> None:
    judge = Judge(process)
    with pytest.raises(InputError, match=r"row 3: .*no tools"):
        judge.encode(Answer([{"role": "user", "content": "w3"}], "w4", "row 3", tools=[{"function": {}}]))
    with pytest.raises(InputError, match=r"row 4: the last message is no text"):
        judge.encode(Answer(None, [{"role": "assistant", "content": None, "tool_calls": []}], "row 4"))


def test_rows_that_are_too_long_are_told_with_the_first_place(outcome: Scorer) -> None:
    judge = Judge(outcome)
    rows = [judge.encode(Answer("w3", " w4" * num, "here")) for num in (1, 61, 62, 80)]
    assert [judge.fits(row) for row in rows] == [True, True, False, False]
    error = judge.too_long(["a", "b", "c", "d"], rows, "shorten")
    assert error is not None and error.where == "c" and "2 of 4" in error.message and "has 65" in error.message
    assert judge.too_long(["a", "b"], rows[:2], "shorten") is None


def test_an_aggregate_is_for_steps(outcome: Scorer, process: Scorer) -> None:
    with pytest.raises(InputError, match="min of the steps"):
        Judge(outcome, "min")
    assert (Judge(outcome).how, Judge(process).how, Judge(process, "last").how) == (None, "product", "last")
