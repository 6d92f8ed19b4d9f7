"""Models that lie on a disk, or on the hub, made ready to be used: of runs, of others, and adapters on them."""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from llmtrain.data.tokenizer import load_tokenizer, num_ids
from llmtrain.errors import InputError
from llmtrain.models.decoder import config_field
from llmtrain.models.diffusion import FILE as DIFFUSION_FILE
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.growth import bare_head, with_new_rows
from llmtrain.models.heads import CAUSAL, SCORING_HEADS, Head, adapter_head, head_in, saved_head
from llmtrain.models.loading import config_fields, known_diffusion, load_weights, open_config
from llmtrain.models.refusals import LOADABLE, TRANSFORMERS_ERRORS, as_input_error
from llmtrain.models.vocabulary import check_vocabulary
from llmtrain.models.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BELOW, WeightFiles, is_adapter_alone
from llmtrain.recipe.resolved import RESOLVED

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_NAMEABLE = "give a run directory, a model directory or an adapter directory"
# Learnt keys and values in every layer; the other kinds of prompt learning are embeddings.
_PREFIXES = frozenset({"PREFIX_TUNING", "CARTRIDGE"})
# What peft raises where an adapter does not become part of the weights: it is of a kind that never does (not
# implemented, which is a RuntimeError, or no such method), has a bias where the model has none, or is not finite.
UNMERGEABLE = (RuntimeError, ValueError, AttributeError)


@dataclass(frozen=True)
class Location:
    """Where a model lies.

    Attributes:
        path: its directory, or a hub name.
        run: the directory of the run that made it, where that is known.
        base: of an adapter, the directory or hub name of the model that it was made for; else None.
    """

    path: str
    run: Path | None = None
    base: str | None = None

    @property
    def is_adapter(self) -> bool:
        return self.base is not None


@dataclass(frozen=True)
class Saved:
    """A model in evaluation mode, and its tokenizer.

    Attributes:
        model: the transformers model, or peft's around it.
        decoder: the transformers model; adapters inside its layers are in it already.
        virtual: what an adapter puts before the text: embeddings, keys and values in every layer, or nothing.
        num_virtual: how many positions that takes.
        diffusion: how it is to be used as a diffusion model; None where it is autoregressive.
        head: of the model.
    """

    location: Location
    model: Any
    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    virtual: str | None = None
    num_virtual: int = 0
    diffusion: Diffusion | None = None
    head: Head = CAUSAL

    @property
    def device(self) -> torch.device:
        device: torch.device = self.decoder.device
        return device

    @property
    def window(self) -> int | None:
        """Tokens of text that the model has positions for; None where it has no such limit."""
        longest: int | None = config_field(self.decoder.config, "max_position_embeddings")
        return None if longest is None else longest - self.num_virtual

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[B, T, V] after each of the tokens [B, T], padded on the right, where causal attention does not see it."""
        virtual: dict[str, Any] = {"input_ids": ids}
        if self.virtual == "embeddings":
            learnt = self.virtual_embeddings(len(ids))
            virtual = {"inputs_embeds": torch.cat([learnt, self.decoder.get_input_embeddings()(ids)], 1)}
        elif self.virtual == "cache":
            virtual["past_key_values"] = self.virtual_cache(len(ids))
        output: Tensor = self.decoder(**virtual, use_cache=self.virtual == "cache").logits
        return output[:, -ids.shape[1] :]

    def virtual_embeddings(self, rows: int) -> Tensor:
        """[rows, num_virtual, D]: what stands before the text where `virtual` is embeddings."""
        prompt: Tensor = self.model.get_prompt(batch_size=rows)
        return prompt.to(self.decoder.dtype)[:, : self.num_virtual]

    def virtual_cache(self, rows: int) -> Cache:
        """A fresh cache that begins with the learnt keys and values, where `virtual` is cache."""
        cache: Cache = self.model.get_prompt(batch_size=rows)
        return cache


def locate(model: str, base: str | None = None, where: str = "MODEL_OR_RUN") -> Location:
    """What `model` names: a run, a model directory, an adapter directory or a hub model.

    Args:
        base: for an adapter, in place of the base model that it names itself.

    Raises:
        InputError: nothing is there, the run is not finished, or the adapter's base is not there.
    """
    path = Path(model).expanduser()
    if not os.path.exists(path):
        if not _may_be_on_hub(model):
            raise InputError(f"no such directory: {model}", where=where, remedy=_NAMEABLE)
        return _checked_base(Location(model), base)
    for directory, run in ((path / "final", path), (path, _run_of(path))):
        if (directory / ADAPTER_CONFIG).is_file():
            return Location(str(directory), run, _base_of(directory, base))
        if (directory / "config.json").is_file():
            return _checked_base(Location(str(directory), run), base)
    if (path / RESOLVED).is_file():
        raise InputError(
            f"the run in {model} is not finished: it has no final/ yet",
            where=where,
            remedy="run its `llmtrain train` command again, which goes on from its last checkpoint",
        )
    raise InputError(f"{model} holds no model (no config.json or {ADAPTER_CONFIG})", where=where, remedy=_NAMEABLE)


def _may_be_on_hub(name: str) -> bool:
    path = Path(name)
    return not (path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or path.parent.is_dir())


def _run_of(directory: Path) -> Path | None:
    parent = directory.resolve().parent
    return parent if directory.resolve().name == "final" and (parent / RESOLVED).is_file() else None


def _checked_base(location: Location, base: str | None) -> Location:
    if base is not None:
        raise InputError(
            f"{location.path} is a whole model, and takes no base", where="--base", remedy="leave --base out"
        )
    return location


def _base_of(adapter: Path, given: str | None) -> str:
    """The base model of an adapter directory: as given, else as its own configuration says."""
    if given is not None:
        base = locate(given, where="--base").path
        if is_adapter_alone(base):
            raise InputError(
                f"{base} is an adapter, too", where="--base", remedy="give the whole model that both were trained on"
            )
        check_vocabulary(adapter, base, _rows_of_tokens(_shapes(adapter / ADAPTER_WEIGHTS)), "--base")
        return base
    file = adapter / ADAPTER_CONFIG
    named = _adapter_fields(adapter).get("base_model_name_or_path")
    remedy = "give the directory of the base model with --base"
    if not isinstance(named, str) or not named:
        raise InputError("it does not say which model it was made for", where=str(file), remedy=remedy)
    # A relative path was relative to where the training was started; adapters that are moved with their base
    # keep it beside them.
    for path in (Path(named).expanduser(), adapter / named):
        if os.path.exists(path):
            return locate(str(path), where=str(file)).path
    if not _may_be_on_hub(named):
        raise InputError(f"its base model is not there: {named}", where=str(file), remedy=remedy)
    return named


def _adapter_fields(directory: Path) -> dict[str, Any]:
    file = directory / ADAPTER_CONFIG
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as peft's configuration: {error!r}", where=str(file)) from None
    if not isinstance(fields, dict):
        raise InputError("it is no JSON object, as peft's configuration is", where=str(file))
    return fields


def head_at(location: Location) -> Head:
    """Which head the model that lies there has, by its configuration or the adapter's."""
    if location.is_adapter:
        return adapter_head(_adapter_fields(Path(location.path)))
    with as_input_error(location.path, LOADABLE):
        return saved_head(config_fields(location.path))


