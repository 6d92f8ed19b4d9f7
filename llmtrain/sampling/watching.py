"""A text in the terminal as it is unmasked, in place: what was just written stands out, open places are shaded."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from llmtrain.sampling.batched import decode_after
from llmtrain.sampling.diffusion import DiffusionGenerator, Step

_SHADE = "░"
_SECONDS_A_STEP = 0.04  # at least, or small models are done before anything is seen


def picture(
    tokenizer: PreTrainedTokenizerBase, step: Step, num_prompt: int, end_ids: frozenset[int], *, noise: bool
) -> Text:
    """The text of a step.

    Args:
        num_prompt: tokens before the first place that was open.
        end_ids: nothing is shown behind the first of them that was written.
        noise: open places hold tokens that are not final, and are shown with them.
    """
    text = Text()
    known: list[int] = []
    shaded = 0
    for place, (token, is_open, is_new) in enumerate(zip(*step, strict=True)):
        if is_open and not noise:
            shaded += 1
            continue
        if shaded:
            text.append(" " + _SHADE * shaded, "bright_black")
            shaded = 0
        # An open place before it is no context: its mask would be decoded, too.
        piece = decode_after(tokenizer, known, [token])
        text.append(piece, "bold green" if is_new else "dim" if is_open else "")
        known.append(token)
        if token in end_ids and place >= num_prompt and not is_open:
            break
    if shaded:
        text.append(" " + _SHADE * shaded, "bright_black")
    return text


@contextmanager
def watched(generator: DiffusionGenerator, tokenizer: PreTrainedTokenizerBase, console: Console) -> Iterator[None]:
    """While it lasts, single requests are shown as they are written; nothing of that stays on the terminal."""
    noise = generator.diffusion.process == "uniform"
    with Live(console=console, auto_refresh=False, transient=True) as live:
        num_prompt: int | None = None

        def show(step: Step) -> None:
            nonlocal num_prompt
            if num_prompt is None:  # nothing was written before the first step
                written = (step.open[place] or step.new[place] for place in range(len(step.ids)))
                num_prompt = next((place for place, is_written in enumerate(written) if is_written), len(step.ids))
            live.update(picture(tokenizer, step, num_prompt, generator.end_ids, noise=noise), refresh=True)
            if console.is_terminal:
                time.sleep(_SECONDS_A_STEP)

        before: Callable[[Step], None] | None = generator.on_step
        generator.on_step = show
        try:
            yield
        finally:
            generator.on_step = before
