"""Numbers and events: on the console, in files, and on disks that refuse them.

What a resumed log keeps is in ``test_schedule_and_metrics.py``.
"""

import errno
import io
import json
import logging
import os
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_cogview.training import line_file, metrics
from megatron_cogview.training.metrics import MetricsLog, read_metrics

INFINITY = float("inf")


class Terminal(io.StringIO):
    """Stands for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def console(monkeypatch):
    """Sends log lines to a stream of the test's choice, which is standard error as well."""
    root, level = logging.getLogger(), logging.getLogger().level
    handlers = []

    def use(stream):
        monkeypatch.setattr("sys.stderr", stream)
        handlers.append(logging.StreamHandler(stream))
        root.addHandler(handlers[-1])
        root.setLevel(logging.INFO)
        return stream

    yield use
    for handler in handlers:
        root.removeHandler(handler)
    root.setLevel(level)


def scalars(folder, name):
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def events(folder):
    rows, damaged = line_file.read(folder / "events.jsonl")
    assert not damaged
    return [(row["step"], row["kind"], row["message"]) for row in rows]


def test_a_log_file_gets_one_line_for_each_row_and_no_bar(tmp_path, console):
    text = console(io.StringIO())
    with MetricsLog(tmp_path, 0, 20, enabled=True) as log:
        for step in range(1, 21):
            log.advance()
            if step % 10 == 0:
                log.write(step, {"loss": step / 10, "lr": 0.1})
        log.write(20, {})
    assert text.getvalue() == (
        "step 10/20  loss 1.000  lr 1.0e-01\nstep 20/20  loss 2.000  lr 1.0e-01\n"
    )


def test_on_a_terminal_lines_stand_above_the_bar(tmp_path, console):
    text = console(Terminal())
    with MetricsLog(tmp_path, 0, 2, enabled=True, what="pretrain") as log:
        logging.getLogger("elsewhere").warning("a word from elsewhere")
        log.advance()
        log.write(1, {"loss": 1.0})
        log.rewind(0)
    logging.getLogger("elsewhere").info("later")
    lines = text.getvalue().split("\n")
    assert "pretrain: " in text.getvalue() and "1/2" in text.getvalue()
    # The bar is wiped before each line, and drawn again after it.
    for line in ("a word from elsewhere", "step 1/2  loss 1.000", "later"):
        assert line in [each.rpartition("\r")[2] for each in lines]


def test_the_console_shows_what_is_asked_for_and_files_hold_everything(tmp_path, console):
    text = console(io.StringIO())
    with MetricsLog(tmp_path, 0, 2, enabled=True, shown=("psnr", "lr")) as log:
        log.write(1, {"loss": 1.0, "lr": 0.5, "psnr": 30.0, "layer/1": 3.0})
        log.write(2, {"loss": 2.0, "layer/1": INFINITY})
    assert text.getvalue() == "step 1/2  lr 5.0e-01  psnr 30\n"
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0]
    # JSON has no infinity either.
    assert json.loads((tmp_path / "metrics.jsonl").read_text().split("\n")[1])["layer/1"] is None
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0)]
    assert scalars(tmp_path, "layer/1") == [(1, 3.0), (2, INFINITY)]


