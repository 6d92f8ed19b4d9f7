"""Prompts with holes: <|mask:5|> stands for five tokens that the model is to write, and its mask token for one.

    The capital of <|mask:2|> is Paris.

A space before a hole belongs to it, since most tokenizers put a word's space into its first token.
"""

import re
from collections.abc import Sequence

from llmtrain.errors import InputError
from llmtrain.models.saved import Saved
from llmtrain.sampling.prompts import encode_text

_HOLE = re.compile(r" ?<\|mask:([^|<>]*)\|>")


def holes(ids: Sequence[int], mask: int | None) -> list[int]:
    """Places of a prompt that hold the mask."""
    return [] if mask is None else [place for place, token in enumerate(ids) if token == mask]


def encode_prompt(saved: Saved, text: str, where: str) -> list[int]:
    """A text to continue, or to fill where it has holes, with the token that begins a document.

    Raises:
        InputError: it has no token at all, or holes that this model cannot fill.
    """
    diffusion = saved.diffusion
    found = list(_HOLE.finditer(text))
    if diffusion is None or diffusion.mask_token_id is None:
        if found:
            why = "it is autoregressive" if diffusion is None else "it has no mask token"
            raise InputError(
                f"the model fills no holes such as {found[0][0].strip()}: {why}",
                where=where,
                remedy="use a masked or block diffusion model, or take the hole out",
            )
        return encode_text(saved.tokenizer, text, where)
    mask = saved.tokenizer.convert_ids_to_tokens(diffusion.mask_token_id)
    most = saved.window or 1 << 16
    for hole in found:
        if not hole[1].isdecimal() or not 1 <= int(hole[1]) <= most:
            raise InputError(
                f"{hole[0].strip()} is no hole: it takes a number of tokens from 1 to {most}",
                where=where,
                remedy="write it as <|mask:5|>",
            )
    text = re.sub(f" ?{re.escape(mask)}", mask, text)  # written by its own name, a hole is as any other
    ids = encode_text(saved.tokenizer, _HOLE.sub(lambda hole: mask * int(hole[1]), text), where)
    places = holes(ids, diffusion.mask_token_id)
    if len(places) < sum(int(hole[1]) for hole in found):
        raise InputError(
            f"the tokenizer does not read {mask} as the mask token", where=where, remedy="declare it as a special token"
        )
    if places and places[0] == 0 and diffusion.shift:
        raise InputError(
            "the prompt begins with a hole, and this model predicts each token from the one before it",
            where=where,
            remedy="begin with something that is known",
        )
    return ids


def check_no_holes(saved: Saved, ids: Sequence[int], where: str) -> None:
    """Raises InputError where a conversation holds the mask token, which would be a hole in it."""
    if saved.diffusion is not None and holes(ids, saved.diffusion.mask_token_id):
        raise InputError(
            "the conversation holds the model's mask token",
            where=where,
            remedy="take it out, or give the text as a prompt to have its holes filled",
        )
