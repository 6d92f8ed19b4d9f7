"""Adapters: a small set of parameters is put into a decoder, by peft, and trained in place of its weights."""

import copy
import logging
import math
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtrain.errors import InputError
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.decoder import Decoder
from llmtrain.models.growth import bare_head
from llmtrain.models.hub import MODEL_DTYPE
from llmtrain.models.peft import layers, prompt
from llmtrain.models.peft.config import check_names, peft_config, refused_as_input_error, target_names
from llmtrain.models.quantised import is_quantised
from llmtrain.models.saved import merge_below
from llmtrain.models.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BELOW
from llmtrain.recipe.schema import FSDPEngine, PrefixTuning, PromptTuning, PTuning, Recipe

log = logging.getLogger(__name__)

# What weights are rounded to when they are computed with; float32 otherwise.
COMPUTE_DTYPE = {"bf16_mixed": torch.bfloat16, "fp16_mixed": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Adapter:
    """An adapter in a decoder.

    Attributes:
        decoder: that it is in.
        model: peft's around `decoder.hf`; it says how things are saved.
        config: peft's of the adapter.
        names: of the tensors in the decoder's state that an export needs: what is trained and what belongs to it.
        peft_names: what peft calls them; one that layers share has several names.
        bases: directories of the adapters that were merged into the model before.
    """

    decoder: Decoder
    model: Any
    config: Any
    names: frozenset[str]
    peft_names: dict[str, str]
    bases: tuple[Path, ...]


def adapt(blueprint: Blueprint, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Adapter | None:
    """Puts the recipe's adapter into the decoder and freezes the rest; None where the recipe has none.

    The decoder may be on the meta device: the adapter's values come with those of its unit, as peft
    itself makes them. Adapters of `adapter.base` become part of the frozen weights.

    Raises:
        InputError: peft does not have it, it does not fit the model, or a base is not there.
    """
    spec = recipe.adapter
    if spec is None:
        return None
    decoder = blueprint.decoder
    mask_row = _new_mask_row(blueprint, recipe, tokenizer)
    config = peft_config(spec, recipe, decoder.hf, mask_row)
    check_names(spec, config, decoder.hf)
    bases = tuple(Path(directory).expanduser() for directory in spec.base)
    if bases:
        _merge_bases(blueprint, tokenizer, bases)
    own: set[Tensor] = {*decoder.parameters(), *decoder.buffers()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft's, of transformers
        if isinstance(spec, PromptTuning | PrefixTuning | PTuning):
            model = prompt.put_in(spec, config, blueprint, recipe, tokenizer)
        else:
            model = _put_into_layers(blueprint, config, recipe)
    if mask_row is not None:
        bare_head(decoder.hf, mask_row)
    _set_dtypes(decoder, own, recipe)
    _check_head(decoder)
    _check_added_tokens(blueprint, recipe)
    new = {*decoder.parameters(), *decoder.buffers()} - own
    added = {tensor: name for name, tensor in decoder.state_dict(keep_vars=True).items() if tensor in new}
    peft_names = {name: added[tensor] for name, tensor in model.state_dict(keep_vars=True).items() if tensor in added}
    _check_parameters(decoder, model)
    trained = sum(parameter.numel() for parameter in decoder.parameters() if parameter.requires_grad)
    log.info(
        "adapter: %s, %.3fM parameters are trained of %.2fM",
        config.peft_type.value,
        trained / 1e6,
        decoder.num_parameters() / 1e6,
    )
    return Adapter(decoder, model, config, frozenset(added.values()), peft_names, bases)


def _set_dtypes(decoder: Decoder, base: set[Tensor], recipe: Recipe) -> None:
    """What is trained has the precision's own dtype; what is frozen, that in which it is computed with.

    FSDP would keep the frozen weights in float32 and round them for each forward: twice the memory for
    the same numbers. (DeepSpeed rounds them once.)
    """
    frozen = torch.bfloat16 if recipe.precision == "bf16_mixed" and isinstance(recipe.engine, FSDPEngine) else None
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(MODEL_DTYPE[recipe.precision])
        elif frozen is not None and parameter in base:
            parameter.data = parameter.data.to(frozen)


def _put_into_layers(blueprint: Blueprint, config: Any, recipe: Recipe) -> Any:
    hf = blueprint.decoder.hf
    computed = COMPUTE_DTYPE.get(recipe.precision, torch.float32)
    with _telling_targets(hf):
        if blueprint.is_empty:
            why = layers.obstacle(copy.deepcopy(hf), config, computed)
            if why is None:
                with torch.device("meta"):
                    model = layers.inject(hf, config, computed)
                blueprint.additions.append(layers.Layers(hf, model, computed))
                blueprint.indivisible |= layers.indivisible(hf)
                return model
            log.info("each rank builds the whole model before it is sharded: %s", why)
            blueprint.build_whole()
        before = {tensor: tensor.detach().clone() for tensor in hf.parameters()} if _may_change(config) else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = layers.inject(hf, config, computed)
    if any(not torch.equal(tensor, value) for tensor, value in before.items()):
        raise layers.changed_base(config)
    if is_quantised(hf):
        _check_on_four_bits(hf, model, config)
    blueprint.indivisible |= layers.indivisible(hf)
    return model


def _check_on_four_bits(hf: PreTrainedModel, model: Any, config: Any) -> None:
    kinds = {type(hf.get_submodule(key)) for key in model.base_model.targeted_module_names}
    # peft has the layers that can be put on bitsandbytes' in modules of that name.
    if layers.changes_base(config) or not all(kind.__module__.endswith(".bnb") for kind in kinds):
        raise InputError(
            f"{config.peft_type.value} with these settings cannot be put on weights in 4 bits",
            where="adapter",
            remedy="use adapter.kind lora with init default, or set model.quantization: none",
        )


def _may_change(config: Any) -> bool:
    return config.peft_type.value not in ("LORA", "IA3")


@contextmanager
def _telling_targets(hf: PreTrainedModel) -> Iterator[None]:
    """Targets that are not there are told with those that are."""
    try:
        with refused_as_input_error():
            yield
    except InputError as error:
        if isinstance(error.__cause__, NoMatchingPeftModuleError) or "target_modules" in error.message:
            raise InputError(
                f"{error.message} (there are: {target_names(hf)})",
                where="adapter.target_modules",
                remedy="name some of these in a list, [q_proj]; a text is a regular expression over the whole name",
            ) from error
        raise


def _merge_bases(blueprint: Blueprint, tokenizer: PreTrainedTokenizerBase, directories: Iterable[Path]) -> None:
    """Makes adapters part of the weights, in their order; each rank has the whole model for it."""
    hf = blueprint.decoder.hf
    if is_quantised(hf):
        raise InputError(
            "adapters cannot be put under another one in 4 bits without a loss",
            where="adapter.base",
            remedy="merge them into the model by `llmtrain export` first",
        )
    log.info("each rank builds the whole model before it is sharded: adapters are merged into it")
    blueprint.build_whole()
    for number, directory in enumerate(directories):
        where = f"adapter.base.{number}"
        if not (directory / ADAPTER_CONFIG).is_file() or not (directory / ADAPTER_WEIGHTS).is_file():
            raise InputError(
                f"{directory} holds no adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS})",
                where=where,
                remedy="correct the path",
            )
        try:
            merged = merge_below(hf, tokenizer, directory)
        except InputError as error:
            raise InputError(f"{directory}: {error.message}", where=where, remedy=error.remedy) from error
        assert merged is hf


def _check_parameters(decoder: Decoder, model: Any) -> None:
    known = set(decoder.parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter not in known:
            raise InputError(
                f"peft keeps {name} outside of the model, where no backend finds it",
                where="adapter.type",
                remedy="choose another",
            )


def _check_head(decoder: Decoder) -> None:
    """The loss reads the head's weight, a chunk of rows at a time, so it has to be all that the head is."""
    head: Any = decoder.head
    if isinstance(head, BaseTunerLayer | TrainableTokensWrapper):
        raise InputError(
            "an adapter on the head would not be in the loss, which multiplies with the head's weight itself",
            where="adapter",
            remedy="train the head whole: modules_to_save: [lm_head] (with a tied embedding: [embed_tokens])",
        )


def _new_mask_row(blueprint: Blueprint, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The row of the mask token, where that is the one token that is new to the model."""
    if recipe.mask_token is None or list(blueprint.new_rows) != [tokenizer.mask_token_id]:
        return None
    return blueprint.new_rows.start


def _check_added_tokens(blueprint: Blueprint, recipe: Recipe) -> None:
    embedding = blueprint.decoder.hf.get_input_embeddings()
    saved: set[int] = set()  # matrices on the embedding would be, and not the rows that they are on
    if isinstance(embedding, TrainableTokensWrapper):
        saved = set(embedding.token_adapter.token_indices[layers.NAME])
    elif isinstance(embedding, ModulesToSaveWrapper):
        saved = set(blueprint.new_rows)
    if left := set(blueprint.new_rows) - saved:
        keys = [f"algorithm.mask_token ({recipe.mask_token})"] if recipe.mask_token else []
        if not keys or len(blueprint.new_rows) > 1:
            keys.insert(0, "tokenizer.add_tokens")
        raise InputError(
            f"the model gets {len(left)} new embeddings by {' and '.join(keys)}, which this adapter would not save",
            where="adapter.modules_to_save",
            remedy="add embed_tokens (and lm_head, where it is not tied to them), by the model's names for them; for a "
            "mask token alone adapter.kind lora does without",
        )


def save_adapter(
    adapter: Adapter,
    parameters: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Writes a directory that `peft.PeftModel.from_pretrained` loads on the unchanged model, with the tokenizer.

    Adapters that were merged into the model before lie in base-0, base-1, ... beside it: to be merged
    in this order first.

    Args:
        parameters: (name, whole tensor) of `adapter.names` at least, as `Engine.full_parameters` streams
            them; names may lack `Decoder.PREFIX`.
    """
    full = {name.removeprefix(Decoder.PREFIX): name for name in adapter.names}
    state = {}
    for name, tensor in parameters:
        if (short := name.removeprefix(Decoder.PREFIX)) in full:
            state[full[short]] = tensor.detach().cpu()
    assert state.keys() == adapter.names, f"the stream lacks {sorted(adapter.names - state.keys())[:3]}"
    config = copy.deepcopy(adapter.config)
    if config.is_prompt_learning:
        embeddings = adapter.decoder.hf.get_input_embeddings()
        start = "prompt.encoder."
        network = {name.removeprefix(start): tensor for name, tensor in state.items()}
        tensors = {"prompt_embeddings": prompt.learnt_prompt(config, network, embeddings)}
    else:
        prefixed = {name: state[own] for name, own in adapter.peft_names.items()}
        tensors = _of_adapter(adapter, prefixed, layers.NAME)
        if layers.changes_base(config):
            # peft asks every adapter of a model for the rows that one of them trains; these are counted from nothing.
            rows = {name: tensor for name, tensor in prefixed.items() if name.endswith(f"_tokens_delta.{layers.NAME}")}
            renamed = {name.removesuffix(layers.NAME) + layers.INITIAL: tensor for name, tensor in rows.items()}
            tensors = _counted_from(_of_adapter(adapter, prefixed | renamed, layers.INITIAL), tensors, config)
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        directory / ADAPTER_WEIGHTS,
        {"format": "pt"},
    )
    config.inference_mode = True
    # peft has taken the path as the recipe gives it, which another working directory would not find.
    base_model = Path(adapter.decoder.hf.name_or_path).expanduser()
    if base_model.is_dir():
        config.base_model_name_or_path = str(base_model.resolve())
    config.save_pretrained(str(directory))
    tokenizer.save_pretrained(directory)
    for number, base in enumerate(adapter.bases):
        target = directory / f"{BELOW}{number}"
        target.mkdir()
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copy(base / file, target / file)


def _of_adapter(adapter: Adapter, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = get_peft_model_state_dict(
        adapter.model, state_dict=state, adapter_name=name, save_embedding_layers=False
    )
    return tensors


def _counted_from(initial: dict[str, Tensor], trained: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """An adapter of twice the rank that does to the unchanged weights what this one does to the changed ones.

    W = W' + s B0 A0 was split, so W' + s B A = W + s [B, -B0] [A; A0].
    """
    config.init_lora_weights, config.r = True, 2 * config.r
    scale = math.sqrt(2) if config.use_rslora else 2
    config.lora_alpha = config.lora_alpha * scale
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: alpha * scale for key, alpha in config.alpha_pattern.items()}
    tensors = dict(trained)
    for name, tensor in initial.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([trained[name], tensor], dim=0)
        elif ".lora_B." in name:
            tensors[name] = torch.cat([trained[name], -tensor], dim=1)
    return tensors
