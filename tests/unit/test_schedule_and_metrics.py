"""Learning-rate schedule and the metrics log."""

import itertools
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.training.metrics import MetricsLog, read_metrics
from megatron_cogview.training.schedule import learning_rate


def test_warm_up_then_cosine_to_the_floor():
    config = OptimizerConfig(lr=2.0, warmup_fraction=0.1, min_lr_ratio=0.25)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] == 2.0
    assert rates[-1] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    half = 10 + 45 - 1
    assert rates[half] == pytest.approx(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert learning_rate(config, 500, 100) == pytest.approx(0.5)


def test_no_warm_up_and_a_single_step():
    config = OptimizerConfig(lr=1.0, warmup_fraction=0.0, min_lr_ratio=0.0)
    assert learning_rate(config, 0, 1000) == pytest.approx(1.0, abs=1e-4)
    assert learning_rate(config, 0, 1) == 0.0


def test_a_resumed_log_drops_what_will_be_repeated(tmp_path):
    with MetricsLog(tmp_path, 0, 6, enabled=True) as log:
        for step in range(1, 6):
            log.write(step, {"loss": float(step), "empty": float("nan")})
            log.advance()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut off by a kill
    with MetricsLog(tmp_path, 3, 6, enabled=True) as log:
        log.write(4, {"loss": 40.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1] == {"step": 4, "loss": 40.0}
    assert rows[0] == {"step": 1, "loss": 1.0, "empty": None}
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")][-1] == (4, 40.0)


def test_other_ranks_write_nothing(tmp_path):
    with MetricsLog(tmp_path / "run", 0, 2, enabled=False) as log:
        log.write(1, {"loss": 1.0})
        log.advance()
    assert not (tmp_path / "run").exists()
