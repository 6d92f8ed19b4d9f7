"""Tiny models and adapters on a disk, and the command line on them."""

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from llmtrain import cli
from tests import tiny

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + message.role) }}"
    "{% endif %}w4 {{ message.content }} </s> {% endfor %}{% if add_generation_prompt %}w5{% endif %}"
)
ADAPTERS: dict[str, peft.PeftConfig] = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
        task_type="CAUSAL_LM",
    ),
    "prompt_tuning": peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "p_tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, task_type="CAUSAL_LM"),
    "prefix_tuning": peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


def write_model(directory: Path, *, chat: bool = True, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """A tiny Llama with a tokenizer of words (w3, w4, ...)."""
    model = tiny.decoder(dtype=dtype, **({"max_position_embeddings": 64} | fields)).hf
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that one token is clearly the most likely
    model.save_pretrained(directory)
    tokenizer = tiny.tokenizer()
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


def write_adapter(directory: Path, base: Path, kind: str, **settings: Any) -> Path:
    """An adapter of random weights, saved by peft itself."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = type(ADAPTERS[kind])(**(ADAPTERS[kind].to_dict() | settings))
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                parameter.normal_()
    model.save_pretrained(directory)
    return directory


@dataclass
class Done:
    code: int
    out: str
    err: str


class CommandLine:
    """Runs `llmtrain ...` in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self._capfd = capfd

    def __call__(self, *arguments: object) -> Done:
        self._capfd.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = self._capfd.readouterr()
        return Done(code, out, err)


def assert_refused(done: Done, *texts: str, code: int = 2) -> None:
    """The command ended with an error that says these things, and what to do."""
    assert done.code == code, done.err
    assert "error: " in done.err and "Traceback" not in done.err
    for text in texts:
        assert text in done.err, done.err


# Ways to interrupt a command, and the exit codes that they lead to.
INTERRUPTIONS = ((signal.SIGINT, 130), (signal.SIGTERM, 143))


def interrupt(number: signal.Signals) -> None:
    """As Ctrl-C does, or a scheduler."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt  # the signal itself is ignored where a shell started the tests in the background
    assert signal.getsignal(number) != signal.SIG_DFL, "it would end the tests"
    signal.raise_signal(number)


def kept_in(output: str) -> str:
    """What an interrupted command says in the end."""
    return f"interrupted; what is done is in {output}.partial, from where the command that began it goes on"
