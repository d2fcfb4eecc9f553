"""model.kernel_choice: which attention a configuration gets, and how many keys it sees."""

from dataclasses import replace

import pytest
import torch

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.model import AttentionConfig
from megatron_cogview.configs.presets import fashion_3b
from megatron_cogview.kernels.pivot_attention.reference import visible_keys
from megatron_cogview.model.kernel_choice import (
    choose_attention,
    current_device,
    effective_attention,
    host_seed,
)

PAPER = AttentionConfig(kind="pivot", window_block=128, window_blocks=6, num_pivots=768)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("length", "attention"),
    [
        (70, replace(PAPER, window_block=7, window_blocks=3, num_pivots=20)),
        (64, replace(PAPER, window_block=16, window_blocks=1, num_pivots=0)),
        (50, replace(PAPER, window_block=8, window_blocks=2, num_pivots=99)),
    ],
)
def test_mean_keys(length: int, attention: AttentionConfig) -> None:
    """Against masks of many samples."""
    samples = 400
    visible = visible_keys(
        torch.tensor([[sample, 0] for sample in range(samples)]),
        *(length, length, length),
        window_block=attention.window_block,
        window_blocks=attention.window_blocks,
        num_pivots=attention.num_pivots,
        layer_number=1,
        seed=attention.pivot_seed,
    )
    counted = float(visible.sum()) / samples / length
    assert attention.mean_keys(length) == pytest.approx(counted, rel=0.01)
    assert replace(attention, kind="dense").mean_keys(length) == (length + 1) / 2


def test_dense_attention_stands_in_where_three_regions_save_nothing() -> None:
    assert effective_attention(PAPER, 1088).kind == "dense"
    for length in (2560, 4096, 16384):
        assert effective_attention(PAPER, length) == PAPER
    by_name = replace(PAPER, backend="reference")
    assert effective_attention(by_name, 1088) == by_name
    preset = fashion_3b()
    attention = preset.model.attention
    assert effective_attention(attention, preset.sequence.model_length).kind == "pivot"


def test_choices_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def choice(attention: AttentionConfig, dtype: torch.dtype, dropout: float) -> str:
        return choose_attention(attention, dtype, CPU, dropout)

    assert choice(AttentionConfig(), torch.float32, 0.1) == "fused"
    assert choice(AttentionConfig(), torch.float16, 0.1) == "written out"
    assert choice(AttentionConfig(relax_max="head"), torch.float32, 0.0) == "written out"
    assert choice(PAPER, torch.float32, 0.0) == "written out"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for kind in ("dense", "pivot"):
        by_name = AttentionConfig(kind=kind, backend="triton")  # type: ignore[arg-type]
        assert choice(by_name, torch.float16, 0.1) == "kernel"


def test_a_maximum_per_head_is_no_kernel_s() -> None:
    with pytest.raises(ConfigError, match=r"relax_max.*whose maximum is a row's"):
        AttentionConfig(backend="triton", relax_max="head")


def test_seeds_follow_the_random_state() -> None:
    torch.manual_seed(3)
    first = [host_seed() for _ in range(3)]
    torch.manual_seed(3)
    assert [host_seed() for _ in range(3)] == first
    assert len(set(first)) == 3 and all(0 <= seed < 1 << 62 for seed in first)
    assert current_device().type in ("cpu", "cuda")
