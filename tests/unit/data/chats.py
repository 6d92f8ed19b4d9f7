"""A small tokenizer with tokens for turns, and conversations, for the tests of chat data."""

from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmtrain.data.chat import ExampleEncoder
from llmtrain.data.examples import Conversation
from llmtrain.recipe.schema import Data

SPECIAL = [
    "<|endoftext|>",
    "<bos>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "plain": "<|endoftext|>", "qwen3": "<|im_end|>\n"}

Message = dict[str, Any]
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Look up", "parameters": {}}}]


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def tool(content: str) -> Message:
    return {"role": "tool", "name": "weather", "content": content}


SINGLE = [user("What is 2 + 2?"), assistant("It is 4.")]
MULTI = [system("Be kind."), user("Hi"), assistant("Hello!\nHow are you?"), user("Fine."), assistant("  Good \n")]
CALLING = [
    user("Weather?"),
    assistant("", tool_calls=[WEATHER]),
    tool("sunny"),
    tool("warm"),
    assistant("It is sunny."),
    user("Thanks."),
    assistant("Bye."),
]


def chat_tokenizer(template: str | None = None, special: list[str] | None = None, **options: Any) -> Any:
    """Byte-level, so that it keeps any text; EOS <|endoftext|>, BOS <bos>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*SPECIAL, *(special or [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for message in (*SINGLE, *MULTI, *CALLING)] * 3
    tokenizer.train_from_iterator([*texts, "system user assistant tool"] * 2, trainer)
    names = {"bos_token": "<bos>", "eos_token": "<|endoftext|>", **options}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


def data(**settings: Any) -> Data:
    return Data.model_validate({"train": [{"kind": "text", "paths": ["unread"]}], **settings})


def encoder(tokenizer: Any, **settings: Any) -> ExampleEncoder:
    section = data(**settings)
    return ExampleEncoder(tokenizer, section.chat_template, section.train_on)


def conversation(messages: list[Message], **more: Any) -> Conversation:
    return Conversation(messages, "chats.jsonl:1", **more)


def trained_text(tokenizer: Any, tokens: Any) -> str:
    """What the trained tokens of a row say."""
    assert len(tokens.ids) == len(tokens.trained)
    ids = [index for index, is_trained in zip(tokens.ids, tokens.trained, strict=True) if is_trained]
    return str(tokenizer.decode(ids))


_said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: not text.isspace())
_awkward = st.sampled_from(
    ["<|im_end|>", "a <|eot_id|> b", "\n\nx\n\n", "### User:\nno", "<|im_start|>assistant\n", "😀"]
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Any turns in the right order, special-looking text in them too."""
    said = st.one_of(_said, _awkward)
    messages = [system(draw(said))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages += [user(draw(said)), assistant(draw(said))]
    return [*messages, user(draw(said))] if draw(st.booleans()) else messages
