"""Learning rates at their corners, and as curves."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.errors import InputError
from llmtrain.recipe.schema import WSD, Constant, Cosine, Linear
from llmtrain.schedule import AnySchedule, check_steps, learning_rate

PEAK, STEPS, WARMUP = 0.3, 100, 10
SCHEDULES: dict[str, AnySchedule] = {
    "constant": Constant(kind="constant", warmup_steps=WARMUP),
    "linear": Linear(kind="linear", warmup_steps=WARMUP, min_ratio=0.2),
    "cosine": Cosine(kind="cosine", warmup_steps=WARMUP, min_ratio=0.2),
    "wsd": WSD(kind="wsd", warmup_steps=WARMUP, decay_steps=40, min_ratio=0.2),
}
CURVES = st.one_of(
    st.builds(Constant, kind=st.just("constant"), warmup_steps=st.integers(0, 50)),
    st.builds(Linear, kind=st.just("linear"), warmup_steps=st.integers(0, 50), min_ratio=st.floats(0, 1)),
    st.builds(Cosine, kind=st.just("cosine"), warmup_steps=st.integers(0, 50), min_ratio=st.floats(0, 1)),
    st.builds(
        WSD,
        kind=st.just("wsd"),
        warmup_steps=st.integers(0, 50),
        decay_steps=st.integers(1, 80),
        min_ratio=st.floats(0, 1),
    ),
)


def curve(schedule: AnySchedule, num_steps: int = STEPS, peak: float = PEAK) -> list[float]:
    return [learning_rate(schedule, peak, step, num_steps) for step in range(1, num_steps + 1)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_begins_above_zero_and_reaches_the_peak(kind: str) -> None:
    rates = curve(SCHEDULES[kind])
    assert rates[0] == pytest.approx(PEAK / WARMUP)  # the first step learns something
    assert rates[4] == pytest.approx(PEAK / 2)
    assert rates[WARMUP - 1] == PEAK


@pytest.mark.parametrize(("kind", "last"), [("constant", 1.0), ("linear", 0.2), ("cosine", 0.2), ("wsd", 0.2)])
def test_the_last_step(kind: str, last: float) -> None:
    assert curve(SCHEDULES[kind])[-1] == pytest.approx(last * PEAK)


def test_on_the_way_down() -> None:
    """Step 40 is a third of a decay from 10 to 100; step 80 half of one from 60 to 100."""
    assert learning_rate(SCHEDULES["constant"], PEAK, 40, STEPS) == PEAK
    assert learning_rate(SCHEDULES["linear"], PEAK, 40, STEPS) == pytest.approx(PEAK * (0.2 + 0.8 * 2 / 3))
    assert learning_rate(SCHEDULES["cosine"], PEAK, 40, STEPS) == pytest.approx(PEAK * (0.2 + 0.8 * 0.75))
    assert learning_rate(SCHEDULES["wsd"], PEAK, 80, STEPS) == pytest.approx(PEAK * (0.2 + 0.8 * (1 - math.sqrt(0.5))))


def test_wsd_is_constant_until_its_decay() -> None:
    rates = curve(SCHEDULES["wsd"])
    assert set(rates[WARMUP - 1 : 60]) == {PEAK}
    assert rates[60] < PEAK


def test_a_decay_longer_than_the_rest_begins_after_warm_up() -> None:
    rates = curve(WSD(kind="wsd", warmup_steps=WARMUP, decay_steps=1000))
    assert rates[WARMUP - 1] == PEAK
    assert rates[WARMUP] < PEAK
    assert rates[-1] == 0


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_warm_up_the_first_step_is_at_the_peak_or_just_below(kind: str) -> None:
    schedule = SCHEDULES[kind].model_copy(update={"warmup_steps": 0})
    first = learning_rate(schedule, PEAK, 1, STEPS)
    assert 0.98 * PEAK < first <= PEAK
    assert learning_rate(schedule, PEAK, 1, 1) == (PEAK if kind == "constant" else pytest.approx(0.2 * PEAK))


def test_a_run_that_ends_in_its_warm_up() -> None:
    for schedule in SCHEDULES.values():
        assert curve(schedule, num_steps=5) == pytest.approx([PEAK * step / WARMUP for step in range(1, 6)])


@given(CURVES, st.integers(1, 200))
def test_it_rises_to_the_end_of_warm_up_falls_after_and_never_leaves_its_bounds(
    schedule: AnySchedule, num_steps: int
) -> None:
    rates = curve(schedule, num_steps)
    assert all(0 <= rate <= PEAK * (1 + 1e-12) for rate in rates)
    rising, falling = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    assert all(a < b for a, b in pairwise(rising))
    assert all(a >= b - 1e-15 for a, b in pairwise(falling))


@given(CURVES)
def test_there_are_no_jumps(schedule: AnySchedule) -> None:
    """A thousand times more steps: neighbours differ by little; 1 - sqrt is steepest, at its start."""
    scale = 1000
    longer = schedule.model_copy(update={"warmup_steps": schedule.warmup_steps * scale})
    if isinstance(longer, WSD):
        longer = longer.model_copy(update={"decay_steps": max(longer.decay_steps, 10) * scale})
    num_steps = 100 * scale
    corners = [longer.warmup_steps, num_steps - (longer.decay_steps if isinstance(longer, WSD) else 0), num_steps - 1]
    for corner in corners:
        for step in range(max(1, corner - 2), min(num_steps, corner + 3)):
            a, b = (learning_rate(longer, PEAK, at, num_steps) for at in (step, step + 1))
            assert abs(a - b) < 0.02 * PEAK


@pytest.mark.parametrize(
    "schedule", [Cosine(kind="cosine", warmup_steps=11), WSD(kind="wsd", warmup_steps=3, decay_steps=8)]
)
def test_warm_up_and_decay_must_fit_into_the_run(schedule: Cosine | WSD) -> None:
    check_steps(schedule, 11)
    with pytest.raises(InputError, match=r"schedule: .* \(11\) exceeds steps \(10\)"):
        check_steps(schedule, 10)
