"""Python's logging: everything into logs/rank-N.log, rank 0's news also on the console."""

import logging
from pathlib import Path

from rich.logging import RichHandler

from llmtrain.errors import InputError
from llmtrain.observe.console import CONSOLE

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OURS = "llmtrain"


def setup_logging(log_dir: Path, rank: int) -> None:
    """Sends log records to `log_dir`/rank-N.log and, on rank 0, to the console.

    The file gets everything of level INFO and above and Python's warnings. The console gets our
    own records, and of the libraries only warnings and worse; Python's warnings not at all.
    Calling it again replaces the handlers of the call before.

    Raises:
        InputError: the file cannot be written.
    """
    path = log_dir / f"rank-{rank}.log"
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", where=str(path)) from None
    file.setFormatter(logging.Formatter(_FORMAT))
    handlers: list[logging.Handler] = [file]
    if rank == 0:
        handlers.append(_console_handler())
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for old in [handler for handler in root.handlers if (handler.get_name() or "").startswith(_OURS)]:
        root.removeHandler(old)
        old.close()
    for number, handler in enumerate(handlers):
        handler.set_name(f"{_OURS}-{number}")
        root.addHandler(handler)
    logging.captureWarnings(True)


class _ConsoleFormatter(logging.Formatter):
    """News as they are; what is worse with its level before it."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {text}"


def _console_handler() -> logging.Handler:
    # On a terminal rich keeps the records above the progress; in a batch log they stay plain lines.
    handler: logging.Handler
    if CONSOLE.is_terminal:
        handler = RichHandler(console=CONSOLE, show_time=False, show_level=False, show_path=False)
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(_ConsoleFormatter())
    handler.addFilter(_for_the_console)
    return handler


def _for_the_console(record: logging.LogRecord) -> bool:
    if record.name == "py.warnings":
        return False
    ours = record.name == _OURS or record.name.startswith(f"{_OURS}.")
    return ours or record.levelno >= logging.WARNING
