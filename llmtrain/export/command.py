"""`llmtrain export`: a model directory that others can load, whole or not there."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmtrain.directories import check_new, new_directory
from llmtrain.errors import InputError, TrainingError
from llmtrain.export.card import card
from llmtrain.export.scoring import Scoring
from llmtrain.models.diffusion import save_diffusion
from llmtrain.models.heads import Head
from llmtrain.models.llada import save_llada
from llmtrain.models.loading import known_diffusion, load_weights, open_config
from llmtrain.models.merging import CAST_BOUND, difference, merge, probe, probe_rows
from llmtrain.models.reward import known_reward, save_reward
from llmtrain.models.saved import DTYPES, Location, Saved, head_at, load_located, locate
from llmtrain.models.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BELOW

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)B", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """How a model is exported.

    Attributes:
        dtype: of the weights; auto keeps those of the model, of an adapter's base where it is merged.
        merge: put an adapter into its base's weights.
        base: of an adapter, in place of the model that it names.
        max_shard_size: of a weights file.
        layout: names of the parameters and the configuration: transformers', or LLaDA's published one.
    """

    dtype: str = "auto"
    merge: bool = True
    base: str | None = None
    max_shard_size: str = "5GB"
    layout: Literal["transformers", "llada"] = "transformers"

    def command(self, model: str, output: Path) -> str:
        """The command line that means these options."""
        parts = ["llmtrain", "export", model, "--output", str(output)]
        parts += [] if self.dtype == "auto" else ["--dtype", self.dtype]
        parts += [] if self.merge else ["--no-merge"]
        parts += [] if self.base is None else ["--base", self.base]
        parts += [] if self.layout == "transformers" else ["--layout", self.layout]
        return shlex.join(parts)


def export(model: str, output: Path, options: Options) -> None:
    """Writes the model into a new directory, once it is known to compute what it should.

    Raises:
        InputError: no model there, an adapter that cannot be merged, or an output that is not empty.
        TrainingError: the merged or cast model computes something else, or the disk is full.
    """
    _bytes(options.max_shard_size)
    location = locate(model, options.base)
    check_new(output)
    head = head_at(location)
    reward = known_reward(location.path, head) if head.scores else None
    if reward is not None and options.layout != "transformers":
        message = f"that layout is of language models, and this is {head.what}"
        raise InputError(message, where="--layout", remedy="leave it out")
    merged = location.is_adapter and options.merge
    if location.is_adapter and not merged and options.layout != "transformers":
        raise InputError("an adapter alone has peft's layout", where="--layout", remedy="leave out --no-merge")
    with Console(stderr=True).status(f"exporting {location.path}"), new_directory(output) as aside:
        if location.is_adapter and not merged:
            dtype, tokenizer = _write_adapter(location, aside, options, head)
        else:
            dtype, tokenizer = _write_model(location, aside, options, head)
        if reward is not None:
            save_reward(reward, aside)
        diffusion = known_diffusion(str(aside), str(aside))
        name, command = output.absolute().name, options.command(model, output)
        scoring = None if reward is None else Scoring(reward, head, tokenizer)
        text = card(location, name, dtype, command, merged=merged, diffusion=diffusion, scoring=scoring)
        (aside / "README.md").write_text(text, encoding="utf-8")
    typer.echo(f"{output}: {'merged, ' if merged else ''}{dtype}; what it is stands in its README.md")


def _bytes(size: str) -> int:
    found = _SIZE.fullmatch(size)
    if found is None:
        raise InputError(f"{size!r} is no size", where="--max-shard-size", remedy="such as 5GB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** (1 + "KMGT".index(found[2].upper())))


def _write_model(
    location: Location, directory: Path, options: Options, head: Head
) -> tuple[str, PreTrainedTokenizerBase]:
    """Writes the whole model, merged where it is an adapter; returns its dtype and its tokenizer."""
    dtype = DTYPES.get(options.dtype) or _dtype_of(location.base or location.path)
    # float32, because what an update adds to a weight in bf16 is mostly rounded away
    saved = load_located(location, head=head, dtype="float32")
    diffusion = saved.diffusion
    if diffusion is not None:  # so that transformers' own forward attends both ways where ours does
        saved.decoder.config.is_causal = diffusion.process == "block"
    rows = probe_rows(saved.decoder)
    if location.is_adapter:
        decoder, reference = merge(saved, rows)
    else:
        decoder, reference = saved.decoder, probe(saved.decoder, rows, diffusion)
    if options.layout == "llada":
        save_llada(decoder.to(dtype), diffusion, saved.tokenizer, directory, _bytes(options.max_shard_size))
    else:
        _save(saved, decoder.to(dtype), directory, _bytes(options.max_shard_size))
    name, tokenizer = str(dtype).removeprefix("torch."), saved.tokenizer
    del decoder, saved  # two of them in memory are enough
    written = load_weights(str(directory), str(directory), head, dtype=torch.float32)
    error = difference(probe(written, rows, diffusion), reference)
    if error > CAST_BOUND[dtype]:
        raise TrainingError(
            f"written as {name}, the model's logits differ by {error:.2g} of their size (at most {CAST_BOUND[dtype]:g} "
            "is rounding)\n  remedy: export it with --dtype float32 or bfloat16"
        )
    return name, tokenizer


def _dtype_of(path: str) -> torch.dtype:
    dtype = open_config(path, path).dtype
    return dtype if dtype in CAST_BOUND else torch.float32


def _save(saved: Saved, decoder: PreTrainedModel, directory: Path, max_shard_size: int) -> None:
    decoder.config.use_cache = True
    decoder.save_pretrained(directory, max_shard_size=max_shard_size)
    _save_beside(saved, directory)


def _save_beside(saved: Saved, directory: Path) -> None:
    """What the weights do not tell."""
    saved.tokenizer.save_pretrained(directory)
    if saved.diffusion is not None:
        save_diffusion(saved.diffusion, directory)


def _write_adapter(
    location: Location, directory: Path, options: Options, head: Head
) -> tuple[str, PreTrainedTokenizerBase]:
    """Writes the adapter alone, in peft's layout; returns its dtype and its tokenizer."""
    saved = load_located(location, head=head)  # which checks that it fits its base
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
    _save_beside(saved, directory)
    for below in source.glob(f"{BELOW}*"):  # adapters that it stands on, to be merged before it
        shutil.copytree(below, directory / below.name)
    return str(next(iter(tensors.values())).dtype).removeprefix("torch."), saved.tokenizer
