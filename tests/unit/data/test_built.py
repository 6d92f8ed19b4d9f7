"""Directories that are built once, and are whole or not there."""

import errno
import json
import logging
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from llmtrain.data.built import ASIDE, MANIFEST, build_once, read_about
from llmtrain.errors import InputError, TrainingError


def write_letters(directory: Path) -> dict[str, int]:
    (directory / "letters").write_text("abc")
    return {"num": 3}


def refuse(directory: Path) -> dict[str, int]:
    raise AssertionError("built again")


def test_it_is_built_once(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "key"
    assert read_about(path) is None
    assert build_once(path, "letters", write_letters) == {"num": 3}
    assert build_once(path, "letters", refuse) == {"num": 3}
    assert (path / "letters").read_text() == "abc"
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["files"]["letters"]["bytes"] == 3 and len(manifest["files"]["letters"]["blake2b"]) == 40


def rewritten(manifest: Path, **changes: object) -> None:
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))


MANIFESTS = {"cut": '{"about"', "empty": "", "object": "{}", "list": "[]", "deep": "[" * 100_000, "binary": "\0\ufffd"}


@pytest.mark.parametrize("name", [*MANIFESTS, "other numbers", "no files", "a directory"])
def test_a_damaged_manifest_is_made_anew(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "key"
    build_once(path, "letters", write_letters)
    manifest = path / MANIFEST
    if name in MANIFESTS:
        manifest.write_text(MANIFESTS[name])
    elif name == "a directory":
        manifest.unlink()
        manifest.mkdir()
    else:
        rewritten(manifest, **({"about": {"num": 4}} if name == "other numbers" else {"files": {}}))
    assert build_once(path, "letters", write_letters) == {"num": 3}
    (warning,) = caplog.messages
    assert "manifest.json is no manifest" in warning and warning.endswith("the letters will be built again")
    assert build_once(path, "letters", refuse) == {"num": 3}


def test_a_small_file_is_hashed_at_each_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tokenizer that a failing disk changed in place, or that was copied with its times."""
    path = tmp_path / "key"
    build_once(path, "letters", write_letters)
    before = (path / "letters").stat()
    (path / "letters").write_text("abd")
    os.utime(path / "letters", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert build_once(path, "letters", write_letters) == {"num": 3}
    assert (path / "letters").read_text() == "abc"
    assert "was changed since it was written" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything; run as another user to see it refused")
@pytest.mark.parametrize("closed", ["key", "."])
def test_a_cache_of_another_user(tmp_path: Path, closed: str) -> None:
    build_once(tmp_path / "key", "letters", write_letters)
    (tmp_path / closed).chmod(0)
    try:
        with pytest.raises(InputError, match="data.cache_dir: the cache holds what is not yours") as caught:
            build_once(tmp_path / "key", "letters", write_letters)
    finally:
        (tmp_path / closed).chmod(0o700)
    assert caught.value.remedy


@pytest.mark.parametrize("damage", ["missing file", "short file", "no manifest", "cut manifest"])
def test_what_is_not_whole_is_built_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "key"
    build_once(path, "letters", write_letters)
    if damage == "missing file":
        (path / "letters").unlink()
    elif damage == "short file":
        (path / "letters").write_text("ab")
    elif damage == "no manifest":
        (path / MANIFEST).unlink()
    else:
        (path / MANIFEST).write_text((path / MANIFEST).read_text()[:20])
    assert read_about(path) is None
    assert build_once(path, "letters", write_letters) == {"num": 3}
    assert (path / "letters").read_text() == "abc"


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> dict[str, int]:
        (directory / "half").write_text("half")
        raise InputError("bad line")

    with pytest.raises(InputError, match="bad line"):
        build_once(tmp_path / "key", "letters", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert build_once(tmp_path / "key", "letters", write_letters) == {"num": 3}


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    def fill(directory: Path) -> dict[str, int]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(TrainingError, match="no space left for the letters"):
        build_once(tmp_path / "key", "letters", fill)


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    for name in ("key", "dead", "living"):
        leftover = tmp_path / f"{name}{ASIDE}0123"
        leftover.mkdir()
        (leftover / "half").write_text("half")
    with FileLock(tmp_path / "living.lock"):
        build_once(tmp_path / "key", "letters", write_letters)
    assert [path.name for path in tmp_path.glob(f"*{ASIDE}*")] == [f"living{ASIDE}0123"]


def _build_slowly(path: Path, log: Path) -> None:
    def build(directory: Path) -> dict[str, int]:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return write_letters(directory)

    assert build_once(path, "letters", build) == {"num": 3}


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (tmp_path / "key", tmp_path / "log")
    processes = [context.Process(target=_build_slowly, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "built\n"


def test_who_waits_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("llmtrain.data.built.SECONDS_BEFORE_SAYING_SO", 0.01)
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_build_slowly, args=(tmp_path / "key", tmp_path / "log"))
    process.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    with caplog.at_level(logging.INFO):
        assert build_once(tmp_path / "key", "letters", refuse) == {"num": 3}
    process.join()
    assert "waiting for another process that builds the letters" in caplog.text


def test_content_that_was_changed_afterwards_is_built_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def build(directory: Path) -> dict[str, int]:
        (directory / "tokens").write_bytes(b"right")
        return {}

    build_once(tmp_path / "thing", "thing", build)
    (tmp_path / "thing" / "tokens").write_bytes(b"wrong")  # of the same size
    build_once(tmp_path / "thing", "thing", build)
    assert (tmp_path / "thing" / "tokens").read_bytes() == b"right"
    assert "was changed since it was written" in caplog.text
