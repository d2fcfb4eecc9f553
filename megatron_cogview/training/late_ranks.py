"""Which rank do the others wait for?  A judgement over heartbeats, without clocks or processes.

Knows nothing of threads and stores; ``watchdog.py`` brings the heartbeats and acts on the verdict.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_NAMED = 8
"""Late ranks that a message describes; the others are counted."""


class Member(NamedTuple):
    """Who a rank is; exchanged once."""

    rank: int
    host: str
    pid: int
    stage: int
    """Pipeline stage."""
    groups: tuple[int, ...]
    """Its groups, one of each kind (world, tensor, data), each by the first rank in it."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, pid {self.pid})"


class Heartbeat(NamedTuple):
    """What a rank publishes about its main thread, from another thread."""

    number: int
    """Counts publications: it changes as long as the process runs."""
    state: str
    """``running``, ``done``, or the error that ended it."""
    progress: tuple[int, int, int]
    """Times it went back, step, beats in this step: grows alike on all ranks."""
    phase: str
    idle: float
    """Seconds without a beat, by the rank's own clock."""
    limit: float
    """Seconds it may be without a beat."""
    collectives: tuple[int, ...]
    """Collectives begun in each of its groups, in the order of :attr:`Member.groups`."""
    place: str
    """Where in the code its main thread stands; empty unless it has been idle for a while."""

    def to_json(self) -> str:
        """As text, to publish."""
        return json.dumps(self)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Heartbeat":
        """Back from text."""
        number, state, progress, phase, idle, limit, collectives, place = json.loads(text)
        collectives, progress = tuple(collectives), tuple(progress)
        return cls(number, state, progress, phase, idle, limit, collectives, place)

    @property
    def step(self) -> int:
        """The step it is in."""
        return self.progress[1]

    @property
    def over(self) -> bool:
        """Whether it has been idle for too long."""
        return self.idle > self.limit


class Seen(NamedTuple):
    """The last heartbeat of a rank, as another one knows it."""

    heartbeat: Heartbeat
    silence: float
    """Seconds that it has not changed, by the reader's clock; a lower bound."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Who keeps the others waiting."""

    late: tuple[int, ...]
    message: str

    def to_json(self) -> str:
        """As text, to publish."""
        return json.dumps([self.late, self.message])

    @classmethod
    def from_json(cls, text: str | bytes) -> "Verdict":
        """Back from text."""
        late, message = json.loads(text)
        return cls(late=tuple(late), message=message)


def judge(
    me: int, members: Sequence[Member], seen: Mapping[int, Seen], silent_after: float
) -> Verdict | None:
    """Who is late, as rank ``me`` sees it, whose own patience is at its end.

    Args:
        me: the rank that judges.
        members: all ranks, in their order.
        seen: what is known of each rank.
        silent_after: seconds after which a heartbeat that does not change means a rank that does
            not run.

    Returns:
        None while those who are late may take their time still.
    """
    beats = {rank: each.heartbeat for rank, each in seen.items()}
    failed = [rank for rank, beat in beats.items() if beat.state not in ("running", "done")]
    gone = [
        rank
        for rank, beat in beats.items()
        if beat.state == "running"
        and seen[rank].silence > silent_after
        and beats[me].idle > beat.limit
    ]
    if failed or gone:
        lines = [f"{members[r]} ended with {beats[r].state}" for r in failed]
        lines += [_silent(members[r], seen[r]) for r in gone]
        return _verdict([*failed, *gone], lines, "the others wait for it")
    running = {rank: beat for rank, beat in beats.items() if beat.state == "running"}
    late = _behind(members, beats)
    if not all(beats[rank].over for rank in late or running if rank in running):
        return None
    if late:
        return _verdict(late, [_stuck(members[r], beats[r]) for r in late], _waiting(beats, late))
    late = _elsewhere(members, running)
    if late:
        why = "the others of its stage stand elsewhere, so that collectives may not match"
        return _verdict(late, [_stuck(members[r], running[r]) for r in late], why)
    late = sorted(running)
    return _verdict(late, [_stuck(members[r], running[r]) for r in late], _nobody(beats))


def _behind(members: Sequence[Member], beats: Mapping[int, Heartbeat]) -> list[int]:
    """Ranks that others wait for and that wait for nobody, by what each has done.

    Whoever began fewer collectives than another of the same group keeps that one waiting, even if
    he has ended; but he may himself be kept waiting, in another group.
    """
    groups: dict[tuple[int, int], dict[int, tuple[int, ...]]] = {}
    for rank, beat in beats.items():
        if beat.state == "running":
            groups.setdefault((-1, 0), {})[rank] = beat.progress
        for kind, first in enumerate(members[rank].groups):
            groups.setdefault((kind, first), {})[rank] = (beat.collectives[kind],)
    awaited: set[int] = set()
    waiting: set[int] = set()
    for done in groups.values():
        least, most = min(done.values()), max(done.values())
        awaited |= {rank for rank, count in done.items() if count < most}
        waiting |= {rank for rank, count in done.items() if count > least}
    # Who has ended waits for nobody, whatever he did.
    waiting = {rank for rank in waiting if beats[rank].state == "running"}
    # Nobody left: a circle of ranks that wait for each other.
    return sorted(awaited - waiting or awaited)


def _elsewhere(members: Sequence[Member], running: Mapping[int, Heartbeat]) -> list[int]:
    """Ranks that stand in another place of the code than most of their pipeline stage."""
    stages: dict[int, dict[int, str]] = {}
    for rank, beat in running.items():
        stages.setdefault(members[rank].stage, {})[rank] = beat.place
    odd: list[int] = []
    for places in stages.values():
        place, count = Counter(places.values()).most_common(1)[0]
        if 2 * count > len(places):
            odd += [rank for rank, its in places.items() if its != place]
    return sorted(odd)


def _verdict(late: Sequence[int], lines: Sequence[str], why: str) -> Verdict:
    more = f"; and {len(lines) - MAX_NAMED} more ranks" if len(lines) > MAX_NAMED else ""
    message = "; ".join(lines[:MAX_NAMED]) + more + "; " + why
    return Verdict(late=tuple(late), message=message)


def _silent(member: Member, seen: Seen) -> str:
    beat = seen.heartbeat
    return (
        f"{member} has not answered for at least {seen.silence:.1f} s; it was last seen in step "
        f"{beat.step}, {beat.phase}"
    )


def _stuck(member: Member, beat: Heartbeat) -> str:
    if beat.state == "done":
        return f"{member} has ended, with fewer collectives than others"
    return f"{member} has been in step {beat.step}, {beat.phase}, for {beat.idle:.1f} s{_at(beat)}"


def _at(beat: Heartbeat) -> str:
    return f", at {beat.place}" if beat.place else ""


def _waiting(beats: Mapping[int, Heartbeat], late: Sequence[int]) -> str:
    others = [beat for rank, beat in beats.items() if rank not in late and beat.state == "running"]
    if not others:
        return "they wait for each other, so that collectives may not match"
    place = Counter(_at(beat) for beat in others).most_common(1)[0][0]
    return f"the others wait for it{place}"


def _nobody(beats: Mapping[int, Heartbeat]) -> str:
    if ended := sum(beat.state == "done" for beat in beats.values()):
        return f"ranks that have ended: {ended}"
    if len(beats) == 1:
        return "it runs alone"
    return "no rank is behind the others, so that a device or the network may be stuck"
