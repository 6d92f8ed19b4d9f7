"""RoPE scaling: parameters that are checked before transformers takes them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llmtrain.errors import InputError, nearest
from llmtrain.models.refusals import as_input_error

ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)


def stretch_rope(config: PreTrainedConfig, parameters: dict[str, Any]) -> None:
    """Sets RoPE scaling, and the longer context that its factor gives."""
    where = "model.rope_parameters"
    check_rope_type(parameters, where)
    if "rope_type" not in parameters:
        raise InputError("it lacks rope_type", where=where, remedy=f"add one of {', '.join(ROPE_TYPES)}")
    old = config.to_dict().get("rope_parameters")
    if old is None:
        raise InputError(f"{type(config).__name__} has no RoPE", where=where)
    # What belongs to the weights and not to the scaling stays.
    kept = {key: old[key] for key in ("rope_theta", "partial_rotary_factor") if key in old}
    parameters = kept | parameters
    original = parameters.get("original_max_position_embeddings", config.max_position_embeddings)
    factor = parameters.get("factor", 1.0)
    for key, number in (("original_max_position_embeddings", original), ("factor", factor)):
        if not isinstance(number, int | float):
            raise InputError(f"expected a number, given {number!r}", where=f"{where}.{key}")
    if parameters["rope_type"] in ("yarn", "llama3", "longrope"):
        parameters = {"original_max_position_embeddings": original, **parameters}
    config.rope_parameters = dict(parameters)
    # Dynamic NTK is for inference: it leaves the positions up to this length as they are, and scales
    # by the length it sees beyond. With a longer one here it would never begin.
    if parameters["rope_type"] != "dynamic":
        config.max_position_embeddings = int(original * factor)
    with as_input_error(where), rope_warnings_as_errors(where):
        config.standardize_rope_params()
        config.validate_rope()


def check_rope_type(parameters: Any, where: str) -> None:
    if parameters is None:
        return
    if not isinstance(parameters, dict):
        raise InputError(
            f"expected a mapping, given {parameters!r}", where=where, remedy="write {rope_type: yarn, factor: 4.0}"
        )
    for part in [parameters] if "rope_type" in parameters else [v for v in parameters.values() if isinstance(v, dict)]:
        kind = str(part.get("rope_type"))
        if kind not in ROPE_TYPES:
            raise InputError(
                f"unknown rope_type {kind!r}{nearest(kind, ROPE_TYPES)} (allowed: {', '.join(ROPE_TYPES)})",
                where=f"{where}.rope_type",
            )


@contextmanager
def rope_warnings_as_errors(where: str) -> Iterator[None]:
    """transformers only warns of RoPE fields that are unknown or out of range."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("transformers.modeling_rope_utils"), Collect(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    # The ratio of the two lengths may differ from the factor on purpose (DeepSeek's models do).
    wrong = [message for message in messages if "does not match the ratio" not in message]
    if wrong:
        raise InputError(" ".join(wrong), where=where)
