"""What the algorithms of text have in common: batches from the data, held-out figures, samples to look at."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmtrain import distributed
from llmtrain.contracts import POLICY, LossOutput, MicroBatch, Sample
from llmtrain.data.tokenizer import token_byte_lengths
from llmtrain.errors import InputError
from llmtrain.models.loss_head import IGNORE_INDEX, linear_cross_entropy
from llmtrain.recipe.schema import Samples
from llmtrain.sampling.autoregressive import continue_prompts

Loss = Callable[[nn.Module, MicroBatch], LossOutput]


def nll_sum(model: nn.Module, micro: MicroBatch) -> Tensor:
    """Sum of -log p(target) over a micro-batch's counted positions, in nats: a float32 scalar."""

    def head_loss(hidden: Tensor, head: nn.Linear) -> Tensor:
        rows, targets = counted(hidden, micro)
        return linear_cross_entropy(rows, head.weight, targets, head.bias)

    loss: Tensor = model(micro.tensors["input_ids"], micro.tensors["position_ids"], head_loss)
    return loss


def counted(hidden: Tensor, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """Hidden states [N, D] and targets [N] of the N positions that count: the head computes no others."""
    where = micro.tensors["counted"]
    return hidden.flatten(0, 1).index_select(0, where), micro.tensors["targets"].flatten().index_select(0, where)


class Stateful(Protocol):
    """What of an algorithm changes while it trains, beside the weights; JSON values only."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Supervised:
    """Training on the data's rows: an `Algorithm` whose loss is given.

    Args:
        loss: sums over one micro-batch; see `Algorithm.loss`.
        micro_batches: gives this rank's micro-batches of any step.
        held_out: rows to measure on.
        samples: texts to look at.
        data_fingerprint: hashes of the training and held-out rows, by key of the recipe; a resumed run must
            find the same, or neither its batches nor its figures would go on from what they were.
        state: what the batches depend on beside (seed, step) and the rows.
    """

    def __init__(
        self,
        loss: Loss,
        micro_batches: Callable[[int], list[MicroBatch]],
        held_out: "Measured",
        samples: "Sampled",
        data_fingerprint: Mapping[str, str],
        state: Stateful | None = None,
    ):
        self._loss, self._micro_batches, self._held_out, self._samples = loss, micro_batches, held_out, samples
        self._data_fingerprint, self._state = data_fingerprint, state

    def step_batches(self, first_step: int) -> Iterator[list[MicroBatch]]:
        for step in itertools.count(first_step):
            yield self._micro_batches(step)

    def loss(self, models: Mapping[str, nn.Module], micro: MicroBatch) -> LossOutput:
        return self._loss(models[POLICY], micro)

    def evaluate(self, models: Mapping[str, nn.Module], device: torch.device) -> dict[str, float]:
        return self._held_out.figures(models[POLICY], device)

    def samples(self, models: Mapping[str, nn.Module], device: torch.device) -> list[Sample]:
        return self._samples.drawn(models[POLICY], device)

    def state_dict(self) -> dict[str, Any]:
        own = {} if self._state is None else self._state.state_dict()
        return {"data": dict(self._data_fingerprint), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, print_of_data in self._data_fingerprint.items():
            if state["data"].get(key) != print_of_data:
                raise InputError(
                    "the text, the tokenizer or how rows are made of them changed since the checkpoint was saved",
                    where=key,
                    remedy="bring the former files back, or start a new run with another name=...",
                )
        if self._state is not None:
            self._state.load_state_dict(state)


class Measured(Protocol):
    """Held-out figures of a model, equal on all ranks."""

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, float]: ...


class Sampled(Protocol):
    """Texts of a model, to look at."""

    def drawn(self, model: nn.Module, device: torch.device) -> list[Sample]: ...


class HeldOut:
    """Held-out rows, and how well a model predicts them.

    Args:
        batches: this rank's share of the rows, as the loss takes them.
        num_bytes: of text that this rank's trained tokens stand for; see `bytes_of`.
        nats: the sum of -log p, or of its bound, over a micro-batch.
    """

    def __init__(
        self,
        batches: Sequence[MicroBatch],
        num_bytes: float,
        nats: Callable[[nn.Module, MicroBatch], Tensor] = nll_sum,
    ):
        self._batches, self._num_bytes, self._nats = batches, num_bytes, nats

    def figures(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Loss (nats a token), perplexity, and bits per byte of the text predicted; equal on all ranks.

        A token that ends a document or a turn counts as a token to predict and as no byte; bits per
        byte are NaN where no token stands for any. Nothing is returned where no rows are held out.
        """
        nats, tokens = 0.0, 0.0
        for micro in self._batches:
            nats += self._nats(model, micro.to(device)).item()
            tokens += micro.weights[POLICY]
        nats, tokens, num_bytes = distributed.sum_scalars([nats, tokens, self._num_bytes])
        if tokens == 0:
            return {}
        loss = nats / tokens
        # exp overflows beyond 709 nats, where a model that diverged may be
        perplexity = math.exp(min(loss, 700.0))
        bits_per_byte = nats / math.log(2) / num_bytes if num_bytes else math.nan
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}


def bytes_of(tokens: Iterable[Tensor], tokenizer: PreTrainedTokenizerBase) -> float:
    """Bytes of text that token ids stand for; IGNORE_INDEX is none."""
    lengths = token_byte_lengths(tokenizer)
    return float(sum(lengths[ids.numpy()[ids.numpy() != IGNORE_INDEX]].sum() for ids in tokens))


def checked_prompts(settings: Samples | None, encode: Callable[[str], list[int]], max_length: int) -> list[list[int]]:
    """The ids of the samples' prompts; raises InputError where no token can follow them."""
    return [] if settings is None else [_checked(text, encode(text), max_length) for text in settings.prompts]


def _checked(prompt: str, ids: list[int], max_length: int) -> list[int]:
    if not 0 < len(ids) < max_length:
        raise InputError(
            f"the prompt {prompt[:40]!r} has {len(ids)} tokens; it takes 1 to {max_length - 1}",
            where="samples.prompts",
            remedy="shorten the prompt" if ids else "give a prompt that is not empty",
        )
    return ids


class TextSamples:
    """Prompts that the model continues while training, to look at.

    Args:
        settings: None for no samples.
        tokenizer: of the model.
        max_length: tokens the model was made for.
        seed: of the sampling.
        encode: ids of a prompt.
    """

    def __init__(
        self,
        settings: Samples | None,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
        encode: Callable[[str], list[int]],
    ):
        self._settings, self._tokenizer, self._seed, self._max_length = settings, tokenizer, seed, max_length
        self._prompts = checked_prompts(settings, encode, max_length)

    def drawn(self, model: nn.Module, device: torch.device) -> list[Sample]:
        """A continuation of each prompt."""
        if self._settings is None:
            return []
        tokenizer = self._tokenizer
        completions = continue_prompts(
            model,
            self._prompts,
            max_new_tokens=self._settings.max_new_tokens,
            temperature=self._settings.temperature,
            eos_id=tokenizer.eos_token_id,
            max_length=self._max_length,
            device=device,
            seed=self._seed,
        )
        return [
            Sample(prompt, tokenizer.decode(completion, skip_special_tokens=True))
            for prompt, completion in zip(self._settings.prompts, completions, strict=True)
        ]
