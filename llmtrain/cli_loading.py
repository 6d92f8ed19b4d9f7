"""What a terminal shows while a command loads its libraries."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Says what the seconds of importing torch are for: on a terminal, and gone when they are over."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("loading torch and transformers ..."):
        yield
