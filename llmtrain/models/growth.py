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


def bare_head(model: PreTrainedModel, mask_row: int) -> None:
    """Takes the mask's row that an adapter trains out of a head that is tied to the embedding; peft puts it in both.

    Nothing changes by it, since the mask itself has no probability, whatever the head's row for it is.
    """
    from peft.utils.other import TrainableTokensWrapper  # here, because peft takes a second to import

    head = model.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper):
        return
    if all(set(rows) == {mask_row} for rows in head.token_adapter.token_indices.values()):
        model.set_output_embeddings(head.original_module)


def fill_new_rows(rows: Tensor, new: range) -> None:
    rows[new.start : new.stop] = rows[: new.start].float().mean(0).to(rows.dtype)
