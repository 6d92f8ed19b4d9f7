"""Decoders of transformers for training: from a config, a directory or the hub, or a GGUF file."""

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmtrain.data.tokenizer import num_ids
from llmtrain.errors import InputError, nearest
from llmtrain.models import llada
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder, config_field
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.growth import rows_of_tokens, with_new_rows
from llmtrain.models.heads import CAUSAL, Head, head_of
from llmtrain.models.loading import (
    check_kind,
    config_fields,
    generation_config,
    is_llada,
    known_diffusion,
    load_weights,
    open_config,
)
from llmtrain.models.quantised import in_four_bits
from llmtrain.models.refusals import LOADABLE, as_input_error
from llmtrain.models.rope import check_rope_type, rope_warnings_as_errors, stretch_rope
from llmtrain.models.weights import find_weights, is_converted
from llmtrain.recipe.schema import (
    DIFFUSION,
    SFT,
    Model,
    ModelFromConfig,
    ModelFromGGUF,
    ModelFromPretrained,
    Recipe,
)

log = logging.getLogger(__name__)

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


def open_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, num_new: int = 0) -> Blueprint:
    """The recipe's model, with random weights by the recipe's seed or with its pretrained ones.

    The weights come when the engine asks for them; what the recipe has wrong is said now. Its head is that of the
    recipe's algorithm; one that scores is drawn at random where the pretrained model has none.

    Args:
        num_new: how many of the tokenizer's last ids are new to the model: their rows begin as the mean of the
            others.

    Raises:
        InputError: unknown architecture or config field, weights that are not there or do not fit, an architecture
            without such a head, vocabulary smaller than the tokenizer's, rows longer than the model's positions.
    """
    blueprint = _opened(recipe.model, recipe, tokenizer, num_new, head_of(recipe))
    if isinstance(recipe.algorithm, SFT):
        blueprint.decoder.neftune_alpha = recipe.algorithm.neftune_alpha
    return blueprint


def open_other_model(
    spec: Model, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, where: str = "model"
) -> Blueprint:
    """Another model than the recipe's, which predicts tokens: a teacher, a reference.

    Args:
        where: the recipe's key of `spec`.

    Raises:
        InputError: as `open_model`.
    """
    try:
        return _opened(spec, recipe, tokenizer, 0, CAUSAL, where)
    except InputError as error:
        place = error.where or ""
        if place == "model" or place.startswith("model."):
            place = where + place.removeprefix("model")
        raise InputError(error.message, where=place, remedy=error.remedy) from error


def _opened(
    spec: Model, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, num_new: int, head: Head, key: str = "model"
) -> Blueprint:
    dtype = MODEL_DTYPE[recipe.precision]
    if isinstance(spec, ModelFromConfig):
        _check_mask(None, recipe, tokenizer)
        config = _config_from_fields(spec, tokenizer, recipe.sequence_length)
        head.check(config, "model.architecture")
        head.configure(config, tokenizer)
        _check_fit(config, tokenizer, recipe, 0, key)
        blueprint = _random(config, dtype, recipe.seed, spec.attention, head)
    elif isinstance(spec, ModelFromPretrained):
        blueprint = _pretrained(spec, dtype, recipe, tokenizer, num_new, head, key)
    else:
        _check_mask(None, recipe, tokenizer)
        model = _from_gguf(spec, dtype, recipe.seed, tokenizer, head)
        new_rows = _check_fit(model.config, tokenizer, recipe, num_new, key)
        blueprint = Blueprint(_decoder(with_new_rows(model, new_rows), head), recipe.seed)
        blueprint.new_rows = new_rows
    rows = blueprint.decoder.hf.get_input_embeddings().weight.shape[0]
    if rows < num_ids(tokenizer):
        raise InputError(
            f"the model's embedding has {rows} rows and the tokenizer {num_ids(tokenizer)} ids",
            where="tokenizer",
            remedy="use the tokenizer that lies beside the model (tokenizer: {kind: model})",
        )
    return blueprint


def _decoder(hf: PreTrainedModel, head: Head) -> Decoder:
    return Decoder(hf, head.attribute(hf))


def _random(config: PreTrainedConfig, dtype: torch.dtype, seed: int, attention: str, head: Head) -> Blueprint:
    def build() -> PreTrainedModel:
        with as_input_error("model", "correct model.config, or model.attention"):
            model: PreTrainedModel = head.auto.from_config(config, dtype=dtype, **_attention(attention))
            return model

    empty = _on_meta(build)
    if isinstance(empty, str):
        obstacle: str | None = empty
    else:
        blueprint = Blueprint(_decoder(empty, head), seed)
        obstacle = blueprint.obstacle()
        if obstacle is None:
            return blueprint
    log.info("each rank builds the whole model before it is sharded: %s", obstacle)
    torch.manual_seed(seed)
    return Blueprint(_decoder(build(), head), seed)


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
    with as_input_error("model.config"):
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
    check_rope_type(fields.get("rope_parameters"), "model.config.rope_parameters")
    with as_input_error("model.config"), rope_warnings_as_errors("model.config.rope_parameters"):
        return AutoConfig.for_model(spec.architecture, **fields)


