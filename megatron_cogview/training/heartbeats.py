"""Where ranks leave their heartbeats for each other: a store of its own, held by rank 0.

Any call may block while rank 0 is stopped, whatever timeout it was given: a timeout makes the store
cancel its question, and then it waits for the answer to that.  So only a thread that nobody waits
for may call :class:`HeartbeatStore`.
"""

import datetime
import os
import socket
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch.distributed as dist

from megatron_cogview.training.late_ranks import Heartbeat, Member, Verdict

CONNECT_TIMEOUT_S = 60.0
_VERDICT = "verdict"


class HeartbeatStore:
    """One rank's connection to the heartbeats of all."""

    def __init__(self, rank: int, store: dist.TCPStore) -> None:
        self._rank, self._store = rank, store

    def publish(self, heartbeat: Heartbeat) -> None:
        """Leave this rank's heartbeat."""
        self._store.set(_beat(self._rank), heartbeat.to_json())

    def look(self, ranks: Sequence[int]) -> tuple[Verdict | None, dict[int, Heartbeat]]:
        """The verdict, if there is one, and the heartbeats of ``ranks``."""
        verdict, *beats = self._store.multi_get([_VERDICT, *map(_beat, ranks)])
        found = {r: Heartbeat.from_json(text) for r, text in zip(ranks, beats, strict=True)}
        return (Verdict.from_json(verdict) if verdict else None), found

    def declare(self, verdict: Verdict) -> Verdict:
        """Leave a verdict; the first one counts, and is returned."""
        return Verdict.from_json(self._store.compare_set(_VERDICT, "", verdict.to_json()))

    def acknowledge(self) -> None:
        """Say that this rank knows the verdict."""
        self._store.set(f"known/{self._rank}", "1")

    def acknowledged(self, ranks: Iterable[int]) -> bool:
        """Whether all of ``ranks`` know the verdict."""
        return self._store.check([f"known/{rank}" for rank in ranks])


def _beat(rank: int) -> str:
    return f"beat/{rank}"


class Meeting(NamedTuple):
    """What the ranks know of each other when they begin."""

    members: list[Member]
    heartbeats: list[Heartbeat]
    store: HeartbeatStore | None
    error: str
    """Why there is no store; the same on all ranks."""


def meet(mine: Member, first: Heartbeat) -> Meeting:
    """Exchange who is who, and connect to rank 0.  All ranks call it together."""
    size = dist.get_world_size()
    present = [(mine, first)] * size
    dist.all_gather_object(present, (mine, first))
    members, beats = [member for member, _ in present], [beat for _, beat in present]
    if size == 1:
        return Meeting(members, beats, None, "")
    store, error, where = None, "", [("", 0)]
    # No failure may leave this function on one rank alone: the others would wait for its word.
    if mine.rank == 0:
        try:
            store = _connect("localhost", 0, is_master=True)
            store.set(_VERDICT, "")
            where = [(_address(members), store.port)]
        except (RuntimeError, OSError) as failure:
            error = f"rank 0 cannot open a port: {failure}"
    dist.broadcast_object_list(where, 0)
    host, port = where[0]
    mailbox = None
    try:
        if port and mine.rank != 0:
            store = _connect(host, port, is_master=False)
        if store is not None:
            mailbox = HeartbeatStore(mine.rank, store)
            mailbox.publish(first)
    except (RuntimeError, OSError) as failure:
        error = f"rank {mine.rank} cannot reach {host}:{port}: {failure}"
    errors = [error] * size
    dist.all_gather_object(errors, error)
    error = next((each for each in errors if each), "")
    return Meeting(members, beats, None if error else mailbox, error)


def _connect(host: str, port: int, is_master: bool) -> dist.TCPStore:
    timeout = datetime.timedelta(seconds=CONNECT_TIMEOUT_S)
    return dist.TCPStore(host, port, None, is_master, timeout, wait_for_workers=False)


def _address(members: Sequence[Member]) -> str:
    """Where all ranks reach rank 0."""
    # Launchers put rank 0 on this node: the ranks have just met there.
    if address := os.environ.get("MASTER_ADDR"):
        return address
    if len({member.host for member in members}) == 1:
        return "127.0.0.1"
    return socket.gethostname()