def load_saved(
    model: str,
    *,
    base: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    where: str = "MODEL_OR_RUN",
) -> Saved:
    """A model of a run, directory or hub name, with the adapter on it where it is one; from safetensors only.

    Args:
        model: see `locate`.
        base: for an adapter, in place of the base model that it names itself.
        dtype: of the weights: auto (as they were saved), float32, bfloat16, float16.

    Raises:
        InputError: something is not there, or does not fit.
    """
    return load_located(locate(model, base, where), dtype=dtype, device=device)


def load_located(
    location: Location, *, head: Head = CAUSAL, dtype: str = "auto", device: torch.device | str = "cpu"
) -> Saved:
    """As `load_saved`, of what `locate` found; with a head that scores where one is asked for."""
    chosen = DTYPES.get(dtype, "auto")
    if location.base is None:
        tokenizer = load_tokenizer(location.path)
        weights = load_weights(location.path, location.path, head, dtype=chosen).to(device).eval()
        return Saved(location, weights, weights, tokenizer, diffusion=_diffusion_of(location, weights), head=head)
    directory = Path(location.path)
    _check_head(directory, head)
    has_tokenizer = (directory / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(location.path if has_tokenizer else location.base)
    decoder = _load_base(location, tokenizer, head, chosen)
    for below in sorted(directory.glob(f"{BELOW}*"), key=lambda path: int(path.name.removeprefix(BELOW))):
        decoder = merge_below(decoder, tokenizer, below)
    with_adapter = _with_adapter(decoder, tokenizer, directory).to(device).eval()
    config, diffusion = with_adapter.active_peft_config, _diffusion_of(location, decoder)
    if diffusion is not None and diffusion.mask_token_id is not None:
        bare_head(decoder, diffusion.mask_token_id)
    if config.is_prompt_learning:
        if diffusion is not None or head.scores:
            what = head.what if head.scores else "a diffusion model"
            raise InputError(
                f"{config.peft_type.value} puts tokens before causal text, and this is {what}",
                where=location.path,
                remedy="use an adapter inside the layers, such as LoRA",
            )
        virtual = "cache" if config.peft_type in _PREFIXES else "embeddings"
        return Saved(location, with_adapter, decoder, tokenizer, virtual, int(config.num_virtual_tokens))
    return Saved(location, with_adapter, decoder, tokenizer, diffusion=diffusion, head=head)


def _check_head(adapter: Path, head: Head) -> None:
    own = adapter_head(_adapter_fields(adapter))
    if own is not head and (own.scores or head.scores):
        raise InputError(
            f"it is an adapter of {own.what}, and {head.what} is wanted",
            where=str(adapter),
            remedy="give an adapter or a model of that kind",
        )


def _load_base(location: Location, tokenizer: PreTrainedTokenizerBase, head: Head, dtype: Any) -> PreTrainedModel:
    """The model that an adapter is for; of one that scores the head may come with the adapter."""
    base = location.base
    assert base is not None
    if not head.scores:
        return load_weights(base, base, dtype=dtype)
    config = open_config(base, base)
    head.check(config, base)
    head.configure(config, tokenizer)
    names = _shapes(Path(location.path) / ADAPTER_WEIGHTS)
    modules = {name.rpartition(".")[0].rpartition(".")[2] for name in names}
    brings_head = not modules.isdisjoint(SCORING_HEADS)
    return load_weights(base, base, head, may_lack_head=brings_head, config=config, dtype=dtype)


def _diffusion_of(location: Location, decoder: PreTrainedModel) -> Diffusion | None:
    """How the model is to be used as a diffusion model; None of an autoregressive one."""
    diffusion = known_diffusion(location.path, location.path)
    num = decoder.get_input_embeddings().weight.shape[0]
    if diffusion is not None and diffusion.mask_token_id is not None and diffusion.mask_token_id >= num:
        raise InputError(
            f"mask_token_id is {diffusion.mask_token_id}, and the model has embeddings of {num} tokens",
            where=str(Path(location.path) / DIFFUSION_FILE),
            remedy="bring the file back that was saved with the weights",
        )
    return diffusion


def merge_below(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> PreTrainedModel:
    """The model with an adapter in its weights that another one stands on; computed in float32.

    Raises:
        InputError: it does not fit, or is of a kind that is in no weights.
    """
    dtype = decoder.dtype
    adapted = _with_adapter(decoder.float(), tokenizer, directory)
    kind = adapted.active_peft_config
    if kind.is_prompt_learning:
        raise InputError(
            f"{kind.peft_type.value} is no part of the layers, so nothing can go on top of it", where=str(directory)
        )
    try:
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    except UNMERGEABLE as error:
        raise InputError(f"{kind.peft_type.value} cannot be merged: {error}", where=str(directory)) from error
    return merged.to(dtype)


def _with_adapter(decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Any:
    # Only here: it takes a second to import, and most models have no adapter.
    from peft import PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model_state_dict

    file = directory / ADAPTER_WEIGHTS
    shapes = _shapes(file)
    _grow_embeddings(decoder, tokenizer, shapes)
    head, own = head_in(decoder), adapter_head(_adapter_fields(directory))
    if own.scores:
        _check_head(directory, head)
    cls: Any = PeftModel if head.scores else PeftModelForCausalLM
    try:
        config = PeftConfig.from_pretrained(str(directory))
        if head.scores and not own.scores:
            config.task_type = None  # of a language model, to be merged: its class wants one that generates
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft's, of transformers
            model = cls.from_pretrained(decoder, str(directory), is_trainable=False, config=config)
    except (*TRANSFORMERS_ERRORS, RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"the adapter does not fit on {decoder.config.name_or_path or 'its base'}: {' '.join(str(error).split())}",
            where=str(directory),
            remedy="give the model that it was trained on with --base",
        ) from error
    # What the file lacks stays random; peft only warns of it.
    missing = sorted(get_peft_model_state_dict(model, save_embedding_layers=False).keys() - shapes.keys())
    if missing:
        raise InputError(
            f"{len(missing)} of the adapter's weights are not there: {', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}",
            where=str(file),
            remedy="save the adapter again, or give the model that it was trained on with --base",
        )
    return model


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if not file.is_file():
        raise InputError(
            f"no such file: {file.name}",
            where=str(file.parent),
            remedy="save the adapter in safetensors (peft's default); pickled weights are not read",
        )
    try:
        return WeightFiles([file]).shapes()
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot be read: {error}", where=str(file)) from None


def _grow_embeddings(
    decoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Gives the base the rows of tokens that were added for the adapter; it holds their values, or trained none."""
    rows = decoder.get_input_embeddings().weight.shape[0]
    wanted = _rows_of_tokens(shapes) or num_ids(tokenizer)
    with_new_rows(decoder, range(rows, max(rows, wanted)))


def _rows_of_tokens(shapes: dict[str, tuple[int, ...]]) -> int:
    """Rows of the embedding or the head that an adapter holds; 0 where it holds neither."""
    ends = ("embed_tokens.weight", "lm_head.weight")
    return max((shape[0] for name, shape in shapes.items() if name.endswith(ends)), default=0)
