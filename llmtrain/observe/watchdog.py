"""The watchdog: a job whose ranks hang, are stopped or gone says where, and ends.

Each rank has two threads beside the main one. The heartbeat (`heartbeat.py`) exchanges beats. The
watch, below, looks every half second, never waits for another rank, and decides:

    a rank is longer in a phase than the recipe allows       its own watch finds out
    a rank says nothing any more                             rank 0's watch; of rank 0, everyone's
    a rank has failed and the others wait for it for ever    rank 0's watch

Then every rank that can writes the Python stacks of all its threads into its log, rank 0 says on the
console who was where, and the processes end, whatever C call their main threads are in.

The same threads end a run that ends by itself: each main thread says a last word, and rank 0 decides
from all of them what became of the run, and tells the others. No collective is needed, so it works
when ranks are gone; and no rank leaves before that, because torchrun ends the rest when one leaves.
"""

import faulthandler
import logging
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from llmtrain import distributed
from llmtrain.distributed import World
from llmtrain.errors import EXIT_FAILED, EXIT_PREEMPTED, InputError
from llmtrain.observe.heartbeat import Beat, Heartbeat, Word, prepare_keys
from llmtrain.observe.phases import Phases
from llmtrain.observe.roll_call import named, roll_call
from llmtrain.signals import StopRequest

log = logging.getLogger(__name__)

TICK = 0.5
_GONE_BEATS = 3  # who misses so many when a rank was lost is the lost one
_GRACE = 5.0  # for a main thread that may come to the end by itself
_PATIENCE = 15.0  # of a rank at its end, for the others
_HARD_EXIT = 30.0  # if saying why it ends, or leaving the process group, hangs too
_UNANSWERED = "did not answer any more (killed, crashed or stopped)"
_REMEDY = "  remedy: the same command goes on from the last checkpoint"


