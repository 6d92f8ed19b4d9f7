"""Autoregressive language modelling.

    L = sum over counted positions i of  -log p(x_{i+1} | x_{<=i})

Counted is every token but a document's first: rows are packed with several documents, positions
restart at each, and attention stays inside. The weight is the number of counted tokens. The
logits are never whole (`models/loss_head.py`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmtrain import distributed
from llmtrain.contracts import POLICY, LossOutput, MicroBatch, Sample
from llmtrain.data.loader import Loader
from llmtrain.data.tokenizer import document_frame, token_byte_lengths
from llmtrain.errors import InputError
from llmtrain.models.loss_head import IGNORE_INDEX, linear_cross_entropy
from llmtrain.recipe.schema import Samples
from llmtrain.sampling.autoregressive import continue_prompts


class CausalLM:
    """Next-token prediction on packed rows, of pretraining or continued pretraining.

    Args:
        loader: gives this rank's micro-batches of any step.
        held_out: this rank's share of the held-out rows.
        tokenizer: turns samples and byte counts into text.
        samples: what to generate while training, or None.
        max_length: tokens the model was made for.
        seed: of the samples.
        data_fingerprint: hashes of the training and held-out rows, by key of the recipe; a resumed run must
            find the same, or neither its batches nor its figures would go on from what they were.
    """

    def __init__(
        self,
        loader: Loader,
        held_out: Sequence[MicroBatch],
        tokenizer: PreTrainedTokenizerBase,
        samples: Samples | None,
        max_length: int,
        seed: int,
        data_fingerprint: Mapping[str, str],
    ):
        self._loader, self._held_out, self._tokenizer = loader, held_out, tokenizer
        self._samples, self._max_length, self._seed = samples, max_length, seed
        self._data_fingerprint = data_fingerprint
        self._token_bytes = token_byte_lengths(tokenizer)
        self._prompts = [] if samples is None else [self._encode(text) for text in samples.prompts]

    def _encode(self, prompt: str) -> list[int]:
        before, _ = document_frame(self._tokenizer)
        ids: list[int] = [*before, *self._tokenizer.encode(prompt, add_special_tokens=False)]
        if not 0 < len(ids) < self._max_length:
            raise InputError(
                f"the prompt {prompt[:40]!r} has {len(ids)} tokens; it takes 1 to {self._max_length - 1}",
                where="samples.prompts",
                remedy="shorten the prompt" if ids else "give a prompt that is not empty",
            )
        return ids

    def step_batches(self, first_step: int) -> Iterator[list[MicroBatch]]:
        step = first_step
        while True:
            yield self._loader.micro_batches(step)
            step += 1

    def loss(self, models: Mapping[str, nn.Module], micro: MicroBatch) -> LossOutput:
        def nll_sum(hidden: Tensor, head: nn.Linear) -> Tensor:
            targets = micro.tensors["targets"]
            return linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten(), head.bias)

        tensors = micro.tensors
        return LossOutput({POLICY: models[POLICY](tensors["input_ids"], tensors["position_ids"], nll_sum)})

    def evaluate(self, models: Mapping[str, nn.Module], device: torch.device) -> dict[str, float]:
        """Held-out loss (nats a token), perplexity, and bits per byte of the text predicted.

        An end-of-document token counts as a token to predict and as no byte; bits per byte are NaN
        where no token stands for any. Nothing is returned where no rows are held out.
        """
        nll, tokens, num_bytes = 0.0, 0.0, 0.0
        for micro in self._held_out:
            nll += self.loss(models, micro.to(device)).sums[POLICY].item()
            tokens += micro.weights[POLICY]
            num_bytes += self._bytes_predicted(micro.tensors["targets"].numpy())
        nll, tokens, num_bytes = distributed.sum_scalars([nll, tokens, num_bytes])
        if tokens == 0:
            return {}
        loss = nll / tokens
        # exp overflows beyond 709 nats, where a model that diverged may be
        perplexity = math.exp(min(loss, 700.0))
        bits_per_byte = nll / math.log(2) / num_bytes if num_bytes else math.nan
        return {"loss": loss, "perplexity": perplexity, "bits_per_byte": bits_per_byte}

    def _bytes_predicted(self, targets: np.ndarray) -> float:
        return float(self._token_bytes[targets[targets != IGNORE_INDEX]].sum())

    def samples(self, models: Mapping[str, nn.Module], device: torch.device) -> list[Sample]:
        if self._samples is None:
            return []
        tokenizer = self._tokenizer
        completions = continue_prompts(
            models[POLICY],
            self._prompts,
            max_new_tokens=self._samples.max_new_tokens,
            temperature=self._samples.temperature,
            eos_id=tokenizer.eos_token_id,
            max_length=self._max_length,
            device=device,
            seed=self._seed,
        )
        return [
            Sample(prompt, tokenizer.decode(completion, skip_special_tokens=True))
            for prompt, completion in zip(self._samples.prompts, completions, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"data": dict(self._data_fingerprint)}  # batches depend on (seed, step) and the rows only

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for key, print_of_data in self._data_fingerprint.items():
            if state["data"].get(key) != print_of_data:
                raise InputError(
                    "the text or the tokenizer changed since the checkpoint was saved",
                    where=key,
                    remedy="bring the former files back, or start a new run with another name=...",
                )
