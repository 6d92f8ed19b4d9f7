"""`llmtrain eval` of diffusion models: perplexity and what else a task file asks of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig

from llmtrain.data.cache import is_held_out
from llmtrain.evaluation import perplexity
from llmtrain.evaluation.likelihood import Order, of_decoder, replay
from llmtrain.evaluation.scoring import Span, rows_of_spans
from llmtrain.evaluation.tasks import Perplexity, load_task
from llmtrain.models.decoder import Decoder
from llmtrain.models.diffusion import Diffusion, save_diffusion
from llmtrain.models.saved import load_saved
from tests.diffusion import BLOCK, BLOCK_SHIFTED, MASK, MASKED, MASKED_SHIFTED, UNIFORM, write_diffusion_model
from tests.likelihood import expected_bound
from tests.saved import ADAPTERS, CommandLine, Done, assert_refused, write_adapter, write_model

TEXTS = ["w4 w5 w6", "w7", "w8 w9 w10 w11 w12 w13 w14", "w10 w11 w12 w60 w61"]
KINDS = {"masked": MASKED, "masked-shift": MASKED_SHIFTED, "block": BLOCK, "block-shift": BLOCK_SHIFTED}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    kinds = KINDS | {"uniform": UNIFORM, "block-1": Diffusion("block", MASK, shift=True, block_size=1)}
    written = {name: write_diffusion_model(base / name, kind) for name, kind in kinds.items()}
    return written | {"autoregressive": write_model(base / "autoregressive")}


def write_task(**settings: Any) -> Path:
    Path("texts.txt").write_text("\n".join(TEXTS) + "\n")
    task = {"kind": "perplexity", "data": [{"kind": "text", "paths": ["texts.txt"], "document": "line"}]} | settings
    Path("ppl.yaml").write_text(json.dumps(task))
    return Path("ppl.yaml")


def lines(done: Done) -> dict[str, list[str]]:
    """Of each figure the value, its error, rows and note."""
    assert done.code == 0, done.err
    header, *rows = [line.split("\t") for line in done.out.splitlines()]
    assert header[:5] == ["task", "figure", "value", "stderr", "rows"]
    return {row[1]: row[2:] for row in rows}


def windows(length: int, overlap: int) -> list[tuple[list[int], int]]:
    """Ids, and the first that is counted: one after the other, each with the tokens before it as context."""
    cut = []
    for text in TEXTS:
        ids, done = [0, *(int(word[1:]) for word in text.split())], 1
        while done < len(ids):
            start = 0 if done == 1 else max(0, done - 1 - overlap)
            cut.append((ids[start : start + length], done - start))
            done = min(len(ids), start + length)
    return cut


# ------------------------------------------------------------------------------------ the bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "overlap"), [(64, 0), (5, 0), (5, 2)])
def test_the_bound(llmtrain: CommandLine, models: dict[str, Path], kind: str, length: int, overlap: int) -> None:
    write_task(sequence_length=length, overlap=overlap, samples=100)
    done = llmtrain("eval", models[kind], "ppl.yaml", "--output", "out.json", "--samples", "rows.jsonl")
    found = lines(done)
    saved = load_saved(str(models[kind]))
    cut = windows(length, overlap)
    nats, tokens = sum(expected_bound(saved, *window) for window in cut), sum(len(ids) - first for ids, first in cut)
    exact = json.loads(Path("out.json").read_text())["tasks"]["ppl"]["figures"]
    error = exact["monte_carlo_error"]["value"]
    assert 0 < error < 0.1
    assert abs(exact["loss"]["value"] - nats / tokens) < 4 * error
    assert exact["loss"]["note"] == found["loss"][3] == "upper bound"
    assert exact["loss"]["stderr"] > 0 and exact["loss"]["rows"] == 4
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert math.sqrt(sum(row["nats_stderr"] ** 2 for row in rows)) / tokens == pytest.approx(error)
    # the same texts, tokens and bytes as of an autoregressive model, whose table is what it always was
    of_ar = llmtrain("eval", models["autoregressive"], "ppl.yaml", "--samples", "ar.jsonl")
    assert of_ar.out.splitlines()[0] == "task\tfigure\tvalue\tstderr\trows"
    ar = [json.loads(line) for line in Path("ar.jsonl").read_text().splitlines()]
    assert [list(row) for row in ar] == [["task", "row", "nats", "tokens", "bytes"]] * 4
    assert [(row["tokens"], row["bytes"]) for row in rows] == [(row["tokens"], row["bytes"]) for row in ar]
    bits = sum(row["nats"] for row in rows) / math.log(2) / sum(row["bytes"] for row in rows)
    assert exact["bits_per_byte"]["value"] == pytest.approx(bits)
    assert exact["perplexity"]["value"] == pytest.approx(math.exp(exact["loss"]["value"]))


def test_what_is_drawn_depends_on_the_seed_alone(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    for kind in ("masked", "block", "uniform"):
        write_task(sequence_length=5, samples=3)
        once = lines(llmtrain("eval", models[kind], "ppl.yaml"))
        assert lines(llmtrain("eval", models[kind], "ppl.yaml", "--batch-tokens", 1)) == once
        write_task(sequence_length=5, samples=3, seed=1)
        assert lines(llmtrain("eval", models[kind], "ppl.yaml")) != once


def test_blocks_of_one_token_have_no_noise(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    found = lines(llmtrain("eval", models["block-1"], "ppl.yaml", "--samples", "rows.jsonl"))
    assert "monte_carlo_error" not in found and found["loss"][3] == "exact"
    # with shift that is the autoregressive model of the same weights, but that the mask has no probability
    of_ar = float(lines(llmtrain("eval", models["autoregressive"], "ppl.yaml"))["loss"][0])
    assert 0.99 * of_ar < float(found["loss"][0]) < of_ar
    assert "nats_stderr" not in json.loads(Path("rows.jsonl").read_text().splitlines()[0])


def test_a_single_draw_does_not_know_its_error(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task(samples=1)
    found = lines(llmtrain("eval", models["masked"], "ppl.yaml"))
    assert list(found) == ["loss", "perplexity", "bits_per_byte"] and float(found["loss"][1]) > 0


def test_errors_hold_the_texts_and_the_noise(models: dict[str, Path], tmp_path: Path) -> None:
    """Over many seeds the loss of the same texts differs by as much as is said; and that error adds to the texts'."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 20, 30)
    texts = [" ".join(f"w{number}" for number in random.integers(4, 96, length)) for length in lengths]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    (tmp_path / "t.yaml").write_text("kind: perplexity\ndata: [{kind: text, paths: [t.txt], document: line}]\n")
    loaded, saved = load_task(tmp_path / "t.yaml"), load_saved(str(models["masked"]))

    def measured(seed: int, samples: int) -> dict[str, Any]:
        assert isinstance(loaded.task, Perplexity)
        task = loaded.task.model_copy(update={"seed": seed, "samples": samples})
        return perplexity.measure(loaded, task, saved, None, 8192)[0]

    found = [measured(seed, 2) for seed in range(40)]
    spread = float(np.std([figures["loss"].value for figures in found], ddof=1))
    errors = [figures["monte_carlo_error"].value for figures in found]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(spread, rel=0.3)
    of_texts = measured(0, 200)["loss"].stderr
    both = np.mean([figures["loss"].stderr for figures in found])
    assert both == pytest.approx(math.hypot(of_texts, spread), rel=0.15)
    assert both > 1.1 * of_texts


