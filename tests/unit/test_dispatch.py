"""kernels.dispatch: what is chosen, said once, and refused."""

import importlib.util
import logging

import pytest
import torch

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.kernels import dispatch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._choose.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_cpu_takes_the_reference_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert {dispatch.choose("op", "auto", CPU) for _ in range(3)} == {"reference"}
    assert dispatch.choose("op", "reference", CPU) == "reference"
    messages = [record.message for record in caplog.records]
    assert messages[0].startswith("op: reference (a cpu device has no Triton")
    assert messages[1:] == ["op: reference (as asked for)"]


def test_triton_by_name_is_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"op: triton was asked for, and a cpu device has no"):
        dispatch.choose("op", "triton", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="the package triton is not installed"):
        dispatch.choose("op", "triton", CPU)


def test_the_interpreter_is_taken_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.choose("op", "triton", CPU) == "triton"
    assert dispatch.choose("op", "auto", CPU) == "reference"


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "reference"), ((9, 0), "triton")])
def test_a_gpu_takes_triton_if_it_is_new_enough(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch.choose("op", "auto", torch.device("cuda", 0)) == chosen
