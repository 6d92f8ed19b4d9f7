"""Models that score, loaded from what runs and others leave, and asked."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
)

from llmtrain.errors import InputError
from llmtrain.models.reward import Reward
from llmtrain.models.saved import load_saved
from llmtrain.models.scorer import load_scorer
from tests import scorers, tiny
from tests.saved import write_adapter, write_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

ROWS = [list(range(3, 3 + length)) for length in (5, 17, 1, 30, 2)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scorers.write(tmp_path_factory.mktemp("outcome"), "outcome", Reward("outcome", 0.5))


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scorers.write(tmp_path_factory.mktemp("process"), "process", Reward("process", separator=" w9"))


@torch.no_grad()
def theirs(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    return logits


def refused(message: str, *arguments: Any, **options: Any) -> InputError:
    with pytest.raises(InputError, match=message) as caught:
        load_scorer(*arguments, **options)
    assert caught.value.remedy
    return caught.value


def test_an_outcome_is_what_the_head_says_less_the_bias(outcome: Path) -> None:
    scorer = load_scorer(str(outcome))
    assert (scorer.kind, scorer.separator, scorer.window) == ("outcome", None, 64)
    assert scorer.tokenizer.eos_token_id == 1
    model = AutoModelForSequenceClassification.from_pretrained(outcome)
    assert scorer.scores(ROWS) == pytest.approx([theirs(model, row).item() - 0.5 for row in ROWS], abs=1e-5)
    assert scorer.scores([]) == []


def test_a_step_is_judged_where_it_ends(process: Path) -> None:
    scorer = load_scorer(str(process))
    assert (scorer.kind, scorer.separator) == ("process", " w9")
    model = AutoModelForTokenClassification.from_pretrained(process)
    asked = [(ROWS[1], [3, 9, 16]), (ROWS[2], [0]), (ROWS[3], []), (ROWS[0], [4])]
    for (row, places), found in zip(asked, scorer.step_scores(asked, 40), strict=True):
        assert found == pytest.approx(theirs(model, row).softmax(-1)[places, 1].tolist(), abs=1e-5)


def test_models_of_others(tmp_path: Path) -> None:
    scorers.write(tmp_path / "outcome", "outcome")
    scorers.write(tmp_path / "process", "process")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "outcome")
    assert load_scorer(str(tmp_path / "outcome")).scores(ROWS[:1]) == pytest.approx([theirs(model, ROWS[0]).item()])
    assert load_scorer(str(tmp_path / "process")).separator == "\n"


def test_padding_at_the_end_is_passed_over_as_transformers_does(tmp_path: Path) -> None:
    """Many were trained with the token that ends a text for padding."""
    model = scorers.model("outcome")
    model.config.pad_token_id = 1
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    for row in ([5, 6, 7, 1], [5, 6, 7, 1, 1], [5, 1, 7], [1]):
        assert load_scorer(str(tmp_path)).scores([row]) == pytest.approx([theirs(model, row).item()])


def test_dtypes(outcome: Path) -> None:
    exact, rounded = (load_scorer(str(outcome), dtype=dtype).scores(ROWS) for dtype in ("float32", "bfloat16"))
    assert exact != rounded and rounded == pytest.approx(exact, abs=0.1)


# ---------------------------------------------------------------------------------------- adapters


def adapter_of(kind: str, base: Path, directory: Path, **settings: Any) -> Any:
    """One that peft saves."""
    head = scorers.KINDS[kind]
    torch.manual_seed(2)
    model = head.auto.from_pretrained(base, num_labels=head.num_outputs)
    model.config.pad_token_id = 2
    config = peft.LoraConfig(
        task_type=head.task_type, init_lora_weights=False, **({"target_modules": ["q_proj", "up_proj"]} | settings)
    )
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        adapted.base_model.model.score.modules_to_save["default"].weight.normal_()
    adapted.save_pretrained(directory)
    return adapted


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_an_adapter_brings_the_head(kind: str, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    adapted = adapter_of(kind, base, tmp_path / "adapter")
    scorer = load_scorer(str(tmp_path / "adapter"))
    other = load_scorer(str(tmp_path / "adapter"), base=str(base))
    if kind == "outcome":
        assert scorer.scores(ROWS) == pytest.approx([theirs(adapted, row).item() for row in ROWS], rel=1e-4, abs=1e-4)
        assert other.scores(ROWS) == scorer.scores(ROWS)
    else:
        expected = theirs(adapted, ROWS[1]).softmax(-1)[[2, 16], 1].tolist()
        assert scorer.step_scores([(ROWS[1], [2, 16])])[0] == pytest.approx(expected, rel=1e-4)


def test_a_base_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    adapter_of("outcome", write_model(tmp_path / "base"), tmp_path / "adapter")
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    other = write_model(tmp_path / "other", vocab_size=64)
    refused("--base: .*other has embeddings of 64 tokens", str(tmp_path / "adapter"), base=str(other))


def test_an_adapter_on_a_merged_one_of_a_language_model(tmp_path: Path) -> None:
    """Fine-tuned by one adapter, and then made to score by another."""
    base = write_model(tmp_path / "base")
    below = write_adapter(tmp_path / "below", base, "lora")
    merged = peft.PeftModel.from_pretrained(load_saved(str(base)).decoder, below).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny.tokenizer().save_pretrained(tmp_path / "merged")
    adapted = adapter_of("outcome", tmp_path / "merged", tmp_path / "adapter")
    below.rename(tmp_path / "adapter" / "base-0")
    found = load_scorer(str(tmp_path / "adapter"), base=str(base)).scores(ROWS)
    assert found == pytest.approx([theirs(adapted, row).item() for row in ROWS], rel=1e-3, abs=1e-3)


def test_an_adapter_that_lacks_the_head(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    adapter_of("outcome", base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "score" not in name}, file)
    refused("1 of the model's weights are not there.*score.weight", str(tmp_path / "adapter"))


def test_learnt_tokens_before_the_text_are_refused(tmp_path: Path) -> None:
    base = scorers.write(tmp_path / "base", "outcome")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    refused("PROMPT_TUNING puts tokens before causal text, and this is a reward model", str(tmp_path / "adapter"))


# ----------------------------------------------------------------------------------------- refused


def test_what_gives_no_score(tmp_path: Path, outcome: Path) -> None:
    base = write_model(tmp_path / "base")
    error = refused("is a causal language model, which gives no score", str(base))
    assert "algorithm.kind reward_model" in (error.remedy or "")
    write_adapter(tmp_path / "adapter", base, "lora")
    refused("is a causal language model", str(tmp_path / "adapter"))
    refused("no such directory", str(tmp_path / "nowhere"))
    adapter_of("outcome", base, tmp_path / "scores")
    for model in (outcome, tmp_path / "scores"):
        with pytest.raises(InputError, match="a reward model.*and a causal language model is wanted"):
            load_saved(str(model))


def test_reward_json_of_another_model(tmp_path: Path) -> None:
    scorers.write(tmp_path, "outcome", Reward("process", separator="\n"))
    refused("kind is 'process', and the weights .* a reward model", str(tmp_path))


def test_a_head_of_another_size(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", vocab_size=96, num_labels=3, **tiny.LLAMA)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    refused("its head has 3 outputs, and that of a reward model has 1", str(tmp_path))


def test_an_encoder(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=1
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    refused("does not score by its head", str(tmp_path))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    scorers.write(tmp_path, "outcome")
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    refused("safetensors", str(tmp_path))


def test_rows_that_cannot_be_read(outcome: Path) -> None:
    scorer = load_scorer(str(outcome))
    with pytest.raises(InputError, match="row 1 has 65 tokens, and the model's window is 64"):
        scorer.scores([ROWS[0], [3] * 65])
    with pytest.raises(InputError, match="row 2 has no token"):
        scorer.scores([ROWS[0], ROWS[1], []])


def test_a_score_that_is_not_finite(tmp_path: Path) -> None:
    scorers.write(tmp_path, "outcome")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][25] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    scorer = load_scorer(str(tmp_path))
    assert len(scorer.scores([ROWS[0]])) == 1
    with pytest.raises(InputError, match="the score of row 3 is not finite"):
        scorer.scores(ROWS)


def test_reward_json_is_written_for_others(outcome: Path) -> None:
    content = json.loads((outcome / "reward.json").read_text())
    assert content == {"format": 1, "kind": "outcome", "bias": 0.5, "separator": None}