def _pretrained(
    spec: ModelFromPretrained,
    dtype: torch.dtype,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    num_new: int,
    head: Head,
    key: str,
) -> Blueprint:
    path = str(Path(spec.path).expanduser())
    source = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    config = open_config(path, "model.path", spec.revision, spec.trust_remote_code)
    check_kind(path, "model.path", head, spec.revision)
    head.check(config, "model.path")
    head.configure(config, tokenizer)
    known = known_diffusion(path, "model.path", spec.revision)
    _check_mask(known, recipe, tokenizer)
    if known is not None and not isinstance(recipe.algorithm, DIFFUSION):
        log.info("%s was trained by %s diffusion, and is made an autoregressive model of", path, known.process)
        config.is_causal = True  # again: it was saved as a model that attends both ways
    if spec.rope_parameters is not None:
        stretch_rope(config, spec.rope_parameters)
    new_rows = _check_fit(config, tokenizer, recipe, num_new, key)
    why: Blueprint | str = "it is loaded in 4 bits"
    if spec.quantization == "none":
        why = _from_files(path, spec, config, recipe, new_rows, head)
        if isinstance(why, Blueprint):
            return why
        log.info("each rank loads the whole model before it is sharded: %s", why)
    options = source | _attention(spec.attention) | in_four_bits(spec, recipe, new_rows, config.vocab_size)
    torch.manual_seed(recipe.seed)  # of a head that the files lack
    model = load_weights(path, "model.path", head, may_lack_head=True, config=config, dtype=dtype, **options)
    blueprint = Blueprint(_decoder(with_new_rows(model, new_rows), head), recipe.seed)
    blueprint.new_rows = new_rows
    return blueprint


def _from_files(
    path: str, spec: ModelFromPretrained, config: PreTrainedConfig, recipe: Recipe, new_rows: range, head: Head
) -> Blueprint | str:
    """A model whose files hold its weights as they are, or why it takes transformers to load it."""
    renamed = llada.llama_name if is_llada(config_fields(path, spec.revision)) else None
    if spec.trust_remote_code and renamed is None:
        return "it may bring code of its own"
    if config.to_dict().get("quantization_config") is not None:
        return "its weights are quantised"

    dtype = MODEL_DTYPE[recipe.precision]
    # A deep copy, since transformers changes what it builds from.
    grown = copy.deepcopy(config)
    grown.vocab_size = max(config.vocab_size, new_rows.stop)

    def build() -> PreTrainedModel:
        with as_input_error("model.path", LOADABLE):
            options = _attention(spec.attention)
            built: PreTrainedModel = head.auto.from_config(copy.deepcopy(grown), dtype=dtype, **options)
            return built

    model = _on_meta(build)
    if isinstance(model, str):
        return model
    if is_converted(model, dtype):
        return f"transformers converts the weights of {type(model).__name__}"
    files = find_weights(path, spec.revision, renamed)
    if files is None:
        return "its safetensors could not be opened"
    if new_rows:
        files.set_new_rows(rows_of_tokens(model), new_rows)
    decoder = _decoder(model, head)
    if (difference := files.difference(model, decoder.scoring_head)) is not None:
        return difference
    if model.can_generate():
        with as_input_error("model.path", LOADABLE):
            model.generation_config = generation_config(path, spec.revision)
    model.name_or_path = model.config.name_or_path = path
    model._weight_conversions = []  # so that it is saved under the names that it was read by
    blueprint = Blueprint(decoder, recipe.seed, files)
    blueprint.new_rows = new_rows
    return blueprint.obstacle() or blueprint


def _check_mask(known: Diffusion | None, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError where the mask is a token that texts hold, or is not that of a model that has one."""
    mask, where = recipe.mask_token, "algorithm.mask_token"
    if mask is None:
        return
    if known is not None and known.mask_token_id is not None:
        if known.mask_token_id != tokenizer.mask_token_id:
            own = tokenizer.convert_ids_to_tokens(known.mask_token_id)
            raise InputError(
                f"the model is a diffusion model already, and its mask token is {own!r}, not {mask!r}",
                where=where,
                remedy=f"write mask_token: {own!r}",
            )
        return
    what = None
    if mask in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token):
        what = "a token that begins or ends a text, or stands for what has none"
    elif tokenizer.mask_token_id not in tokenizer.added_tokens_decoder:
        what = "a word of the tokenizer's vocabulary"
    elif mask.lstrip("▁Ġ ").isalnum():
        what = "a plain word, which texts hold"
    if what is not None:
        raise InputError(
            f"{mask!r} is {what}, and a masked token could not be told from it",
            where=where,
            remedy="leave it out, or name one that is new, or a special token that the model does not use",
        )


def _from_gguf(
    spec: ModelFromGGUF, dtype: torch.dtype, seed: int, tokenizer: PreTrainedTokenizerBase, head: Head
) -> PreTrainedModel:
    file = Path(spec.file).expanduser()
    if not os.path.isfile(file):  # unlike Path.is_file it raises nothing for a name that is too long
        raise InputError(f"no such file: {spec.file}", where="model.file", remedy="correct the path")
    # Such files hold language models, of which one that scores takes all but the head.
    model = load_weights(str(file.parent), "model.file", gguf_file=file.name, dtype=dtype, local_files_only=True)
    # The weights are plain tensors now; a config that says otherwise could not be saved.
    del model.config.quantization_config
    head.check(model.config, "model.file")
    head.configure(model.config, tokenizer)
    torch.manual_seed(seed)
    with as_input_error("model"):
        fresh: PreTrainedModel = head.auto.from_config(model.config, dtype=dtype, **_attention(spec.attention))
    if head.scores:
        fresh.base_model.load_state_dict(model.base_model.state_dict())
    else:
        fresh.load_state_dict(model.state_dict())
    return fresh


def _check_fit(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, num_new: int, key: str
) -> range:
    """The rows that the embedding is to have for the tokens that the recipe adds; `key` is the model's."""
    new_rows = range(num_ids(tokenizer) - num_new, num_ids(tokenizer))
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
            f"rows of {sequence_length} tokens, and the model{'' if key == 'model' else f' of {key}'} was made for "
            f"{longest}",
            where="sequence_length",
            remedy=f"use {longest} or less, another model, or stretch a pretrained one with {key}.rope_parameters "
            "(yarn, linear, llama3)",
        )
    return new_rows
