"""What a checkpoint says of itself, and whether it is whole."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llmtrain.checkpoint.files import FileRecord
from llmtrain.checkpoint.flat import TensorRecord
from llmtrain.checkpoint.storage import state_file

FORMAT: Literal[2] = 2
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "tensors.json"
_NAME = re.compile(r"step-\d{8,}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_RECORDS = TypeAdapter(dict[str, TensorRecord])


class Manifest(_Strict):
    """The content of manifest.json, written last: what the other files must be.

    Attributes:
        time: when it was saved, ISO 8601, UTC.
        metrics: held-out figures of the newest evaluation before it.
        world_size: ranks that saved it.
        engine: what the backend said of itself.
    """

    format: Literal[2]  # FORMAT
    step: int = Field(ge=0)
    time: str
    metrics: dict[str, float]
    world_size: int = Field(ge=1)
    engine: str
    llmtrain: str
    torch: str
    files: dict[str, FileRecord]


def read_manifest(path: Path) -> tuple[Manifest | None, str | None]:
    """The manifest of a checkpoint, or why there is none."""
    try:
        manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        return None, f"{MANIFEST} is missing"
    except OSError as error:
        return None, f"{MANIFEST} cannot be read: {error.strerror}"
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and isinstance(first["input"], int):
            return None, f"it is of format {first['input']}, and this version of llmtrain reads format {FORMAT} only"
        return None, f"{MANIFEST} is no manifest of ours: {_first(error)}"
    if path.name != f"step-{manifest.step:08d}":
        return None, f"{MANIFEST} is of step {manifest.step}"
    for name in (STATE, TENSORS):
        if name not in manifest.files:
            return None, f"{MANIFEST} lists no {name}"
    return manifest, None


def read_state(path: Path) -> dict[str, Any]:
    """The small state of a checkpoint that was verified."""
    state: dict[str, Any] = json.loads((path / STATE).read_text(encoding="utf-8"))
    return state


def read_tensors(path: Path) -> dict[str, TensorRecord]:
    """Where the tensors of a checkpoint that was verified lie."""
    return _RECORDS.validate_json((path / TENSORS).read_bytes())


def layout_problem(path: Path, manifest: Manifest) -> str | None:
    """Of a checkpoint whose files are as they were written: what is wrong with how they fit together, or None."""
    try:
        tensors = read_tensors(path)
    except ValidationError as error:
        return f"{TENSORS} is none of ours: {_first(error)}"
    # What no hash covers must not be read.
    files = map(state_file, sorted({rank for record in tensors.values() for rank in record.ranks}))
    return next((f"{MANIFEST} lists no {name}" for name in files if name not in manifest.files), None)


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints of a run, whole or not, the newest first.

    Only what is named as we name it: a copy that somebody put beside them is not ours to judge, or to remove.
    """
    found = (path for path in directory.glob("step-*") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def leftovers_in(directory: Path) -> list[Path]:
    """What an interrupted save or removal left."""
    return sorted([*directory.glob(".writing-*"), *directory.glob(".removing-*")])
