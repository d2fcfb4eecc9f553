"""The watchdog, on ranks that are stopped, stuck, slow or simply done."""

import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_cogview.testing.train_faults.world import World
from megatron_cogview.training.watchdog import HANG_EXIT_CODE, Watchdog
from tests.parallel import watchdog_cases as cases
from tests.parallel.watchdog_cases import TIMEOUT_S, train

# Found within twice the timeout; the rest is for starting processes on a busy machine.
FOUND_S = 2 * TIMEOUT_S
MARGIN_S = 10.0


def said(folder: Path) -> str:
    return (folder / "log.txt").read_text(errors="replace")


def stacks(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "hang").glob("*"))}


def accused(folder: Path, size: int) -> list[int]:
    """Ranks that the messages name."""
    lines = [line for line in said(folder).splitlines() if line.startswith("hang: ")]
    return [rank for rank in range(size) if any(f"rank {rank} (" in line for line in lines)]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named_and_the_others_end(tmp_path: Path, victim: int) -> None:
    others = [rank for rank in range(3) if rank != victim]
    with World(3, train(tmp_path, 3, cases.nothing), tmp_path / "log.txt") as world:
        ready = [tmp_path / f"ready-{rank}" for rank in range(3)]
        assert world.wait(20.0, lambda: all(path.exists() for path in ready)), said(tmp_path)
        world.signal(signal.SIGSTOP, victim)
        begin = time.monotonic()
        assert world.wait(
            FOUND_S + MARGIN_S, lambda: None not in [world.codes()[rank] for rank in others]
        )
        seconds = time.monotonic() - begin
        assert [world.codes()[rank] for rank in others] == [HANG_EXIT_CODE] * 2, said(tmp_path)
        assert TIMEOUT_S / 2 < seconds <= FOUND_S
        world.signal(signal.SIGCONT, victim)
        assert world.wait(FOUND_S + MARGIN_S), "the one that was stopped goes on"
        assert world.codes()[victim] not in (0, None)
    assert accused(tmp_path, 3) == [victim], said(tmp_path)
    assert "has not answered for at least" in said(tmp_path)
    for rank in others:
        text = stacks(tmp_path)[f"rank_{rank:05d}.txt"]
        assert f"rank {victim} (" in text
        assert "all_reduce" in text, "the main thread's stack"


def test_a_rank_stuck_in_python_is_named_with_its_place(tmp_path: Path) -> None:
    with World(3, train(tmp_path, 3, cases.spin), tmp_path / "log.txt") as world:
        assert world.wait(FOUND_S + MARGIN_S), said(tmp_path)
        assert world.codes() == [HANG_EXIT_CODE] * 3, said(tmp_path)
    assert accused(tmp_path, 3) == [2]
    assert "has been in step 5, data" in said(tmp_path)
    assert "spin (watchdog_cases.py" in said(tmp_path)
    assert "in spin" in stacks(tmp_path)["rank_00002.txt"], "its own dump"
    assert len(stacks(tmp_path)) == 3


def test_a_rank_that_holds_the_interpreter_is_named(tmp_path: Path) -> None:
    with World(3, train(tmp_path, 3, cases.hold_gil), tmp_path / "log.txt") as world:
        assert world.wait(
            FOUND_S + MARGIN_S,
            lambda: world.codes()[0] is not None and world.codes()[2] is not None,
        )
        assert world.codes() == [HANG_EXIT_CODE, None, HANG_EXIT_CODE], said(tmp_path)
    assert accused(tmp_path, 3) == [1]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (cases.broadcast_alone, "the others wait for it"),
        (cases.wait_for_a_message, "collectives may not match"),
    ],
)
def test_a_rank_whose_collectives_do_not_match_is_named(
    tmp_path: Path, fault: cases.Fault, why: str
) -> None:
    with World(3, train(tmp_path, 3, fault, steps=8), tmp_path / "log.txt") as world:
        assert world.wait(FOUND_S + MARGIN_S), said(tmp_path)
        assert world.codes() == [HANG_EXIT_CODE] * 3, said(tmp_path)
    assert accused(tmp_path, 3) == [1], said(tmp_path)
    assert why in said(tmp_path)


def test_a_process_alone_ends_too(tmp_path: Path) -> None:
    with World(1, train(tmp_path, 1, cases.sleep_alone), tmp_path / "log.txt") as world:
        assert world.wait(FOUND_S + MARGIN_S), said(tmp_path)
        assert world.codes() == [HANG_EXIT_CODE], said(tmp_path)
    assert "sleep_alone" in said(tmp_path)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_ranks_that_end_at_different_times_raise_no_alarm(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    with World(3, cases.leaving(order)(tmp_path), tmp_path / "log.txt") as world:
        assert world.wait(FOUND_S + MARGIN_S), said(tmp_path)
        assert world.codes() == [0, 0, 0], said(tmp_path)
    assert "hang" not in said(tmp_path)
    assert not stacks(tmp_path)


def test_what_may_take_long_raises_no_alarm(tmp_path: Path) -> None:
    with World(2, train(tmp_path, 2, cases.patience, steps=8), tmp_path / "log.txt") as world:
        assert world.wait(FOUND_S + MARGIN_S), said(tmp_path)
        assert world.codes() == [0, 0], said(tmp_path)
    assert "hang" not in said(tmp_path)


def test_an_error_ends_the_ranks_as_it_would_without_a_watchdog(tmp_path: Path) -> None:
    with World(2, train(tmp_path, 2, cases.fail), tmp_path / "log.txt") as world:
        assert world.wait(MARGIN_S), said(tmp_path)
        assert not {0, HANG_EXIT_CODE, None} & set(world.codes()), said(tmp_path)
    assert "a bad record" in said(tmp_path)
    assert "hang: " not in said(tmp_path)


def test_switched_off_it_needs_nobody(tmp_path: Path) -> None:
    place: Any = SimpleNamespace(rank=0)
    before = threading.active_count()
    with Watchdog(place, 0.0, tmp_path) as watchdog:
        watchdog.beat(1, "data")
        with watchdog.allow(9.0):
            assert threading.active_count() == before
