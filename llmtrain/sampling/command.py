"""`llmtrain generate`: texts from a run or from a model directory, through transformers' generate."""

import logging
import os
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from llmtrain.data.tokenizer import document_frame, load_tokenizer
from llmtrain.distributed import choose_device
from llmtrain.errors import InputError
from llmtrain.models.decoder import config_field
from llmtrain.models.hub import load_weights
from llmtrain.sampling.autoregressive import GREEDY_BELOW

log = logging.getLogger(__name__)


def generate(
    model: str,
    prompts: list[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 1.0,
    num: int = 1,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Prints `num` continuations of each prompt as they are made; returns the exit code.

    Args:
        model: a run directory (its final/ is used) or a Hugging Face model directory or hub name.
        temperature: 0 is greedy.
        top_p: nucleus sampling (arXiv 1904.09751); 1 is off.

    Raises:
        InputError: no model there, or a prompt that does not fit it.
    """
    for prompt in prompts:
        _check_is_text(prompt)
    where = _model_directory(model)
    console = Console(highlight=False)
    chosen = choose_device(device, local_rank=0)
    with console.status(f"loading {where}"):
        tokenizer = load_tokenizer(where)
        weights = load_weights(where, where).to(chosen).eval()
    torch.manual_seed(seed)
    for prompt in prompts:
        for number in range(num):
            title = f"{prompt[:50]!r}" + (f" ({number + 1} of {num})" if num > 1 else "")
            console.rule(title, align="left")
            _continue(weights, tokenizer, prompt, max_new_tokens, temperature, top_p)
    return 0


def _check_is_text(prompt: str) -> None:
    """Raises InputError for bytes on the command line that are not UTF-8: Python makes surrogates of them."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not UTF-8 at character {error.start}: {prompt[error.start : error.start + 20]!r}",
            where="--prompt",
            remedy="give it in UTF-8; the terminal or a script may use another encoding",
        ) from None


def _model_directory(model: str) -> str:
    path = Path(model)
    if not os.path.exists(path):
        if path.is_absolute() or model.startswith(".") or model.count("/") != 1 or path.parent.is_dir():
            raise InputError(f"no such directory: {model}", remedy="give a run directory or a model directory")
        return model  # a hub name
    if (path / "final" / "config.json").is_file():
        return str(path / "final")
    if (path / "config.json").is_file():
        return str(path)
    if (path / "recipe.resolved.yaml").is_file():
        raise InputError(
            f"the run in {model} is not finished: it has no final/ yet",
            remedy="run its `llmtrain train` command again, which goes on from its last checkpoint",
        )
    raise InputError(f"{model} holds no model (no config.json)", remedy="give a run directory or a model directory")


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> None:
    before, _ = document_frame(tokenizer)
    ids = [*before, *tokenizer.encode(prompt, add_special_tokens=False)]
    if not ids:
        raise InputError(
            "an empty prompt, and the tokenizer has no beginning-of-text token",
            where="--prompt",
            remedy="give the text to continue",
        )
    longest: int | None = config_field(model.config, "max_position_embeddings")
    if longest is not None and len(ids) >= longest:
        raise InputError(
            f"the prompt has {len(ids)} tokens, and the model's window is {longest}",
            where="--prompt",
            remedy=f"shorten it to {longest - 1} tokens or less",
        )
    room = max_new_tokens if longest is None else min(max_new_tokens, longest - len(ids))
    if room < max_new_tokens:
        log.warning("at most %d new tokens: the model's window is %d tokens", room, longest)
    sampling: dict[str, float | bool] = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    if temperature < GREEDY_BELOW:
        sampling = {"do_sample": False}
    batch = torch.tensor([ids], device=model.device)
    model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        max_new_tokens=room,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )
