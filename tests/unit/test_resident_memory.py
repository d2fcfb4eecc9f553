"""The memory counter sees what a function holds, whatever was held and freed before."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cogview.analysis import resident_memory
from megatron_cogview.analysis.resident_memory import peak_bytes

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_memory_counter_sees_what_is_held_and_no_more() -> None:
    """A tensor of 200 MiB, after as much was freed; then two in turn, and two at once."""
    torch.ones(50 << 20)
    one = peak_bytes(lambda: torch.ones(50 << 20).sum(), CPU)
    turn = peak_bytes(lambda: [torch.ones(50 << 20).sum() for _ in range(2)], CPU)
    both = peak_bytes(lambda: torch.ones(50 << 20) + torch.ones(50 << 20)[0], CPU)
    for value in (one, turn):
        assert 195 < value / 2**20 < 230
    assert 390 < both / 2**20 < 640


HOLES = """
import torch
from megatron_cogview.analysis.resident_memory import peak_bytes
# Small holes first, or what is meant to lie behind a tensor would find room elsewhere.
filled = [bytearray(100_000) for _ in range(1000)]
below = [bytearray(100_000) for _ in range(3000)]
above = bytearray(100_000)
del below

def in_turn(megabytes):
    behind = []
    for _ in range(2):
        tensor = torch.ones(megabytes << 18)
        behind.append(bytearray(90_000))
        del tensor

for megabytes in (200, 20):
    print(peak_bytes(lambda: in_turn(megabytes), torch.device("cpu")) / 2**20)
"""


def test_holes_in_the_parent_s_heap_do_not_count() -> None:
    """Two tensors in turn, of which the first would fit into a hole and the second no more."""
    done = subprocess.run(
        [sys.executable, "-c", HOLES], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    large, small = (float(line) for line in done.stdout.split())
    assert 195 < large < 215
    assert 19 < small < 35


def test_a_run_that_fails_gives_an_error_instead_of_a_number() -> None:
    with pytest.raises(RuntimeError, match="died"):
        peak_bytes(lambda: torch.ones(2) + torch.ones(3), CPU)


def test_a_cpu_is_measured_as_such_on_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own memory, not that of the idle GPU beside it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    assert 195 < peak_bytes(lambda: torch.ones(50 << 20).sum(), CPU) / 2**20 < 230


def test_without_clear_refs_there_is_an_error_instead_of_a_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resident_memory, "_STATUS", Path("/proc/self/absent"))
    with pytest.raises(RuntimeError, match="died"):
        peak_bytes(lambda: None, CPU)
