"""The hang watchdog: names the rank that all others wait for, dumps stacks and ends the run.

Each rank has two threads beside its main one.  One publishes a heartbeat and reads those of others;
it may block in the store when rank 0 is stopped, so another one watches the main thread and the
first.  Neither touches CUDA.  The main thread only assigns a tuple.

Clocks of two machines are never compared.  A rank is judged by whether its heartbeat changes, and
by how long its main thread has been idle according to itself; and a clock here stands still while
its process is stopped, so that one that wakes up does not blame the others.

What it cannot see: a GPU that is stuck while its process waits for it like all others.  Then every
rank is named, with the place it stands in.
"""

import contextlib
import datetime
import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_cogview.parallel.topology import Topology
from megatron_cogview.training import heartbeats
from megatron_cogview.training.late_ranks import Heartbeat, Member, Seen, Verdict, judge

logger = logging.getLogger(__name__)

HANG_EXIT_CODE = 75
"""EX_TEMPFAIL: it failed, and may well succeed when it is started again; torchrun does so."""
REPORT_TIMEOUT_S = 5.0
"""A log or disk that is stuck as well must not keep the run."""
LEAVE_TIMEOUT_S = 5.0
"""The longest a rank stays for others at the end."""
PLACE_FRAMES = 4


class Watchdog:
    """Watches this rank's main thread inside a ``with`` block.

    Args:
        topology: process groups.
        timeout_s: seconds that a rank may be without a beat; at least about 1.  Hangs are found
            within twice of it.  0: no watchdog.
        folder: the run folder; stacks go to its ``hang/``.

    All ranks construct it together.
    """

    def __init__(self, topology: Topology, timeout_s: float, folder: Path) -> None:
        self._rank, self._folder = topology.rank, Path(folder) / "hang"
        self._limit = timeout_s
        self._interval = min(max(timeout_s / 8, 0.05), 10.0)
        self._poll = self._interval / 2
        self._silent_after = max(4 * self._interval, 1.0)
        # How often it went back, step, beats in this step, phase, seconds until the next beat.
        self._beat: tuple[int, int, int, str, float] = (0, 0, 0, "start", timeout_s)
        self._noticed, self._noticed_at = self._beat, 0.0
        self._clock, self._slept, self._slept_in = 0.0, 0.0, (0, 0)
        self._number, self._state = 0, "running"
        self._main = threading.get_ident()
        self._asked: float | None = None
        self._lost: float | None = None
        self._changed: dict[int, float] = {}
        self._last: dict[int, Heartbeat] = {}
        self._ended, self._alarmed = threading.Event(), threading.Event()
        self._news = threading.Event()
        """Something that the thread that talks should not wait with."""
        self._alarm_lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._members: list[Member] = []
        self._store: heartbeats.HeartbeatStore | None = None
        if timeout_s > 0:
            self._meet(topology)

    def _meet(self, topology: Topology) -> None:
        # Without the pipeline group: its ranks send to each other, and unequally often.
        world = dist.group.WORLD
        assert world is not None
        self._groups: tuple[Any, ...] = (world, topology.tensor_group, topology.data_group)
        mine = Member(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            stage=topology.pipeline_rank,
            groups=tuple(min(dist.get_process_group_ranks(group)) for group in self._groups),
        )
        meeting = heartbeats.meet(mine, self._heartbeat())
        if meeting.error:
            # A run without a watchdog is better than none.
            logger.error("no hang watchdog: %s", meeting.error)
            return
        self._members, self._store = meeting.members, meeting.store
        self._last = dict(enumerate(meeting.heartbeats))

    def beat(self, step: int, phase: str) -> None:
        """The main thread enters ``phase`` of ``step``.  All ranks do so in the same order."""
        laps, last, beats, _, _ = self._beat
        if step == last:
            self._beat = (laps, step, beats + 1, phase, self._limit)
        else:
            # A run that returns to an earlier step goes on, so its progress grows.
            self._beat = (laps + (step < last), step, 0, phase, self._limit)

    @contextlib.contextmanager
    def allow(self, seconds: float) -> Iterator[None]:
        """Inside, the main thread has ``seconds`` to its next beat, if that is longer."""
        former, self._limit = self._limit, max(self._limit, seconds)
        self.beat(self._beat[1], self._beat[3])
        try:
            yield
        finally:
            self._limit = former
            self.beat(self._beat[1], self._beat[3])
            # If this rank were stopped now, the others would be as patient as they last heard.
            self._news.set()

    def __enter__(self) -> Self:
        if not self._members:
            return self
        self._main = threading.get_ident()
        self._real = time.monotonic()
        for work in (self._watch, self._talk) if self._store is not None else (self._watch,):
            # Daemons: one that is blocked in the store must not keep the process.
            thread = threading.Thread(
                target=self._guarded, args=(work,), name=f"watchdog{work.__name__}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        return self

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            logger.exception("the hang watchdog has failed; the run goes on without it")
            self._ended.set()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failed = kind is not None and not issubclass(kind, SystemExit)
        if failed and self._threads and self._idle() > self._beat[4] / 2:
            # An error after a long wait: another rank may have found the hang a moment earlier.
            self._alarmed.wait(2 * self._interval + 1.0)
        # Before the event: the last heartbeat carries it.
        self._state = f"{kind.__name__}: {error}"[:500] if kind and failed else "done"
        self._ended.set()
        self._news.set()
        if self._alarmed.is_set():
            # The watchdog ends this process; what the main thread met is part of the hang.
            time.sleep(self._last_words_s())
        for thread in self._threads:
            thread.join(LEAVE_TIMEOUT_S + 1.0)
        if not any(thread.is_alive() for thread in self._threads):
            self._store = None

    # The thread that watches.

    def _watch(self) -> None:
        """Keep the clock, and find out when the other thread gets no answer."""
        while not self._ended.wait(self._poll):
            self._tick()
            if self._idle() <= self._beat[4] and not self._overslept():
                continue
            if self._store is None:
                self._alarm(judge(self._rank, self._members, self._seen(), self._silent_after))
            elif (since := self._lost if self._lost is not None else self._asked) is not None:
                self._judge_host(self._clock - since)

    def _tick(self) -> None:
        real = time.monotonic()
        passed, self._real = real - self._real, real
        beat = self._beat
        if passed > self._silent_after:
            self._slept, self._slept_in = self._slept + passed, beat[:2]
        elif beat[0] > self._slept_in[0] or beat[1] > self._slept_in[1] + 1:
            # A whole step behind it, which takes all ranks: they are there.
            self._slept = 0.0
        # Time in which this process did not run is nobody's fault.
        self._clock += min(passed, self._poll + 1.0)
        if self._noticed is not beat:
            self._noticed, self._noticed_at = beat, self._clock

    def _idle(self) -> float:
        # Another tuple than the noticed one is a beat of this moment.
        return self._clock - self._noticed_at if self._noticed is self._beat else 0.0

    def _judge_host(self, unanswered: float) -> None:
        """The store has not answered for so many seconds, or is lost since."""
        if unanswered <= self._silent_after or self._idle() <= self._silent_after:
            return
        host = self._last[0]
        if self._overslept():
            self._alarm(self._woke_up())
        elif self._idle() > max(self._beat[4], host.limit):
            seen = {0: Seen(host, unanswered), self._rank: Seen(self._heartbeat(), 0.0)}
            self._alarm(judge(self._rank, self._members, seen, self._silent_after))

    def _overslept(self) -> bool:
        """Whether this process was stopped for so long that the others may have given it up."""
        return self._slept > self._beat[4] / 2

    def _woke_up(self) -> Verdict:
        me, slept = self._members[self._rank], self._slept
        return Verdict(
            late=(self._rank,),
            message=f"{me} was itself stopped for {slept:.1f} s, and the others do not answer",
        )

    # The thread that talks.

    def _talk(self) -> None:
        """Publish, read and judge, until the main thread leaves or the store is lost."""
        try:
            while not self._ended.is_set():
                self._exchange()
                self._news.wait(self._interval)
                self._news.clear()
            self._leave()
        except dist.DistNetworkError:
            # No word: who ends first takes the store along.
            self._asked, self._lost = None, self._clock

    def _exchange(self) -> None:
        """One round."""
        self._asked = self._clock
        try:
            verdict = self._read() or self._judge()
        except dist.DistStoreError:
            # A timeout after all: rank 0 was stopped and goes on.
            self._changed.clear()
            return
        finally:
            self._asked = None
        self._alarm(verdict)

    def _read(self) -> Verdict | None:
        """Publish, and look at the others: at rank 0 always, at all when the wait gets long."""
        assert self._store is not None
        begin = self._clock
        watching = self._idle() > self._beat[4] / 4
        self._store.publish(self._heartbeat())
        verdict, found = self._store.look(range(len(self._members) if watching else 1))
        if self._clock - begin > self._silent_after / 2 or not watching:
            # Others could not publish meanwhile either, or it is not known when they did.
            self._changed.clear()
        for rank, heartbeat in found.items():
            if rank not in self._changed or heartbeat.number != self._last[rank].number:
                self._changed[rank] = self._clock
            self._last[rank] = heartbeat
        return verdict

    def _judge(self) -> Verdict | None:
        """A verdict that all ranks get, when this one's patience is at its end."""
        assert self._store is not None
        if len(self._changed) < len(self._members):
            return None
        seen = self._seen()
        if self._overslept():
            others = [each.silence for rank, each in seen.items() if rank != self._rank]
            if min(others) > self._silent_after:
                return self._woke_up()
        if self._idle() <= self._beat[4]:
            return None
        verdict = judge(self._rank, self._members, seen, self._silent_after)
        return self._store.declare(verdict) if verdict else None

    def _seen(self) -> dict[int, Seen]:
        now, changed = self._clock, self._changed
        seen = {r: Seen(b, now - changed.get(r, now)) for r, b in self._last.items()}
        return {**seen, self._rank: Seen(self._heartbeat(), 0.0)}

    def _heartbeat(self) -> Heartbeat:
        laps, step, beats, phase, limit = self._beat
        idle = round(self._idle(), 3)
        self._number += 1
        return Heartbeat(
            number=self._number,
            state=self._state,
            progress=(laps, step, beats),
            phase=phase,
            idle=idle,
            limit=limit,
            # A counter of the host, for nccl as well.
            collectives=tuple(group._get_sequence_number_for_group() for group in self._groups),
            place=_place(sys._current_frames().get(self._main)) if idle > limit / 4 else "",
        )

    def _leave(self) -> None:
        """Tell the others that this rank goes; rank 0 lets them hear it, for it has the store."""
        assert self._store is not None
        self._store.publish(self._heartbeat())
        if self._rank != 0:
            return
        ranks = range(1, len(self._members))
        deadline = time.monotonic() + min(2.5 * self._interval, LEAVE_TIMEOUT_S)
        _, first = self._store.look(ranks)
        while time.monotonic() < deadline:
            _, now = self._store.look(ranks)
            # Who has published twice has read in between.
            if all(b.state != "running" or b.number > first[r].number + 1 for r, b in now.items()):
                return
            time.sleep(0.05)

    # The end.

    def _last_words_s(self) -> float:
        return REPORT_TIMEOUT_S + 3 * self._interval + 2.0

    def _alarm(self, verdict: Verdict | None) -> None:
        """Report the hang and end this process."""
        if verdict is None:
            return
        with self._alarm_lock:
            if self._alarmed.is_set():
                return
            self._alarmed.set()
        # Whatever else blocks, this process ends.
        threading.Thread(target=_exit_after, args=(self._last_words_s(),), daemon=True).start()
        reports = [
            threading.Thread(target=report, args=(verdict,), daemon=True)
            for report in (self._log, self._dump)
        ]
        for report in reports:
            report.start()
        for report in reports:
            report.join(REPORT_TIMEOUT_S / 2)
        with contextlib.suppress(RuntimeError):
            self._let_others_know(verdict)
        os._exit(HANG_EXIT_CODE)

    def _log(self, verdict: Verdict) -> None:
        stacks = self._folder / _file_name(self._rank)
        logger.error("hang: %s.  The run ends; stacks are in %s", verdict.message, stacks)
        sys.stderr.flush()

    def _dump(self, verdict: Verdict) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / _file_name(self._rank)).open("a", encoding="utf-8") as file:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            file.write(f"{now}  {self._members[self._rank]}\n{verdict.message}\n\n")
            for rank, heartbeat in sorted(self._last.items()):
                file.write(f"{rank} {heartbeat.to_json()}\n")
            file.write("\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")

    def _let_others_know(self, verdict: Verdict) -> None:
        """Rank 0, and with it the store, stays until the verdict has gone round."""
        if self._store is None or self._asked is not None or self._lost is not None:
            return
        self._store.acknowledge()
        if self._rank == 0:
            # A late rank whose watchdog answers should hear of it from here, and not judge alone.
            others = [
                rank
                for rank, (heartbeat, silence) in self._seen().items()
                if rank != 0
                and heartbeat.state == "running"
                and (rank not in verdict.late or silence <= self._silent_after)
            ]
            deadline = time.monotonic() + 3 * self._interval + 1.0
            while time.monotonic() < deadline and not self._store.acknowledged(others):
                time.sleep(0.02)


def _exit_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(HANG_EXIT_CODE)


def _file_name(rank: int) -> str:
    return f"rank_{rank:05d}.txt"


def _place(frame: FrameType | None) -> str:
    """Innermost calls of a thread."""
    calls: list[str] = []
    while frame is not None and len(calls) < PLACE_FRAMES:
        name = Path(frame.f_code.co_filename).name
        # torch wraps each collective in a function that says nothing.
        if name != "c10d_logger.py":
            calls.append(f"{frame.f_code.co_name} ({name}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(calls)
