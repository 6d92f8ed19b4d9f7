"""Builders of the token cache that are killed at any moment, and builders that start at once."""

import hashlib
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from llmtrain.data import built
from llmtrain.data import cache as module
from llmtrain.data.built import ASIDE, build_once, read_about
from llmtrain.data.documents import Texts
from llmtrain.data.tokenizer import load_tokenizer
from llmtrain.recipe.schema import TextSource
from tests.unit.data.corpora import byte_level_tokenizer, text_documents

NUM_DOCUMENTS = 30_000
NUM_KILLS = 10
# Real processes that have the libraries imported: a start takes milliseconds, not seconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


def build(directory: Path, cache: Path, answer: Connection) -> None:
    """What a rank does at its start; answers when it begins, and what it found."""
    module.BATCH_CHARACTERS = 20_000  # many moments to be killed in
    write, calls = module._write, []

    def counted(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        return write(*arguments)

    module._write = counted  # type: ignore[assignment]
    paths = [str(directory / "corpus.txt")]
    source = TextSource.model_validate({"kind": "text", "paths": paths, "document": "line"})
    tokenizer = load_tokenizer(str(directory / "tokenizer"))
    answer.send("begins")
    halves = module.tokenised(source, Texts(tokenizer), 0.1, cache)
    answer.send((len(calls), halves.train.num_documents, halves.validation.num_documents))


class Builder:
    """A process that builds, from the moment on that it begins."""

    def __init__(self, directory: Path, cache: Path):
        self._answers, answer = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=build, args=(directory, cache, answer))
        self.process.start()
        answer.close()
        assert self._answers.recv() == "begins"

    def result(self) -> tuple[int, int, int]:
        """(how often it built, train documents, held-out documents)."""
        found: tuple[int, int, int] = self._answers.recv()
        self.process.join()
        assert self.process.exitcode == 0
        return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    byte_level_tokenizer(text_documents(100)).save_pretrained(directory / "tokenizer")
    lines = (text.replace("\n", " ") + "\n" for text in text_documents(NUM_DOCUMENTS))
    (directory / "corpus.txt").write_text("".join(lines))
    return directory


def contents(cache: Path) -> dict[str, str]:
    """Hashes of all files of the entries."""
    files = sorted(cache.glob("tokens/*/*"))
    return {str(file.relative_to(cache)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_killed_build_is_never_taken_for_whole(directory: Path, tmp_path: Path) -> None:
    undisturbed = Builder(directory, tmp_path / "undisturbed")
    began = time.monotonic()
    num_built, *counts = undisturbed.result()
    seconds = time.monotonic() - began
    assert num_built == 1 and sum(counts) == NUM_DOCUMENTS

    cache = tmp_path / "cache"
    rng = random.Random(2)
    num_leftovers = 0
    for kill in range(NUM_KILLS):
        builder = Builder(directory, cache)
        time.sleep(seconds * (kill + rng.random()) / NUM_KILLS)  # a moment in each part of the build
        builder.process.kill()
        builder.process.join()
        leftovers = list(cache.glob(f"tokens/*{ASIDE}*"))
        assert len(leftovers) <= 1  # each builder removes what the one before left
        num_leftovers += len(leftovers)
    assert num_leftovers > 0  # some were killed while they wrote
    assert Builder(directory, cache).result()[1:] == tuple(counts)
    assert not list(cache.glob(f"tokens/*{ASIDE}*"))
    assert contents(cache) == contents(tmp_path / "undisturbed")


def test_builders_that_start_at_once_build_once(directory: Path, tmp_path: Path) -> None:
    builders = [Builder(directory, tmp_path / "cache") for _ in range(3)]
    found = [builder.result() for builder in builders]
    assert sorted(num_built for num_built, _, _ in found) == [0, 0, 1]
    assert len({(train, held_out) for _, train, held_out in found}) == 1


def build_and_die(path: Path, num_syncs: int) -> None:
    """Dies after so many files and directories were synced: the steps of putting a build in place."""
    sync = built.fsync_path
    calls: list[Path] = []

    def deadly(path: Path) -> None:
        if len(calls) == num_syncs:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(path)
        sync(path)

    built.fsync_path = deadly
    build_once(path, "letters", write_letters)


def write_letters(directory: Path) -> dict[str, int]:
    (directory / "letters").write_text("abc")
    return {"num": 3}


# Synced are the file, the manifest, the directory aside and, once it has its name, the one above.
@pytest.mark.parametrize(("num_syncs", "is_whole"), [(0, False), (1, False), (2, False), (3, True)])
def test_killed_at_each_step_of_putting_it_in_place(tmp_path: Path, num_syncs: int, is_whole: bool) -> None:
    path = tmp_path / "key"
    process = PROCESSES.Process(target=build_and_die, args=(path, num_syncs))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (read_about(path) is not None) == is_whole
    assert build_once(path, "letters", write_letters) == {"num": 3}
    assert sorted(file.name for file in path.iterdir()) == ["letters", "manifest.json"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["key", "key.lock"]
