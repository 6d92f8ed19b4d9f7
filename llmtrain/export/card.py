"""The model card: what the model is, what it was made from, and the command that made it."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from llmtrain import __version__
from llmtrain.data.sources import describe
from llmtrain.errors import InputError
from llmtrain.export.scoring import Scoring, how_to_score
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.saved import Location
from llmtrain.models.weights import BELOW
from llmtrain.observe.metrics import read_metrics
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.resolved import RESOLVED
from llmtrain.recipe.schema import Diffusion as Settings
from llmtrain.recipe.schema import ModelFromGGUF, ModelFromPretrained, Recipe

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def card(
    location: Location,
    name: str,
    dtype: str,
    command: str,
    *,
    merged: bool,
    diffusion: Diffusion | None = None,
    scoring: Scoring | None = None,
) -> str:
    """README.md of an exported model.

    Args:
        location: what was exported.
        name: heading.
        dtype: of the weights.
        command: that exported it.
        merged: an adapter's weights are in its base's now.
        diffusion: how it is sampled, where it is no autoregressive model.
        scoring: how it scores, where it is no language model.
    """
    recipe = None if location.run is None else _recipe(location.run)
    base = location.base or _base(recipe)
    known = {} if base is None else _front_matter(Path(base))
    adapter_alone = location.is_adapter and not merged
    tags = ["llmtrain", *([recipe.algorithm.kind] if recipe else [])]
    if recipe is not None and recipe.adapter is not None:
        tags.append(recipe.adapter.kind)
    metadata: dict[str, Any] = {
        "base_model": _public_name(base, known),
        "license": known.get("license") or _front_matter(Path(location.path)).get("license"),
        "library_name": "peft" if adapter_alone else "transformers",
        "pipeline_tag": "text-generation" if scoring is None else scoring.pipeline_tag,
        "tags": tags,
    }
    front = yaml.safe_dump({key: value for key, value in metadata.items() if value}, sort_keys=False)
    parts = [f"---\n{front}---\n# {name}", _what(location, base, dtype, diffusion, scoring, merged=merged)]
    if diffusion is not None:
        parts.append(_sampling(diffusion, name))
    if scoring is not None:
        parts.append(how_to_score(scoring, name, is_adapter=adapter_alone))
    if location.run is not None and recipe is not None:
        parts += _training(location.run, recipe)
    parts.append(f"## Made by\n\nllmtrain {__version__}:\n\n```\n{command}\n```")
    return "\n\n".join(parts) + "\n"


def _what(
    location: Location,
    base: str | None,
    dtype: str,
    diffusion: Diffusion | None,
    scoring: Scoring | None,
    *,
    merged: bool,
) -> str:
    if merged:
        text = f"An adapter merged into its base model {base}; the merged logits were compared with the two apart."
    elif location.is_adapter:
        text = f"An adapter for {base}: load it with peft on top of that model."
        if any(Path(location.path).glob(f"{BELOW}*")):
            text += f" It was trained on that model with the adapters in {BELOW}0, ... merged into it, in this order."
    else:
        what = "A causal language model" if diffusion is None else "A diffusion language model"
        if scoring is not None:
            what = scoring.head.what.capitalize()
        text = what + (f", trained from {base}." if base else ".")
    return f"{text} Weights: {dtype}, safetensors."


def _sampling(diffusion: Diffusion, name: str) -> str:
    """How a diffusion model is used, for those who have its files and not llmtrain."""
    predicts = "row i - 1 of the logits predicts token i" if diffusion.shift else "row i of the logits predicts token i"
    masked = f"Masked tokens are id {diffusion.mask_token_id}, which is never predicted itself"
    match diffusion.process:
        case "masked":
            text = f"Masked diffusion: attention sees the whole text. {masked}; {predicts}."
        case "block":
            first = " (the first of a block: of the row before it among the finished tokens)" if diffusion.shift else ""
            text = (
                f"Block diffusion: attention sees a token's own block of {diffusion.block_size} tokens and the blocks "
                f"before it, counted from the start of the text. {masked}; {predicts}{first}."
            )
        case "uniform":
            text = f"Diffusion with uniform noise: attention sees the whole text, and {predicts}, before noise."
    return (
        f"## Sampling\n\n{text}\nCausal generation, as transformers' generate does it, does not work with it. "
        f"llmtrain knows how to attend by the model's own files:\n\n```\nllmtrain generate {name} --prompt '...'\n```"
    )


def _training(run: Path, recipe: Recipe) -> list[str]:
    sources = "\n".join(f"- {describe(source)}" for source in recipe.data.train)
    parts = [recipe.description] if recipe.description else []
    parts.append(f"## Training data\n\n{sources}")
    figures = _last_evaluation(run)
    if figures:
        rows = "\n".join(f"| {key} | {value:.6g} |" for key, value in figures.items())
        bounds = ", upper bounds" if isinstance(recipe.algorithm, Settings) else ""
        title = f"## Held-out figures\n\nOf the run's last evaluation{bounds}:"
        parts.append(f"{title}\n\n| figure | value |\n|---|---|\n{rows}")
    text = (run / RESOLVED).read_text(encoding="utf-8")
    resolved = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    parts.append(f"## Recipe\n\n`llmtrain train` with:\n\n```yaml\n{resolved}\n```")
    return parts


def _recipe(run: Path) -> Recipe | None:
    try:
        return load_recipe(run / RESOLVED).recipe
    except InputError:
        return None  # of another version of llmtrain: the model is worth more than its description


def _base(recipe: Recipe | None) -> str | None:
    match recipe.model if recipe is not None else None:
        case ModelFromPretrained(path=path) | ModelFromGGUF(file=path):
            return path
        case _:
            return None


def _last_evaluation(run: Path) -> dict[str, float]:
    file = run / "metrics.jsonl"
    if not file.is_file():
        return {}
    evaluated = [record for record in read_metrics(file) if any(key.startswith("eval_") for key in record)]
    if not evaluated:
        return {}
    last = evaluated[-1]
    figures = {key.removeprefix("eval_"): float(value) for key, value in last.items() if key.startswith("eval_")}
    return {"step": float(last["step"])} | {key: value for key, value in figures.items() if math.isfinite(value)}


def _public_name(base: str | None, known: dict[str, Any]) -> str | None:
    """A hub name: the base itself, or what its own card says where it is a directory."""
    if base is None or not Path(base).exists():
        return base
    named = known.get("base_model")
    return named if isinstance(named, str) else Path(base).resolve().name


def _front_matter(directory: Path) -> dict[str, Any]:
    """What the card in a directory says of itself; empty where there is none."""
    file = directory / "README.md"
    if not file.is_file():
        return {}
    found = _FRONT_MATTER.match(file.read_text(encoding="utf-8", errors="replace"))
    try:
        known = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return known if isinstance(known, dict) else {}
