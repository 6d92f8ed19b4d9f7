"""peft's configuration of the recipe's adapter."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmtrain.errors import InputError, nearest
from llmtrain.models.decoder import config_field
from llmtrain.models.heads import head_of
from llmtrain.recipe.schema import (
    IA3,
    Adapter,
    LayerAdapter,
    LoRA,
    ModelFromPretrained,
    OtherAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Recipe,
)

# What peft has and a run cannot use, and why.
REFUSED = {
    "ADALORA": "it moves ranks between layers after each step, which the loop does not do",
    "ADAPTION_PROMPT": "it rewrites the attention of a few architectures; use prefix_tuning",
    "CARTRIDGE": "it is made from a text's keys and values, and not trained like the others; use prefix_tuning",
    "CPT": "it has a loss of its own; use prompt_tuning",
    "FROD": "it decomposes all layers together, and peft does not load what it saves of it",
    "MULTITASK_PROMPT_TUNING": "its forward wants a task for each row; use prompt_tuning",
    "OSF": "it projects gradients as whole matrices, which sharded backends do not have; use kind lora",
    "POLY": "its forward wants a task for each row; use kind lora",
    "SHADOW": "it is a second model beside the first; use kind lora",
    "XLORA": "it mixes adapters by a network of its own; use kind lora",
    "PROMPT_TUNING": "write kind: prompt_tuning",
    "PREFIX_TUNING": "write kind: prefix_tuning",
    "P_TUNING": "write kind: p_tuning",
}
# Initialisations of LoRA that change the weights they are put on.
CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NEEDS_DATA = ("corda", "eva", "loftq", "lora_ga")


def peft_config(spec: Adapter, recipe: Recipe, hf: PreTrainedModel, mask_row: int | None = None) -> PeftConfig:
    """The configuration that peft would save of this adapter.

    Args:
        mask_row: of the embedding, where the model is new to the mask token; LoRA trains it beside its matrices.

    Raises:
        InputError: peft has no such type or field, or refuses a value.
    """
    head = head_of(recipe)
    common: dict[str, Any] = {"task_type": head.task_type}
    scoring = head.attribute(hf)  # trained whole, and saved with the adapter
    model = recipe.model
    if not isinstance(model, ModelFromPretrained):
        raise InputError(
            f"an adapter is saved without the model it is for, and a model of kind {model.kind} cannot be loaded again",
            where="adapter",
            remedy="use model.kind: pretrained; train and export the model first, or convert the GGUF file",
        )
    common["base_model_name_or_path"] = model.path
    common["revision"] = model.revision
    if isinstance(spec, PromptTuning | PrefixTuning | PTuning):
        return _of_prompt(spec, common)
    with refused_as_input_error():
        if isinstance(spec, OtherAdapter):
            return _of_other(spec, common, scoring)
        if saved := _with_head(spec.modules_to_save, scoring):
            common["modules_to_save"] = saved
        if isinstance(spec, IA3):
            feedforward = None if spec.feedforward_modules is None else list(spec.feedforward_modules)
            return IA3Config(target_modules=spec.target_modules, feedforward_modules=feedforward, **common)
        return _of_lora(spec, hf, common, mask_row)


def _with_head(modules: list[str], scoring: str | None) -> list[str]:
    return list(modules) if scoring is None or scoring in modules else [*modules, scoring]


def _not_saved(kind: str, scoring: str) -> InputError:
    return InputError(
        f"{kind} saves no other module with it, and the head that scores ({scoring}) is trained, too",
        where="adapter.kind",
        remedy="use lora or ia3",
    )


def _of_lora(spec: LoRA, hf: PreTrainedModel, common: dict[str, Any], mask_row: int | None) -> PeftConfig:
    saved = {name.split(".")[-1] for name in spec.modules_to_save}
    is_tied = bool(config_field(hf.config, "tie_word_embeddings"))
    ties = is_tied and not saved.isdisjoint(EMBEDDING_LAYER_NAMES)
    config = LoraConfig(
        r=spec.r,
        lora_alpha=int(spec.alpha) if float(spec.alpha).is_integer() else spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        use_dora=spec.dora,
        init_lora_weights=True if spec.init == "default" else spec.init,
        target_modules=spec.target_modules,
        ensure_weight_tying=ties,  # a tied head stays tied to the embedding that is trained
        **common,
    )
    embedding = _embedding_name(hf)
    own = embedding.rpartition(".")[2]
    is_trained = ties or own in saved or check_target_module_exists(config, embedding)
    if mask_row is not None and not is_trained:
        config.trainable_token_indices = {own: [mask_row]}
    return config


def _embedding_name(hf: PreTrainedModel) -> str:
    embedding = hf.get_input_embeddings()
    name: str = next(name for name, module in hf.named_modules() if module is embedding)
    return name


def _of_prompt(spec: PromptTuning | PrefixTuning | PTuning, common: dict[str, Any]) -> PeftConfig:
    common["num_virtual_tokens"] = spec.num_virtual_tokens
    if isinstance(spec, PromptTuning):
        return PromptTuningConfig(**common)  # an initial text is our business: peft would load a tokenizer
    if isinstance(spec, PrefixTuning):
        return PrefixTuningConfig(
            prefix_projection=spec.projection, encoder_hidden_size=spec.encoder_hidden_size, **common
        )
    return PromptEncoderConfig(
        encoder_reparameterization_type=spec.encoder.upper(), encoder_hidden_size=spec.encoder_hidden_size, **common
    )


def _of_other(spec: OtherAdapter, common: dict[str, Any], scoring: str | None) -> PeftConfig:
    types = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = spec.type.upper()
    if name not in types:
        raise InputError(f"peft has no {spec.type!r}{nearest(name, types)}", where="adapter.type")
    if (why := REFUSED.get(name)) is not None:
        raise InputError(f"{name} cannot be trained here: {why}", where="adapter.type", remedy="choose another")
    fields = {field.name for field in dataclasses.fields(types[name]) if field.init}
    for key in spec.config:
        where = f"adapter.config.{key}"
        if key not in fields:
            raise InputError(f"{types[name].__name__} has no field {key!r}{nearest(key, fields)}", where=where)
        if key in (*common, "peft_type", "inference_mode"):
            raise InputError("it is set by the recipe", where=where, remedy="remove it")
    init = str(spec.config.get("init_lora_weights")).lower()
    if init.startswith(_NEEDS_DATA):
        raise InputError(
            f"{init} looks at data before the training, which is not done here",
            where="adapter.config.init_lora_weights",
            remedy="use pissa or olora",
        )
    given = dict(spec.config)
    if scoring is not None:
        if "modules_to_save" not in fields:
            raise _not_saved(name, scoring)
        given["modules_to_save"] = _with_head(given.get("modules_to_save") or [], scoring)
    return types[name](**common, **given)


@contextmanager
def refused_as_input_error() -> Iterator[None]:
    """What peft raises for settings that are wrong, as an error of the recipe."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, AssertionError, ImportError) as error:
        raise InputError(f"peft: {' '.join(str(error).split())}", where="adapter", remedy="correct it") from error


def check_names(spec: Adapter, config: Any, hf: PreTrainedModel) -> None:
    """Raises InputError where one of several names is that of no module: peft passes over it in silence."""
    modules = [name for name, _ in hf.named_modules()]
    saved = spec.modules_to_save if isinstance(spec, LayerAdapter | IA3) else None
    targets = config.to_dict().get("target_modules")
    for where, names in (
        ("adapter.target_modules", targets if isinstance(targets, list | set) else []),
        ("adapter.modules_to_save", saved or []),
    ):
        for name in sorted(names):
            if not any(module == name or module.endswith(f".{name}") for module in modules):
                endings = {module.rpartition(".")[2] for module in modules}
                raise InputError(
                    f"the model has no module {name!r}{nearest(name, endings)}",
                    where=where,
                    remedy=f"adapters can be put on: {target_names(hf)}",
                )


def target_names(hf: PreTrainedModel) -> str:
    """The endings of the names that adapters can be put on."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, Conv1D)
    endings = {name.rpartition(".")[2] for name, module in hf.named_modules() if isinstance(module, kinds)}
    return ", ".join(sorted(endings))
