"""Packed documents equal separate ones, and the checks that guard it see what breaks it."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmtrain.errors import InputError
from llmtrain.models.attention import bidirectional
from llmtrain.models.checks import (
    Asked,
    check_attends_as_told,
    check_causality,
    check_document_isolation,
    check_head,
    check_shares_prompts,
)
from llmtrain.models.decoder import Decoder
from llmtrain.models.loss_head import linear_cross_entropy
from tests import tiny

V = 96
TINY = {
    "llama": dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    "qwen3": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8,
    ),
    "mamba2": dict(hidden_size=32, num_heads=8, head_dim=8, state_size=8, num_hidden_layers=2, chunk_size=8),
    "mistral": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=6,
    ),
    "gemma2": dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, query_pre_attn_scalar=8, sliding_window=6, final_logit_softcapping=None,
        attn_logit_softcapping=None,
    ),
}  # fmt: skip


def decoder(architecture: str, attn: str = "sdpa", **fields) -> Decoder:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, vocab_size=V, **(TINY.get(architecture, {}) | fields))
    attention = {} if architecture == "mamba2" else {"attn_implementation": attn}
    return Decoder(AutoModelForCausalLM.from_config(config, dtype=torch.float32, **attention))


def head_loss(targets):
    return lambda hidden, head: linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_equals_separate_documents_in_loss_and_gradients(architecture, attention):
    model = decoder(architecture, attn=attention)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(V, (n,), generator=generator) for n in (9, 1, 14, 2, 6)]

    def targets_of(document):
        return torch.cat([document[1:], torch.tensor([-100])])

    packed = model(
        torch.cat(documents)[None],
        torch.cat([torch.arange(len(d)) for d in documents])[None],
        head_loss(torch.cat([targets_of(d) for d in documents])),
    )
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    separate = sum(model(d[None], None, head_loss(targets_of(d))) for d in documents)
    separate.backward()
    torch.testing.assert_close(packed, separate, rtol=4e-6, atol=0)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=4e-6, msg=name)


def asked(*arguments, **fields):
    model = decoder(*arguments, **fields).eval()
    return Asked(model, model, torch.device("cpu"), exact=True)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mistral"])
def test_the_checks_pass_what_is_right(architecture):
    check_head(asked(architecture))
    check_causality(asked(architecture))
    check_document_isolation(asked(architecture), num_rows=2)


def test_recurrent_state_is_seen_to_leak():
    check_head(asked("mamba2"))
    with pytest.raises(InputError, match=r"data.packing.*carries state"):
        check_document_isolation(asked("mamba2"), num_rows=2)


def test_a_kernel_that_takes_documents_apart_in_single_rows_only_is_seen_to():
    """As transformers calls FlashAttention, whose kernel is told of restarts where the batch is one row."""

    def single_rows(module, query, key, value, attention_mask, position_ids=None, **more):
        apart = position_ids is not None and len(query) == 1
        document = (position_ids == 0).cumsum(1) if apart else torch.zeros(len(query), query.shape[2])
        places = torch.arange(query.shape[2])
        mask = (document[:, :, None] == document[:, None, :]) & (places[:, None] >= places[None, :])
        return sdpa_attention_forward(module, query, key, value, mask[:, None], **more)

    AttentionInterface.register("single_rows", single_rows)
    AttentionMaskInterface.register("single_rows", lambda *given, **more: None)
    packed = asked("llama", attn="single_rows")
    check_document_isolation(packed, num_rows=1)
    with pytest.raises(InputError, match=r"data.packing.*several rows") as found:
        check_document_isolation(packed, num_rows=2)
    assert "batch.micro_sequences: 1" in str(found.value)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("mpt", dict(attn="eager", d_model=32, n_heads=4, n_layers=1)),
        ("bart", dict(d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32)),
        ("falcon", dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, alibi=True)),
    ],
)
def test_answers_cannot_stand_behind_each_other_where_places_are_positions(architecture, fields):
    recipe = tiny.recipe(sequence_length=6, algorithm={"kind": "dpo"})
    with pytest.raises(InputError, match=r"algorithm.share_prompts.*where tokens stand in the row"):
        check_shares_prompts(decoder(architecture, **fields), recipe)
    check_shares_prompts(decoder("llama"), recipe)


def test_an_encoder_is_seen_to_look_ahead():
    """Its head is the last thing it does, and without packing nothing else would tell."""
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    check_head(asked("bert-generation", **shape))
    with pytest.raises(InputError, match=r"not causal"):
        check_causality(asked("bert-generation", **shape))
    check_causality(asked("bert-generation", is_decoder=True, **shape))


@pytest.mark.parametrize(
    ("architecture", "attention"),
    [(name, kernel) for name in ("llama", "qwen3", "mistral") for kernel in ("sdpa", "eager")] + [("gemma2", "eager")],
)
def test_attention_that_takes_a_mask_passes(architecture, attention):
    """Also where the architecture has windows of its own, narrower than the documents."""
    window = {"sliding_window": 2} if architecture in ("mistral", "gemma2") else {}
    check_attends_as_told(asked(architecture, attention, **window))


class AttendsOtherwise(nn.Module):
    """A decoder that is told one predicate and goes by another."""

    def __init__(self, inner, visible):
        super().__init__()
        self.inner, self.visible = inner, visible

    def forward(self, input_ids, position_ids, head, visible=None):
        return self.inner(input_ids, position_ids, head, self.visible)


def test_what_attends_otherwise_than_it_is_told_is_seen():
    with pytest.raises(InputError, match="a token does not see those after it"):
        check_attends_as_told(asked("mamba2"))
    told = asked("llama")
    with pytest.raises(InputError, match="does not attend as it is told") as caught:
        check_attends_as_told(replace(told, model=AttendsOtherwise(told.model, None)))
    assert caught.value.where == "model" and "choose a decoder such as" in caught.value.remedy
    with pytest.raises(InputError, match="a token sees another document"):
        check_attends_as_told(replace(told, model=AttendsOtherwise(told.model, bidirectional)))


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("bloom", dict(hidden_size=32, n_layer=2, n_head=4)),
        ("xlm", dict(emb_dim=32, n_layers=2, n_heads=4)),
        ("falcon_mamba", dict(hidden_size=32, num_hidden_layers=2, state_size=4)),
    ],
)
def test_attention_that_takes_a_mask_of_another_shape_is_refused(architecture, fields):
    """ValueError, AssertionError and RuntimeErrors: what transformers raises then, by a look at all its decoders."""
    told = asked(architecture, None, **fields)
    with pytest.raises(InputError, match="takes no mask that says who attends to whom: [A-Z]") as caught:
        check_attends_as_told(told)
    assert caught.value.where == "model" and "choose a decoder such as" in caught.value.remedy


def test_sizes_that_do_not_fit_each_other_are_seen():
    """Qwen3 has 32 key-value heads unless told otherwise, and transformers does not compare them with the heads."""
    with pytest.raises(InputError, match=r"cannot run.*(?s:.*)num_key_value_heads"):
        check_head(asked("qwen3", num_key_value_heads=32))


def test_a_soft_cap_after_the_head_is_seen():
    with pytest.raises(InputError, match="changes its logits after the head"):
        check_head(asked("gemma2", "eager", final_logit_softcapping=0.05))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_rope_depends_on_relative_position_only(architecture):
    model = decoder(architecture).eval()
    ids = torch.arange(10)[None]
    with torch.no_grad():
        a, b = (model(ids, torch.arange(10)[None] + shift, lambda hidden, head: hidden) for shift in (0, 7))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_no_gradient():
    ids = torch.arange(20)[None] % V
    gradients = []
    for recompute in (False, True):
        model = decoder("llama").train()
        if recompute:
            model.hf.activation_checkpointing_enable()
        model(ids, None, head_loss(ids)).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
