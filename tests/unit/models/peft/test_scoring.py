"""Adapters in models that score: the head is trained whole, and saved with them."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from llmtrain.errors import InputError
from llmtrain.models.peft import save_adapter
from llmtrain.models.reward import Reward, save_reward
from llmtrain.models.scorer import load_scorer
from tests import adapters, scorers, tiny
from tests.adapters import IDS, KINDS, LORA

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

ALGORITHMS = {"outcome": {"kind": "reward_model"}, "process": {"kind": "process_reward"}}
CHOSEN = {
    "lora": LORA,
    "lora, q_proj": LORA | {"target_modules": ["q_proj"]},
    "lora, pissa": KINDS["lora, pissa"],
    "lora, embedding": LORA | {"modules_to_save": ["embed_tokens"]},
    "lora, head named": LORA | {"modules_to_save": ["score"]},
    "ia3": KINDS["ia3"],
    "LOHA": KINDS["LOHA"],
    "VERA": KINDS["VERA"],
    "LN_TUNING": KINDS["LN_TUNING"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.pretrained(tmp_path_factory.mktemp("base"), max_position_embeddings=64)


def made(base: Path, kind: str, adapter: dict[str, Any], **overrides: Any) -> tuple[Any, Any]:
    model, adapted = adapters.materialised(adapters.recipe(base, adapter, algorithm=ALGORITHMS[kind], **overrides))
    return model, adapted


def trained(model: nn.Module) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(IDS, None, lambda hidden, head: (head(hidden)[..., -1] - 1).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def expected(kind: str, outputs: Tensor) -> list[Any]:
    found: list[Any] = outputs[:, -1, 0].tolist() if kind == "outcome" else outputs.softmax(-1)[:, :, 1].tolist()
    return found


def asked(kind: str, scorer: Any) -> list[Any]:
    rows = IDS.tolist()
    places = list(range(IDS.shape[1]))
    found: list[Any] = scorer.scores(rows) if kind == "outcome" else scorer.step_scores([(row, places) for row in rows])
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "outcome") for name in CHOSEN), *((name, "process") for name in ("lora", "lora, pissa", "ia3"))],
)
def test_what_is_saved_scores_in_plain_peft_and_here(name: str, kind: str, base: Path, tmp_path: Path) -> None:
    model, adapter = made(base, kind, CHOSEN[name])
    before = model.head.weight.detach().clone()
    trained(model)
    assert not torch.equal(model.head.weight, before)
    ours = adapters.logits(model, IDS)
    save_adapter(adapter, adapters.stream(model), tiny.tokenizer(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"][-1] == "score" and "score" not in config["target_modules"]
    assert config["task_type"] == scorers.KINDS[kind].task_type

    auto, num = scorers.KINDS[kind].auto, scorers.KINDS[kind].num_outputs
    plain = auto.from_pretrained(base, num_labels=num)
    plain.config.pad_token_id = 2
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    with torch.no_grad():
        theirs = loaded(input_ids=IDS).logits
    torch.testing.assert_close(theirs, ours[:, -1] if kind == "outcome" else ours, rtol=1e-4, atol=1e-5)

    bias = 0.5 if kind == "outcome" else 0.0
    save_reward(Reward("outcome", bias) if kind == "outcome" else Reward("process", separator="\n"), tmp_path)
    found = torch.tensor(asked(kind, load_scorer(str(tmp_path))))
    torch.testing.assert_close(found + bias, torch.tensor(expected(kind, ours)), rtol=1e-4, atol=1e-5)


def test_the_head_of_a_model_that_scores_already_goes_on(tmp_path: Path) -> None:
    base = scorers.write(tmp_path / "base", "outcome")
    model, _ = made(base, "outcome", LORA)
    torch.testing.assert_close(
        adapters.logits(model, IDS), adapters.logits(scorers.decoder("outcome"), IDS), rtol=1e-5, atol=1e-5
    )


def test_an_adapter_of_a_language_model_below(base: Path, tmp_path: Path) -> None:
    below, adapter = adapters.materialised(adapters.recipe(base, LORA))
    adapters.trained(below)
    (tmp_path / "below").mkdir()
    save_adapter(adapter, adapters.stream(below), tiny.tokenizer(), tmp_path / "below")
    model, adapter = made(base, "outcome", LORA | {"base": [str(tmp_path / "below")]})
    hidden, wanted = (one(IDS, None, lambda hidden, head: hidden) for one in (model, below))
    torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-4)
    trained(model)
    (tmp_path / "on-top").mkdir()
    save_adapter(adapter, adapters.stream(model), tiny.tokenizer(), tmp_path / "on-top")
    found = torch.tensor(load_scorer(str(tmp_path / "on-top")).scores(IDS.tolist()))
    torch.testing.assert_close(found, adapters.logits(model.eval(), IDS)[:, -1, 0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (KINDS["TRAINABLE_TOKENS"], "TRAINABLE_TOKENS saves no other module with it"),
        (LORA | {"modules_to_save": ["lm_head"]}, "no module 'lm_head'"),
    ],
)
def test_adapters_that_would_not_save_the_head(adapter: dict[str, Any], message: str, base: Path) -> None:
    recipe = adapters.recipe(base, adapter, algorithm={"kind": "reward_model", "share_prompts": False})
    with pytest.raises(InputError, match=message) as caught:
        adapters.adapted(recipe)
    assert caught.value.remedy
