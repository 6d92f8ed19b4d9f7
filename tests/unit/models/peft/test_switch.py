"""An adapter switched off for a while."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.errors import InputError
from llmtrain.models.hub import open_model
from llmtrain.models.peft import save_adapter
from llmtrain.models.peft.switch import check_switchable, disabled
from tests import adapters, tiny
from tests.adapters import CPU, IDS, KINDS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

CHANGING = [kind for kind in KINDS if "pissa" in kind or "olora" in kind]
BEFORE_TEXT = [kind for kind in KINDS if kind.startswith(("prompt_tuning", "p_tuning", "prefix_tuning"))]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.pretrained(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def plain(base: Path) -> Tensor:
    """What the base says without any adapter."""
    blueprint = open_model(adapters.recipe(base, None), tiny.tokenizer())
    blueprint.materialise(blueprint.decoder, CPU)
    return adapters.logits(blueprint.decoder.eval(), IDS)


def trainable(model: torch.nn.Module) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in CHANGING + BEFORE_TEXT])
def test_inside_it_is_the_base_and_outside_the_adapted_model(kind: str, base: Path, plain: Tensor) -> None:
    model, adapter = adapters.materialised(adapters.recipe(base, KINDS[kind]))
    adapters.trained(model, steps=2)
    adapted, flags = adapters.logits(model, IDS), trainable(model)
    with disabled(adapter):
        assert torch.equal(adapters.logits(model, IDS), plain)
        # A backend holds these, and would not know why they changed.
        assert trainable(model) == flags
    assert not torch.equal(adapted, plain)
    assert torch.equal(adapters.logits(model, IDS), adapted)
    assert trainable(model) == flags
    assert adapters.trained(model, steps=1)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_it_comes_back_after_an_error(kind: str, base: Path) -> None:
    model, adapter = adapters.materialised(adapters.recipe(base, KINDS[kind]))
    adapters.trained(model, steps=2)
    adapted = adapters.logits(model, IDS)
    with pytest.raises(KeyError), disabled(adapter):
        raise KeyError
    assert torch.equal(adapters.logits(model, IDS), adapted)


@pytest.mark.parametrize("kind", CHANGING + BEFORE_TEXT)
def test_an_adapter_without_which_the_model_is_another_than_at_the_start(kind: str, base: Path) -> None:
    _, adapter = adapters.materialised(adapters.recipe(base, KINDS[kind]))
    what = "changes the weights" if kind in CHANGING else "begins at random"
    with pytest.raises(InputError, match=rf"{what}.*\n.*reference: cached") as caught:
        check_switchable(adapter)
    assert caught.value.where == "algorithm.reference"
    with pytest.raises(InputError), disabled(adapter):
        pass


def test_adapters_below_stay(base: Path, plain: Tensor, tmp_path: Path) -> None:
    lora: dict[str, Any] = KINDS["lora"]
    below, adapter = adapters.materialised(adapters.recipe(base, lora))
    adapters.trained(below, steps=3)
    save_adapter(adapter, adapters.stream(below), tiny.tokenizer(), tmp_path)
    model, adapter = adapters.materialised(adapters.recipe(base, lora | {"base": [str(tmp_path)]}))
    adapters.trained(model, steps=3)
    with disabled(adapter):
        inside = adapters.logits(model, IDS)
    torch.testing.assert_close(inside, adapters.logits(below, IDS), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(inside, plain, atol=1e-4)
