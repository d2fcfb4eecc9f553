"""Speed, MFU and remaining time, on a clock that the tests turn."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_cogview.configs.devices import peak_flops
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.presets import base_4b, tiny
from megatron_cogview.training import throughput
from megatron_cogview.training.throughput import HALF_LIFE, MEASURED, Throughput, device_peak


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def timed(config, total=100, start=0, world_size=1):
    clock = Clock()
    groups = SimpleNamespace(device=torch.device("cpu"), world_size=world_size)
    return Throughput(config, groups, total, start, clock), clock


def test_rates_of_a_lap_and_what_is_no_step():
    config = tiny()
    speed, clock = timed(config, start=10)
    tokens = config.training.global_batch_size * config.sequence.model_length
    clock.now += 3.0
    with speed.pause():
        clock.now += 1000.0
    clock.now += 1.0
    figures = speed.lap(12)
    assert figures["seconds_per_step"] == pytest.approx(2.0)
    assert figures["tokens_per_second"] == pytest.approx(tokens / 2.0)
    assert figures["eta_seconds"] == pytest.approx(88 * 2.0)
    assert 0 < figures["memory_gib"] < 100
    assert "mfu" not in figures, "nobody knows what a CPU could do"
    assert figures.keys() <= MEASURED
    speed.leave_out()
    clock.now += 6.0
    assert speed.lap(16)["tokens_per_second"] == pytest.approx(tokens / 2.0)


def test_a_pause_that_fails_is_no_step_either():
    speed, clock = timed(tiny())
    with pytest.raises(OSError), speed.pause():
        clock.now += 50.0
        raise OSError
    clock.now += 1.0
    assert speed.lap(1)["seconds_per_step"] == pytest.approx(1.0)


def test_no_step_no_rate():
    speed, clock = timed(tiny())
    clock.now += 1.0
    assert set(speed.lap(0)) == {"memory_gib"}
    speed.leave_out()
    assert set(speed.lap(1)) == {"memory_gib"}


def test_the_remaining_time_forgets_the_warm_up_and_then_old_steps():
    speed, clock = timed(tiny(), total=1000)
    clock.now += 60.0
    assert speed.lap(1)["eta_seconds"] == pytest.approx(999 * 60.0)
    clock.now += 10 * 1.0
    assert speed.lap(11)["eta_seconds"] == pytest.approx(989 * 1.0, rel=1e-3)
    for done in range(12, 12 + HALF_LIFE):
        clock.now += 3.0
        figures = speed.lap(done)
    # Of 1 s and 3 s, the steps of the last half-life weigh more than those before.
    assert 2.0 < figures["eta_seconds"] / (1000 - 11 - HALF_LIFE) < 3.0
    clock.now += 100 * HALF_LIFE
    speed, clock = timed(tiny(), total=5)
    clock.now += 1.0
    assert speed.lap(5)["eta_seconds"] == 0.0


def test_mfu_is_the_strict_one(monkeypatch):
    """25.4 thousand tokens a second of the 4B model on an H200 are 62 to 63 % of 989 TFLOP/s."""
    config = replace(base_4b(), precision=PrecisionConfig(dtype="bf16"))
    monkeypatch.setattr(throughput, "device_peak", lambda *_: peak_flops("NVIDIA H200", "bf16"))
    speed, clock = timed(config, world_size=4)
    tokens = config.training.global_batch_size * config.sequence.model_length
    clock.now += tokens / (4 * 25_400.0)
    figures = speed.lap(1)
    assert figures["tokens_per_second"] == pytest.approx(4 * 25_400.0)
    assert figures["mfu"] == pytest.approx(0.624, abs=0.005)
    # Recomputation is work that the model does not need.
    config = replace(config, parallel=replace(config.parallel, recompute="full"))
    again, clock = timed(config, world_size=4)
    clock.now += tokens / (4 * 25_400.0)
    assert again.lap(1)["mfu"] == figures["mfu"]


def test_a_device_that_is_not_known_has_no_peak():
    for name in (
        "NVIDIA A10G",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H200 NVL",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA GeForce RTX 4090",
        "",
    ):
        assert peak_flops(name, "bf16") is None, name


@pytest.mark.parametrize(
    ("name", "bf16", "fp16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 989e12),
        ("NVIDIA H100 PCIe", 756e12, 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 312e12),
        ("A100-SXM4-40GB", 312e12, 312e12),
        ("NVIDIA L40S", 362e12, 362e12),
        ("NVIDIA L40", 181e12, 181e12),
        ("NVIDIA B200", 2250e12, 2250e12),
        ("Tesla V100-SXM2-32GB", None, 125e12),
    ],
)
def test_peaks_by_the_driver_s_name(name, bf16, fp16):
    assert peak_flops(name, "bf16") == bf16
    assert peak_flops(name, "fp16") == fp16


def test_the_peak_is_that_of_the_run_s_format(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla V100-SXM2-16GB")
    gpu = torch.device("cuda", 0)
    peaks = {
        dtype: device_peak(replace(tiny(), precision=PrecisionConfig(dtype=dtype)), gpu)
        for dtype in ("fp32", "bf16", "fp16")
    }
    assert peaks == {"fp32": None, "bf16": None, "fp16": 125e12}
    half = replace(tiny(), precision=PrecisionConfig(dtype="fp16"))
    assert device_peak(half, torch.device("cpu")) is None
