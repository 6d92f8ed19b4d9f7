"""Answers as reward models are given them."""

import logging
import math
from pathlib import Path

import pytest

from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.errors import InputError
from llmtrain.search.scoring import Grader, score_answers
from tests import tiny
from tests.chats import write_chat_model
from tests.unit.search.graders import HandScorer

ASKED = [{"role": "system", "content": "the fox"}, {"role": "user", "content": "the quick brown"}]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("scoring") / "model"
    write_chat_model(directory)
    return directory


def test_messages_go_through_the_reward_models_own_template(chat: Path) -> None:
    """Whatever template and tokens the model that answered has."""
    tokenizer = load_tokenizer(str(chat))
    scorer = HandScorer(tokenizer, len)
    assert score_answers(scorer, [(ASKED, "dog"), (ASKED, "lazy dog")]) == [len(row) for row in scorer.rows][::-1]
    whole = [*ASKED, {"role": "assistant", "content": "lazy dog"}]
    assert scorer.rows[0] == tokenizer.apply_chat_template(whole, return_dict=False)


def test_texts_are_framed_as_documents() -> None:
    scorer = HandScorer(tiny.tokenizer(), lambda ids: -float(len(ids)))
    assert score_answers(scorer, [("w3 w4", " w5"), ("w3", " w5")]) == [-5, -4]
    assert scorer.rows == [[0, 3, 4, 5, 1], [0, 3, 5, 1]]


@pytest.mark.parametrize(("how", "score"), [("product", 0.5 * 0.25), ("min", 0.25), ("last", 0.5), (None, 0.125)])
def test_steps_are_judged_where_their_separators_end(how, score: float) -> None:
    """By a judge that reads the ids up to there: the first step is worse."""
    chances = {(0, 3, 5, 90): 0.25, (0, 3, 5, 90, 6, 7, 90): 0.5}
    scorer = HandScorer(tiny.tokenizer(), lambda ids: chances[tuple(ids)], "process", " w90")
    assert score_answers(scorer, [("w3", " w5 w90 w6 w7")], how) == [score]
    assert score_answers(scorer, [("w3", " w5 w90 w6 w7 w90")], how) == [score]  # not whole yet


def test_an_answer_of_nothing_is_one_step() -> None:
    scorer = HandScorer(tiny.tokenizer(), lambda ids: {(0, 3, 90): 0.5}[tuple(ids)], "process", " w90")
    assert score_answers(scorer, [("w3", "")]) == [0.5]


def test_an_answer_that_cannot_be_read_gets_the_worst_score(caplog: pytest.LogCaptureFixture) -> None:
    words = " w5" * 9
    outcome = Grader(HandScorer(tiny.tokenizer(), lambda ids: 0.5, window=8))
    told: list[int] = []
    with caplog.at_level(logging.WARNING):
        scores, lengths = outcome.score([("w3", words), ("w3", " w5"), ("w3", words)], told.append)
        outcome.score([("w3", words)])
        assert not caplog.text, "a search has answers judged in many parts"
        outcome.tell_unread("beam")
        outcome.tell_unread("mcts")
    assert scores == [-math.inf, 0.5, -math.inf] and lengths == [0, 4, 0] and sum(told) == 3
    assert "beam: 3 answers get the worst score" in caplog.text and "window of 8 tokens" in caplog.text
    assert "mcts" not in caplog.text
    process = Grader(HandScorer(tiny.tokenizer(), lambda ids: 0.5, "process", " w90", window=8))
    assert process.score([("w3", words), ("w3", " w5")])[0] == [0.0, 0.5]


def test_a_prompt_that_cannot_be_read_is_refused(chat: Path) -> None:
    with pytest.raises(InputError, match=r"answer 2: the tokenizer has no chat template"):
        score_answers(HandScorer(tiny.tokenizer(), len), [("w3", "w4"), (ASKED, "w4")])
    scorer = HandScorer(load_tokenizer(str(chat)), len, window=8)
    with pytest.raises(InputError, match=r"answer 1: .* do not fit the reward model's window of 8"):
        score_answers(scorer, [(ASKED, "dog")])


def test_an_aggregate_is_for_steps() -> None:
    with pytest.raises(InputError, match="judges whole answers"):
        Grader(HandScorer(tiny.tokenizer(), len), "min")
