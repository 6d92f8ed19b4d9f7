import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.checkpoint.manifest import checkpoints_in, layout_problem, leftovers_in, read_manifest

HASH = {"sha256": "0" * 64, "bytes": 1}
GOOD: dict[str, Any] = {
    "format": 2,
    "step": 4,
    "time": "2026-01-01T00:00:00+00:00",
    "metrics": {"loss": 2.5},
    "world_size": 1,
    "engine": "single process",
    "llmtrain": "0",
    "torch": "2",
    "files": {"state.json": HASH, "tensors.json": HASH, "state-rank-00000.safetensors": HASH},
}
# As the release before wrote it.
FORMAT_1 = {"format": 1, "step": 4, "llmtrain": "0.1.0", "torch": "2.13.0", "files": {"state.json": HASH}}


def problem_of(directory: Path, content: str) -> str | None:
    path = directory / "step-00000004"
    path.mkdir(exist_ok=True)
    (path / "manifest.json").write_text(content)
    manifest, problem = read_manifest(path)
    assert (manifest is None) == (problem is not None)
    return problem


def test_a_manifest(tmp_path: Path) -> None:
    assert problem_of(tmp_path, json.dumps(GOOD)) is None


def test_older_and_newer_formats_are_named(tmp_path: Path) -> None:
    old = problem_of(tmp_path, json.dumps(FORMAT_1))
    assert old == "it is of format 1, and this version of llmtrain reads format 2 only"
    new = problem_of(tmp_path, json.dumps(GOOD | {"format": 3, "more": []}))
    assert new == "it is of format 3, and this version of llmtrain reads format 2 only"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is no manifest of ours: : Invalid JSON"),
        ("\0" * 4096, "is no manifest of ours: : Invalid JSON"),
        ("[]", "is no manifest of ours"),
        ("{}", "is no manifest of ours: format: Field required"),
        (json.dumps(GOOD | {"format": "2"}), "is no manifest of ours: format"),
        (json.dumps(GOOD | {"metrics": {"loss": None}}), "is no manifest of ours: metrics.loss"),
        (json.dumps(GOOD | {"world_size": 0}), "is no manifest of ours: world_size"),
        (json.dumps(GOOD | {"extra": 1}), "is no manifest of ours: extra"),
        (json.dumps(GOOD | {"step": 5}), "is of step 5"),
        (json.dumps(GOOD | {"files": {"state.json": HASH}}), "lists no tensors.json"),
        (json.dumps(GOOD | {"files": {"tensors.json": HASH}}), "lists no state.json"),
        (json.dumps(GOOD | {"files": {"state.json": {"sha256": "x", "bytes": 1}}}), "files.state.json.sha256"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, content: str, problem: str) -> None:
    found = problem_of(tmp_path, content)
    assert found is not None and problem in found and found.startswith("manifest.json ") and "\n" not in found


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "step-00000004"
    assert read_manifest(path) == (None, "manifest.json is missing")
    (path / "manifest.json").mkdir(parents=True)
    assert read_manifest(path) == (None, "manifest.json cannot be read: Is a directory")


def test_tensors_in_a_file_without_a_hash_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "step-00000004"
    assert problem_of(tmp_path, json.dumps(GOOD)) is None
    manifest, _ = read_manifest(path)
    assert manifest is not None
    record = {"dtype": "F32", "shape": [10], "starts": [0, 5], "ranks": [0, 0]}
    for content, problem in (
        ({"w": record}, None),
        ({"w": record | {"ranks": [0, 3]}}, "manifest.json lists no state-rank-00003.safetensors"),
        ({"w": record | {"starts": [5, 0]}}, "tensors.json is none of ours: w: Value error, the runs do not make up"),
        ([], "tensors.json is none of ours"),
    ):
        (path / "tensors.json").write_text(json.dumps(content))
        found = layout_problem(path, manifest)
        assert found is problem or (found is not None and problem is not None and found.startswith(problem))


def test_only_what_is_named_as_a_checkpoint_is_one(tmp_path: Path) -> None:
    names = ["step-00000010", "step-00000009", "step-100000000", "step-99999999"]
    others = ["step-00000010-copy", "step-00000010.bak", "step-7", "step-", "last", "step-0000001O"]
    for name in [*names, *others, ".writing-step-00000011", ".removing-step-00000001"]:
        (tmp_path / name).mkdir()
    ordered = ["step-100000000", "step-99999999", "step-00000010", "step-00000009"]
    assert [path.name for path in checkpoints_in(tmp_path)] == ordered
    assert [path.name for path in leftovers_in(tmp_path)] == [".removing-step-00000001", ".writing-step-00000011"]
    assert checkpoints_in(tmp_path / "absent") == [] == leftovers_in(tmp_path / "absent")
