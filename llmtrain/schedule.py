"""Learning rates as pure functions of the step."""

import math

from llmtrain.errors import InputError
from llmtrain.recipe.schema import WSD, Constant, Cosine, Linear, exceeding

AnySchedule = Constant | Linear | Cosine | WSD


def check_steps(schedule: AnySchedule, num_steps: int) -> None:
    """Raises InputError where warm-up and decay do not fit into the run's steps."""
    if (problem := exceeding(schedule, num_steps)) is not None:
        raise InputError(problem, where="schedule", remedy="shorten them, or train for more steps")


def learning_rate(schedule: AnySchedule, peak: float, step: int, num_steps: int) -> float:
    """The learning rate of optimizer step `step` (counted from 1) of `num_steps`.

    Warm-up is linear and reaches the peak at step warmup_steps; the decays end at min_ratio * peak
    in the last step.
    """
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if isinstance(schedule, Constant):
        return peak
    if isinstance(schedule, WSD):
        start = max(num_steps - schedule.decay_steps, schedule.warmup_steps)
    else:
        start = schedule.warmup_steps
    if step <= start:
        return peak
    done = (step - start) / (num_steps - start)  # in (0, 1]
    if isinstance(schedule, Linear):
        left = 1 - done
    elif isinstance(schedule, Cosine):
        left = 0.5 * (1 + math.cos(math.pi * done))
    else:
        left = 1 - math.sqrt(done)
    return peak * (schedule.min_ratio + (1 - schedule.min_ratio) * left)
