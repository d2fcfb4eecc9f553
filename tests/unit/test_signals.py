"""training.signals: a signal asks and breaks nothing; exit codes and the word to Slurm."""

import logging
import os
import signal
import stat
import threading
from pathlib import Path

import pytest

from megatron_cogview.training.signals import (
    REQUEUE_EXIT_CODE,
    STOP_SIGNALS,
    StopRequest,
    requeue,
    stopped,
)


def test_these_signals_ask_a_run_to_stop() -> None:
    assert set(STOP_SIGNALS) == {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def scontrol(tmp_path: Path) -> dict[str, str]:
    """An environment of Slurm's whose scontrol writes down what it is told."""
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"SLURM_JOB_ID": "4711", "PATH": str(tmp_path)}


def told(tmp_path: Path) -> str:
    path = tmp_path / "told"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_the_former_handlers_come_back(number: signal.Signals) -> None:
    former = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    with StopRequest() as stop:
        assert not stop.requested and stop.signal_name is None
        send(number)
        assert stop.requested and stop.signal_name == number.name
    assert stop.requested
    assert {each: signal.getsignal(each) for each in former} == former


def test_signals_that_come_again_change_nothing_and_are_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with StopRequest() as stop:
        send(signal.SIGUSR1)
        assert [stop.requested for _ in range(3)] == [True] * 3
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.requested and stop.signal_name == "SIGUSR1"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "SIGUSR1" in caplog.text


def test_the_second_interrupt_is_one() -> None:
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert stop.signal_name == "SIGTERM"
        send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former


def test_a_read_that_is_under_way_goes_on() -> None:
    readable, writable = os.pipe()
    sender = threading.Timer(0.05, lambda: (send(signal.SIGTERM), os.write(writable, b"x")))
    with StopRequest() as stop:
        sender.start()
        assert os.read(readable, 1) == b"x"
        sender.join()
        assert stop.requested
    os.close(readable)
    os.close(writable)


def test_a_forked_writer_lives_on() -> None:
    with StopRequest():
        child = os.fork()
        if not child:
            send(signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_outside_the_main_thread_nothing_is_installed(caplog: pytest.LogCaptureFixture) -> None:
    former = signal.getsignal(signal.SIGTERM)
    found = []

    def run() -> None:
        with StopRequest() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10.0)
    assert found == [(False, former)]
    assert "main thread" in caplog.text


def request(number: signal.Signals | None) -> StopRequest:
    with StopRequest() as stop:
        if number is not None:
            send(number)
    return stop


def test_the_main_process_queues_a_job_again_that_meets_its_time_limit(
    scontrol: dict[str, str], tmp_path: Path
) -> None:
    asked = request(signal.SIGUSR1)
    assert stopped(asked, False, scontrol) == REQUEUE_EXIT_CODE
    assert told(tmp_path) == ""
    assert stopped(asked, True, scontrol) == REQUEUE_EXIT_CODE
    assert told(tmp_path) == "requeue 4711\n"


def test_a_time_limit_that_another_rank_heard_of_counts(
    scontrol: dict[str, str], tmp_path: Path
) -> None:
    mine = request(None)
    assert (mine.urgency, request(signal.SIGTERM).urgency) == (0.0, 1.0)
    assert request(signal.SIGUSR1).urgency == 2.0
    mine.agreed(1.0)
    assert not mine.is_time_limit
    mine.agreed(2.0)
    stopped(mine, True, scontrol)
    assert told(tmp_path) == "requeue 4711\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, None])
def test_other_ends_are_not_queued_again(
    scontrol: dict[str, str], tmp_path: Path, number: signal.Signals | None
) -> None:
    assert stopped(request(number), True, scontrol) == REQUEUE_EXIT_CODE
    assert told(tmp_path) == ""


def test_torchrun_gets_the_code_that_does_not_make_it_start_again() -> None:
    assert stopped(request(signal.SIGTERM), True, {"TORCHELASTIC_RUN_ID": "none"}) == 0


def test_a_requeue_that_fails_is_told_and_no_error(
    scontrol: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    requeue({})
    assert not caplog.records
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho Access denied >&2\nexit 1\n")
    requeue(scontrol)
    assert "Access denied" in caplog.text
    requeue({**scontrol, "PATH": str(tmp_path / "nowhere")})
    assert "no scontrol" in caplog.text
    (tmp_path / "scontrol").write_text("no program\x00")
    requeue(scontrol)
    assert all(record.levelno == logging.ERROR for record in caplog.records)
