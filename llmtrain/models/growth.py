"""Embeddings that grow by new tokens."""

import torch
from torch import Tensor
from transformers import PreTrainedModel


def rows_of_tokens(model: PreTrainedModel) -> set[str]:
    """Names of the weights that have a row for each token: of the embedding and of the head."""
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    return {
        f"{name}.{own}"
        for name, module in model.named_modules()
        if module in embeddings
        for own, tensor in module.named_parameters(recurse=False)
        if tensor.shape[0] == model.config.vocab_size
    }


@torch.no_grad()
def with_new_rows(model: PreTrainedModel, new: range) -> PreTrainedModel:
    """The model, whose embedding and head have, for new tokens, rows that are the mean of those before.

    They grow where they have no such rows yet. The mean itself, where transformers draws around it: no
    token is likelier than another for it, and what a row becomes is learnt from where its token stands.
    """
    if not new:
        return model
    if model.get_input_embeddings().weight.shape[0] < new.stop:
        model.resize_token_embeddings(new.stop, mean_resizing=False)
    for parameter in {model.get_parameter(name) for name in rows_of_tokens(model)}:  # a tied head's once
        fill_new_rows(parameter, new)
    return model


def fill_new_rows(rows: Tensor, new: range) -> None:
    rows[new.start : new.stop] = rows[: new.start].float().mean(0).to(rows.dtype)
