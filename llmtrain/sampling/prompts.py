"""Prompts as token ids: plain texts to continue, and conversations to answer."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtrain.data.tokenizer import prompt_ids
from llmtrain.errors import InputError
from llmtrain.models.saved import Saved

Message = Mapping[str, Any]
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, KeyError)
_PROBE = "llmtrain-probe-of-the-turn's-end"


def check_is_text(text: str, where: str) -> None:
    """Raises InputError for half of a surrogate pair, which is how Python gives bytes that are not UTF-8."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not UTF-8 at character {error.start}: {text[error.start : error.start + 20]!r}",
            where=where,
            remedy="give it in UTF-8; the terminal or a script may use another encoding",
        ) from None


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[int]:
    """A text to continue, with the token that begins a document where the tokenizer has one of its own.

    Raises:
        InputError: it has no token at all.
    """
    check_is_text(text, where)
    ids = prompt_ids(tokenizer, text)
    if not ids:
        raise InputError(
            "an empty prompt, and the tokenizer has no beginning-of-text token",
            where=where,
            remedy="give the text to continue",
        )
    return ids


def check_chat_template(saved: Saved, where: str, remedy: str) -> None:
    """Raises InputError where the tokenizer has no chat template."""
    if saved.tokenizer.chat_template is None:
        raise InputError(f"the tokenizer of {saved.location.path} has no chat template", where=where, remedy=remedy)


def check_messages(messages: object, where: str) -> list[Message]:
    """`messages`, once they are known to be a conversation that waits for an answer.

    Raises:
        InputError: they are not.
    """
    example = 'such as [{"role": "user", "content": "Hello"}]'
    if not isinstance(messages, list) or not messages:
        raise InputError("messages must be a list that is not empty", where=where, remedy=f"write one {example}")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InputError(
                f"messages.{number} is no message with a role and a content", where=where, remedy=f"write {example}"
            )
        if isinstance(message["content"], str):
            check_is_text(message["content"], where)
    if messages[-1]["role"] == "assistant":
        raise InputError(
            "the last message is the assistant's: there is nothing to answer",
            where=where,
            remedy="end with a message of another role",
        )
    return messages


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], where: str, tools: Any = None
) -> list[int]:
    """A conversation in the tokenizer's chat template, up to where the assistant's answer begins.

    Raises:
        InputError: the template does not take these messages.
    """
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except _TEMPLATE_ERRORS as error:
        raise _not_taken(error, where) from None
    return ids


def _not_taken(error: Exception, where: str) -> InputError:
    return InputError(
        f"the chat template does not take these messages: {error}",
        where=where,
        remedy="correct their roles and their order",
    )


def encode_begun(
    tokenizer: PreTrainedTokenizerBase, shown: str | Sequence[Message], begun: str, where: str
) -> list[int]:
    """A text or conversation with the beginning of what follows, as one text, which is how it was trained.

    Raises:
        InputError: it has no token at all, or the chat template does not take these messages.
    """
    if isinstance(shown, str):
        return encode_text(tokenizer, shown + begun, where)
    check_is_text(begun, where)
    try:
        asked: str = tokenizer.apply_chat_template(list(shown), add_generation_prompt=True, tokenize=False)
    except _TEMPLATE_ERRORS as error:
        raise _not_taken(error, where) from None
    ids: list[int] = tokenizer.encode(asked + begun, add_special_tokens=False)
    return ids


def end_ids(saved: Saved) -> list[int]:
    """Tokens that end a completion: the model's, the tokenizer's, and that which ends a turn of the chat template."""
    return ends_of(saved.decoder, saved.tokenizer, saved.tokenizer.chat_template)


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat_template: Any) -> list[int]:
    """As `end_ids`, of a model with a tokenizer and a chat template (or None) that may not be the tokenizer's own."""
    # A model that was made from a config may have none; transformers then asks the config.
    configured = model.config.eos_token_id if model.generation_config is None else model.generation_config.eos_token_id
    ids = set(configured if isinstance(configured, list) else [configured])
    ids |= {tokenizer.eos_token_id, _end_of_turn(tokenizer, chat_template)}
    return sorted(number for number in ids if isinstance(number, int))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, chat_template: Any) -> int | None:
    """The special token that the chat template writes after an assistant's answer; None without one."""
    if chat_template is None:
        return None
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=chat_template)
    except _TEMPLATE_ERRORS:
        return None  # it wants something of its own, such as a system message
    ids = tokenizer.encode(text.rpartition(_PROBE)[2].lstrip(), add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return ids[0] if ids and ids[0] in special else None
