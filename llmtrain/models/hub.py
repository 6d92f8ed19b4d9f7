"""Decoders of transformers: from a config, a directory or the hub, or a GGUF file; and export."""

import copy
import logging
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from llmtrain.data.tokenizer import num_ids
from llmtrain.errors import InputError, nearest
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder, config_field
from llmtrain.models.growth import rows_of_tokens, with_new_rows
from llmtrain.models.quantised import in_four_bits
from llmtrain.models.weights import find_weights, is_converted
from llmtrain.recipe.schema import (
    SFT,
    Model,
    ModelFromConfig,
    ModelFromGGUF,
    ModelFromPretrained,
    Recipe,
    SentencePieceTokenizer,
)

log = logging.getLogger(__name__)
disable_progress_bar()  # of transformers' own loading and writing: it would tear our progress

# Of the weights that are trained; the mixed precisions keep them in float32 and compute in another.
MODEL_DTYPE = {
    "fp32": torch.float32,
    "bf16_autocast": torch.float32,
    "bf16_mixed": torch.float32,
    "fp16_mixed": torch.float32,
    "bf16": torch.bfloat16,
}
# Fields of every config that keys of the recipe set, and that would be overruled in silence.
SET_ELSEWHERE = {"model_type": "model.architecture", "dtype": "precision"}
LOADABLE = "name a directory with config.json and *.safetensors, a .gguf file, or, with a network, a hub model"
ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
# What it raises for a config or for files that are wrong; it looks at few of the values that it takes.
TRANSFORMERS_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    ZeroDivisionError,
    struct.error,
    TypeError,
    AttributeError,
    RecursionError,
    AssertionError,  # of torch's modules, for sizes
    StrictDataclassError,
    SafetensorError,
)


def open_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """The recipe's model, with random weights by the recipe's seed or with its pretrained ones.

    The weights come when the engine asks for them; what the recipe has wrong is said now.

    Raises:
        InputError: unknown architecture or config field, weights that are not there or do not fit,
            vocabulary smaller than the tokenizer's, rows longer than the model's positions.
    """
    blueprint = open_other_model(recipe.model, recipe, tokenizer)
    if isinstance(recipe.algorithm, SFT):
        blueprint.decoder.neftune_alpha = recipe.algorithm.neftune_alpha
    return blueprint


