"""The one console that progress, logs and samples share, so that none writes over another."""

from rich.console import Console

# stderr: what a command prints as its result goes to stdout and can be piped.
CONSOLE = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Prints a line above the progress; not wrapped where the output is a file or a pipe."""
    CONSOLE.print(text, markup=False, soft_wrap=not CONSOLE.is_terminal)
