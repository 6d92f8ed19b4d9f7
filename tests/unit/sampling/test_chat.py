"""`llmtrain generate --chat`, with the conversation on a pipe."""

import io
from pathlib import Path

import pytest

from llmtrain.models.saved import load_saved
from llmtrain.sampling.batched import Completion, Request, Sampling, TextGenerator
from tests.saved import CommandLine, Done, assert_refused, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture
def chat(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def run(model: Path, *lines: str, options: tuple[str, ...] = ()) -> Done:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        settings = ("--temperature", "0", "--max-new-tokens", "5")
        return CommandLine(capfd)("generate", model, "--chat", *settings, *options)

    return run


def answer(model: Path, text: str) -> str:
    """The greedy answer to a rendered conversation."""
    saved = load_saved(str(model))
    found: list[Completion] = []
    generator = TextGenerator(saved, (1,), Sampling(max_new_tokens=5))
    ids = saved.tokenizer.encode(text, add_special_tokens=False)
    generator.generate([Request(ids)], lambda _, completion: found.append(completion))
    return found[0].text


def test_a_conversation_has_a_history(model: Path, chat) -> None:
    done = chat(model, "w7 w8", "", "w9")
    assert done.code == 0, done.err
    first = answer(model, "w4 w7 w8 </s> w5")
    second = answer(model, f"w4 w7 w8 </s> w4 {first} </s> w4 w9 </s> w5")
    assert done.out == f"{first}\n{second}\n"
    assert "cut off after 5 tokens" in done.err


def test_commands(model: Path, chat) -> None:
    done = chat(model, "w7", "/reset", "w9", "/system w20", "w9", "/what", "/quit", "w9")
    answers = [answer(model, f"w4 {text} </s> w5") for text in ("w7", "w9")]
    answers.append(answer(model, "w4 w20 </s> w4 w9 </s> w5"))
    assert done.out == "".join(f"{text}\n" for text in answers)
    assert "/what is no command" in done.err
    assert chat(model, "w9", options=("--system", "w20")).out == f"{answers[2]}\n"


def test_a_line_that_is_too_long_ends_nothing(model: Path, chat) -> None:
    done = chat(model, "w7 " * 80, "w9")
    assert done.code == 0
    assert "the conversation has 83 tokens, and the model's window is 64" in done.err and "/reset" in done.err
    assert done.out == f"{answer(model, 'w4 w9 </s> w5')}\n"


def test_a_model_without_a_chat_template(tmp_path: Path, chat) -> None:
    done = chat(write_model(tmp_path / "model", chat=False), "w7")
    assert_refused(done, "--chat: the tokenizer of", "has no chat template", "remedy: use --prompt")
