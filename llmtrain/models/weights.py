"""Safetensors of a pretrained model, read a tensor at a time."""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from llmtrain.models.growth import fill_new_rows

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # in peft's layout
BELOW = "base-"  # directories in an adapter's, numbered: adapters that it was trained on top of

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BUILT_BY_THE_MODEL = re.compile(r"rotary_emb\.inv_freq$")  # saved by old versions of transformers


class WeightFiles:
    """The tensors of some safetensors files, by name.

    Args:
        files: paths.
        renamed: the name by which a tensor is asked for, of the one that it has in its file.

    Raises:
        OSError, SafetensorError: a file is not there, or is torn.
    """

    def __init__(self, files: Iterable[Path], renamed: Callable[[str], str] | None = None):
        self._file_of: dict[str, Path] = {}
        self._name_in_file: dict[str, str] = {}
        self._meta: dict[str, tuple[tuple[int, ...], str]] = {}
        self._new_rows: dict[str, range] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for own in opened.keys():  # noqa: SIM118 - it is no mapping
                    piece = opened.get_slice(own)
                    name = own if renamed is None else renamed(own)
                    self._file_of[name], self._name_in_file[name] = file, own
                    self._meta[name] = (tuple(piece.get_shape()), piece.get_dtype())

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (shape, _) in self._meta.items()}

    def dtype(self) -> torch.dtype | None:
        """Of the first floating-point tensor; None without one."""
        kinds = (kind for _, kind in self._meta.values() if kind in _FLOATS)
        return _FLOATS.get(next(kinds, ""))

    def set_new_rows(self, names: Iterable[str], new: range) -> None:
        """From now on the tensors of these names have such rows, the mean of those before, whatever the files hold."""
        for name in names:
            if name in self:
                (rows, *rest), dtype = self._meta[name]
                self._meta[name] = ((max(rows, new.stop), *rest), dtype)
                self._new_rows[name] = new

    def difference(self, model: PreTrainedModel, scoring_head: str | None = None) -> str | None:
        """How the files differ from the model's names and shapes; None where they can be read by name.

        Args:
            scoring_head: the module that scores, in a model that has one. The files may lack all of it, and may hold
                another head.
        """
        state = model.state_dict(keep_vars=True)
        own = set() if scoring_head is None else {name for name in state if name.startswith(f"{scoring_head}.")}
        drawn = own if not any(name in self for name in own) else set()
        names_of: dict[Tensor, list[str]] = defaultdict(list)
        for name, tensor in state.items():
            if name not in drawn:
                names_of[tensor].append(name)
        for tensor, names in names_of.items():
            present = [name for name in names if name in self]
            if not present:
                return f"{names[0]} is not in the files"
            for name in present:
                shape, dtype = self._meta[name]
                if shape != tuple(tensor.shape):
                    return f"{name} has shape {shape} in the files and {tuple(tensor.shape)} in the model"
                if not tensor.is_floating_point() or dtype not in _FLOATS:
                    return f"{name} is {dtype} in the files"
            if len(present) > 1 and not self._equal(present):
                return f"{' and '.join(present)} are tied in the model and differ in the files"
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), _BUILT_BY_THE_MODEL]
        if scoring_head is not None:
            ignored.append(rf"^(?!{re.escape(model.base_model_prefix)}\.)")  # what is no part of the decoder itself
        for name in self._file_of:
            if name not in state and not any(re.search(pattern, name) for pattern in ignored):
                return f"the model has no {name}"
        return None

    def _equal(self, names: list[str]) -> bool:
        first, *others = (self._read(name) for name in names)
        return all(torch.equal(first, other) for other in others)

    def _read(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(self._name_in_file[name])
            return tensor

    @torch.no_grad()
    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the named tensors out of the files, casting to the dtype of where they go."""
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in tensors:
            by_file[self._file_of[name]].append(name)
        for file, names in by_file.items():
            with safe_open(file, framework="pt") as opened:  # closed after each unit: pages of it are memory, too
                for name in names:
                    read = opened.get_tensor(self._name_in_file[name])
                    if name in self._new_rows:
                        tensors[name][: read.shape[0]] = read
                        fill_new_rows(tensors[name], self._new_rows[name])
                    else:
                        tensors[name].copy_(read)


def find_weights(path: str, revision: str | None, renamed: Callable[[str], str] | None = None) -> WeightFiles | None:
    """The safetensors of a local directory or of a hub model; `renamed` as `WeightFiles` takes it.

    None where there are none, or not whole: from_pretrained tells what is wrong with them.
    """
    try:
        if cached(path, ADAPTER_CONFIG, revision) is not None:
            return None  # the weights of its base model lie elsewhere
        if (single := cached(path, SAFE_WEIGHTS_NAME, revision)) is not None:
            return WeightFiles([single], renamed)
        if (index := cached(path, SAFE_WEIGHTS_INDEX_NAME, revision)) is None:
            return None
        files, _ = get_checkpoint_shard_files(path, str(index), revision=revision)
        return WeightFiles((Path(file) for file in files), renamed)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError):
        return None


def is_adapter_alone(path: str) -> bool:
    """Whether a directory holds an adapter, and not the whole model that it was trained on."""
    directory = Path(path)
    return os.path.isfile(directory / ADAPTER_CONFIG) and not os.path.isfile(directory / "config.json")


def cached(path: str, name: str, revision: str | None) -> Path | None:
    """A file of the model; None where it has none, or is not cached and there is no network."""
    found = cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def is_converted(model: PreTrainedModel, dtype: torch.dtype) -> bool:
    """Whether from_pretrained does more to this model's files than copying and casting to `dtype`."""
    config = model.config
    elsewhere = config.to_dict().get("transformers_weights") or type(config).extra_files
    return bool(elsewhere or get_model_conversion_mapping(model, add_legacy=False) or model._get_dtype_plan(dtype))