class Watchdog:
    """Watches the ranks of a run; a context manager that all ranks enter together.

    Args:
        deadlines: seconds for each phase; a phase that is not there has none.
        silence: seconds without a beat after which a rank counts as stopped or gone; a C call that
            keeps the interpreter's lock for so long counts too.
        world: the ranks.
        log_file: of this rank, for its stacks: at a bad end, and whenever SIGUSR2 comes.
        stop: read in the start-up, where no loop reads it.
        on_end: called once, on rank 0, when it is known how the run ended and before any rank leaves.
    """

    def __init__(
        self,
        deadlines: Mapping[str, float],
        silence: float,
        world: World,
        log_file: Path,
        stop: StopRequest,
        on_end: Callable[[Word], None],
    ):
        self.phases = Phases()
        self._deadlines, self._silence, self._world = deadlines, silence, world
        self._log_file, self._on_end, self.stop = log_file, on_end, stop
        self._host = platform.node()
        self._heartbeat: Heartbeat | None = None
        self._own: Word | None = None  # this rank's last word ...
        self._said_at = 0.0
        self._end: Word | None = None  # ... and what became of the run
        self._leave_at = 0.0
        self._main_came = False
        self._ended, self._look, self._closing = threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._stacks = self._log_file.open("a", encoding="utf-8")
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)
        if self._world.size > 1:
            self._heartbeat = self._connected()
            self._heartbeat.start()
        self._thread.start()
        return self

    def _connected(self) -> Heartbeat:
        try:
            store = distributed.side_store(self._world)
        except RuntimeError as error:
            raise InputError(
                f"rank {self._world.rank} cannot reach the heartbeats of rank 0: {error}",
                where="environment",
                remedy="let the nodes reach each other on all TCP ports, as the process group needs it too",
            ) from error
        if self._world.is_main:
            prepare_keys(store, self._world)
        hosts = distributed.gather_objects(self._host)
        return Heartbeat(store, self._world, hosts, self._silence, self._beat, lambda: self.phases.now)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._heartbeat is not None:
            if kind is not None:
                _exit_later(EXIT_FAILED)  # leaving a process group of dead ranks may take for ever
            self._heartbeat.close()
        self._closing = True
        self._look.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()

    def last_word(self, word: Word) -> Word:
        """Says how this rank's part ended, and returns how the run did; called by the main thread."""
        self._main_came = True
        if self._own is None:
            self._say(word)
        self._look.set()
        while not self._ended.wait(TICK) and self._thread.is_alive():
            pass
        return self._end or word

    def why_stopped(self) -> str:
        return f"stopped by {'another rank' if self.stop.signal is None else self.stop.signal.name}"

    # ------------------------------------------------------------------------ the watch's thread

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closing:
            self._look.wait(TICK if self._own is None else TICK / 10)
            self._look.clear()
            now = time.monotonic()
            # Time in which the process did not run does not count: a suspended job may be continued.
            self.phases.now += min(now - before, 4 * TICK)
            before = now
            if self._end is None:
                self._look_at_itself()
                self._look_at_others()
            elif not self._main_came and self.phases.now >= self._leave_at:
                self._leave(self._end)

    def _look_at_itself(self) -> None:
        if self._own is not None:
            return
        phase, began = self.phases.current
        seconds, deadline = self.phases.now - began, self._deadlines.get(phase)
        if deadline is not None and seconds > deadline:
            self._dump_stacks()
            where = f"{self._beat().doing} for {seconds:.0f} s; watchdog.{phase} is {deadline:g}"
            self._say(Word(EXIT_FAILED, f"rank {self._world.rank} on {self._host} is in {where}", "overdue"))
        elif self.stop and self.phases.starting:
            # No step will come after which the loop could look, and there is nothing to be saved.
            self._say(Word(EXIT_PREEMPTED, f"{self.why_stopped()} before the first step"))

    def _look_at_others(self) -> None:
        if self._heartbeat is None:
            if self._own is not None:
                self._conclude(self._own)
        elif self._world.is_main:
            self._decide(self._heartbeat)
        else:
            self._listen(self._heartbeat)

    def _decide(self, heartbeat: Heartbeat) -> None:
        """Rank 0: whether the run has ended, and how."""
        words = {rank: beat.word for rank, beat in heartbeat.beats.items() if beat.word}
        overdue = [word for word in (self._own, *words.values()) if word is not None and word.kind == "overdue"]
        silent = self._unheard(heartbeat, self._silence)
        causes = [rank for rank, word in words.items() if _is_cause(word)]
        if overdue:
            self._conclude(overdue[0])
            return
        if silent:
            self._conclude(self._lost(silent, f"said nothing for {max(silent.values()):.0f} s"))
            return
        own, said_at = self._own, self._said_at
        if own is None:
            # Who has ended leaves soon; this rank's main thread waits for it, or is about to end as well.
            said_at = min(heartbeat.said.values(), default=self.phases.now)
            ending = causes or self.phases.starting or any(word.kind == "lost" for word in words.values())
            if not ending or self.phases.now - said_at <= _GRACE:
                return
            own = self._from(next(iter(causes or words)))
        if _is_cause(own):
            self._conclude(own)
        elif causes:
            self._conclude(self._from(causes[0]))
        else:
            gone = self._unheard(heartbeat, min(_GONE_BEATS * heartbeat.interval, self._silence), since=said_at)
            if set(heartbeat.beats) == {*words, *gone} or self.phases.now - said_at > _PATIENCE:
                # A stop in the start-up may only be torchrun ending the ranks that are left.
                blamed = gone and (own.kind == "lost" or self.phases.starting)
                self._conclude(self._lost(gone, _UNANSWERED) if blamed else own)

    def _listen(self, heartbeat: Heartbeat) -> None:
        """Another rank: what rank 0 says of the end, or that it will never say anything."""
        unheard = self.phases.now - heartbeat.heard[0]
        if heartbeat.end is not None:
            self._log(heartbeat.end)
            self._finish(heartbeat.end, _GRACE if self._own is None else 0.0)
        elif unheard > self._silence:
            self._without_rank_0(self._lost([0], f"said nothing for {unheard:.0f} s"))
        elif not heartbeat.connected and (self._own is not None or unheard > _GRACE):
            self._without_rank_0(self._lost([0], "closed its connections"))
        elif self._own is not None and self.phases.now - self._said_at > 2 * _PATIENCE:
            self._finish(self._own)

    # ------------------------------------------------------------------------------ how it ends

    def _say(self, word: Word) -> None:
        self._own, self._said_at = word, self.phases.now
        if self._heartbeat is not None:
            self._heartbeat.hurry()

    def _conclude(self, end: Word) -> None:
        """Rank 0: this is how the run ended."""
        if not self._main_came:
            _exit_later(end.code)
        end = self._recorded(end)
        self._on_end(end)
        if self._heartbeat is not None:
            self._heartbeat.publish(end)
        self._finish(end)

    def _without_rank_0(self, end: Word) -> None:
        end = self._recorded(end)
        if self._world.local_rank == 0 or self._world.rank == 1:  # one voice on each node
            sys.stderr.write(f"[rank {self._world.rank}] error: {end.message}\n")
        self._finish(end)

    def _finish(self, end: Word, grace: float = 0.0) -> None:
        self._end, self._leave_at = end, self.phases.now + grace
        self._ended.set()
        if grace == 0.0 and not self._main_came:
            self._leave(end)

    def _leave(self, end: Word) -> None:
        """Ends the process, whatever its main thread is doing."""
        _exit_later(end.code)
        if end.code == EXIT_FAILED:
            self._dump_stacks()
        if sys.stderr.isatty():
            sys.stderr.write("\x1b[?25h\n")  # the cursor that the progress hid
        if self._heartbeat is not None:
            self._heartbeat.close()
        logging.shutdown()
        os._exit(end.code)

    def _dump_stacks(self) -> None:
        self._stacks.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} watchdog: {self._beat().doing}; all threads:\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks, all_threads=True)

    # ---------------------------------------------------------------------------- what is known

    def _beat(self) -> Beat:
        phase, began = self.phases.current
        doing = phase if self.phases.starting else f"{phase} of step {self.phases.step + 1}"
        return Beat(self._host, doing, round(self.phases.now - began, 1), self._own)

    def _unheard(self, heartbeat: Heartbeat, seconds: float, since: float = 0.0) -> dict[int, float]:
        """Seconds of silence of the ranks that said no last word and were not heard for longer than `seconds`."""
        return {
            rank: self.phases.now - heard
            for rank, heard in heartbeat.heard.items()
            if rank not in heartbeat.said and self.phases.now - max(heard, since) > seconds
        }

    def _from(self, rank: int) -> Word:
        """The word of another rank as that of the run."""
        beats = self._beats()
        word = beats[rank].word
        assert word is not None
        return word._replace(message=f"{named([rank], beats)}: {word.message}")

    def _lost(self, ranks: Collection[int], how: str) -> Word:
        beats = self._beats()
        last = dict.fromkeys(beats[rank].doing for rank in ranks)
        return Word(EXIT_FAILED, f"{named(ranks, beats)} {how}; last: {', '.join(list(last)[:3])}", "lost")

    def _recorded(self, end: Word) -> Word:
        """Logged, with where the ranks are unless its message says all."""
        if end.kind != "ended":
            heartbeat = self._heartbeat
            quiet = {} if heartbeat is None else self._unheard(heartbeat, _GONE_BEATS * heartbeat.interval)
            stacks = f"  stacks of their threads: {self._log_file.parent}/rank-N.log\n"
            where = f"{roll_call(self._beats(), quiet)}\n{'' if self._main_came else stacks}"
            end = end._replace(message=f"{end.message}\n{where}{_REMEDY}")
        self._log(end)
        return end

    def _log(self, end: Word) -> None:
        if not self._main_came or end.kind != "ended":  # else its own error will say it
            log.log(logging.WARNING if end.code == EXIT_PREEMPTED else logging.ERROR, "%s", end.message)

    def _beats(self) -> dict[int, Beat]:
        others = {} if self._heartbeat is None else self._heartbeat.beats
        return {self._world.rank: self._beat(), **others}


def _is_cause(word: Word) -> bool:
    """Whether the word says why the run failed, and not only that it did."""
    return word.code not in (0, EXIT_PREEMPTED) and word.kind != "lost"


def _exit_later(code: int) -> None:
    timer = threading.Timer(_HARD_EXIT, os._exit, (code,))
    timer.daemon = True
    timer.start()
