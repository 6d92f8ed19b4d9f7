"""Settings of every test: no hub, no telemetry, no file of the user's own cache."""

import os
import tempfile

import pytest

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
