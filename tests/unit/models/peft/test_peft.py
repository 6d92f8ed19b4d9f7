"""What is wrong with an adapter is told, with what would be right; weights come unit by unit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.errors import InputError
from llmtrain.models.blueprint import Blueprint
from llmtrain.models.hub import open_model
from llmtrain.models.peft import adapt
from tests import adapters, tiny
from tests.adapters import CPU, KINDS, LORA


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.pretrained(tmp_path_factory.mktemp("base"))


def refused(base: Path, adapter: dict[str, Any], **overrides: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        adapters.materialised(adapters.recipe(base, adapter, **overrides))
    return caught.value


MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such target": (
        LORA | {"target_modules": ["qproj"]},
        "adapter.target_modules",
        r"no module 'qproj'; did you mean 'q_proj'",
    ),
    "one target that is not there": (
        LORA | {"target_modules": ["q_proj", "v_projj"]},
        "adapter.target_modules",
        r"no module 'v_projj'; did you mean 'v_proj'",
    ),
    "a module to save that is not there": (
        LORA | {"modules_to_save": ["lm_hed"]},
        "adapter.modules_to_save",
        r"no module 'lm_hed'; did you mean 'lm_head'",
    ),
    "more directions than there are": (
        LORA | {"init": "pissa", "r": 64},
        "adapter.r",
        r"is \d+ x \d+, which has no 64 directions to begin with",
    ),
    "a pattern that matches nothing": (
        LORA | {"target_modules": ".*query"},
        "adapter.target_modules",
        r"\.\*query.*there are: down_proj",
    ),
    "the head": (LORA | {"target_modules": ["lm_head"]}, "adapter", "an adapter on the head would not be in the loss"),
    "no such type": (adapters.of_peft("LOHAA"), "adapter.type", "peft has no 'LOHAA'; did you mean 'LOHA'"),
    "no such field": (
        adapters.of_peft("LOHA", rnak=3),
        "adapter.config.rnak",
        r"LoHaConfig has no field 'rnak'",
    ),
    "a field of ours": (adapters.of_peft("LOHA", task_type="X"), "adapter.config.task_type", "set by the recipe"),
    "a type with a kind of its own": (adapters.of_peft("P_TUNING"), "adapter.type", "write kind: p_tuning"),
    "a type that a run cannot use": (adapters.of_peft("ADALORA"), "adapter.type", "moves ranks between layers"),
    "an initialisation from data": (
        adapters.of_peft("LORA", init_lora_weights="eva"),
        "adapter.config.init_lora_weights",
        "looks at data",
    ),
    "a value that peft refuses": (adapters.of_peft("MISS", r=64), "adapter", r"peft: `r` \(64\) must be less"),
    "nowhere to be found": (LORA | {"base": ["/nowhere"]}, "adapter.base.0", "/nowhere holds no adapter"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, base: Path) -> None:
    adapter, where, message = MISTAKES[mistake]
    error = refused(base, adapter)
    assert error.where == where
    with pytest.raises(InputError, match=message):
        raise error


def test_a_model_that_cannot_be_loaded_again_takes_no_adapter() -> None:
    recipe = tiny.recipe(adapter=LORA)
    blueprint = open_model(recipe, tiny.tokenizer())
    with pytest.raises(InputError, match="a model of kind config cannot be loaded again"):
        adapt(blueprint, recipe, tiny.tokenizer())


def test_without_an_adapter_nothing_is_done(base: Path) -> None:
    recipe = adapters.recipe(base, None)
    blueprint = open_model(recipe, tiny.tokenizer())
    assert adapt(blueprint, recipe, tiny.tokenizer()) is None
    assert not blueprint.additions


@pytest.mark.parametrize("kind", ["lora, dora", "lora, pissa", "lora, whole embeddings", "prompt_tuning", "LOKR"])
def test_nothing_is_there_before_its_unit(kind: str, base: Path) -> None:
    blueprint, adapter = adapters.adapted(adapters.recipe(base, KINDS[kind]))
    decoder = blueprint.decoder
    names = {name: (p.shape, p.requires_grad, p.dtype) for name, p in decoder.named_parameters()}
    assert all(p.is_meta for p in decoder.parameters())
    first, second = blueprint.layers
    blueprint.materialise(first, CPU)
    assert not any(p.is_meta for p in first.parameters())
    assert all(p.is_meta for p in second.parameters())
    blueprint.materialise(decoder, CPU)
    assert {name: (p.shape, p.requires_grad, p.dtype) for name, p in decoder.named_parameters()} == names
    assert all(torch.isfinite(p).all() for p in decoder.parameters())
    assert adapter.names <= decoder.state_dict().keys()


def test_weights_that_layers_share_are_made_in_one_go(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="llmtrain"):
        blueprint, _ = adapters.adapted(adapters.recipe(base, KINDS["VERA"]))
    assert (
        "each rank builds the whole model before it is sharded: VERA has weights that all layers share" in caplog.text
    )
    assert isinstance(blueprint, Blueprint)
    assert not blueprint.is_empty


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ({"engine": {"kind": "auto", "activation_checkpointing": "full"}}, "engine.activation_checkpointing"),
        ({"sequence_length": 2047}, "sequence_length"),
    ],
)
def test_what_a_prefix_cannot_be_with(overrides: dict[str, Any], where: str, base: Path) -> None:
    assert refused(base, KINDS["prefix_tuning"], **overrides).where == where


def test_a_tied_head_stays_tied_to_an_embedding_that_is_trained(tmp_path: Path) -> None:
    base = adapters.pretrained(tmp_path, tie_word_embeddings=True)
    model, _ = adapters.materialised(adapters.recipe(base, LORA | {"modules_to_save": ["embed_tokens"]}))
    hf = model.hf
    assert hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    assert hf.get_output_embeddings().weight.requires_grad
    losses = adapters.trained(model)
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------ new tokens


def with_tokens() -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    return tokenizer


def opened(base: Path, adapter: dict[str, Any] | None) -> Blueprint:
    section = {"kind": "model", "add_tokens": ["<|user|>", "<|assistant|>"]}
    recipe = adapters.recipe(base, adapter, tokenizer=section)
    blueprint = open_model(recipe, with_tokens(), 2)
    adapt(blueprint, recipe, with_tokens())
    return blueprint


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocabulary", [96, 97, 128])
def test_new_tokens_begin_as_the_mean_of_the_others(tied: bool, vocabulary: int, tmp_path: Path) -> None:
    """Also where the model has rows to spare."""
    base = adapters.pretrained(tmp_path, tie_word_embeddings=tied, vocab_size=vocabulary)
    old = tiny.decoder(seed=3, tie_word_embeddings=tied, vocab_size=vocabulary).hf
    blueprint = opened(base, None)
    assert blueprint.is_empty  # row by row from the files
    blueprint.materialise(blueprint.decoder, CPU)
    hf = blueprint.decoder.hf
    for new, before in (
        (hf.get_input_embeddings().weight, old.get_input_embeddings().weight),
        (hf.get_output_embeddings().weight, old.get_output_embeddings().weight),
    ):
        assert new.shape[0] == max(98, vocabulary)
        assert torch.equal(new[:96], before[:96])
        assert torch.equal(new[98:], before[98:])
        torch.testing.assert_close(new[96:98], before[:96].mean(0).expand(2, -1))
    assert (hf.get_input_embeddings().weight is hf.get_output_embeddings().weight) is tied
    assert hf.config.vocab_size == max(98, vocabulary)


def test_new_tokens_that_an_adapter_would_not_save(base: Path) -> None:
    with pytest.raises(
        InputError, match="2 new embeddings by tokenizer.add_tokens, which this adapter would not save"
    ) as caught:
        opened(base, LORA)
    assert caught.value.where == "adapter.modules_to_save"
    opened(base, LORA | {"modules_to_save": ["embed_tokens", "lm_head"]})


def test_a_tokenizer_with_more_tokens_than_were_added(base: Path) -> None:
    recipe = adapters.recipe(base, None, tokenizer={"kind": "model", "add_tokens": ["<|user|>"]})
    with pytest.raises(InputError, match="the model has 96 token ids and the tokenizer 97"):
        open_model(recipe, with_tokens(), 1)
