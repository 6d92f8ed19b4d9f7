"""The settings of diffusion: what they default to, and what cannot be."""

from typing import Any

import pytest
from pydantic import ValidationError

from llmtrain.recipe.batch import plan_batch
from llmtrain.recipe.layout import check_layout
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.problems import RecipeError
from llmtrain.recipe.schema import BlockDiffusion, MaskedDiffusion, Recipe
from tests import tiny
from tests.runs import RECIPE
from tests.unit.recipe.minimal import MINIMAL, Write

MASKED = {"kind": "masked_diffusion"}
BLOCK = {"kind": "block_diffusion", "block_size": 4}
SCORE = {"kind": "score_entropy"}
ALL = (MASKED, BLOCK, SCORE)
PRETRAINED = {"model": {"kind": "pretrained", "path": "somewhere"}, "tokenizer": {"kind": "model"}}


def recipe(algorithm: dict[str, Any], **overrides: Any) -> Recipe:
    return tiny.recipe(algorithm=algorithm, **overrides)


def data(**settings: Any) -> dict[str, Any]:
    return {**RECIPE["data"], **settings}


STAGES = [{"from_step": 0, "block_size": 1}, {"from_step": 10, "block_size": 4}]


@pytest.mark.parametrize(
    ("algorithm", "overrides", "said"),
    [
        (MASKED | {"eos_padding": 8}, {}, "eos_padding is for task sft: texts end where they end"),
        (BLOCK | {"eos_padding": 8}, {}, "eos_padding is for task sft"),
        (BLOCK | {"eos_padding": 6, "task": "sft"}, {}, "eos_padding is a multiple of block_size"),
        (BLOCK | {"clip": [0.5]}, {}, r"clip is \[low, high\] with low < high"),
        (BLOCK | {"clip": [0.8, 0.3]}, {}, r"clip is \[low, high\] with low < high"),
        (BLOCK | {"clip": [0.3, 0.3]}, {}, r"clip is \[low, high\] with low < high"),
        (BLOCK | {"clip": [0.1, 0.5, 0.9]}, {}, r"clip is \[low, high\] with low < high"),
        (BLOCK | {"clip": [0.1, 1.5]}, {}, "less than or equal to 1"),
        (BLOCK | {"clip": "best"}, {}, "search"),
        (BLOCK | {"curriculum": STAGES[1:]}, {}, "curriculum begins with from_step 0"),
        (BLOCK | {"curriculum": [STAGES[0], STAGES[1], STAGES[1]]}, {}, "later than the one before"),
        (BLOCK | {"curriculum": STAGES[::-1]}, {}, "curriculum begins with from_step 0"),
        (BLOCK | {"curriculum": STAGES[:1]}, {}, "last entry of curriculum has another block_size"),
        ({"kind": "block_diffusion"}, {}, "(?s)block_size.*required"),
        (BLOCK | {"block_size": 0}, {}, "(?s)block_size.*greater than 0"),
        (MASKED | {"eps": 0.0}, {}, "(?s)eps.*greater than 0"),
        (MASKED | {"eps": 0.2}, {}, "(?s)eps.*less than or equal to 0.1"),
        (MASKED | {"random_length_share": 1.0}, {}, "(?s)random_length_share.*less than 1"),
        (MASKED | {"annealing_steps": 0}, {}, "(?s)annealing_steps.*greater than 0"),
        (SCORE | {"noise": "gaussian"}, {}, "'absorbing' or 'uniform'"),
        (BLOCK | {"annealing_steps": 10}, {}, "(?s)annealing_steps.*not permitted"),
        (SCORE | {"complementary": True}, {}, "(?s)complementary.*not permitted"),
        (
            BLOCK | {"clip": "search"},
            {"data": data(validation_fraction=0)},
            "clip search measures on held-out rows; give",
        ),
        (BLOCK | {"clip": "search", "block_size": 1}, {}, "clip has no meaning for blocks of one token"),
        (BLOCK | {"block_size": 17}, {"sequence_length": 16}, "block_size 17 is more than sequence_length 16"),
        (
            BLOCK | {"curriculum": [{"from_step": 0, "block_size": 32}, {"from_step": 9, "block_size": 4}]},
            {"sequence_length": 16},
            "block_size 32 is more than sequence_length 16",
        ),
        (MASKED | {"random_length_share": 0.1, "task": "sft"}, {}, "random_length_share is for task pretrain"),
        (
            BLOCK | {"curriculum": STAGES},
            {"steps": 10},
            "comes to blocks of 4 at step 10, and the run ends after",
        ),
        (BLOCK | {"clip": [0.3, 0.8], "block_size": 1}, {}, "clip has no meaning for blocks of one token"),
        *(
            (one, {"data": data(train_on="all")}, "train_on is for fine-tuning, not .* of texts; take it")
            for one in ALL
        ),
        *((one, {"data": data(chat_template="x")}, "chat_template is for fine-tuning") for one in ALL),
        (MASKED, {"data": data(overflow="truncate")}, "masked_diffusion splits long documents"),
        *(
            (
                one,
                {"model": RECIPE["model"] | {"attention": "flash_attention_2"}},
                "knows causal attention only.*use auto",
            )
            for one in ALL
        ),
        *(
            (one, PRETRAINED | {"adapter": {"kind": kind}, "data": data(packing="none")}, "both ways; use adapter lora")
            for one in (MASKED, BLOCK, SCORE | {"noise": "uniform"}, MASKED | {"task": "sft"})
            for kind in ("prompt_tuning", "prefix_tuning", "p_tuning")
        ),
        (MASKED, {"optimizer": {"kind": "adamw"}}, "optimizer has no lr, and only fine-tuning"),
    ],
)
def test_what_cannot_be(algorithm: dict[str, Any], overrides: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe(algorithm, **overrides)


def test_a_mistake_is_told_with_its_line(write: Write) -> None:
    mistaken = write(MINIMAL.replace("{kind: causal_lm}", "{kind: block_diffusion, block_size: 4, clip: [0.9, 0.1]}"))
    with pytest.raises(RecipeError) as caught:
        load_recipe(mistaken)
    assert [str(problem) for problem in caught.value.problems] == [
        f"{mistaken}:13: algorithm: clip is [low, high] with low < high"
    ]


def test_flex_attention_trains_on_gpus() -> None:
    asked = recipe(MASKED, model=RECIPE["model"] | {"attention": "flex_attention"})
    check_layout(asked, 1, "cuda")
    with pytest.raises(RecipeError, match="flex_attention has no backward on a CPU: use auto, sdpa or eager here"):
        check_layout(asked, 1, "cpu")


@pytest.mark.parametrize("algorithm", ALL)
def test_pretraining_and_fine_tuning(algorithm: dict[str, Any]) -> None:
    """A task decides what the data are, and with it what is packed and cut how; and the learning rate."""
    texts = recipe(algorithm)
    assert (texts.fine_tunes, texts.packing, texts.overflow) == (False, "documents", "split")
    answers = recipe(
        algorithm | {"task": "sft", "eos_padding": 8},
        data=data(train_on="last_assistant", chat_template="x", max_empty_share=0.5),
        optimizer={"kind": "adamw"},
    )
    assert (answers.fine_tunes, answers.packing, answers.overflow) == (True, "best_fit", "truncate")
    assert answers.peak_lr == 2e-5
    assert recipe({"kind": "sft"}).fine_tunes and not recipe({"kind": "causal_lm"}).fine_tunes


def test_which_of_them_have_a_mask_token() -> None:
    for algorithm in ALL:
        assert recipe(algorithm).mask_token == "<|mask|>"
        assert recipe(algorithm | {"mask_token": "[M]"}).mask_token == "[M]"
    for algorithm in (SCORE | {"noise": "uniform"}, {"kind": "causal_lm"}, {"kind": "sft"}):
        assert recipe(algorithm).mask_token is None


def test_the_block_size_of_each_step() -> None:
    plain = BlockDiffusion(kind="block_diffusion", block_size=4)
    assert [plain.block_size_at(step) for step in (0, 10**6)] == [4, 4]
    rising = BlockDiffusion.model_validate(BLOCK | {"curriculum": STAGES})
    assert [rising.block_size_at(step) for step in (0, 9, 10, 11, 10**6)] == [1, 1, 4, 4, 4]


def test_annealing() -> None:
    assert MaskedDiffusion(kind="masked_diffusion").annealed(0) == 1.0
    slow = MaskedDiffusion(kind="masked_diffusion", annealing_steps=4)
    assert [slow.annealed(step) for step in (0, 1, 3, 4, 100)] == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_the_default_micro_batch_counts_the_copies_of_a_token() -> None:
    """Of block diffusion a noisy and a clean one, of complementary masks one for each view."""
    batch = {"sequences": 64}
    for algorithm, micro_sequences in ((MASKED, 8), (SCORE, 8), (BLOCK, 4), (MASKED | {"complementary": True}, 4)):
        plan = plan_batch(recipe(algorithm, batch=batch, sequence_length=1024), 1)
        assert plan.micro_sequences == micro_sequences
