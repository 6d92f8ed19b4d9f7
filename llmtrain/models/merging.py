"""Adapters put into the weights of their base, and the proof that nothing was lost on the way."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmtrain.errors import InputError, TrainingError
from llmtrain.models.decoder import Decoder, config_field
from llmtrain.models.diffusion import Diffusion
from llmtrain.models.heads import head_in
from llmtrain.models.saved import UNMERGEABLE, Saved

# Of the logits' root mean square, in float32: what adding the update first or last does, with a wide margin, and
# what the adapter itself does, of which no noticeable part may be lost.
_MERGE_BOUND, _MERGE_FLOOR, _PART_OF_EFFECT = 1e-3, 1e-5, 0.05
# The same for weights that were rounded to that dtype, computed in float32.
CAST_BOUND = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ROWS, _TOKENS = 4, 16


def probe_rows(model: PreTrainedModel) -> Tensor:
    """[4, 16] token ids, always the same ones for a vocabulary."""
    window = config_field(model.config, "max_position_embeddings") or _TOKENS
    vocabulary = model.get_input_embeddings().weight.shape[0]
    return torch.randint(vocabulary, (_ROWS, min(_TOKENS, window)), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def probe(model: PreTrainedModel, rows: Tensor, diffusion: Diffusion | None = None) -> Tensor:
    """The model's logits on `rows`, in float32 on the CPU; without the mask's, which is used nowhere.

    Of a model that scores, what its head says at every token, where transformers' forward may say the last one alone.
    """
    head, ids = head_in(model).attribute(model), rows.to(model.device)
    if head is None:
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    else:
        logits = Decoder(model, head)(ids, None, lambda hidden, module: module(hidden))
    logits = logits.float().cpu()
    if diffusion is not None and diffusion.mask_token_id is not None:
        logits[..., diffusion.mask_token_id] = 0.0
    return logits


def difference(logits: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, as a share of the reference's; infinite where a logit is not finite."""
    if not torch.isfinite(logits).all():
        return float("inf")
    return float((logits - reference).norm() / reference.norm())


def merge(saved: Saved, rows: Tensor) -> tuple[PreTrainedModel, Tensor]:
    """The base with the adapter in its weights, and the logits that the two had apart.

    Args:
        saved: in float32; it is used up.
        rows: token ids to compare on.

    Raises:
        InputError: this kind of adapter cannot be merged.
        TrainingError: the merged model computes something else.
    """
    model: Any = saved.model
    kind = model.active_peft_config.peft_type.value.lower()
    place = saved.location.path
    remedy = "export it with --no-merge, as an adapter beside its base model"
    if saved.virtual is not None:
        raise InputError(
            f"{kind} cannot be merged: what it learnt stands before the text, not in the weights",
            where=place,
            remedy=remedy,
        )
    reference = probe(saved.decoder, rows, saved.diffusion)
    with model.disable_adapter():
        alone = probe(saved.decoder, rows, saved.diffusion)
    _untie(saved.decoder)
    try:
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
    except UNMERGEABLE as error:
        raise InputError(f"{kind} cannot be merged: {error}", where=place, remedy=remedy) from error
    bound = min(_MERGE_BOUND, max(_MERGE_FLOOR, _PART_OF_EFFECT * difference(reference, alone)))
    off = difference(probe(merged, rows, saved.diffusion), reference)
    if off > bound:
        raise TrainingError(
            f"{place}: merged, the model's logits differ by {off:.2g} of their size (at most {bound:.2g} is rounding)"
            f"\n  remedy: {remedy}, and report this with the adapter's configuration"
        )
    head: Any = merged.get_output_embeddings()  # None where the model scores
    if head is not None and head.weight is not merged.get_input_embeddings().weight:
        merged.config.tie_word_embeddings = False  # or reading the files would make one of them again
    return merged, reference


def _untie(decoder: PreTrainedModel) -> None:
    """Gives the head weights of its own where they are the embedding's and an adapter would change them in both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = [decoder.get_input_embeddings(), decoder.get_output_embeddings()]
    if not any(isinstance(module, BaseTunerLayer) for module in modules):
        return
    embedding, head = (m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in modules)
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
