"""Samples of diffusion models while they are trained, and the models that such runs leave."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmtrain.algorithms.diffusion_samples import DiffusionSamples
from llmtrain.errors import InputError
from llmtrain.models.diffusion import Diffusion, load_diffusion
from llmtrain.models.saved import load_saved
from llmtrain.recipe.schema import Samples
from tests import tiny
from tests.diffusion import BLOCK, BLOCK_SHIFTED, MASKED, MASKED_SHIFTED, UNIFORM
from tests.runs import train_apart, train_here, write_recipe
from tests.saved import CommandLine

CPU = torch.device("cpu")
SETTINGS = Samples(prompts=["w20 w21 w22", "w30", "w40 w41"], max_new_tokens=10)


class Counted(nn.Module):
    """An engine's module: it takes what algorithms give, and no cache."""

    def __init__(self, seed: int):
        super().__init__()
        self.decoder, self.num = tiny.decoder(seed=seed).eval(), 0

    def forward(self, ids: Any, positions: Any, head: Any, visible: Any) -> Any:
        self.num += 1
        return self.decoder(ids, positions, head, visible)


def samples(diffusion: Diffusion, settings: Samples | None = SETTINGS, max_length: int = 32) -> DiffusionSamples:
    tokenizer = tiny.tokenizer()
    return DiffusionSamples(diffusion, tiny.VOCABULARY, settings, tokenizer, max_length, 0, tokenizer.encode)


@pytest.mark.parametrize("diffusion", [MASKED, MASKED_SHIFTED, BLOCK, BLOCK_SHIFTED, UNIFORM], ids=str)
def test_all_ranks_make_the_same_forwards(diffusion: Diffusion) -> None:
    """Whatever the weights are: of a sharded model each rank must take part in each forward."""
    models = [Counted(seed) for seed in range(3)]
    drawn = [samples(diffusion).drawn(model, CPU) for model in models]
    assert [sample.prompt for sample in drawn[0]] == SETTINGS.prompts
    assert drawn[0] != drawn[1]
    assert len({model.num for model in models}) == 1
    assert models[0].num <= 12 + (diffusion.block_size or 1) - 1  # the last block is written whole
    assert all(len(sample.completion.split()) <= 10 for sample in drawn[0])


def test_the_window_ends_a_sample() -> None:
    [first, *_] = samples(MASKED, max_length=7).drawn(Counted(0), CPU)
    assert len(first.completion.split()) <= 4
    with pytest.raises(InputError, match="takes 1 to 2"):
        samples(MASKED, max_length=3)
    assert samples(MASKED, None).drawn(Counted(0), CPU) == []


def test_blocks_are_written_whole() -> None:
    """As they were trained: what is wanted of the last one is the beginning of it."""
    seen: list[int] = []

    class Watched(Counted):
        def forward(self, ids: Any, positions: Any, head: Any, visible: Any) -> Any:
            seen.append(ids.shape[1])
            return super().forward(ids, positions, head, visible)

    assert BLOCK.block_size == 4
    drawn = samples(BLOCK, Samples(prompts=["w20 w21 w22"], max_new_tokens=2)).drawn(Watched(0), CPU)
    assert max(seen) == 8
    assert len(drawn[0].completion.split()) <= 2


ALGORITHMS: dict[str, dict[str, Any]] = {
    "masked": {"kind": "masked_diffusion"},
    "block": {"kind": "block_diffusion", "block_size": 4, "shift": True},
    "uniform": {"kind": "score_entropy", "noise": "uniform"},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_and_what_is_made_of_it(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {"prompts": ["the quick", "a"], "every": 2, "max_new_tokens": 8}
    run = train_here(write_recipe(tmp_path, algorithm=ALGORITHMS[name], steps=4, samples=drawn))
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["prompt"]) for row in rows] == [(s, p) for s in (2, 4) for p in drawn["prompts"]]
    assert any(row["completion"] for row in rows)
    saved = load_saved(str(run))
    assert saved.diffusion is not None and saved.diffusion.process == name
    assert saved.diffusion == load_diffusion(run / "final")
    monkeypatch.chdir(tmp_path)
    llmtrain = CommandLine(capfd)
    prompt = "the quick <|mask:3|> dog" if name == "masked" else "the quick"
    settings = ("--prompt", prompt, "--max-new-tokens", 8)
    done = llmtrain("generate", run, *settings)
    assert done.code == 0, done.err
    if name == "masked":
        assert "the quick" in done.out and done.out.strip().endswith("dog")
    done = llmtrain("export", run, "--output", "model")
    assert done.code == 0, done.err
    assert load_diffusion(tmp_path / "model") == saved.diffusion
    card = Path("model/README.md").read_text()
    assert "A diffusion language model" in card and "llmtrain generate model" in card
    assert {"masked": "sees the whole text", "block": "block of 4 tokens", "uniform": "uniform noise"}[name] in card
    assert llmtrain("generate", "model", *settings).out == llmtrain("generate", run, *settings).out


@pytest.mark.slow
@pytest.mark.parametrize("engine", [{"kind": "ddp"}, {"kind": "fsdp"}, {"kind": "deepspeed", "zero_stage": 3}], ids=str)
def test_two_ranks_draw_the_same_texts_as_one(tmp_path: Path, engine: dict[str, Any]) -> None:
    drawn = {"prompts": ["the quick", "a"], "every": 2, "max_new_tokens": 8}
    settings = {"algorithm": ALGORITHMS["block"], "steps": 2, "samples": drawn}
    batch = {"sequences": 8, "micro_sequences": 4}
    texts = []
    for name, ranks, kind in (("one", 1, {"kind": "auto"}), ("two", 2, engine)):
        recipe = write_recipe(tmp_path, name=name, batch=batch, engine=kind | {"timeout_seconds": 60}, **settings)
        run = train_apart(recipe, ranks=ranks)
        texts.append((run / "samples.jsonl").read_text())
    assert texts[0] == texts[1]