# --------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("kind", KINDS)
def test_replay(llmtrain: CommandLine, models: dict[str, Path], kind: str) -> None:
    saved = load_saved(str(models[kind]))
    assert saved.diffusion is not None
    predict, size = of_decoder(Decoder(saved.decoder), saved.diffusion), saved.diffusion.block_size
    cut = windows(5, 2)
    for settings, order, note in (
        ({"order": "place"}, Order("place", block_length=32), "exact, unmasked by place"),
        ({}, Order(block_length=32), "exact, unmasked by confidence"),
        ({"tokens_per_step": 3}, Order(tokens_per_step=3, block_length=32), "exact, unmasked by confidence"),
        ({"threshold": 0.3}, Order(threshold=0.3, block_length=32), "exact, unmasked by confidence"),
    ):
        write_task(sequence_length=5, overlap=2, method="replay", **settings)
        found = lines(llmtrain("eval", models[kind], "ppl.yaml"))
        order = order if size is None else Order(order.by, order.tokens_per_step, order.steps, order.threshold)
        spans = [Span(np.asarray(ids), np.arange(len(ids)) >= first, 0) for ids, first in cut]
        nats = sum(float(replay(predict, rows_of_spans([span]), size, order)[0]) for span in spans)
        assert float(found["loss"][0]) == pytest.approx(nats / sum(span.counted.sum() for span in spans), rel=1e-3)
        assert found["loss"][3] == note and list(found) == ["loss", "perplexity", "bits_per_byte"]