def test_events_are_told_and_kept_for_good(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with MetricsLog(tmp_path, 0, 9, enabled=True) as log:
        log.event(5, "saved", "checkpoint of step 5")
        log.event(7, "rollback", "back to step 5: «NaN»")
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "st')  # cut off by a kill
    with MetricsLog(tmp_path, 5, 9, enabled=True) as log:
        log.event(8, "straggler", "rank 3")
    rows, damaged = line_file.read(tmp_path / "events.jsonl")
    assert [(row["step"], row["kind"]) for row in rows] == [
        (5, "saved"),
        (7, "rollback"),
        (8, "straggler"),
    ]
    assert damaged == 1
    assert rows[1]["message"] == "back to step 5: «NaN»"
    assert rows[0].keys() == {"time", "step", "kind", "message"}
    levels = [record.levelno for record in caplog.records if "step" in record.getMessage()]
    assert levels == [logging.INFO, logging.WARNING, logging.WARNING]
    assert "step 7: rollback: back to step 5" in caplog.text


def test_other_ranks_tell_nothing(tmp_path, caplog):
    with MetricsLog(tmp_path / "run", 0, 2, enabled=False) as log:
        log.event(1, "straggler", "rank 3")
        log.rewind(0)
    assert not (tmp_path / "run").exists()
    assert not caplog.records


def test_a_rollback_puts_rows_aside(tmp_path):
    with MetricsLog(tmp_path, 0, 6, enabled=True) as log:
        log.rewind(0)
        for step in range(1, 6):
            log.write(step, {"loss": float(step)})
        log.rewind(2)
        log.write(3, {"loss": 30.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    aside = read_metrics(tmp_path / "metrics_rolled_back.jsonl")
    assert [row["step"] for row in aside] == [3, 4, 5]
    assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert log.failures == 0


def test_a_rollback_on_a_full_disk_leaves_one_account_of_each_step(tmp_path, monkeypatch):
    def refuse(descriptor, data):
        raise OSError(errno.ENOSPC, "no space")

    with MetricsLog(tmp_path, 0, 6, enabled=True) as log:
        for step in range(1, 6):
            log.write(step, {"loss": float(step)})
        with monkeypatch.context() as patch:
            patch.setattr(line_file.os, "write", refuse)
            log.rewind(2)
        log.write(3, {"loss": 30.0})
        assert log.failures
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["loss"] for row in rows] == [1.0, 2.0, 30.0]


def test_a_row_that_does_not_fit_leaves_no_trace(tmp_path, monkeypatch, caplog):
    """A disk that fills within a row, or refuses it whole; later there is room again."""
    path, whole, full = tmp_path / "metrics.jsonl", os.write, [0]

    def write(descriptor, data):
        if not full[0]:
            return whole(descriptor, data)
        whole(descriptor, data[: full[0]])
        if full[0] == 5:
            raise OSError(errno.ENOSPC, "no space")
        return full[0]

    monkeypatch.setattr(line_file.os, "write", write)
    with MetricsLog(tmp_path, 0, 6, enabled=True) as log:
        log.write(1, {"loss": 1.0})
        before = path.read_bytes()
        for full[0] in (5, 9):
            log.write(2, {"loss": 2.0})
            log.event(2, "spike", "loss 2")
            assert path.read_bytes() == before
        full[0] = 0
        log.write(3, {"loss": 3.0})
        log.event(3, "saved", "checkpoint of step 3")
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    assert events(tmp_path) == [(3, "saved", "checkpoint of step 3")]
    assert log.failures == 4
    assert caplog.text.count("metrics.jsonl cannot be written") == 1
    assert caplog.text.count("events.jsonl cannot be written") == 1
    assert "4 writes of metrics were refused" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_board_that_is_taken_away_comes_back(tmp_path, caplog):
    with MetricsLog(tmp_path, 0, 9, enabled=True) as log:
        log.write(1, {"loss": 1.0})
        shutil.rmtree(tmp_path / "tensorboard")
        for step in range(2, 9):
            log.write(step, {"loss": float(step)})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [*range(1, 9)]
    assert log.failures > 0
    assert caplog.text.count("TensorBoard cannot be written") == 1
    assert scalars(tmp_path, "loss")[-1] == (8, 8.0)


def test_a_board_that_stays_away_is_tried_ever_less(tmp_path, monkeypatch):
    tries = []

    class Broken:
        def __init__(self, *_, **__):
            tries.append(1)
            if len(tries) > 1:
                raise OSError(errno.ENOSPC, "no space")

        def add_scalar(self, *_):
            raise OSError(errno.ENOSPC, "no space")

        def close(self):
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(metrics, "SummaryWriter", Broken)
    with MetricsLog(tmp_path, 0, 1000, enabled=True) as log:
        for step in range(1, 101):
            log.write(step, {"loss": 1.0})
    # Rows 2, 4, 8, ... of a disk that stays full.
    assert len(tries) == 1 + 6
    assert log.failures == 7
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 100


def test_a_damaged_line_does_not_keep_a_run_from_starting(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"ste\n[3]\n{"step": 2}\n')
    with MetricsLog(tmp_path, 2, 3, enabled=True):
        pass
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert "2 damaged lines" in caplog.text


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(OSError):
        MetricsLog(tmp_path / "run", 0, 3, enabled=True)
