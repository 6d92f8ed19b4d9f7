"""The generator that fits a model."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from llmtrain.models.saved import Saved
from llmtrain.sampling.batched import Completion, Request, Sampling, TextGenerator
from llmtrain.sampling.diffusion import DiffusionGenerator
from llmtrain.sampling.prompts import end_ids
from llmtrain.sampling.samplers import Asked, settled


class Generator(Protocol):
    """Answers requests with one model."""

    sampling: Sampling

    def room(self, prompt_length: int) -> int:
        """Tokens that can follow a prompt of that length; none or fewer where it does not fit."""
        ...

    def settings(self) -> dict[str, Any]:
        """All that decides what is generated, beside model and prompts."""
        ...

    def fits(self, ids: Sequence[int]) -> bool:
        """Whether the model's window holds a prompt and what is asked for."""
        ...

    def generate(
        self,
        requests: Sequence[Request],
        on_done: Callable[[int, Completion], None],
        on_text: Callable[[str], None] | None = None,
    ) -> None:
        """Answers all requests.

        Args:
            requests: each of a prompt that fits.
            on_done: called with (index of the request, completion) as soon as one is finished.
            on_text: for a single request: called with each piece of text as it comes.
        """
        ...


def text_generator(
    saved: Saved, sampling: Sampling, asked: Asked | None = None, batch_tokens: int = 8192
) -> TextGenerator | DiffusionGenerator:
    """What answers requests with this model, autoregressive or diffusion; completions end where the model ends them.

    Args:
        sampling: holds for all requests.
        asked: how a diffusion model is sampled.
        batch_tokens: about so many positions in a batch.

    Raises:
        InputError: what was asked for does not fit the model.
    """
    unmasking = settled(asked or Asked(), saved.diffusion)
    if unmasking is None:
        return TextGenerator(saved, end_ids(saved), sampling, batch_tokens)
    return DiffusionGenerator(saved, end_ids(saved), sampling, unmasking, batch_tokens)