# ------------------------------------------------------------------------------ models and texts


def test_an_adapter_that_makes_a_diffusion_model(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task()
    assert isinstance(ADAPTERS["lora"], LoraConfig)
    write_adapter(Path("adapter"), models["autoregressive"], "lora")
    as_ar = lines(llmtrain("eval", "adapter", "ppl.yaml"))
    save_diffusion(MASKED, Path("adapter"))
    as_diffusion = lines(llmtrain("eval", "adapter", "ppl.yaml"))
    assert len(as_ar["loss"]) == 3 and as_diffusion["loss"][3] == "upper bound"
    write_adapter(Path("prompt"), models["autoregressive"], "prompt_tuning")
    save_diffusion(MASKED, Path("prompt"))
    assert_refused(llmtrain("eval", "prompt", "ppl.yaml"), "PROMPT_TUNING puts tokens before causal text")


def test_uniform_noise(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_task(samples=4)
    found = lines(llmtrain("eval", models["uniform"], "ppl.yaml"))
    assert found["loss"][3] == "upper bound" and 2 < float(found["loss"][0]) < 50
    write_task(method="replay")
    assert_refused(llmtrain("eval", models["uniform"], "ppl.yaml"), "ppl.yaml:1: method: ", "so nothing is unmasked")


def test_held_out_documents_alone(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    held = [text for text in TEXTS if is_held_out(text, 0.6)]
    assert 0 < len(held) < len(TEXTS)
    write_task(held_out_fraction=0.6)
    for kind in ("autoregressive", "masked"):
        llmtrain("eval", models[kind], "ppl.yaml", "--samples", "rows.jsonl")
        rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
        assert [row["tokens"] for row in rows] == [len(text.split()) for text in held]


def test_texts_that_spell_the_mask(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    """No model can predict it, so it is not counted; texts only spell it where the tokenizer reads it as a word."""
    write_task()
    Path("texts.txt").write_text(f"w4 w{MASK} w5\nw6\n")
    llmtrain("eval", models["masked"], "ppl.yaml", "--samples", "rows.jsonl")
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [2, 1] and all(row["nats"] < 100 for row in rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 4}, "ppl.yaml:1: steps is for method replay"),
        ({"order": "place"}, "order is for method replay"),
        ({"method": "replay", "samples": 4}, "samples is for method bound"),
        ({"method": "replay", "steps": 4, "tokens_per_step": 2}, "tokens_per_step and steps exclude each other"),
        ({"method": "replay", "order": "place", "threshold": 0.5}, "threshold is for order confidence"),
        ({"method": "replay", "threshold": 1.5}, "threshold: must be at most 1"),
        ({"samples": 0}, "samples: must be greater than 0"),
        ({"method": "rebound"}, "method: the text 'rebound' is not allowed; did you mean"),
        ({"method": "replay", "block_length": 8}, "block_length: 8, and the model's own blocks have 4 tokens"),
    ],
)
def test_mistakes(llmtrain: CommandLine, models: dict[str, Path], settings: dict[str, Any], message: str) -> None:
    write_task(**settings)
    assert_refused(llmtrain("eval", models["block"], "ppl.yaml"), message)


def test_tasks_of_lm_eval_are_for_autoregressive_models(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    Path("lm.yaml").write_text("kind: lm_eval\ntasks: [arc_easy]\n")
    done = llmtrain("eval", models["masked"], "lm.yaml")
    assert_refused(done, "lm.yaml:1: kind: lm-eval takes every model for an autoregressive one", "multiple_choice")


# ------------------------------------------------------------------------------------ questions


def write_questions(**settings: Any) -> None:
    rows = [{"question": f"w{number}", "answer": "w9"} for number in (7, 8)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "exact_match", "data": "rows.jsonl", "prompt": "{question}", "max_new_tokens": 6}
    Path("qa.yaml").write_text(json.dumps(task | settings))


@pytest.mark.parametrize("kind", ["masked", "block", "uniform"])
def test_questions_are_answered_as_the_model_writes(llmtrain: CommandLine, models: dict[str, Path], kind: str) -> None:
    write_questions()
    found = lines(llmtrain("eval", models[kind], "qa.yaml", "--samples", "said.jsonl"))
    assert float(found["tokens"][0]) <= 6 and 0 <= float(found["accuracy"][0]) <= 1
    said = [json.loads(line)["completions"][0]["text"] for line in Path("said.jsonl").read_text().splitlines()]
    assert kind == "uniform" or all(f"w{MASK}" not in text.split() for text in said), "the mask was written"


def test_how_a_diffusion_model_writes(llmtrain: CommandLine, models: dict[str, Path]) -> None:
    write_questions(diffusion={"sampler": "llada", "steps": 2, "block_length": 3})
    assert lines(llmtrain("eval", models["masked"], "qa.yaml"))
    assert lines(llmtrain("eval", models["autoregressive"], "qa.yaml")), "there is nothing to unmask"
    refused = llmtrain("eval", models["block"], "qa.yaml")
    assert_refused(refused, "qa.yaml:1: diffusion.block_length: is for masked diffusion", "leave it out")
    write_questions(diffusion={"sampler": "lada"})
    assert_refused(llmtrain("eval", models["masked"], "qa.yaml"), "diffusion.sampler: the text 'lada' is not allowed")


def test_with_its_end_a_text_is_whole_blocks(models: dict[str, Path], llmtrain: CommandLine) -> None:
    """What fills the last block is predicted with it, and is no token of the text."""
    task = write_task(end_of_text=True, samples=2)
    counted = {}
    for name in ("autoregressive", "block", "block-1"):
        done = llmtrain("eval", models[name], task, "--samples", "rows.jsonl")
        assert done.code == 0, done.err
        counted[name] = [json.loads(line)["tokens"] for line in Path("rows.jsonl").read_text().splitlines()]
        Path("rows.jsonl").unlink()
    assert counted["block"] == counted["block-1"] == counted["autoregressive"] == [4, 2, 8, 6]
    loaded = load_task(task)
    assert isinstance(loaded.task, Perplexity)
    saved = load_saved(str(models["block"]))
    ids = np.asarray([0, 4, 5, 6, 1, 1, 1, 1])  # of the first text
    span = Span(ids, np.arange(8) > 0, 0)
    _, records = perplexity.measure(loaded, loaded.task.model_copy(update={"method": "replay"}), saved, 1, 64)
    predict = of_decoder(Decoder(saved.decoder), BLOCK)
    exact = replay(predict, rows_of_spans([span]), BLOCK.block_size, Order())
    assert records[0]["nats"] == pytest.approx(float(exact[0]), rel=1e-5)
