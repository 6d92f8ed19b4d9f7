"""Where answers come from: what stands beside them in the files that are written, and what an interrupted command
must be given again."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmtrain import __version__
from llmtrain.evaluation.questions import Question
from llmtrain.evaluation.tasks import LoadedTask
from llmtrain.models.saved import Saved
from llmtrain.sampling.completions import named


def provenance(loaded: LoadedTask, saved: Saved, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same for all answers of a command: model, task, version, and how was sampled."""
    adapter = {} if saved.location.base is None else {"base": saved.location.base}
    return {"model": saved.location.path, **adapter, "task": loaded.name, "llmtrain": __version__, **settings}


def header(
    command: str, saved: Saved, questions: Sequence[Question], settings: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """All that decides what a command generates: for `sampling/partial.py`."""
    return {
        "command": command,
        "model": named(saved.location, saved.decoder.dtype),
        "prompts_sha256": digest([question.ids for question in questions]),
        **settings,
        **more,
    }


def digest(value: Any) -> str:
    """Of anything that JSON can write."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
