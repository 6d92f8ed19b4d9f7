"""Our token masks equal those with which TRL's SFTTrainer trains on the same rows."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from transformers import LlamaConfig, LlamaForCausalLM
from trl.chat_template_utils import get_training_chat_template

from llmtrain.data.chat import ExampleEncoder
from llmtrain.data.chat_template_files import named
from llmtrain.data.examples import PromptCompletion, Text
from llmtrain.data.formats import read_examples
from llmtrain.recipe.schema import JSONLSource
from tests.unit.data.chats import (
    CALLING,
    MULTI,
    SINGLE,
    TOOLS,
    Message,
    assistant,
    chat_tokenizer,
    conversation,
    encoder,
    user,
)

IGNORED = -100
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
THOUGHTS = [user("Hi"), assistant("<think>\nhm\n</think>\n\nHello."), user("So?"), assistant("Well.")]
CHATS: dict[str, tuple[list[Message], Any]] = {
    "single": (SINGLE, None),
    "multi": (MULTI, None),
    "thoughts": (THOUGHTS, None),
    "calling": (CALLING, TOOLS),
}


def trl_rows(tokenizer: Any, rows: list[dict[str, Any]], directory: Path, **options: Any) -> list[tuple[Any, Any]]:
    """(ids, trained) of the rows as SFTTrainer prepares them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    arguments = trl.SFTConfig(
        output_dir=str(directory), max_length=None, report_to=[], use_cpu=True, bf16=False, **options
    )
    trainer = trl.SFTTrainer(
        model=LlamaForCausalLM(config),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return [
        (row["input_ids"], [label != IGNORED for label in row["labels"]])
        for row in trainer.train_dataset  # type: ignore[union-attr]
    ]


def our_rows(made: ExampleEncoder, examples: list[Any]) -> list[tuple[Any, Any]]:
    return [(tokens.ids, tokens.trained) for tokens in made.encode(examples)]


@pytest.mark.parametrize("name", ["chatml", "qwen3", "llama3", "plain"])
def test_conversations(name: str, tmp_path: Path) -> None:
    """With the template in the tokenizer, marks and all, TRL does with it what we do."""
    tokenizer = chat_tokenizer(named(name))
    chats = [messages for messages, tools in CHATS.values() if tools is None]
    rows = [{"messages": messages} for messages in chats]
    expected = trl_rows(tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert our_rows(encoder(tokenizer), [conversation(messages) for messages in chats]) == expected
    assert all(any(trained) and not all(trained) for _, trained in expected)
    whole = trl_rows(tokenizer, rows, tmp_path, assistant_only_loss=False)
    assert our_rows(encoder(tokenizer, train_on="all"), [conversation(messages) for messages in chats]) == whole


@pytest.mark.parametrize("name", ["chatml", "qwen3"])
def test_conversations_with_tools(name: str, tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(named(name))
    rows = [{"messages": CALLING, "tools": TOOLS}] * 2
    expected = trl_rows(tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert our_rows(encoder(tokenizer), [conversation(CALLING, tools=TOOLS)] * 2) == expected


def test_a_template_without_marks_as_trl_trains_with_its_twin(tmp_path: Path) -> None:
    """Through the whole of both: Qwen3's own template in the tokenizer, rows from a file."""
    tokenizer = chat_tokenizer((TEMPLATES / "qwen3.jinja").read_text())
    rows = [{"messages": messages} for messages, tools in CHATS.values() if tools is None]
    file = tmp_path / "chats.jsonl"
    datasets.Dataset.from_list(rows).to_json(file)
    examples = list(read_examples(JSONLSource(kind="jsonl", paths=[str(file)])))
    expected = trl_rows(tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert our_rows(encoder(tokenizer), examples) == expected


# Of TRL's templates, those whose turns are found without marks: what we find must be what TRL's twin marks.
ONLY_USERS = ("cohere", "cohere2", "gemma", "gemma3")  # no tools; a system message is refused, or moved
NO_TOOLS = ("lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5_vl")  # passed over; TRL trains on it, we refuse
TOOLS_TOO = ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl")


@pytest.mark.parametrize("family", [*ONLY_USERS, *NO_TOOLS, *TOOLS_TOO])
def test_turns_found_without_marks_are_those_of_trls_marked_twins(family: str) -> None:
    template = (TEMPLATES / f"{family}.jinja").read_text()
    special = ["<|END_OF_TURN_TOKEN|>", "<end_of_turn>", "<start_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"]
    tokenizer = chat_tokenizer(template, special=[token for token in special if token in template])
    twin = get_training_chat_template(tokenizer)
    assert twin is not None
    for name, (messages, tools) in CHATS.items():
        if (name == "calling" and family not in TOOLS_TOO) or (name == "multi" and family in ONLY_USERS):
            continue
        theirs = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=twin, return_dict=True, return_assistant_tokens_mask=True
        )
        trained = [bool(mask) for mask in theirs["assistant_masks"]]
        if family == "qwen2_5":  # its twin has the line end of the heading inside of the marks, which no model writes
            trained = [mask and trained[i - 1] for i, mask in enumerate(trained)]
        ours = encoder(tokenizer).encode([conversation(messages, tools=tools)])[0]
        assert (ours.ids, ours.trained) == (theirs["input_ids"], trained), name


def test_prompts_with_completions(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    add_bos(tokenizer)
    pairs = [("What is 2 + 2?", " It is 4."), ("Hi\n", "Hello!\n"), ("a", "b"), ("x ", "y 😀"), ("q", "a<|endoftext|>")]
    expected = trl_rows(tokenizer, [{"prompt": p, "completion": c} for p, c in pairs], tmp_path)
    examples = [PromptCompletion(p, c, "a:1") for p, c in pairs]
    assert our_rows(encoder(tokenizer), examples) == expected
    whole = trl_rows(
        tokenizer, [{"prompt": p, "completion": c} for p, c in pairs], tmp_path, completion_only_loss=False
    )
    assert our_rows(encoder(tokenizer, train_on="all"), examples) == whole


def test_prompts_with_completions_of_messages(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(named("qwen3"))
    rows = [{"prompt": MULTI[:4], "completion": MULTI[4:]}, {"prompt": SINGLE[:1], "completion": SINGLE[1:]}]
    examples = [conversation(MULTI, num_prompt=4), conversation(SINGLE, num_prompt=1)]
    assert our_rows(encoder(tokenizer), examples) == trl_rows(tokenizer, rows, tmp_path)
    both = trl_rows(tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert our_rows(encoder(tokenizer), examples) == both


def test_texts(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    add_bos(tokenizer)
    texts = ["Hello there", "  two\nlines ", "<|im_start|>user\nHi<|im_end|>", "ended<|endoftext|>"]
    expected = trl_rows(tokenizer, [{"text": text} for text in texts], tmp_path)
    made = ExampleEncoder(tokenizer)
    assert our_rows(made, [Text(text, "a:1") for text in texts]) == expected


def add_bos(tokenizer: Any) -> None:
    """Before every text, as Llama's tokenizers do it; TRL leaves it to them."""
    from tokenizers import processors

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
