"""Texts that a diffusion model completes while it is trained, to look at."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from llmtrain.algorithms.texts import checked_prompts
from llmtrain.contracts import Sample
from llmtrain.data.tokenizer import pad_id
from llmtrain.models.diffusion import Diffusion
from llmtrain.recipe.schema import Samples
from llmtrain.sampling.batched import Sampling, decode_after
from llmtrain.sampling.canvas import lay_out, to_continue
from llmtrain.sampling.denoising import Denoiser
from llmtrain.sampling.drawing import Draws, write_texts
from llmtrain.sampling.samplers import Asked, Unmasking, settled
from llmtrain.sampling.writing import Work


class DiffusionSamples:
    """As `texts.TextSamples`, of a diffusion model.

    Without a cache, through the engine's own module. Every rank makes the same forwards, as sharded weights want it:
    their number is known from the prompts' lengths, and no text is left alone when it has ended.

    Args:
        diffusion: how the model attends, and is sampled.
        vocabulary: rows of the model's head, of which uniform noise is made.
        settings: None for no samples.
        tokenizer: of the model.
        max_length: tokens the model was made for.
        seed: of the sampling.
        encode: ids of a prompt.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        vocabulary: int,
        settings: Samples | None,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
        encode: Callable[[str], list[int]],
    ):
        self._diffusion, self._vocabulary, self._settings, self._tokenizer = diffusion, vocabulary, settings, tokenizer
        self._max_length, self._seed = max_length, seed
        self._prompts = checked_prompts(settings, encode, max_length)

    def drawn(self, model: nn.Module, device: torch.device) -> list[Sample]:
        """A continuation of each prompt."""
        if self._settings is None:
            return []
        pad, most = pad_id(self._tokenizer), self._settings.max_new_tokens
        limits = [min(most, self._max_length - len(prompt)) for prompt in self._prompts]
        drafts = [
            to_continue(prompt, limit, self._diffusion, self._max_length, pad)
            for prompt, limit in zip(self._prompts, limits, strict=True)
        ]
        unmasking = settled(Asked(cache=False), self._diffusion)
        assert isinstance(unmasking, Unmasking)
        layout = lay_out(drafts, self._diffusion, unmasking.block_length, pad)
        sampling = Sampling(temperature=self._settings.temperature, seed=self._seed)
        names = [(row, 0) for row in range(len(drafts))]
        draws = Draws(sampling, names, layout.starts, layout.canvas.ids.shape[1])
        denoiser = Denoiser(model, self._diffusion, device)
        write_texts(denoiser, layout, unmasking, draws, self._vocabulary, Work())
        samples = []
        for row, (text, prompt) in enumerate(zip(self._settings.prompts, self._prompts, strict=True)):
            new = layout.canvas.ids[row][layout.canvas.text[row]][len(prompt) :][: limits[row]].tolist()
            end = new.index(self._tokenizer.eos_token_id) if self._tokenizer.eos_token_id in new else len(new)
            samples.append(Sample(text, decode_after(self._tokenizer, prompt, new[:end])))
        return samples
