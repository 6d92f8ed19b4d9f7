"""Continuing texts with a model as it is being trained."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

GREEDY_BELOW = 1e-4  # dividing logits by less overflows, and would leave the most likely token all the same


def sample_tokens(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One token id a row, [B], from float logits [B, V]; temperature 0 takes the most likely one."""
    if temperature < GREEDY_BELOW:
        return logits.argmax(1)
    probabilities = torch.softmax(logits.float() / temperature, dim=1)
    # Drawn on the CPU, so that a seed means the same on every device.
    return torch.multinomial(probabilities.cpu(), 1, generator=generator).squeeze(1).to(logits.device)


@torch.no_grad()
def continue_prompts(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_id: int,
    max_length: int,
    device: torch.device,
    seed: int,
) -> list[list[int]]:
    """The tokens after each prompt, ending with `eos_id` where the model ended.

    It runs whole forwards without a cache, through the engine's own module: slow, and right on
    every backend. It serves the few samples of a training run; `llmtrain generate` has a cache.

    Args:
        model: an engine's module around a `Decoder`.
        prompts: token ids of each, not empty.
        max_length: prompt and completion end at this many tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = min(max_length, int(lengths.max()) + max_new_tokens)
    # Padding is on the right, where causal attention does not see it.
    ids = torch.full((len(prompts), width), eos_id, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(list(prompt), device=device)
    rows = torch.arange(len(prompts), device=device)
    limits = (lengths + max_new_tokens).clamp_max(width)
    done = lengths >= limits

    def next_logits(hidden: Tensor, head: nn.Module) -> Tensor:
        logits: Tensor = head(hidden[rows, lengths - 1])
        return logits

    while not bool(done.all()):
        logits = model(ids[:, : int(lengths.max())], None, next_logits)
        tokens = sample_tokens(logits, temperature, generator)
        ids[rows[~done], lengths[~done]] = tokens[~done]
        lengths = torch.where(done, lengths, lengths + 1)
        done = done | (tokens == eos_id) | (lengths >= limits)
    return [ids[row, len(prompt) : int(lengths[row])].tolist() for row, prompt in enumerate(prompts)]
