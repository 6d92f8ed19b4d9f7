"""What a diffusion language model's weights do not tell: how it attends, and how it is to be sampled.

It lies in diffusion.json beside the weights, whether they are a whole model or an adapter, whose base is none.
Without that file a model is autoregressive.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llmtrain.errors import InputError
from llmtrain.recipe.schema import BlockDiffusion, Recipe, ScoreEntropy
from llmtrain.recipe.schema import Diffusion as Settings

FILE = "diffusion.json"
FORMAT = 1  # a reader refuses those that it does not know


@dataclass(frozen=True)
class Diffusion:
    """How a model is to be used.

    Attributes:
        process: masked: any token of a text may be masked, attention is bidirectional. block: tokens of a block
            are masked, attention is bidirectional in a block and causal over blocks. uniform: tokens become any
            others, attention is bidirectional.
        mask_token_id: stands for a masked token, and is never predicted; None for uniform.
        shift: row i - 1 predicts token i; with blocks, the first of a block is predicted by the row before it
            among the clean tokens.
        block_size: tokens of a block, cut from the start of the text; None but for block.
    """

    process: Literal["masked", "block", "uniform"]
    mask_token_id: int | None
    shift: bool
    block_size: int | None = None


def diffusion_of(recipe: Recipe, mask_token_id: int | None) -> Diffusion | None:
    """Of the model that the recipe trains; None of an autoregressive one."""
    algorithm = recipe.algorithm
    if not isinstance(algorithm, Settings):
        return None
    if isinstance(algorithm, BlockDiffusion):
        return Diffusion("block", mask_token_id, algorithm.shift, algorithm.block_size)
    if isinstance(algorithm, ScoreEntropy) and algorithm.noise == "uniform":
        return Diffusion("uniform", None, algorithm.shift)
    return Diffusion("masked", mask_token_id, algorithm.shift)


def save_diffusion(diffusion: Diffusion, directory: Path) -> None:
    """Writes diffusion.json."""
    content = {"format": FORMAT, **asdict(diffusion)}
    (directory / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_diffusion(directory: Path) -> Diffusion | None:
    """What diffusion.json in a model's directory says; None without one.

    Raises:
        InputError: it is of a newer format, or holds something else.
    """
    file = directory / FILE
    if not file.is_file():
        return None
    remedy = "bring the file back that was saved with the weights"
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        if content.pop("format") != FORMAT:
            raise InputError(
                "it is of a format that this version does not read", where=str(file), remedy="update llmtrain"
            )
        diffusion = Diffusion(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot be read: {error!r}", where=str(file), remedy=remedy) from None
    _check(diffusion, str(file), remedy)
    return diffusion


def _check(diffusion: Diffusion, where: str, remedy: str) -> None:
    def is_int(value: object, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    wrong = {
        "process": diffusion.process not in ("masked", "block", "uniform"),
        "mask_token_id": not (is_int(diffusion.mask_token_id, 0) or diffusion.process == "uniform"),
        "shift": not isinstance(diffusion.shift, bool),
        "block_size": (diffusion.process == "block") != is_int(diffusion.block_size, 1),
    }
    for field, is_wrong in wrong.items():
        if is_wrong:
            value = asdict(diffusion)[field]
            raise InputError(f"{field} is {value!r}", where=where, remedy=remedy)
