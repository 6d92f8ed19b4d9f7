"""Settings of every test: no hub, no telemetry, no file of the user's own cache."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.saved import CommandLine

# Before any test module imports transformers or datasets, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

_cache = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_cache] = tempfile.TemporaryDirectory(prefix="llmtrain-test-cache-")
    os.environ["LLMTRAIN_CACHE"] = config.stash[_cache].name


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_cache].cleanup()


@pytest.fixture(autouse=True)
def _own_log_handlers() -> Iterator[None]:
    """What a run in this process logs to goes with its test, whose streams it may hold."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in root.handlers[:]:
        if handler not in before:
            root.removeHandler(handler)
            handler.close()


@pytest.fixture
def llmtrain(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "CommandLine":
    """Runs command lines in this process, in an empty directory."""
    from tests.saved import CommandLine  # which imports transformers

    monkeypatch.chdir(tmp_path)
    return CommandLine(capfd)
