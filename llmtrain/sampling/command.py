"""`llmtrain generate`: continue texts, chat, or answer a file of prompts."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from llmtrain.distributed import choose_device
from llmtrain.errors import InputError
from llmtrain.models.saved import Location, Saved, load_located, locate
from llmtrain.models.scorer import Scorer, load_scorer
from llmtrain.sampling.batched import Completion, Request, Sampling
from llmtrain.sampling.chat import Chat
from llmtrain.sampling.completions import complete_file, read_input
from llmtrain.sampling.diffusion import DiffusionGenerator
from llmtrain.sampling.generators import Generator, text_generator
from llmtrain.sampling.infilling import encode_prompt
from llmtrain.sampling.partial import check_output
from llmtrain.sampling.prompts import check_chat_template, check_is_text
from llmtrain.sampling.samplers import Asked
from llmtrain.sampling.watching import watched

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

    def load_scorer(self) -> Scorer:
        """The reward model that this names.

        Raises:
            InputError: it is not there, or does not score.
        """
        device = choose_device(self.device, local_rank=0)
        with Console(stderr=True).status(f"loading {self.name}"):
            return load_scorer(self.name, base=self.base, dtype=self.dtype, device=device)


def generate(
    choice: ModelChoice, prompts: list[str], sampling: Sampling, num: int, asked: Asked, watch: bool = False
) -> int:
    """Prints `num` continuations of each prompt as they are made, or its text with the holes filled.

    Args:
        asked: how a diffusion model is sampled.
        watch: show how it unmasks a text.

    Returns:
        The exit code.

    Raises:
        InputError: no model there, or a prompt or setting that does not fit it.
    """
    for prompt in prompts:
        check_is_text(prompt, "--prompt")
    saved = choice.load()
    generator = text_generator(saved, sampling, asked)
    if watch and not isinstance(generator, DiffusionGenerator):
        raise InputError(
            "shows how a text is unmasked, and this model is autoregressive", where="--watch", remedy="leave it out"
        )
    console = Console(highlight=False, markup=False, emoji=False)  # prompts are shown as they are
    for row, prompt in enumerate(prompts):
        for sample in range(num):
            title = f"{prompt[:50]!r}" + (f" ({sample + 1} of {num})" if num > 1 else "")
            console.rule(title, align="left")
            request = Request(_encoded(saved, generator, prompt), row, sample)
            if isinstance(generator, DiffusionGenerator) and (watch or generator.fills(request.ids)):
                with watched(generator, saved.tokenizer, console) if watch else nullcontext():
                    done = _single(generator, request)
                typer.echo(done.text if done.finish == "filled" else prompt + done.text)
                continue
            typer.echo(prompt, nl=False)
            _single(generator, request, lambda text: typer.echo(text, nl=False))
            typer.echo()
    _tell_work(generator)
    return 0


def _encoded(saved: Saved, generator: Generator, prompt: str) -> list[int]:
    ids = encode_prompt(saved, prompt, "--prompt")
    room, wanted = generator.room(len(ids)), generator.sampling.max_new_tokens
    fills = isinstance(generator, DiffusionGenerator) and generator.fills(ids)
    if not generator.fits(ids):
        assert saved.window is not None
        raise InputError(
            f"the prompt has {len(ids)} tokens, and the model's window is {saved.window}",
            where="--prompt",
            remedy=f"shorten it to {saved.window - (0 if fills else 1)} tokens or less",
        )
    if room < wanted and not fills:
        log.warning("at most %d new tokens: the model's window is %d tokens", room, saved.window)
    return ids


def _single(generator: Generator, request: Request, on_text: Callable[[str], None] | None = None) -> Completion:
    done: list[Completion] = []
    generator.generate([request], lambda _, completion: done.append(completion), on_text)
    return done[0]


def _tell_work(generator: Generator) -> None:
    """What a diffusion model took for it, which depends on how it is sampled."""
    if isinstance(generator, DiffusionGenerator):
        work = generator.work
        typer.echo(
            f"{work.tokens} places written in {generator.seconds:.1f} s, {work.forwards} forwards; "
            f"{work.tokens_per_forward:.2f} tokens of a text a forward",
            err=True,
        )


def chat(choice: ModelChoice, sampling: Sampling, system: str, asked: Asked) -> int:
    """A conversation on stdin and stdout; returns the exit code.

    Raises:
        InputError: no model there, none with a chat template, or a setting that does not fit it.
    """
    check_is_text(system, "--system")
    saved = choice.load()
    check_chat_template(saved, "--chat", "use --prompt to let it continue texts, or a model that was taught to chat")
    return Chat(saved, text_generator(saved, sampling, asked), system).run()


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


def complete(choice: ModelChoice, files: Files, sampling: Sampling, num: int, asked: Asked) -> int:
    """Answers each row of a JSONL file `num` times into another; returns the exit code.

    Raises:
        InputError: a file, a row or the model is wrong, or a setting does not fit it.
        TrainingError: the disk is full.
    """
    check_output(files.output, inputs=[files.input])
    rows = read_input(files.input)
    saved = choice.load()
    generator = text_generator(saved, sampling, asked, files.batch_tokens)
    done = complete_file(saved, files.input, files.output, rows, generator, num, files.skip_long)
    parts = [f"{done.done} rows done, {done.tokens} tokens in {done.seconds:.1f} s"]
    if done.before:
        parts.append(f"{done.before} were done before")
    if done.skipped:
        parts.append(f"{done.skipped} did not fit the window of {saved.window} tokens and have no completion")
    typer.echo(f"{files.output}: {'; '.join(parts)}")
    _tell_work(generator)
    return 0
