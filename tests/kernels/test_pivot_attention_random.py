"""Three-region attention in random shapes, regions, tiles and parts: ten cases, or with
``pytest -m slow`` three hundred.  A case's number is its seed."""

import random
from typing import Any

import pytest
import torch

from megatron_cogview.kernels.pivot_attention import launch, triton_backward
from megatron_cogview.kernels.pivot_attention.launch import Launch
from tests.kernels.pivot_attention_cases import (
    DEVICE,
    FP32_BOUND,
    Case,
    by_triton,
    exact,
    score_scale,
)

TILES = (Launch(16, 16, 1, 1), Launch(32, 16, 1, 1), Launch(16, 32, 1, 1), Launch(32, 32, 1, 1))


def random_case(draw: random.Random) -> Case:
    """Up to 70 keys, of which the queries are all, one or some of the last."""
    keys = draw.randint(1, 70)
    total = keys + draw.choice([0, draw.randint(0, 30)])
    samples = draw.randint(1, 3)
    given: dict[str, Any] = {
        "total_length": total,
        "window_block": draw.choice([1, 2, 3, 5, 8, 16, 31]),
        "window_blocks": draw.randint(1, 5),
        "num_pivots": draw.choice([0, 1, 5, total, total + 9, draw.randint(0, total)]),
        "layer_number": draw.randint(1, 50),
        "seed": draw.randint(0, 1 << 40),
    }
    texts = tuple(draw.randint(0, total) for _ in range(samples))
    if draw.random() < 0.3:
        given["pivot_bias"] = draw.uniform(-1, 2)
    if draw.random() < 0.4:
        given |= {"dropout": draw.choice([0.1, 0.5]), "dropout_seed": draw.randint(0, 1 << 62)}
    if draw.random() < 0.3:
        padding = [sorted(draw.randint(0, total) for _ in range(2)) for _ in range(samples)]
        given["padding_B2"] = torch.tensor(padding, device=DEVICE)
    if draw.random() < 0.4:
        given["max_text"] = max(texts)
    return Case(
        queries=draw.choice([keys, 1, draw.randint(1, keys)]),
        keys=keys,
        head_dim=draw.choice([8, 16, 20, 40, 64]),
        heads=draw.choice([1, 2]),
        texts=texts,
        scale=draw.choice([0.3, 1.0, 2.0]),
        given=given,
    )


def assert_random_case_is_right(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    case, parts = random_case(draw), draw.choice([1, 2, 5])
    monkeypatch.setattr(launch, "INTERPRETED", draw.choice(TILES))
    monkeypatch.setattr(triton_backward, "num_parts", lambda programs, tiles: parts)
    tensors = case.tensors()
    expected, found = exact(case, tensors), by_triton(case, tensors)
    before_dropout = 1 / (1 - case.settings.get("dropout", 0.0))
    for name, value in expected.items():
        scale = max(
            float(value.abs().max()), before_dropout * score_scale(case, tensors).get(name, 0.0)
        )
        worst = (found[name].double() - value).abs().nan_to_num(nan=torch.inf).max()
        assert worst <= FP32_BOUND * scale, (seed, name, float(worst), scale)


def test_ten_random_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(10):
        assert_random_case_is_right(seed, monkeypatch)


@pytest.mark.slow
def test_three_hundred_random_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(10, 310):
        assert_random_case_is_right(seed, monkeypatch)