def open_other_model(spec: Model, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Blueprint:
    """As `open_model`, another model than the recipe's: a critic, a reference, a teacher."""
    dtype = MODEL_DTYPE[recipe.precision]
    if isinstance(spec, ModelFromConfig):
        config = _config_from_fields(spec, tokenizer, recipe.sequence_length)
        _check_fit(config, tokenizer, recipe)
        blueprint = _random(config, dtype, recipe.seed, spec.attention)
    elif isinstance(spec, ModelFromPretrained):
        blueprint = _pretrained(spec, dtype, recipe, tokenizer)
    else:
        model = _from_gguf(spec, dtype)
        new_rows = _check_fit(model.config, tokenizer, recipe)
        blueprint = Blueprint(Decoder(with_new_rows(model, new_rows)), recipe.seed)
        blueprint.new_rows = new_rows
    rows = blueprint.decoder.hf.get_input_embeddings().weight.shape[0]
    if rows < num_ids(tokenizer):
        raise InputError(
            f"the model's embedding has {rows} rows and the tokenizer {num_ids(tokenizer)} ids",
            where="tokenizer",
            remedy="use the tokenizer that lies beside the model (tokenizer: {kind: model})",
        )
    return blueprint


def _random(config: PreTrainedConfig, dtype: torch.dtype, seed: int, attention: str) -> Blueprint:
    def build() -> PreTrainedModel:
        with _as_input_error("model", "correct model.config, or model.attention"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **_attention(attention))

    empty = _on_meta(build)
    if isinstance(empty, str):
        obstacle: str | None = empty
    else:
        blueprint = Blueprint(Decoder(empty), seed)
        obstacle = blueprint.obstacle()
        if obstacle is None:
            return blueprint
    log.info("each rank builds the whole model before it is sharded: %s", obstacle)
    torch.manual_seed(seed)
    return Blueprint(Decoder(build()), seed)


def _on_meta(build: Callable[[], PreTrainedModel]) -> PreTrainedModel | str:
    """The model without storage, or why there can be none."""
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError as error:
        return f"its constructor wants values: {error}"


def _attention(kernel: str) -> dict[str, str]:
    return {} if kernel == "auto" else {"attn_implementation": kernel}


def _config_from_fields(
    spec: ModelFromConfig, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> PreTrainedConfig:
    if spec.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or spec.architecture not in CONFIG_MAPPING_NAMES:
        raise InputError(
            f"transformers has no decoder of type {spec.architecture!r}"
            f"{nearest(spec.architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}",
            where="model.architecture",
        )
    with _as_input_error("model.config"):
        template = AutoConfig.for_model(spec.architecture)
    # transformers takes any field in silence, so a misspelt one would train another model.
    known = {*template.to_dict(), *template.attribute_map}
    fields: dict[str, Any] = {}
    for key, value in spec.config.items():
        if key in SET_ELSEWHERE:
            raise InputError(f"it is set by {SET_ELSEWHERE[key]}", where=f"model.config.{key}", remedy="remove it")
        if key not in known:
            raise InputError(
                f"{type(template).__name__} has no field {key!r}{nearest(key, known)}", where=f"model.config.{key}"
            )
        name = template.attribute_map.get(key, key)
        if name in fields:
            raise InputError(f"it is another name of {name}, which is given too", where=f"model.config.{key}")
        fields[name] = value
    fields.setdefault("vocab_size", num_ids(tokenizer))
    if "max_position_embeddings" in known:
        name = template.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        fields.setdefault(name, sequence_length)
    for token in ("bos", "eos", "pad"):
        fields.setdefault(f"{token}_token_id", getattr(tokenizer, f"{token}_token_id"))
    _check_rope_type(fields.get("rope_parameters"), "model.config.rope_parameters")
    with _as_input_error("model.config"), _rope_warnings_as_errors("model.config.rope_parameters"):
        return AutoConfig.for_model(spec.architecture, **fields)


def _pretrained(
    spec: ModelFromPretrained, dtype: torch.dtype, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Blueprint:
    path = str(Path(spec.path).expanduser())
    source = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    with _as_input_error("model.path", LOADABLE):
        config = AutoConfig.from_pretrained(path, **source)
    if spec.rope_parameters is not None:
        _stretch_rope(config, spec.rope_parameters)
    new_rows = _check_fit(config, tokenizer, recipe)
    why: Blueprint | str = "it is loaded in 4 bits"
    if spec.quantization == "none":
        why = _from_files(path, spec, config, recipe, new_rows)
        if isinstance(why, Blueprint):
            return why
        log.info("each rank loads the whole model before it is sharded: %s", why)
    options = source | _attention(spec.attention) | in_four_bits(spec, recipe, new_rows)
    model = load_weights(path, "model.path", config=config, dtype=dtype, **options)
    blueprint = Blueprint(Decoder(with_new_rows(model, new_rows)), recipe.seed)
    blueprint.new_rows = new_rows
    return blueprint


def _from_files(
    path: str, spec: ModelFromPretrained, config: PreTrainedConfig, recipe: Recipe, new_rows: range
) -> Blueprint | str:
    """A model whose files hold its weights as they are, or why it takes transformers to load it."""
    if spec.trust_remote_code:
        return "it may bring code of its own"
    if config.to_dict().get("quantization_config") is not None:
        return "its weights are quantised"

    dtype = MODEL_DTYPE[recipe.precision]
    # A deep copy, since transformers changes what it builds from.
    grown = copy.deepcopy(config)
    grown.vocab_size = max(config.vocab_size, new_rows.stop)

    def build() -> PreTrainedModel:
        with _as_input_error("model.path", LOADABLE):
            return AutoModelForCausalLM.from_config(copy.deepcopy(grown), dtype=dtype, **_attention(spec.attention))

    model = _on_meta(build)
    if isinstance(model, str):
        return model
    if is_converted(model, dtype):
        return f"transformers converts the weights of {type(model).__name__}"
    files = find_weights(path, spec.revision)
    if files is None:
        return "its safetensors could not be opened"
    if new_rows:
        files.set_new_rows(rows_of_tokens(model), new_rows)
    if (difference := files.difference(model)) is not None:
        return difference
    with _as_input_error("model.path", LOADABLE):
        model.generation_config = _generation_config(path, spec.revision)
    model.name_or_path = model.config.name_or_path = path
    model._weight_conversions = []  # so that it is saved under the names that it was read by
    blueprint = Blueprint(Decoder(model), recipe.seed, files)
    blueprint.new_rows = new_rows
    return blueprint.obstacle() or blueprint


def _generation_config(path: str, revision: str | None) -> GenerationConfig:
    """The model's file, or what its config says of generation; as from_pretrained does."""
    try:
        return GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:
        return GenerationConfig.from_pretrained(
            path, config_file_name="config.json", _from_model_config=True, revision=revision
        )


def load_weights(path: str, where: str, **options: Any) -> PreTrainedModel:
    """A causal LM from a directory, the hub or (with gguf_file) a GGUF file, all of its weights read from there.

    Args:
        path: directory or hub name.
        where: what to name in errors.
        options: of transformers' from_pretrained.

    Raises:
        InputError: there is no such model, or weights are missing or of another shape.
    """
    with _as_input_error(where, LOADABLE):
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            use_safetensors=True,  # never unpickles what comes from outside
            ignore_mismatched_sizes=True,  # so that they are told below, with their names
            output_loading_info=True,
            **options,
        )
    # transformers only warns, and fills in random numbers.
    names = sorted({*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])})
    if names:
        raise InputError(
            f"{len(names)} of the model's weights are not there, or in another shape: "
            f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}",
            where=where,
            remedy="give one that holds a causal language model of this config",
        )
    return model


