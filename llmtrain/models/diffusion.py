"""What a diffusion language model's weights do not tell: how it attends, and how it is to be sampled.

It lies in diffusion.json beside the weights, whether they are a whole model or an adapter, whose base is none.
Without that file a model is autoregressive.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from llmtrain.models.beside import check_fields, read_beside, write_beside
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
    write_beside(directory / FILE, FORMAT, asdict(diffusion))


def load_diffusion(directory: Path) -> Diffusion | None:
    """What diffusion.json in a model's directory says; None without one.

    Raises:
        InputError: it is of a newer format, or holds something else.
    """
    file = directory / FILE
    diffusion = read_beside(file, FORMAT, Diffusion)
    if diffusion is not None:
        _check(diffusion, file)
    return diffusion


def _check(diffusion: Diffusion, file: Path) -> None:
    def is_int(value: object, least: int) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    wrong = {
        "process": diffusion.process not in ("masked", "block", "uniform"),
        "mask_token_id": not (is_int(diffusion.mask_token_id, 0) or diffusion.process == "uniform"),
        "shift": not isinstance(diffusion.shift, bool),
        "block_size": (diffusion.process == "block") != is_int(diffusion.block_size, 1),
    }
    check_fields(asdict(diffusion), wrong, file)
