"""Saved models, in a directory or on the hub, read by transformers: configuration and whole weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from llmtrain.errors import InputError
from llmtrain.models import llada
from llmtrain.models.diffusion import FILE as DIFFUSION_FILE
from llmtrain.models.diffusion import Diffusion, load_diffusion
from llmtrain.models.heads import CAUSAL, Head, saved_head
from llmtrain.models.refusals import LOADABLE, as_input_error
from llmtrain.models.weights import cached, find_weights, is_adapter_alone
from llmtrain.recipe.resolved import check_is_no_run

disable_progress_bar()  # of transformers' own loading and writing: it would tear our progress


def generation_config(path: str, revision: str | None) -> GenerationConfig:
    """The model's file, or what its config says of generation; as from_pretrained does."""
    try:
        return GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:
        return GenerationConfig.from_pretrained(
            path, config_file_name="config.json", _from_model_config=True, revision=revision
        )


def config_fields(path: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a directory or a hub model."""
    fields: dict[str, Any] = PreTrainedConfig.get_config_dict(path, revision=revision)[0]
    return fields


def is_llada(fields: dict[str, Any]) -> bool:
    return fields.get("model_type") == llada.MODEL_TYPE


def open_config(
    path: str, where: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of a model in a directory or on the hub; LLaDA's is that of a Llama.

    Raises:
        InputError: there is none, or it is not known.
    """
    check_is_no_run(path, where)
    if is_adapter_alone(path):
        raise InputError(
            f"{path} is an adapter, and no whole model",
            where=where,
            remedy="merge it into its base by `llmtrain export`, or name the base here and the adapter in adapter.base",
        )
    with as_input_error(where, LOADABLE):
        fields = config_fields(path, revision)
        if not is_llada(fields):
            return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
        config = llada.llama_config(fields, where)
    if config.dtype is None and (files := find_weights(path, revision)) is not None:
        config.dtype = files.dtype()
    return config


def known_diffusion(path: str, where: str, revision: str | None = None) -> Diffusion | None:
    """How a model in a directory or on the hub is to be used, by its diffusion.json or as LLaDA; None for no diffusion.

    Raises:
        InputError: what it says of itself cannot be read.
    """
    with as_input_error(where, LOADABLE):
        own = cached(path, DIFFUSION_FILE, revision)
        if own is not None:
            return load_diffusion(own.parent)
        if cached(path, "config.json", revision) is None:  # an adapter alone
            return None
        fields = config_fields(path, revision)
    return llada.diffusion_of(fields, where) if is_llada(fields) else None


def check_kind(path: str, where: str, head: Head, revision: str | None = None) -> None:
    """Raises InputError where a saved model has a head that scores, and another one is wanted.

    A model with tied embeddings would load as one that predicts tokens, without a word.
    """
    with as_input_error(where, LOADABLE):
        fields = config_fields(path, revision)
    own = saved_head(fields)
    if not own.scores or own is head:
        return
    instead = "that, or a language model"
    if head is CAUSAL:
        instead = "the language model that it was made from; answers are scored by `llmtrain generate --score`"
    raise InputError(
        f"{path} is {own.what} ({fields['architectures'][0]}), and {head.what} is wanted",
        where=where,
        remedy=f"give {instead}",
    )


def load_weights(
    path: str, where: str, head: Head = CAUSAL, *, may_lack_head: bool = False, **options: Any
) -> PreTrainedModel:
    """A model from a directory, the hub or (with gguf_file) a GGUF file, all of its weights read from there.

    LLaDA's published layout is read as a Llama's.

    Args:
        path: directory or hub name.
        where: what to name in errors.
        head: that the model is to have. Weights of another one in the files are passed over.
        may_lack_head: a scoring head that is not in the files is drawn at random, as transformers does.
        options: of transformers' from_pretrained.

    Raises:
        InputError: there is no such model, it has another head, or weights are missing or of another shape.
    """
    revision = options.get("revision")
    is_gguf = "gguf_file" in options
    if not is_gguf:
        check_kind(path, where, head, revision)
    with as_input_error(where, LOADABLE):
        as_llama = not is_gguf and is_llada(config_fields(path, revision))
        if as_llama:
            config = options.get("config") or open_config(path, where, revision)
            options |= {"config": config, "key_mapping": llada.KEY_MAPPING, "trust_remote_code": False}
        with _another_head_expected(head):
            model, loading = head.auto.from_pretrained(
                path,
                use_safetensors=True,  # never unpickles what comes from outside
                ignore_mismatched_sizes=True,  # so that they are told below, with their names
                output_loading_info=True,
                **options,
            )
    if as_llama:
        model._weight_conversions = []  # or it would be saved under LLaDA's names with a Llama's config
    missing, mismatched = set(loading["missing_keys"]), {name for name, *_ in loading["mismatched_keys"]}
    if may_lack_head and (name := head.attribute(model)) is not None:
        own = {key for key in model.state_dict() if key.startswith(f"{name}.")}
        missing -= own if own <= missing else set()  # half a head is a mistake
    # transformers only warns, and fills in random numbers.
    names = sorted(missing | mismatched)
    if names:
        raise InputError(
            f"{len(names)} of the model's weights are not there, or in another shape: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
            where=where,
            remedy=f"give one that holds {head.what} of this config",
        )
    return model


@contextmanager
def _another_head_expected(head: Head) -> Iterator[None]:
    """Without transformers' table of missing and unexpected weights for a head that takes the place of another."""

    def is_other(record: logging.LogRecord) -> bool:
        return not head.scores or "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)
