"""Model directories as transformers reads them, written while the weights stream by."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

SHARD_BYTES = 5_000_000_000  # a common size on the hub; and what the writing rank holds at a time


def save_pretrained(
    model: PreTrainedModel,
    parameters: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a directory that `AutoModelForCausalLM.from_pretrained` loads: config, safetensors, tokenizer.

    Weights are written in files of at most `shard_bytes` (a larger tensor has its own), as they come.
    Where transformers renames or splits weights to save them, all are collected first.

    Args:
        model: gives the config and the names; its own weights are not read.
        parameters: (name, whole tensor) of each weight, as `Engine.full_parameters` streams them.
    """
    use_cache, model.config.use_cache = model.config.use_cache, True  # training had switched it off
    try:
        if _is_rewritten(model):
            dtype = _save_collected(model, parameters, directory)
        else:
            _save_config(model, directory)
            dtype = save_tensors(_untied(model, parameters), directory, shard_bytes)
    finally:
        model.config.use_cache = use_cache
    tokenizer.save_pretrained(directory)
    # A config without dtype loads as float32, whatever the file holds.
    config_file = directory / "config.json"
    config = json.loads(config_file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _is_rewritten(model: PreTrainedModel) -> bool:
    """Whether transformers saves other names or shapes than the model's own, or code of the model's with them."""
    conversions = vars(model).get("_weight_conversions")
    if conversions is None:  # it was made from a config
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    return bool(conversions) or model.is_remote_code()


def _save_collected(model: PreTrainedModel, parameters: Iterable[tuple[str, Tensor]], directory: Path) -> torch.dtype:
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in parameters}
    dtype = next(iter(state.values())).dtype  # read now: transformers empties the mapping as it writes
    model.save_pretrained(directory, state_dict=state)
    return dtype


def _save_config(model: PreTrainedModel, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [kind.__name__ for kind in type(model).__mro__ if issubclass(kind, PreTrainedModel)][
        :1
    ]
    model.config.save_pretrained(directory)
    if model.can_generate():
        model.generation_config.save_pretrained(directory)


def _untied(model: PreTrainedModel, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Without the second names of tied weights, and what the model says is not to be saved."""
    own = model.state_dict(keep_vars=True)
    left_out = {name for name, source in model.all_tied_weights_keys.items() if own.get(name) is own.get(source)}
    left_out |= set(model._keys_to_ignore_on_save or ())
    return ((name, tensor) for name, tensor in parameters if name not in left_out)


def save_tensors(parameters: Iterable[tuple[str, Tensor]], directory: Path, shard_bytes: int) -> torch.dtype:
    """Writes safetensors of at most `shard_bytes` and their index, as the tensors come; returns the first one's dtype.

    Each file is written when it is full, under a name that tells how many there are once that is known.
    """
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0
    dtype = torch.float32

    def write() -> None:
        nonlocal size
        save_file(shard, directory / _unfinished(len(shards)), {"format": "pt"})
        shards.append(list(shard))
        shard.clear()
        size = 0

    for name, tensor in parameters:
        if shard and size + tensor.nbytes > shard_bytes:
            write()
        if not (shards or shard):
            dtype = tensor.dtype
        shard[name] = tensor.detach().cpu().contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    write()
    if len(shards) == 1:
        (directory / _unfinished(0)).rename(directory / SAFE_WEIGHTS_NAME)
        return dtype
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / _unfinished(index)).rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    table = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(table, indent=2) + "\n")
    return dtype


def _unfinished(index: int) -> str:
    return f"unfinished-{index:05d}.safetensors"
