"""How a diffusion model is sampled: what can be asked for, what fits a model, and what is taken by default."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from llmtrain.errors import InputError
from llmtrain.models.diffusion import Diffusion

Sampler = Literal["llada", "threshold", "ancestral", "first-hitting"]
Remasking = Literal["low-confidence", "random"]

THRESHOLD = 0.9  # Fast-dLLM's
BLOCK_LENGTH = 32  # of what is written after a prompt, where places are chosen by confidence (LLaDA, Fast-dLLM)
ANCESTRAL_STEPS = 1000  # MDLM's; no more of them cost a forward than there are places


@dataclass(frozen=True)
class Asked:
    """What was asked for; None where nothing was."""

    sampler: Sampler | None = None
    steps: int | None = None
    block_length: int | None = None
    remasking: Remasking | None = None
    cfg: float | None = None
    threshold: float | None = None
    cache: bool | None = None

    def given(self) -> list[str]:
        """The options that were, as the command line names them."""
        return [f"--{name.replace('_', '-')}" for name, value in asdict(self).items() if value is not None]


@dataclass(frozen=True)
class Unmasking:
    """How a diffusion model is sampled; see `unmasking.py`.

    Attributes:
        sampler: llada: even shares of the open places, in the order of `remasking`. threshold: all that are confident
            enough. ancestral: the reverse process in steps. first-hitting: one place a step in random order.
        steps: forwards of a whole text (llada), or steps of time (ancestral); None is one a token, or 1000 of time.
        block_length: tokens that are written before those after them; None is all at once. Blocks of a block
            diffusion model are its own.
        remasking: of llada.
        guidance: of the prompt, 0 for none; see `Denoiser`.
        threshold: of confidence.
        cache: finished text is not computed again.
    """

    sampler: Sampler = "llada"
    steps: int | None = None
    block_length: int | None = None
    remasking: Remasking = "low-confidence"
    guidance: float = 0.0
    threshold: float = THRESHOLD
    cache: bool = False


def settled(asked: Asked, diffusion: Diffusion | None) -> Unmasking | None:
    """What is asked for, with defaults that fit the model; None for one that is autoregressive.

    Without a sampler asked for, it is the one that the other options belong to; else llada for masked diffusion,
    first-hitting for block diffusion, which is exact but for the model's own error, and ancestral for uniform noise.

    Raises:
        InputError: an option is not for this model, or not for this sampler.
    """
    if diffusion is None:
        if asked.given():
            raise _refused(asked.given()[0], "is for diffusion models, and this one is autoregressive")
        return None
    sampler = asked.sampler or _implied(asked, diffusion)
    _check_model(asked, sampler, diffusion)
    _check_sampler(asked, sampler)
    length = asked.block_length
    if diffusion.process == "masked" and length is None and sampler in ("llada", "threshold"):
        length = BLOCK_LENGTH
    return Unmasking(
        sampler,
        asked.steps,
        length,
        asked.remasking or "low-confidence",
        asked.cfg or 0.0,
        asked.threshold or THRESHOLD,
        diffusion.process == "block" if asked.cache is None else asked.cache,
    )


def _implied(asked: Asked, diffusion: Diffusion) -> Sampler:
    if diffusion.process == "uniform":
        return "ancestral"
    if asked.threshold is not None:
        return "threshold"
    if asked.remasking is not None or asked.steps is not None:
        return "llada"
    return "llada" if diffusion.process == "masked" else "first-hitting"


def _check_model(asked: Asked, sampler: Sampler, diffusion: Diffusion) -> None:
    process = diffusion.process
    if process == "uniform":
        if sampler != "ancestral":
            raise _refused("--sampler", f"{sampler} is for models that unmask, and this one has uniform noise")
        for option in ("--block-length", "--remasking", "--cfg", "--threshold", "--cache"):
            if option in asked.given() and not (option == "--cache" and asked.cache is False):
                raise _refused(option, "is for models that unmask, and this one has uniform noise")
    if process == "block":
        if asked.block_length is not None:
            raise _refused(
                "--block-length", f"is for masked diffusion; this model has blocks of {diffusion.block_size} tokens"
            )
        if asked.cfg:
            raise _refused("--cfg", "is for masked diffusion, which knows masked prompts; this is block diffusion")


def _check_sampler(asked: Asked, sampler: Sampler) -> None:
    of: Mapping[str, tuple[Sampler, ...]] = {
        "--steps": ("llada", "ancestral"),
        "--remasking": ("llada",),
        "--threshold": ("threshold",),
    }
    for option, samplers in of.items():
        if option in asked.given() and sampler not in samplers:
            raise _refused(option, f"is for --sampler {' and '.join(samplers)}, not {sampler}")


def _refused(option: str, why: str) -> InputError:
    return InputError(why, where=option, remedy=f"leave {option} out, or use a model or sampler that it is for")
