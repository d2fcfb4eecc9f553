"""training.late_ranks: who is named, for heartbeats of every kind of hang."""

from dataclasses import dataclass, field

from megatron_cogview.training.late_ranks import Heartbeat, Member, Seen, Verdict, judge

SILENT_AFTER_S = 4.0


@dataclass
class World:
    """Heartbeats of ranks that all wait in the same place, two to a tensor group."""

    size: int
    seen: dict[int, Seen] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = [(0, rank - rank % 2, rank % 2) for rank in range(self.size)]
        self.members = [Member(r, f"node{r}", 100 + r, 0, groups[r]) for r in range(self.size)]
        beat = Heartbeat(
            number=50,
            state="running",
            progress=(0, 7, 2),
            phase="forward",
            idle=11.0,
            limit=10.0,
            collectives=(5, 90, 12),
            place="all_reduce (engine.py:1)",
        )
        self.seen = {rank: Seen(beat, 0.5) for rank in range(self.size)}

    def put(self, rank: int, silence: float = 0.5, **changes: object) -> "World":
        beat = self.seen[rank].heartbeat._replace(**changes)  # type: ignore[arg-type]
        self.seen[rank] = Seen(beat, silence)
        return self

    def judge(self, me: int = 0) -> Verdict | None:
        return judge(me, self.members, self.seen, SILENT_AFTER_S)

    def late(self, me: int = 0) -> tuple[int, ...] | None:
        verdict = self.judge(me)
        return verdict and verdict.late


def test_a_silent_rank_is_late_even_if_others_are_behind() -> None:
    world = World(4).put(2, silence=8.0).put(3, collectives=(4, 89, 12))
    verdict = world.judge()
    assert verdict is not None and verdict.late == (2,)
    assert verdict.message == (
        "rank 2 (node2, pid 102) has not answered for at least 8.0 s; it was last seen in step 7, "
        "forward; the others wait for it"
    )


def test_a_short_silence_means_nothing() -> None:
    assert World(2).put(1, silence=3.9, progress=(0, 7, 1)).late() == (1,)
    assert World(2).put(1, silence=3.9).late() == (0, 1)


def test_a_rank_that_failed_is_late() -> None:
    verdict = World(3).put(1, state="ValueError: no", silence=30.0).judge()
    assert verdict is not None and verdict.late == (1,)
    assert "rank 1 (node1, pid 101) ended with ValueError: no" in verdict.message


def test_the_rank_with_the_least_progress_is_late() -> None:
    world = World(4).put(1, progress=(0, 7, 1), phase="data", place="read (file.py:3)")
    verdict = world.judge()
    assert verdict is not None and verdict.late == (1,)
    assert verdict.message == (
        "rank 1 (node1, pid 101) has been in step 7, data, for 11.0 s, at read (file.py:3); "
        "the others wait for it, at all_reduce (engine.py:1)"
    )


def test_a_run_that_went_back_is_ahead_of_one_that_did_not() -> None:
    assert World(2).put(0, progress=(1, 3, 0)).late() == (1,)


def test_who_is_kept_waiting_by_another_is_not_late() -> None:
    # Rank 3 is stuck; rank 2 waits for it in their tensor group, the others for both in the world.
    world = World(4).put(3, collectives=(4, 80, 11)).put(2, collectives=(4, 81, 11))
    assert world.late() == (3,)


def test_a_circle_of_waits_names_all_in_it() -> None:
    world = World(4).put(1, collectives=(5, 89, 12)).put(3, collectives=(5, 90, 11))
    world.put(0, collectives=(5, 90, 11)).put(2, collectives=(5, 89, 12))
    verdict = world.judge()
    assert verdict is not None and len(verdict.late) > 1


def test_nobody_is_late_who_may_take_his_time() -> None:
    behind = World(2).put(1, progress=(0, 7, 1))
    assert behind.late() == (1,)
    assert behind.put(1, limit=40.0).late() is None
    assert behind.put(1, limit=10.0, idle=0.1).late() is None
    # Nor when nothing is heard of it while it may: reading a large file can hold the interpreter.
    assert behind.put(1, limit=40.0, silence=20.0).late() is None


def test_who_stands_elsewhere_than_most_is_late_when_all_have_done_the_same() -> None:
    verdict = World(3).put(2, place="broadcast (other.py:9)").judge()
    assert verdict is not None and verdict.late == (2,)
    assert "collectives may not match" in verdict.message


def test_without_a_difference_all_are_named() -> None:
    verdict = World(2).judge()
    assert verdict is not None and verdict.late == (0, 1)
    assert "no rank is behind the others" in verdict.message


def test_stages_of_a_pipeline_stand_in_different_places() -> None:
    world = World(2).put(1, place="recv_forward (p2p.py:5)")
    world.members[1] = world.members[1]._replace(stage=1)
    assert world.late() == (0, 1)


def test_who_is_left_alone_is_named_with_the_number_of_those_that_ended() -> None:
    verdict = World(3).put(0, state="done", silence=99.0).put(1, state="done").judge(2)
    assert verdict is not None and verdict.late == (2,)
    assert "ranks that have ended: 2" in verdict.message


def test_who_ended_too_early_is_late() -> None:
    verdict = World(3).put(1, state="done", collectives=(4, 90, 12), silence=9.0).judge()
    assert verdict is not None and verdict.late == (1,)
    assert "has ended, with fewer collectives" in verdict.message


def test_a_message_names_a_few_of_many() -> None:
    world = World(100)
    for rank in range(20, 100):
        world.put(rank, silence=9.0)
    verdict = world.judge()
    assert verdict is not None and len(verdict.late) == 80
    assert "and 72 more ranks" in verdict.message
    assert len(verdict.message) < 1200


def test_what_is_published_comes_back() -> None:
    beat = World(1).seen[0].heartbeat
    assert Heartbeat.from_json(beat.to_json()) == beat
    verdict = Verdict(late=(1, 2), message="rank 1 …")
    assert Verdict.from_json(verdict.to_json().encode()) == verdict
