"""Our causal LM on packed rows against transformers' own loss on the same documents, one by one."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtrain.algorithms.causal_lm import nll
from llmtrain.algorithms.texts import HeldOut, Supervised, TextSamples
from llmtrain.contracts import POLICY
from llmtrain.data.build import cache_directory, prepare_data, prepare_tokenizer
from llmtrain.data.loader import Loader
from llmtrain.models.decoder import Decoder
from llmtrain.recipe.loading import load_recipe
from tests.runs import write_recipe

ROWS = 6
MODELS = {
    "llama": {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "gpt_neox": {"intermediate_size": 64, "num_attention_heads": 4},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Algorithm and micro-batch of packed rows, with the rows' documents as they are."""
    recipe = load_recipe(write_recipe(tmp_path_factory.mktemp("parity"))).recipe
    cache = cache_directory(None)
    tokenizer = prepare_tokenizer(recipe, cache).tokenizer
    datasets = prepare_data(recipe, tokenizer, cache)
    loader = Loader(datasets.train, datasets.order(recipe.seed), ROWS, ROWS, rank=0, world_size=1)
    samples = TextSamples(None, tokenizer, recipe.sequence_length, 0, datasets.documents.prompt_ids)
    algorithm = Supervised(nll, loader.micro_batches, HeldOut([], 0), samples, {})
    (micro,) = next(algorithm.step_batches(0))
    return algorithm, micro, len(tokenizer)


def pieces(micro):
    """(input ids, targets) of every document's piece in the rows."""
    for ids, targets, documents in zip(*(micro.tensors[k] for k in ("input_ids", "targets", "document_ids"))):  # noqa: B905
        for document in np.unique(documents[documents >= 0]):
            here = documents == int(document)
            yield ids[here][None], targets[here][None]


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_equal_transformers_own(packed, architecture, attention):
    algorithm, micro, vocab_size = packed
    config = AutoConfig.for_model(
        architecture, vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, **MODELS[architecture]
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)

    ours = algorithm.loss({POLICY: Decoder(model)}, micro).sums[POLICY] / micro.weights[POLICY]
    ours.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    theirs = torch.zeros(())
    num_pieces = 0
    for ids, targets in pieces(micro):
        output = model(input_ids=ids, shift_labels=targets, labels=targets, num_items_in_batch=1)
        theirs = theirs + output.loss  # with num_items_in_batch 1 it is the sum
        num_pieces += 1
    theirs = theirs / micro.weights[POLICY]
    theirs.backward()

    assert num_pieces > 2 * ROWS
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-6, msg=name)
