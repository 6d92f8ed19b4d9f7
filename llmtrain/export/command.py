"""`llmtrain export`: a model directory that others can load, whole or not there."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from llmtrain.directories import check_new, new_directory
from llmtrain.errors import InputError, TrainingError
from llmtrain.export.card import card
from llmtrain.models.hub import load_weights
from llmtrain.models.merging import CAST_BOUND, difference, merge, probe, probe_rows
from llmtrain.models.saved import DTYPES, Location, Saved, load_located, locate
from llmtrain.models.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BELOW

_SIZE = re.compile(r"\d+(\.\d+)?\s*(KB|MB|GB|TB|KiB|MiB|GiB|TiB)", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """How a model is exported.

    Attributes:
        dtype: of the weights; auto keeps those of the model, of an adapter's base where it is merged.
        merge: put an adapter into its base's weights.
        base: of an adapter, in place of the model that it names.
        max_shard_size: of a weights file.
    """

    dtype: str = "auto"
    merge: bool = True
    base: str | None = None
    max_shard_size: str = "5GB"

    def command(self, model: str, output: Path) -> str:
        """The command line that means these options."""
        parts = ["llmtrain", "export", model, "--output", str(output)]
        parts += [] if self.dtype == "auto" else ["--dtype", self.dtype]
        parts += [] if self.merge else ["--no-merge"]
        parts += [] if self.base is None else ["--base", self.base]
        return shlex.join(parts)


def export(model: str, output: Path, options: Options) -> None:
    """Writes the model into a new directory, once it is known to compute what it should.

    Raises:
        InputError: no model there, an adapter that cannot be merged, or an output that is not empty.
        TrainingError: the merged or cast model computes something else, or the disk is full.
    """
    if not _SIZE.fullmatch(options.max_shard_size):
        raise InputError(f"{options.max_shard_size!r} is no size", where="--max-shard-size", remedy="such as 5GB")
    location = locate(model, options.base)
    check_new(output)
    merged = location.is_adapter and options.merge
    with Console(stderr=True).status(f"exporting {location.path}"), new_directory(output) as aside:
        if location.is_adapter and not merged:
            dtype = _write_adapter(location, aside, options)
        else:
            dtype = _write_model(location, aside, options)
        text = card(location, output.absolute().name, dtype, options.command(model, output), merged=merged)
        (aside / "README.md").write_text(text, encoding="utf-8")
    typer.echo(f"{output}: {'merged, ' if merged else ''}{dtype}; what it is stands in its README.md")


def _write_model(location: Location, directory: Path, options: Options) -> str:
    """Writes the whole model, merged where it is an adapter; returns its dtype."""
    dtype = DTYPES.get(options.dtype) or _dtype_of(location.base or location.path)
    # float32, because what an update adds to a weight in bf16 is mostly rounded away
    saved = load_located(location, dtype="float32")
    rows = probe_rows(saved.decoder)
    if location.is_adapter:
        decoder, reference = merge(saved, rows)
    else:
        decoder, reference = saved.decoder, probe(saved.decoder, rows)
    _save(saved, decoder.to(dtype), directory, options.max_shard_size)
    name = str(dtype).removeprefix("torch.")
    del decoder, saved  # two of them in memory are enough
    error = difference(probe(load_weights(str(directory), str(directory), dtype=torch.float32), rows), reference)
    if error > CAST_BOUND[dtype]:
        raise TrainingError(
            f"written as {name}, the model's logits differ by {error:.2g} of their size (at most {CAST_BOUND[dtype]:g} "
            "is rounding)\n  remedy: export it with --dtype float32 or bfloat16"
        )
    return name


def _dtype_of(path: str) -> torch.dtype:
    dtype = AutoConfig.from_pretrained(path).dtype
    return dtype if dtype in CAST_BOUND else torch.float32


def _save(saved: Saved, decoder: PreTrainedModel, directory: Path, max_shard_size: str) -> None:
    decoder.config.use_cache = True
    decoder.save_pretrained(directory, max_shard_size=max_shard_size)
    saved.tokenizer.save_pretrained(directory)


def _write_adapter(location: Location, directory: Path, options: Options) -> str:
    """Writes the adapter alone, in peft's layout; returns its dtype."""
    saved = load_located(location)  # which checks that it fits its base
    source = Path(location.path)
    tensors: dict[str, Tensor] = load_file(source / ADAPTER_WEIGHTS)
    if options.dtype != "auto":
        tensors = {
            name: tensor.to(DTYPES[options.dtype]) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
    save_file(tensors, directory / ADAPTER_WEIGHTS, {"format": "pt"})
    config = json.loads((source / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    if options.base is not None:
        local = Path(options.base).expanduser()
        config["base_model_name_or_path"] = str(local.resolve()) if local.is_dir() else options.base
    (directory / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    saved.tokenizer.save_pretrained(directory)
    for below in source.glob(f"{BELOW}*"):  # adapters that it stands on, to be merged before it
        shutil.copytree(below, directory / below.name)
    return str(next(iter(tensors.values())).dtype).removeprefix("torch.")
