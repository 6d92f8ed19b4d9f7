"""Models that score, loaded to be asked: a reward model, or one that judges each step of an answer."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmtrain.errors import InputError
from llmtrain.models.checks import Asked, check_causality, check_head
from llmtrain.models.decoder import Decoder, config_field
from llmtrain.models.heads import HEADS, RIGHT
from llmtrain.models.loading import open_config
from llmtrain.models.reward import Reward, known_reward
from llmtrain.models.saved import Saved, head_at, load_located, locate


class Scorer:
    """A model that scores, in evaluation mode.

    Attributes:
        kind: outcome: one score for an answer. process: a probability for each of its steps.
        separator: stands after each step; None for outcome.
        tokenizer: the model's own.
        window: tokens that the model has positions for; None where it has no such limit.
        location, dtype, device: of the weights.
        reward: how it is used.
    """

    def __init__(self, saved: Saved, decoder: Decoder, reward: Reward):
        self.kind: Literal["outcome", "process"] = reward.kind
        self.separator = reward.separator
        self.tokenizer: PreTrainedTokenizerBase = saved.tokenizer
        self.window = saved.window
        self.location, self.dtype, self.device, self.reward = saved.location, saved.decoder.dtype, saved.device, reward
        self._place, self._bias, self._device = saved.location.path, float(reward.bias), saved.device
        self._decoder = decoder
        self._pad = config_field(saved.decoder.config.get_text_config(), "pad_token_id")
        # A few numbers, read of every token: in the weights' own bfloat16 a score of 5 would move in steps of 0.03.
        self._decoder.head.float()

    def scores(self, rows: Sequence[Sequence[int]], batch_tokens: int = 8192) -> list[float]:
        """The score of each row of ids, prompt and answer, which is read at its last token.

        Args:
            batch_tokens: about so many positions are computed at once.

        Raises:
            InputError: a row is empty or longer than the window, or a score is not finite.
        """
        assert self.kind == "outcome", "it judges steps"
        read = self._read([(row, [self._last(row)]) for row in rows], batch_tokens)
        return [float(outputs[0, 0]) - self._bias for outputs in read]

    def step_scores(
        self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = 8192
    ) -> list[list[float]]:
        """The probability that each step is right.

        Args:
            rows: ids of prompt and answer, and the places of the tokens that the steps end with.
            batch_tokens: about so many positions are computed at once.

        Raises:
            InputError: as `scores`.
        """
        assert self.kind == "process", "it judges whole answers"
        return [outputs.softmax(1)[:, RIGHT].tolist() for outputs in self._read(rows, batch_tokens)]

    @torch.inference_mode()
    def _read(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int) -> list[Tensor]:
        """What the head says at the places of each row, [places, outputs] in float32."""
        for index, (ids, _) in enumerate(rows):
            self._check(ids, index)
        read = [torch.empty(0)] * len(rows)
        for batch in _batches([len(ids) for ids, _ in rows], batch_tokens):
            length = len(rows[batch[0]][0])
            # Padded on the right, where causal attention does not see it: any id will do.
            padded = [[*rows[index][0], *[0] * (length - len(rows[index][0]))] for index in batch]
            places = [place + length * row for row, index in enumerate(batch) for place in rows[index][1]]
            outputs = self._outputs(torch.tensor(padded), torch.tensor(places, dtype=torch.int64))
            for index, part in zip(batch, outputs.split([len(rows[index][1]) for index in batch]), strict=True):
                if not torch.isfinite(part).all():
                    raise InputError(
                        f"the score of row {index} is not finite",
                        where=self._place,
                        remedy="use float32, or another checkpoint of the model: this one may have diverged",
                    )
                read[index] = part
        return read

    def _last(self, ids: Sequence[int]) -> int:
        """The last token that is no padding, where transformers reads the score.

        Of a model trained here that is the last one. One of others may take the token that ends a text for padding,
        and was trained to be read at the one before.
        """
        places = range(len(ids) - 1, 0, -1)
        return next((place for place in places if ids[place] != self._pad), len(ids) - 1)

    def _check(self, ids: Sequence[int], index: int) -> None:
        if not ids:
            raise InputError(f"row {index} has no token", where=self._place, remedy="leave it out")
        if self.window is not None and len(ids) > self.window:
            raise InputError(
                f"row {index} has {len(ids)} tokens, and the model's window is {self.window}",
                where=self._place,
                remedy="leave it out, or use a model with a longer window",
            )

    def _outputs(self, ids: Tensor, places: Tensor) -> Tensor:
        """[N, outputs] at the flat places [N] of rows [B, T]."""

        def at_places(hidden: Tensor, head: nn.Linear) -> Tensor:
            read: Tensor = head(hidden.flatten(0, 1).index_select(0, places.to(hidden.device)).float())
            return read

        outputs: Tensor = self._decoder(ids.to(self._device), None, at_places)
        return outputs.cpu()


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, the longest first, in batches of at most `batch_tokens` positions, or of one row."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def load_scorer(
    model: str, *, base: str | None = None, dtype: str = "auto", device: torch.device | str = "cpu"
) -> Scorer:
    """A model that scores: of a run, a directory or the hub, with the adapter on it where it is one.

    A model of others, without reward.json, is taken as it is: for sequence classification with one output as a reward
    model without a bias, for token classification with two as a process reward model as TRL trains them.

    Args:
        model: see `models/saved.locate`.
        base: for an adapter, in place of the base model that it names itself.
        dtype: of the weights: auto (as they were saved), float32, bfloat16, float16. The head is float32.

    Raises:
        InputError: something is not there or does not fit, or it is no model that scores.
    """
    location = locate(model, base)
    head = head_at(location)
    if not head.scores:
        scoring = " or ".join(head.what for head in HEADS if head.scores)
        raise InputError(
            f"{location.path} is {head.what}, which gives no score",
            where="MODEL_OR_RUN",
            remedy=f"give {scoring}: train one by algorithm.kind reward_model or process_reward",
        )
    reward = known_reward(location.path, head)
    if not location.is_adapter:
        num = open_config(location.path, location.path).num_labels
        if num != head.num_outputs:
            raise InputError(
                f"its head has {num} outputs, and that of {head.what} has {head.num_outputs}",
                where=location.path,
                remedy="give a model that was trained to score answers, or steps as wrong and right",
            )
    saved = load_located(location, head=head, dtype=dtype, device=device)
    decoder = Decoder(saved.decoder, head.attribute(saved.decoder)).eval()
    asked = Asked(decoder, decoder, saved.device, exact=saved.decoder.dtype == torch.float32)
    check_head(asked)
    check_causality(asked)  # an encoder would see the padding
    return Scorer(saved, decoder, reward)
