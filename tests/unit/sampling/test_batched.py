"""Batched generation against the same prompts one by one, by whole forwards without a cache."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.models.saved import Saved, load_saved
from llmtrain.sampling.batched import Completion, Request, Sampling, TextGenerator, decode_after, draw
from llmtrain.sampling.prompts import end_ids
from tests import tiny
from tests.saved import ADAPTERS, write_adapter, write_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("batched") / "base")


@pytest.fixture(scope="module")
def saved(base: Path) -> Saved:
    return load_saved(str(base))


def prompts(num: int, longest: int = 20) -> list[list[int]]:
    chooser = random.Random(0)
    return [[chooser.randint(3, 95) for _ in range(chooser.randint(1, longest))] for _ in range(num)]


def answers(
    saved: Saved, requests: list[Request], sampling: Sampling, ends: tuple[int, ...] = (1,), batch_tokens: int = 200
) -> list[Completion]:
    found: dict[int, Completion] = {}
    TextGenerator(saved, ends, sampling, batch_tokens).generate(requests, found.__setitem__)
    return [found[index] for index in range(len(requests))]


@torch.no_grad()
def slow_greedy(saved: Saved, prompt: list[int], ends: tuple[int, ...], num: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < num and not (ids and ids[-1] in ends):
        ids.append(int(saved.logits(torch.tensor([prompt + ids]))[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("kind", ["none", *ADAPTERS])
def test_greedy_batches_equal_single_prompts(base: Path, tmp_path: Path, kind: str) -> None:
    saved = load_saved(str(base if kind == "none" else write_adapter(tmp_path / "adapter", base, kind)))
    ends = (1, *range(3, 20))  # so that rows end at different lengths
    asked = prompts(9)
    done = answers(saved, [Request(ids, row) for row, ids in enumerate(asked)], Sampling(max_new_tokens=12), ends)
    for prompt, completion in zip(asked, done, strict=True):
        assert list(completion.ids) == slow_greedy(saved, prompt, ends, 12)
        assert completion.finish == ("stop" if completion.ids[-1] in ends else "length")
    assert len({len(completion.ids) for completion in done}) > 1


def test_a_row_draws_the_same_in_any_company(saved: Saved) -> None:
    sampling = Sampling(max_new_tokens=10, temperature=1.0, seed=3)
    requests = [Request(ids, row, sample) for row, ids in enumerate(prompts(5)) for sample in range(3)]
    together = answers(saved, requests, sampling, batch_tokens=10_000)
    in_parts = answers(saved, requests, sampling, batch_tokens=1)
    backwards = answers(saved, requests[::-1], sampling)[::-1]
    assert together == in_parts == backwards
    assert len({completion.ids for completion in together}) == len(requests)
    assert answers(saved, requests, Sampling(max_new_tokens=10, temperature=1.0, seed=4)) != together


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mistral": tiny.LLAMA | {"sliding_window": 6},  # shorter than most prompts
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 1,
    },
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prompt_is_read_once_for_all_of_its_answers(tmp_path: Path, architecture: str) -> None:
    """Where a model has keys and values of it; the answers are those of rows alone, which share nothing."""
    model = tiny.decoder(architecture, **ARCHITECTURES[architecture], initializer_range=0.3).hf
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    saved = load_saved(str(tmp_path))
    positions: list[int] = []
    saved.decoder.register_forward_pre_hook(
        lambda module, args, given: positions.append(given["input_ids"].numel()), with_kwargs=True
    )
    asked = prompts(3)
    requests = [Request(ids, row, sample) for row, ids in enumerate(asked) for sample in range(4)]
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=2)
    together = answers(saved, requests, sampling, (), batch_tokens=10_000)
    width = max(map(len, asked))
    shared = 3 * (width - 1) + 8 * len(requests)
    assert sum(positions) == (shared if architecture != "mamba2" else width * len(requests) + 7 * len(requests))
    assert together == answers(saved, requests, sampling, (), batch_tokens=1)
    assert len({completion.ids for completion in together}) == len(requests)


def test_a_prompt_of_one_token_has_nothing_to_share(saved: Saved) -> None:
    requests = [Request(ids, row, sample) for row, ids in enumerate([[7], [8, 9, 10]]) for sample in range(3)]
    sampling = Sampling(max_new_tokens=6, temperature=1.0)
    assert answers(saved, requests, sampling) == answers(saved, requests, sampling, batch_tokens=1)


def test_batches_are_filled_by_how_long_answers_get(base: Path) -> None:
    saved = load_saved(str(base))
    shapes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, new = kwargs["input_ids"].shape
        shapes.append((rows, kwargs["past_key_values"].get_seq_length() + new))

    saved.decoder.register_forward_pre_hook(note, with_kwargs=True)
    requests = [Request(ids, row) for row, ids in enumerate(prompts(60, longest=8))]
    sampling = Sampling(max_new_tokens=50, temperature=1.0)
    done = answers(saved, requests, sampling, ends=(1, *range(3, 25)), batch_tokens=400)  # about 4 tokens each
    assert max(rows * width for rows, width in shapes) <= 400
    assert max(rows for rows, _ in shapes) > 2 * 400 // 50, "more than answers of 50 tokens would leave room for"
    longest = max(len(completion.ids) for completion in done)
    assert longest > 8, "some did not fit where they were begun"
    shapes.clear()
    assert answers(saved, requests, sampling, ends=(1, *range(3, 25)), batch_tokens=1) == done
    assert {rows for rows, _ in shapes} == {1}


def test_what_the_models_files_say_of_sampling_does_not_hold(base: Path) -> None:
    saved = load_saved(str(base))
    expected = [slow_greedy(saved, prompt, (), 12) for prompt in prompts(3)]
    saved.decoder.generation_config.repetition_penalty = 5.0
    saved.decoder.generation_config.do_sample = True
    requests = [Request(ids) for ids in prompts(3)]
    assert [list(done.ids) for done in answers(saved, requests, Sampling(max_new_tokens=12), ())] == expected


def test_the_window_ends_a_completion(saved: Saved) -> None:
    [done] = answers(saved, [Request([3] * 60)], Sampling(max_new_tokens=100), ())
    assert (len(done.ids), done.finish) == (4, "length")


def test_stop_texts(saved: Saved) -> None:
    [free] = answers(saved, [Request([7, 8])], Sampling(max_new_tokens=8), ())
    words = free.text.split()
    [stopped] = answers(saved, [Request([7, 8])], Sampling(max_new_tokens=8, stop=(words[3], "never")), ())
    first = words.index(words[3])
    assert stopped.finish == "stop"
    assert stopped.text.split() == words[:first]
    assert len(stopped.ids) == first + 1


def test_text_comes_in_pieces(saved: Saved) -> None:
    pieces: list[str] = []
    done: list[Completion] = []
    generator = TextGenerator(saved, (1,), Sampling(max_new_tokens=8))
    generator.generate([Request([7, 8])], lambda _, completion: done.append(completion), pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == done[0].text


def test_text_after_a_prompt_keeps_its_space(saved: Saved) -> None:
    assert decode_after(saved.tokenizer, [3, 4], [5, 6]) == " w5 w6"


def test_what_ends_a_completion(base: Path, saved: Saved) -> None:
    fresh = load_saved(str(base))
    fresh.decoder.generation_config.eos_token_id = [8, 9]
    assert end_ids(fresh) == [1, 8, 9]
    fresh.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} <pad> {% endfor %}"
    assert end_ids(fresh) == [1, 2, 8, 9]


def test_drawing() -> None:
    probabilities = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64)

    def drawn(top_p: float) -> list[int]:
        uniforms = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1, None]
        return torch.bincount(draw(probabilities.expand(100, -1), uniforms, top_p)[:, 0], minlength=4).tolist()

    assert drawn(1.0) == [10, 0, 60, 30]
    assert drawn(0.5) == [0, 0, 100, 0]
    shares = drawn(0.8)
    assert shares[0] == shares[1] == 0
    assert abs(shares[2] - 100 * 0.6 / 0.9) <= 1


def test_draws_follow_the_models_distribution(saved: Saved) -> None:
    requests = [Request([7, 8], 0, sample) for sample in range(3000)]
    done = answers(saved, requests, Sampling(max_new_tokens=1, temperature=2.0), (), batch_tokens=100_000)
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in done]), minlength=96)
    expected = torch.softmax(saved.logits(torch.tensor([[7, 8]]))[0, -1].double() / 2.0, 0)
    deviation = (counts / 3000 - expected).abs() / (expected * (1 - expected) / 3000).sqrt()
    assert deviation.max() < 4.5  # of 96 normal deviates the largest is seldom over 4
