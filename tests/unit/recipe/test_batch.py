import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtrain.recipe.batch import MICRO_TOKENS, BatchPlan, plan_batch
from llmtrain.recipe.loading import load_recipe
from llmtrain.recipe.problems import RecipeError
from tests.unit.recipe.minimal import Write


@pytest.mark.parametrize(
    ("overrides", "world_size", "plan"),
    [
        (["batch.sequences=8"], 1, BatchPlan(8, 8, 1, 1)),
        (["batch.sequences=8"], 4, BatchPlan(8, 2, 1, 4)),
        (["batch.sequences=8", "sequence_length=2048"], 1, BatchPlan(8, 4, 2, 1)),
        (["batch.sequences=6", "sequence_length=2048"], 1, BatchPlan(6, 3, 2, 1)),  # 4 does not divide 6
        (["batch.sequences=6", "sequence_length=16384"], 2, BatchPlan(6, 1, 3, 2)),  # one row is the least
        (["batch={tokens: 1024}"], 2, BatchPlan(8, 4, 1, 2)),
        (["batch.micro_sequences=2"], 2, BatchPlan(8, 2, 2, 2)),
        (["batch.micro_sequences=1"], 1, BatchPlan(8, 1, 8, 1)),
    ],
)
def test_plan(write: Write, overrides: list[str], world_size: int, plan: BatchPlan) -> None:
    assert plan_batch(load_recipe(write(), overrides).recipe, world_size) == plan


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (["batch.sequences=10"], 4, "batch.sequences: 10 does not divide over 4 ranks: use 8 or 12"),
        (["batch.sequences=2"], 4, "batch.sequences: 2 does not divide over 4 ranks: use 4"),
        (
            ["batch={tokens: 640}"],
            4,
            "batch.tokens: 640 (5 sequences) does not divide over 4 ranks: use 512 or 1024",
        ),
        (
            ["batch.sequences=12", "batch.micro_sequences=4"],
            2,
            "batch.micro_sequences: 4 does not divide a rank's share of 6 sequences (12 over 2 ranks): use 3 or 6",
        ),
        (
            ["batch.micro_sequences=16"],
            1,
            "batch.micro_sequences: 16 does not divide a rank's share of 8 sequences (8 over 1 rank): use 8",
        ),
    ],
)
def test_what_does_not_divide(write: Write, overrides: list[str], world_size: int, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_batch(load_recipe(write(), overrides).recipe, world_size)
    assert str(caught.value) == message


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 64), st.integers(1, 16), st.sampled_from([128, 1000, 4096, 20000]))
def test_the_parts_make_up_the_whole(write: Write, share: int, world_size: int, length: int) -> None:
    recipe = load_recipe(write(), [f"batch.sequences={share * world_size}", f"sequence_length={length}"]).recipe
    plan = plan_batch(recipe, world_size)
    assert plan.micro_sequences * plan.accumulation * world_size == plan.sequences == share * world_size
    assert plan.micro_sequences == 1 or plan.micro_sequences * length <= MICRO_TOKENS
    larger = [size for size in range(plan.micro_sequences + 1, share + 1) if share % size == 0]
    assert all(size * length > MICRO_TOKENS for size in larger)
