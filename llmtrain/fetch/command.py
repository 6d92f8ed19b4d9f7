"""`llmtrain fetch NAME`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from llmtrain.directories import new_directory
from llmtrain.errors import InputError, nearest
from llmtrain.fetch import arithmetic, smollm2


@dataclass(frozen=True)
class Size:
    """Of data that is made: rows to train on, rows held out, seed."""

    rows: int = 2000
    test_rows: int = 200
    seed: int = 0


def _model(write: Callable[[Path], str]) -> Callable[[Path, Size], str]:
    def fill(directory: Path, size: Size) -> str:
        if size != Size():
            raise InputError("a model has no rows and no seed", where="--rows", remedy="leave these options out")
        return write(directory)

    return fill


def _data(source: arithmetic.Source) -> Callable[[Path, Size], str]:
    return lambda directory, size: arithmetic.write(source, directory, size.rows, size.test_rows, size.seed)


# A name is a function that fills a directory and says what is in it.
NAMES: dict[str, Callable[[Path, Size], str]] = {
    "smollm2-135m": _model(smollm2.write),
    **{name: _data(source) for name, source in arithmetic.SOURCES.items()},
}


def fetch(name: str, output: Path | None, size: Size) -> None:
    """Fills a new directory with what `name` means, and says what it is.

    Raises:
        InputError: no such name, a package is missing, or the directory is not empty.
    """
    if name not in NAMES:
        raise InputError(
            f"there is no {name!r}{nearest(name, NAMES)}", where="NAME", remedy=f"name one of {', '.join(NAMES)}"
        )
    directory = output or Path(name)
    with new_directory(directory) as aside:
        told = NAMES[name](aside, size)
    typer.echo(f"{directory}: {told}")
