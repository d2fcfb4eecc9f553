"""Measured sizes: the search finds the fastest, keeps it, and kernels are started with it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cogview.analysis import kernel_tuning
from megatron_cogview.analysis.kernel_tuning import Settings, Shapes, table, tune
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.kernels import tuning
from megatron_cogview.kernels.pivot_attention import launch, triton, triton_backward
from tests.kernels.pivot_attention_cases import DEVICE, Case, assert_right

MICRO = Shapes(
    hidden_sizes=(40,), rows=5, length=48, heads=1, head_dim=16, batch=1, codes=20, code_dims=(8,)
)
FORWARD = "pivot_attention.forward.D16"
FAST, SLOW, REFUSED = (32, 16, 1, 1), (16, 32, 1, 1), (24, 16, 1, 1)
"""Triton has no tiles of 24."""


@pytest.fixture(autouse=True)
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Short lists, and no file unless a test names one."""
    lists = dict.fromkeys(launch.CANDIDATES, (SLOW, FAST, REFUSED))
    monkeypatch.setattr(kernel_tuning, "CANDIDATES", lists)
    monkeypatch.setattr(kernel_tuning, "ROW_WARPS", ((1,), (2,)))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuning.measured_sizes.cache_clear()
    yield
    tuning.measured_sizes.cache_clear()


def by_size(calls: dict[str, Any]) -> dict[str, float]:
    """A clock for which one candidate is fast."""
    return {text: 1.0 if text == "32 16 1 1" else 2.0 for text in calls}


def never(calls: dict[str, Any]) -> dict[str, float]:
    raise AssertionError("measured again")


def use(path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Name a file of sizes, as a user's environment does."""
    content = {**tuning.made_for(), "sizes": {}, **changes}
    path.write_text(json.dumps(content))
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    tuning.measured_sizes.cache_clear()


def test_the_fastest_is_kept_and_what_cannot_run_is_out(tmp_path: Path) -> None:
    path, only = tmp_path / "sizes.json", Settings(only="pivot_attention.f")
    content = tune(path, only, DEVICE, MICRO, by_size)
    kinds = ("", ".dropout", ".dense", ".dense.dropout")
    assert content["sizes"] == {f"{FORWARD}{kind}": list(FAST) for kind in kinds}
    assert content["measured"][FORWARD]["16 32 1 1"] == 2.0
    assert isinstance(content["measured"][FORWARD]["24 16 1 1"], str)
    assert json.loads(path.read_text()) == content
    assert f"| {FORWARD} | " in table(content)
    assert tune(path, only, DEVICE, MICRO, never) == content


def test_what_gives_other_numbers_is_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton.forward

    def wrong(q, k, v, plan, padding, settings):
        out, lse = right(q, k, v, plan, padding, settings)
        tiles = launch.launch("forward", q, settings.dropout > 0, padding is not None, False)
        return (out * 1.1 if tiles == FAST else out), lse

    monkeypatch.setattr(triton, "forward", wrong)
    only = Settings(only=f"{FORWARD}.dropout")
    content = tune(tmp_path / "sizes.json", only, DEVICE, MICRO, by_size)
    assert "differs" in content["measured"][f"{FORWARD}.dropout"]["32 16 1 1"]
    assert content["sizes"] == {}


def test_a_gain_within_the_noise_changes_nothing(tmp_path: Path) -> None:
    def nearly(calls: dict[str, Any]) -> dict[str, float]:
        return {text: 0.99 if text == "32 16 1 1" else 1.0 for text in calls}

    only = Settings(only="pivot_attention.decoding")
    assert tune(tmp_path / "sizes.json", only, DEVICE, MICRO, nearly)["sizes"] == {}


def test_every_kernel_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the time limit is kept: after it no kernel is begun."""
    path = tmp_path / "sizes.json"
    begun = tune(path, Settings(budget_seconds=1e-9), DEVICE, MICRO, by_size)
    assert begun["measured"] == {}
    monkeypatch.setattr(kernel_tuning, "_problem", lambda run, expected: None)
    measured = tune(path, Settings(), DEVICE, MICRO, by_size)["measured"]
    directions = ("forward", "query_gradient", "slot_gradient", "key_gradient")
    kinds = ("", ".dropout", ".dense", ".dense.dropout")
    attention = {f"pivot_attention.{d}.D16{kind}" for d in directions for kind in kinds}
    attention -= {f"pivot_attention.slot_gradient.D16.dense{x}" for x in ("", ".dropout")}
    rows = {
        f"{name}.{d}.N40"
        for name in ("sandwich_junction", "scaled_layer_norm")
        for d in ("forward", "backward")
    }
    decoding = {f"pivot_attention.decoding.D16{kind}" for kind in ("", ".dense")}
    others = {*decoding, "codebook_lookup.D8"}
    assert set(measured) == attention | rows | others


def test_kernels_start_with_measured_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And stay right with them."""
    directions = ("forward", "query_gradient", "slot_gradient", "key_gradient")
    sizes = {f"pivot_attention.{d}.D40": [32, 16, 1, 1] for d in directions}
    use(tmp_path / "sizes.json", monkeypatch, sizes=sizes)
    started = []

    def counted(direction, *rest):
        started.append((direction, launch.launch(direction, *rest)))
        return started[-1][1]

    monkeypatch.setattr(triton, "launch", counted)
    monkeypatch.setattr(triton_backward, "launch", counted)
    assert_right(Case())
    assert json.loads(tuning.sizes_in_use()) == sizes
    assert {direction for direction, _ in started} == set(directions)
    if DEVICE.type == "cpu":  # elsewhere fp32 has sizes of its own
        assert {sizes for _, sizes in started} == {FAST}


def test_sizes_of_another_gpu_are_not_used_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(tmp_path / "sizes.json", monkeypatch, gpu="Another GPU", sizes={FORWARD: [32, 16, 1, 1]})
    assert tuning.tuned(FORWARD, (16, 16, 1, 1)) == (16, 16, 1, 1)
    assert "Another GPU" in caplog.text
    assert tuning.sizes_in_use() == "fixed"
    with pytest.raises(ConfigError, match="Another GPU"):
        tune(tmp_path / "sizes.json", Settings(), DEVICE, MICRO, never)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("{}", 'no table "sizes"'),
        ('{"sizes": {}}', '"gpu"'),
        ('{"sizes": {"a": [0]}, "gpu": "x", "triton": "y"}', "a = .0."),
        ('{"sizes": {"a": [true]}, "gpu": "x", "triton": "y"}', "a = .True."),
    ],
)
def test_a_wrong_file_is_refused(
    content: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sizes.json"
    path.write_text(content)
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    with pytest.raises(ConfigError, match=said):
        tuning.tuned("a", (1,))


def test_a_file_for_other_kernels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(tmp_path / "sizes.json", monkeypatch, sizes={FORWARD: [32, 16]})
    with pytest.raises(ConfigError, match="expected 4 numbers"):
        tuning.tuned(FORWARD, (16, 16, 1, 1))


def test_sizes_named_in_the_environment_do_not_reach_the_tuner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the file is the one that is about to be written."""
    path = tmp_path / "sizes.json"
    monkeypatch.setenv(tuning.VARIABLE, str(path))
    only = Settings(only="pivot_attention.query_gradient.D16")
    assert "pivot_attention.query_gradient.D16" in tune(path, only, DEVICE, MICRO, by_size)["sizes"]


def test_without_triton_there_is_nothing_to_tune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="tuning measures"):
        tune(tmp_path / "sizes.json", Settings(), torch.device("cpu"), MICRO, never)
