"""The policy and the judge of a search, on a tiny model."""

from pathlib import Path as FilePath

import pytest
import torch

from llmtrain.evaluation.asking import Asked
from llmtrain.models.saved import Saved, load_saved
from llmtrain.sampling.batched import Sampling, decode_after
from llmtrain.search.driver import ModelDriver, Policy
from llmtrain.search.paths import Branch, Path
from llmtrain.search.scoring import Grader
from tests.saved import write_model
from tests.unit.search.graders import HandScorer

SEPARATOR = " w9"  # and so the words w9 and w90 to w95 end a step
SAMPLING = Sampling(max_new_tokens=24, temperature=2.0, seed=5)
QUESTIONS = [Asked([0, 3, 4], "w3 w4"), Asked([0, 5], "w5"), Asked([0, 6, 7, 8, 3], "w6 w7 w8 w3")]


@pytest.fixture
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    directory = tmp_path_factory.getbasetemp() / "search-driver"
    return load_saved(str(directory if directory.exists() else write_model(directory)))


def make_driver(saved: Saved, batch_tokens: int = 8192, sampling: Sampling = SAMPLING) -> ModelDriver:
    grader = Grader(HandScorer(saved.tokenizer, lambda ids: 1 / len(ids), "process", SEPARATOR))
    return ModelDriver(Policy(saved, QUESTIONS, batch_tokens), sampling, grader)


def branches(paths: list[Path], num: int, depth: int) -> list[Branch]:
    return [Branch(path, number, depth) for path in paths if not path.is_whole for number in range(num)]


def grown(driver: ModelDriver, levels: int, num: int = 3) -> list[list[Path]]:
    """All paths, level by level; each with `num` steps after it."""
    all_levels = [[Path(question) for question in range(len(QUESTIONS))]]
    for depth in range(levels):
        all_levels.append(driver.extend(branches(all_levels[-1], num, depth)))
    return all_levels[1:]


def test_steps_end_at_separators_and_go_on_from_their_tokens(saved: Saved) -> None:
    driver = make_driver(saved)
    levels = grown(driver, 3)
    before = {(path.question, path.ids) for path in levels[0]}
    assert any(not path.is_whole for path in levels[1])
    for depth, paths in enumerate(levels, start=1):
        for path in paths:
            assert path.text == decode_after(saved.tokenizer, QUESTIONS[path.question].ids, path.ids).removesuffix(
                " </s>"
            )
            if not path.is_whole:
                assert path.text.count(SEPARATOR) == depth and len(path.ids) < SAMPLING.max_new_tokens
            assert len(path.ids) <= SAMPLING.max_new_tokens
    assert any((path.question, path.ids[:cut]) in before for path in levels[1] for cut in range(len(path.ids)))
    assert sum(spent.generated for spent in driver.spent) == sum(
        len(path.ids) - (0 if depth == 0 else _length_before(path, levels[depth - 1]))
        for depth, paths in enumerate(levels)
        for path in paths
    )


def _length_before(path: Path, level: list[Path]) -> int:
    return max(
        len(one.ids)
        for one in level
        if one.question == path.question and not one.is_whole and path.ids[: len(one.ids)] == one.ids
    )


def test_an_answer_ends_at_its_limit(saved: Saved) -> None:
    levels = grown(make_driver(saved), 12, num=1)
    ended = [path for paths in levels for path in paths if path.is_whole]
    assert {path.question for path in ended} == {0, 1, 2}
    assert all(len(path.ids) == SAMPLING.max_new_tokens for path in ended if path.finish == "length")


def test_a_step_draws_the_same_in_any_company(saved: Saved) -> None:
    together = grown(make_driver(saved), 2)
    small = grown(make_driver(saved, batch_tokens=40), 2)
    assert small == together
    alone = [make_driver(saved).extend([branch])[0] for branch in branches(together[0], 3, 1)]
    assert alone == together[1]


def test_other_samples_depths_and_seeds_draw_otherwise(saved: Saved) -> None:
    driver = make_driver(saved)
    same, sample, depth = driver.extend([Branch(Path(0), 0, 0), Branch(Path(0), 1, 0), Branch(Path(0), 0, 1)])
    other = make_driver(saved, sampling=Sampling(24, 2.0, seed=6)).extend([Branch(Path(0), 0, 0)])[0]
    assert len({path.ids for path in (same, sample, depth, other)}) == 4


def test_a_stop_text_of_the_task_ends_an_answer(saved: Saved) -> None:
    """Also one that begins in one step and ends in the next."""
    driver = make_driver(saved)
    step = next(path for path in grown(driver, 1)[0] if not path.is_whole)
    [after] = driver.extend([Branch(step, 0, 1)])
    stop = after.text[len(step.text) - 2 : len(step.text) + 2]
    stopping = make_driver(saved, sampling=Sampling(24, 2.0, seed=5, stop=(stop,)))
    [ended] = stopping.extend([Branch(step, 0, 1)])
    assert ended.finish == "stop" and ended.text == after.text[: after.text.index(stop)]


@torch.no_grad()
def test_log_probs_are_those_of_whole_forwards(saved: Saved) -> None:
    driver = make_driver(saved)
    first, second = grown(driver, 2)
    parents = {(path.question, path.ids): path for path in first}
    steps = [(Path(path.question), path) for path in first]
    for path in second:
        cut = next(n for n in range(len(path.ids), 0, -1) if (path.question, path.ids[:n]) in parents)
        if cut < len(path.ids):
            steps.append((parents[path.question, path.ids[:cut]], path))
    for (before, after), given in zip(steps, driver.log_probs(steps), strict=True):
        prompt = QUESTIONS[after.question].ids
        ids = torch.tensor([[*prompt, *after.ids]])
        log_probs = saved.decoder(ids).logits[0, :-1].float().log_softmax(-1)
        places = range(len(prompt) + len(before.ids), ids.shape[1])
        assert given == pytest.approx(sum(float(log_probs[place - 1, ids[0, place]]) for place in places), abs=1e-4)


def test_values_are_the_graders_and_are_accounted_for(saved: Saved) -> None:
    driver = make_driver(saved)
    paths = [Path(0, (5, 9), " w5 w9"), Path(1, (6,), " w6", "stop")]
    values = driver.values(paths)
    assert values == [1 / 5, 1 / 4]  # of <s> w3 w4 w5 w9, and <s> w5 w6 w9
    assert [spent.read for spent in driver.spent] == [6, 5, 0]  # with </s>


def test_the_models_own_ends_hold_for_every_driver(tmp_path: FilePath, saved: Saved) -> None:
    """A generator drops what the model's files say of it, and a policy has several."""
    policy = Policy(saved, QUESTIONS)
    policy.generator(SAMPLING)
    assert 1 in policy.end_ids
