import logging
import subprocess
import sys
from pathlib import Path

import pytest

from llmtrain.errors import InputError
from llmtrain.observe.logs import setup_logging

CODE = """
import logging, sys, warnings
from pathlib import Path
from llmtrain.observe.logs import setup_logging
for _ in range(int(sys.argv[3])):
    setup_logging(Path(sys.argv[1]), int(sys.argv[2]))
logging.getLogger("llmtrain.loop").info("our news")
logging.getLogger("llmtrain.loop").warning("our warning")
logging.getLogger("llmtrain.loop").debug("our detail")
logging.getLogger("some_library").info("their chatter")
logging.getLogger("some_library").warning("their warning")
warnings.warn("python warning")
"""


def _run(directory: Path, rank: int, calls: int = 1) -> tuple[list[str], str]:
    command = [sys.executable, "-c", CODE, str(directory), str(rank), str(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr.splitlines(), (directory / f"rank-{rank}.log").read_text()


def test_rank_0_has_a_file_and_the_console(tmp_path: Path) -> None:
    console, file = _run(tmp_path / "logs", 0)
    assert console == ["our news", "warning: our warning", "warning: their warning"]
    for text in ("our news", "our warning", "their chatter", "their warning", "python warning"):
        assert text in file
    assert "our detail" not in file
    assert " INFO llmtrain.loop: our news" in file and file[:2] == "20"  # a date first


def test_other_ranks_have_a_file_only(tmp_path: Path) -> None:
    console, file = _run(tmp_path, 3)
    assert console == [] and "our news" in file and "python warning" in file


def test_calling_twice_writes_once_and_a_second_run_appends(tmp_path: Path) -> None:
    console, _ = _run(tmp_path, 0, calls=2)
    assert console.count("our news") == 1
    _, file = _run(tmp_path, 0)
    assert file.count("our news") == 2


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(InputError, match="file/logs/rank-0.log: cannot be written"):
        setup_logging(tmp_path / "file" / "logs", 0)
    assert logging.getLogger().handlers == handlers
