"""`llmtrain generate --chat`: a conversation in the terminal, or from a pipe, a line a message."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import typer

from llmtrain.errors import InputError
from llmtrain.models.saved import Saved
from llmtrain.sampling.batched import Completion, Request
from llmtrain.sampling.generators import Generator
from llmtrain.sampling.infilling import check_no_holes
from llmtrain.sampling.prompts import check_is_text, encode_messages

_HELP = "/reset begins again, /system TEXT sets the system message and begins again, /quit (or Ctrl-D) ends"
_LINE = "a line of the conversation"


@dataclass
class Chat:
    """A conversation so far.

    Attributes:
        saved: a model whose tokenizer has a chat template.
        system: text of the system message; empty for none.
    """

    saved: Saved
    generator: Generator
    system: str = ""
    history: list[dict[str, str]] = field(default_factory=list)
    _turns: int = 0  # of the whole session: each turn has random numbers of its own

    def run(self) -> int:
        """Answers what comes on stdin until it ends or /quit; returns the exit code."""
        self._tell(f"chatting with {self.saved.location.path}; {_HELP}")
        for line in self._lines():
            text = line.strip()
            if not text:
                continue
            if text.startswith("/"):
                if text in ("/quit", "/exit"):
                    break
                self._command(text)
                continue
            try:
                self._answer(text)
            except InputError as error:  # the conversation can go on without this line
                typer.echo(f"error: {error}", err=True)
        return 0

    def _lines(self) -> Iterator[str]:
        while True:
            if sys.stdin.isatty():
                typer.secho("> ", nl=False, bold=True)
                sys.stdout.flush()
            try:
                line = sys.stdin.readline()
            except KeyboardInterrupt:
                line = ""
            if not line:
                if sys.stdin.isatty():
                    typer.echo()
                return
            yield line

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name == "/reset":
            self.history.clear()
            self._tell("the conversation begins again")
        elif name == "/system":
            self.system = rest.strip()
            self.history.clear()
            self._tell(
                "the conversation begins again, with that system message" if self.system else "no system message"
            )
        else:
            typer.echo(f"{name} is no command: {_HELP}", err=True)

    def _answer(self, text: str) -> None:
        check_is_text(text, _LINE)
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*self.history, {"role": "user", "content": text}]
        ids = encode_messages(self.saved.tokenizer, [*system, *asked], _LINE)
        check_no_holes(self.saved, ids, _LINE)
        if not self.generator.fits(ids):
            raise InputError(
                f"the conversation has {len(ids)} tokens, and the model's window is {self.saved.window}",
                where=_LINE,
                remedy="/reset begins again",
            )
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            typer.echo(piece, nl=False)
            sys.stdout.flush()

        self._turns += 1
        done: list[Completion] = []
        with contextlib.suppress(KeyboardInterrupt):  # what has been said stands
            self.generator.generate([Request(ids, self._turns)], lambda _, completion: done.append(completion), show)
        typer.echo()
        if not done:
            self._tell("(interrupted)")
        elif done[0].finish == "length":
            self._tell(f"(cut off after {len(done[0].ids)} tokens)")
        self.history = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _tell(self, text: str) -> None:
        typer.secho(text, err=True, dim=True)
