"""The frame around a run in which all its ranks end as one, and the verdict is written."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llmtrain.distributed import World, lost_ranks_told
from llmtrain.errors import EXIT_FAILED, EXIT_PREEMPTED, LLMTrainError, RankLost, TrainingError
from llmtrain.observe.heartbeat import Word
from llmtrain.observe.watchdog import Watchdog
from llmtrain.recipe.schema import Recipe
from llmtrain.rundir import RunDirectory
from llmtrain.signals import StopRequest
from llmtrain.verdict import write_verdict

log = logging.getLogger(__name__)


@contextmanager
def watched(recipe: Recipe, directory: RunDirectory, world: World) -> Iterator[Watchdog]:
    """Watches a run by the recipe's deadlines and for signals; however it ends, rank 0 writes the verdict."""

    def give_verdict(word: Word | None) -> None:
        try:
            phases = watchdog.phases
            code, message = (None, "") if word is None else (word.code, word.message)
            write_verdict(directory.path, code, phases.step, phases.num_steps, message)
        except OSError as error:  # a full disk may be what ends the run
            log.warning("the verdict cannot be written: %s", error)

    deadlines = recipe.watchdog.model_dump()
    silence = deadlines.pop("silence")
    log_file = directory.logs / f"rank-{world.rank}.log"
    stop = StopRequest()
    watchdog = Watchdog(deadlines, silence, world, log_file, stop, give_verdict)
    if world.is_main:
        give_verdict(None)
    with stop.listening(), watchdog:
        yield watchdog


def run_to_its_end(watchdog: Watchdog, action: Callable[[], int]) -> int:
    """Runs `action`, which gives an exit code, and returns it when all ranks know how the run ended.

    Raises:
        RankLost: another rank is gone or does not answer.
        TrainingError: the run failed on another rank.
    """
    try:
        with lost_ranks_told():
            code = action()
    except RankLost as error:
        end = watchdog.last_word(Word(EXIT_FAILED, str(error), "lost"))
        raise RankLost(end.message) from error
    except LLMTrainError as error:
        watchdog.last_word(Word(error.exit_code, str(error)))
        raise
    except BaseException as error:
        watchdog.last_word(Word(EXIT_FAILED, f"{type(error).__name__}: {error}"))
        raise
    end = watchdog.last_word(Word(code, watchdog.why_stopped() if code == EXIT_PREEMPTED else ""))
    if end.code != code:
        raise TrainingError(end.message)
    return code