def _from_gguf(spec: ModelFromGGUF, dtype: torch.dtype) -> PreTrainedModel:
    file = Path(spec.file).expanduser()
    if not os.path.isfile(file):  # unlike Path.is_file it raises nothing for a name that is too long
        raise InputError(f"no such file: {spec.file}", where="model.file", remedy="correct the path")
    model = load_weights(str(file.parent), "model.file", gguf_file=file.name, dtype=dtype, local_files_only=True)
    # The weights are plain tensors now; a config that says otherwise could not be saved.
    del model.config.quantization_config
    with _as_input_error("model"):
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(
            model.config, dtype=dtype, **_attention(spec.attention)
        )
    fresh.load_state_dict(model.state_dict())
    return fresh


def _stretch_rope(config: PreTrainedConfig, parameters: dict[str, Any]) -> None:
    """Sets RoPE scaling, and the longer context that its factor gives."""
    where = "model.rope_parameters"
    _check_rope_type(parameters, where)
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
    with _as_input_error(where), _rope_warnings_as_errors(where):
        config.standardize_rope_params()
        config.validate_rope()


def _check_rope_type(parameters: Any, where: str) -> None:
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


def _check_fit(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> range:
    """The rows that the embedding is to have for the tokens that the recipe adds."""
    num_added = 0 if isinstance(recipe.tokenizer, SentencePieceTokenizer) else len(recipe.tokenizer.add_tokens)
    new_rows = range(num_ids(tokenizer) - num_added, num_ids(tokenizer))
    sequence_length = recipe.sequence_length
    if new_rows.start > config.vocab_size:
        raise InputError(
            f"the model has {config.vocab_size} token ids and the tokenizer {new_rows.start}",
            where="model.config.vocab_size",
            remedy=f"set it to {num_ids(tokenizer)} or more, leave it out, or use the model's own tokenizer",
        )
    longest = config_field(config, "max_position_embeddings")
    if longest is not None and sequence_length > longest:
        raise InputError(
            f"rows of {sequence_length} tokens, and the model was made for {longest}",
            where="sequence_length",
            remedy=f"use {longest} or less, or stretch a pretrained model with rope_parameters (yarn, linear, llama3)",
        )
    return new_rows


@contextmanager
def _as_input_error(where: str, remedy: str | None = None) -> Iterator[None]:
    """What transformers raises for things that are wrong or not there, as an error of the recipe."""
    try:
        yield
    except TRANSFORMERS_ERRORS as error:
        lines = [line.strip() for line in str(error).strip().strip("'\"").splitlines() if line.strip()]
        # All that a KeyError says is the key: of a table of transformers, or of a file.
        message = f"transformers knows or finds no {error}" if isinstance(error, KeyError) else " ".join(lines[:3])
        raise InputError(message, where=where, remedy=remedy) from error


@contextmanager
def _rope_warnings_as_errors(where: str) -> Iterator[None]:
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
