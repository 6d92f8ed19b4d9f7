"""Held-out figures, samples and state of causal LM; its loss is proven in tests/parity and tests/truths."""

import math
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch

from llmtrain.algorithms.causal_lm import nll
from llmtrain.algorithms.texts import HeldOut, Supervised, TextSamples, bytes_of
from llmtrain.contracts import POLICY, MicroBatch, Sample
from llmtrain.data.documents import Texts
from llmtrain.errors import InputError
from llmtrain.models.decoder import Decoder
from llmtrain.models.loss_head import IGNORE_INDEX
from llmtrain.recipe.schema import Samples
from tests import tiny

CPU = torch.device("cpu")
DATA = {"data.train": "abc", "data.validation": "def"}
EOS = 1


def micro_batches(step: int) -> Any:
    """They say which step was asked for."""
    return [step]


def algorithm(held_out: list[MicroBatch] | None = None, samples: Samples | None = None, **changes: Any) -> Supervised:
    settings: dict[str, Any] = {"max_length": 32, "seed": 0, "data_fingerprint": DATA, "state": None} | changes
    tokenizer = tiny.tokenizer()
    texts = TextSamples(samples, tokenizer, settings["max_length"], settings["seed"], Texts(tokenizer).prompt_ids)
    batches = held_out or []
    measured = HeldOut(batches, bytes_of((micro.tensors["targets"] for micro in batches), tokenizer))
    return Supervised(nll, micro_batches, measured, texts, settings["data_fingerprint"], settings["state"])


def row(*ids: int) -> MicroBatch:
    """One document in a row; its last token predicts nothing."""
    input_ids = torch.tensor([ids])
    targets = torch.tensor([[*ids[1:], IGNORE_INDEX]])
    positions, counted = torch.arange(len(ids))[None], torch.arange(len(ids) - 1)
    tensors = {"input_ids": input_ids, "targets": targets, "position_ids": positions, "counted": counted}
    return MicroBatch(tensors, {POLICY: float(len(ids) - 1)}, len(ids))


def test_batches_begin_where_they_are_asked_to() -> None:
    batches = algorithm().step_batches(7)
    assert [next(batches) for _ in range(3)] == [[7], [8], [9]]


@torch.no_grad()
def test_held_out_figures() -> None:
    """Over all tokens of all rows at once, however ragged; w10 is three bytes, </s> none."""
    rows = [row(0, 10, 11, EOS), row(0, 20, 21, 22, 23, 24, 25, EOS), row(0, 5, EOS)]
    decoder = tiny.decoder().eval()
    nll = 0.0
    for micro in rows:
        ids = micro.tensors["input_ids"]
        logprobs = decoder.hf(input_ids=ids).logits[0, :-1].log_softmax(1)
        nll -= logprobs.gather(1, ids[0, 1:, None]).sum().item()
    tokens, num_bytes = 3 + 7 + 2, 2 * 3 + 6 * 3 + 2
    figures = algorithm(rows).evaluate({POLICY: decoder}, CPU)
    assert figures == pytest.approx(
        {
            "loss": nll / tokens,
            "perplexity": math.exp(nll / tokens),
            "bits_per_byte": nll / math.log(2) / num_bytes,
        },
        rel=1e-5,
    )


@torch.no_grad()
def test_figures_of_what_is_not_there() -> None:
    decoder = tiny.decoder().eval()
    assert algorithm([]).evaluate({POLICY: decoder}, CPU) == {}
    figures = algorithm([row(0, EOS)]).evaluate({POLICY: decoder}, CPU)  # nothing but the end is predicted
    assert math.isfinite(figures["loss"])
    assert math.isnan(figures["bits_per_byte"])


@torch.no_grad()
def test_the_perplexity_of_a_model_that_diverged_does_not_overflow() -> None:
    decoder = tiny.decoder(initializer_range=1.0).eval()
    decoder.hf.lm_head.weight.mul_(1e4)
    figures = algorithm([row(0, 10, 11, EOS)]).evaluate({POLICY: decoder}, CPU)
    assert figures["loss"] > 710
    assert math.isfinite(figures["perplexity"])


def test_samples_are_asked_for_as_documents_begin_and_are_the_same_again() -> None:
    """<s> comes before a prompt, as before every document."""
    seen: list[list[int]] = []
    decoder = tiny.decoder().eval()
    decoder.hf.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].tolist()))
    wanted = algorithm(samples=Samples(prompts=["w5 w6"], max_new_tokens=4, temperature=1.0))
    first = wanted.samples({POLICY: cast(Decoder, decoder)}, CPU)
    assert seen[0] == [0, 5, 6]
    assert first == wanted.samples({POLICY: decoder}, CPU)
    assert [sample.prompt for sample in first] == ["w5 w6"]
    assert isinstance(first[0], Sample) and first[0].completion
    assert algorithm(samples=None).samples({POLICY: decoder}, CPU) == []


@pytest.mark.parametrize(("num_words", "fits"), [(30, True), (31, False)])
def test_a_prompt_leaves_room_for_one_token(num_words: int, fits: bool) -> None:
    samples = Samples(prompts=["w5 " * num_words])
    if fits:
        algorithm(samples=samples)
        return
    with pytest.raises(InputError, match=r"samples.prompts: the prompt 'w5 w5.* has 32 tokens; it takes 1 to 31") as e:
        algorithm(samples=samples)
    assert e.value.remedy == "shorten the prompt"


def test_the_state_is_that_of_the_data() -> None:
    state = algorithm().state_dict()
    algorithm().load_state_dict(state)
    for key in DATA:
        with pytest.raises(
            InputError, match=f"{key}: the text, the tokenizer or how rows are made of them changed"
        ) as caught:
            algorithm(data_fingerprint=DATA | {key: "other"}).load_state_dict(state)
        assert caught.value.remedy


class Counter:
    """What of an algorithm changes while it trains."""

    def __init__(self, value: int):
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["value"]


def test_the_state_of_an_algorithm_is_saved_beside_that_of_the_data() -> None:
    state = algorithm(state=Counter(5)).state_dict()
    assert state == {"data": DATA, "value": 5} and algorithm().state_dict() == {"data": DATA}
    restored = Counter(0)
    with pytest.raises(InputError):
        algorithm(state=restored, data_fingerprint={"data.train": "other"}).load_state_dict(state)
    assert restored.value == 0
    algorithm(state=restored).load_state_dict(state)
    assert restored.value == 5
