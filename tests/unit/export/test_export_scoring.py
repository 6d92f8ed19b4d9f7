"""`llmtrain export` of models that score: what comes out, and what its card says, score elsewhere as here."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml

from llmtrain.data.groups import AnswerEncoder
from llmtrain.models.reward import Reward, load_reward, save_reward
from llmtrain.models.scorer import Scorer, load_scorer
from tests import scorers, tiny
from tests.saved import CommandLine, assert_refused, write_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

PROMPT, STEPS = "w10 w11 w12", [" w20 w21", " w22", " w23 w24 w25"]
ANSWER = " w20 w21 w22"
REWARDS = {"outcome": Reward("outcome", 0.75), "process": Reward("process", separator=" w9")}
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}w4 {% generation %}{{ message.content.rstrip() }}"
    " </s>{% endgeneration %} {% else %}w5 {{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w4 {% endif %}"
)


def with_template(directory: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)


def write_adapter(directory: Path, base: Path, kind: str) -> None:
    head = scorers.KINDS[kind]
    torch.manual_seed(3)
    model = head.auto.from_pretrained(base, num_labels=head.num_outputs)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type=head.task_type)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        adapted.base_model.model.score.modules_to_save["default"].weight.normal_()
    adapted.save_pretrained(directory)


def by_the_card(directory: str) -> dict[str, Any]:
    """The names that the card's program leaves, run as it stands there."""
    text = Path(directory, "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None, text
    program = found[1].replace("What is 2 + 3?", "w3").replace('"5"', '"w5"')
    program = re.sub(r'"What is 2 \+ 3 \+ 4\?", \[.*?\]', '"w3", [" w5", " w6"]', program)
    names: dict[str, Any] = {}
    exec(program, names)
    return names


def ours(scorer: Scorer, chat: bool) -> Any:
    encoder = AnswerEncoder(scorer.tokenizer, scorer.separator)
    prompt = [{"role": "user", "content": PROMPT}] if chat else PROMPT
    if scorer.kind == "outcome":
        return scorer.scores([encoder.answer(prompt, ANSWER, "here")])[0]
    return scorer.step_scores([encoder.steps(prompt, STEPS, "here")])[0]


@pytest.mark.parametrize("kind", REWARDS)
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("form", ["whole", "merged"])
def test_the_card_scores_as_we_do(llmtrain: CommandLine, tmp_path: Path, kind: str, chat: bool, form: str) -> None:
    if form == "whole":
        scorers.write(tmp_path / "model", kind, REWARDS[kind])
    else:
        base = write_model(tmp_path / "base", chat=False)
        write_adapter(tmp_path / "model", base, kind)
        save_reward(REWARDS[kind], tmp_path / "model")
        tiny.tokenizer().save_pretrained(tmp_path / "model")
    if chat:
        with_template(tmp_path / "model")
    wanted = ours(load_scorer("model"), chat)
    done = llmtrain("export", "model", "--output", "handed-on")
    assert done.code == 0, done.err
    assert load_reward(Path("handed-on")) == REWARDS[kind]
    assert ours(load_scorer("handed-on"), chat) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    names = by_the_card("handed-on")
    found = names["score"](PROMPT, ANSWER) if kind == "outcome" else names["probabilities"](PROMPT, STEPS)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    config = json.loads(Path("handed-on/config.json").read_text())
    assert config["architectures"] == [f"Llama{scorers.KINDS[kind].suffix}"] and config["pad_token_id"] == 2
    front = yaml.safe_load(Path("handed-on/README.md").read_text().split("---\n")[1])
    assert front["pipeline_tag"] == {"outcome": "text-classification", "process": "token-classification"}[kind]


def test_casting_and_models_of_others(llmtrain: CommandLine, tmp_path: Path) -> None:
    scorers.write(tmp_path / "model", "outcome")
    assert llmtrain("export", "model", "--output", "half", "--dtype", "bfloat16").code == 0
    assert load_reward(Path("half")) == Reward("outcome", 0.0)
    assert ours(load_scorer("half"), False) == pytest.approx(ours(load_scorer("model"), False), abs=0.1)
    assert "A reward model. Weights: bfloat16" in Path("half/README.md").read_text()


@pytest.mark.parametrize("kind", REWARDS)
def test_an_adapter_alone(llmtrain: CommandLine, tmp_path: Path, kind: str) -> None:
    base = write_model(tmp_path / "base", chat=False)
    write_adapter(tmp_path / "model", base, kind)
    save_reward(REWARDS[kind], tmp_path / "model")
    done = llmtrain("export", "model", "--output", "alone", "--no-merge")
    assert done.code == 0, done.err
    assert load_reward(Path("alone")) == REWARDS[kind]
    wanted = ours(load_scorer("model"), False)
    shutil.rmtree("model")
    assert ours(load_scorer("alone"), False) == pytest.approx(wanted)
    num = {"outcome": 1, "process": 2}[kind]
    assert f"num_labels={num})" in Path("alone/README.md").read_text()


def test_another_layout_is_of_language_models(llmtrain: CommandLine, tmp_path: Path) -> None:
    scorers.write(tmp_path / "model", "outcome")
    done = llmtrain("export", "model", "--output", "out", "--layout", "llada")
    assert_refused(done, "--layout: that layout is of language models, and this is a reward model")
