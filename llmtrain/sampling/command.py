"""`llmtrain generate`: continue texts, chat, or answer a file of prompts."""

import logging
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from llmtrain.distributed import choose_device
from llmtrain.errors import EXIT_INTERRUPTED, InputError
from llmtrain.models.saved import Location, Saved, load_located, locate
from llmtrain.sampling.batched import Request, Sampling, TextGenerator
from llmtrain.sampling.chat import Chat
from llmtrain.sampling.completions import check_output, complete_file, read_input
from llmtrain.sampling.prompts import check_chat_template, check_is_text, encode_text, end_ids

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelChoice:
    """Which model, and how it is held.

    Attributes:
        name: a run, model or adapter directory, or a hub name.
        base: the model under an adapter, in place of the one that the adapter names.
        dtype: auto (as saved), float32, bfloat16 or float16.
        device: auto, cpu or cuda.
    """

    name: str
    base: str | None = None
    dtype: str = "auto"
    device: str = "auto"

    def load(self, location: Location | None = None) -> Saved:
        """The model and its tokenizer; `location` where it was looked up before.

        Raises:
            InputError: it is not there, or does not fit.
        """
        location = location or locate(self.name, self.base)
        device = choose_device(self.device, local_rank=0)
        with Console(stderr=True).status(f"loading {location.path}"):
            return load_located(location, dtype=self.dtype, device=device)


def generate(choice: ModelChoice, prompts: list[str], sampling: Sampling, num: int) -> int:
    """Prints `num` continuations of each prompt as they are made; returns the exit code.

    Raises:
        InputError: no model there, or a prompt that does not fit it.
    """
    for prompt in prompts:
        check_is_text(prompt, "--prompt")
    saved = choice.load()
    generator = TextGenerator(saved, end_ids(saved), sampling)
    console = Console(highlight=False)
    for row, prompt in enumerate(prompts):
        for sample in range(num):
            title = f"{prompt[:50]!r}" + (f" ({sample + 1} of {num})" if num > 1 else "")
            console.rule(title, align="left")
            _continue(saved, generator, prompt, row, sample)
    return 0


def _continue(saved: Saved, generator: TextGenerator, prompt: str, row: int, sample: int) -> None:
    ids = encode_text(saved.tokenizer, prompt, "--prompt")
    room, wanted = generator.room(len(ids)), generator.sampling.max_new_tokens
    if room <= 0:
        assert saved.window is not None
        raise InputError(
            f"the prompt has {len(ids)} tokens, and the model's window is {saved.window}",
            where="--prompt",
            remedy=f"shorten it to {saved.window - 1} tokens or less",
        )
    if room < wanted:
        log.warning("at most %d new tokens: the model's window is %d tokens", room, saved.window)
    typer.echo(prompt, nl=False)
    generator.generate([Request(ids, row, sample)], lambda _, completion: None, lambda text: typer.echo(text, nl=False))
    typer.echo()


def chat(choice: ModelChoice, sampling: Sampling, system: str) -> int:
    """A conversation on stdin and stdout; returns the exit code.

    Raises:
        InputError: no model there, or none with a chat template.
    """
    check_is_text(system, "--system")
    saved = choice.load()
    check_chat_template(saved, "--chat", "use --prompt to let it continue texts, or a model that was taught to chat")
    return Chat(saved, TextGenerator(saved, end_ids(saved), sampling), system).run()


@dataclass(frozen=True)
class Files:
    """What batch mode reads and writes, and how.

    Attributes:
        skip_long: leave prompts that do not fit the window without a completion.
        batch_tokens: about so many positions are computed at once.
    """

    input: Path
    output: Path
    skip_long: bool = False
    batch_tokens: int = 8192


def complete(choice: ModelChoice, files: Files, sampling: Sampling, num: int) -> int:
    """Answers each row of a JSONL file `num` times into another; returns the exit code.

    Raises:
        InputError: a file, a row or the model is wrong.
        TrainingError: the disk is full.
    """
    check_output(files.output)
    rows = read_input(files.input)
    saved = choice.load()
    generator = TextGenerator(saved, end_ids(saved), sampling, files.batch_tokens)
    try:
        done = complete_file(saved, files.input, files.output, rows, generator, num, files.skip_long)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from there", err=True)
        return EXIT_INTERRUPTED
    parts = [f"{done.done} rows done, {done.tokens} tokens in {done.seconds:.1f} s"]
    if done.before:
        parts.append(f"{done.before} were done before")
    if done.skipped:
        parts.append(f"{done.skipped} did not fit the window of {saved.window} tokens and have no completion")
    typer.echo(f"{files.output}: {'; '.join(parts)}")
    return 0
