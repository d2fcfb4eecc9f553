"""Sampling: the distribution, its independence of batches, prompts and their errors."""

import json

import numpy as np
import pytest
import torch

from megatron_cogview.configs.errors import DataError
from megatron_cogview.generation.pictures import sheet
from megatron_cogview.generation.prompts import read_prompts
from megatron_cogview.generation.sampling import draw, uniforms


def test_uniforms_are_uniform_independent_and_do_not_depend_on_the_batch():
    numbers = np.arange(20_000)
    u = uniforms(7, numbers, 3)
    counts = np.histogram(u, 50, (0, 1))[0]
    assert 20 < ((counts - 400) ** 2 / 400).sum() < 90
    for other in (uniforms(7, numbers, 4), uniforms(8, numbers, 3), uniforms(7, numbers + 1, 3)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
    assert uniforms(7, np.array([123]), 3)[0] == u[123]
    assert (uniforms(-1, numbers[:5], 0) < 1).all()


def test_draw_follows_the_softmax():
    logits = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0]) * 0.7
    u = torch.from_numpy(uniforms(1, np.arange(40_000), 0))
    for temperature in (1.0, 0.5):
        drawn = draw(logits.expand(40_000, 5), u, temperature, 0)
        share = torch.bincount(drawn, minlength=5) / 40_000
        expected = torch.softmax(logits / temperature, -1)
        assert (share - expected).abs().max() < 0.01


def test_top_k_and_greedy():
    logits = torch.randn(500, 30, generator=torch.Generator().manual_seed(0))
    u = torch.from_numpy(uniforms(2, np.arange(500), 0))
    best = logits.topk(3, dim=-1).indices
    drawn = draw(logits, u, 1.0, 3)
    assert (best == drawn[:, None]).any(-1).all()
    assert len({tuple(row) for row in (best == drawn[:, None]).tolist()}) == 3
    assert torch.equal(draw(logits, u, 0.0, 0), logits.argmax(-1))
    assert torch.equal(draw(logits, u, 1.0, 1), logits.argmax(-1))
    assert torch.equal(draw(logits, u, 1.0, 30), draw(logits, u, 1.0, 0))


def test_the_largest_uniform_still_draws_an_id():
    for v in (2, 1000, 8192):
        logits = torch.randn(1, v, generator=torch.Generator().manual_seed(1))
        top = draw(logits, torch.tensor([np.nextafter(1.0, 0.0)]), 1.0, 0)
        assert 0 <= int(top) < v
        zero = draw(torch.tensor([[float("-inf"), 1.0, 2.0]]), torch.tensor([0.0]), 1.0, 0)
        assert int(zero) == 1


def test_prompts_from_both_kinds_of_file(tmp_path):
    text = tmp_path / "captions.txt"
    text.write_text("a red circle\n\n 一只小狗 \n", encoding="utf-8")
    assert [(p.id, p.caption) for p in read_prompts(text)] == [
        ("000000", "a red circle"),
        ("000002", "一只小狗"),
    ]
    lines = tmp_path / "captions.jsonl"
    lines.write_text(json.dumps({"id": "x-1", "caption": "y", "more": 1}) + "\n")
    assert read_prompts(lines)[0].id == "x-1"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 1: expected an object"),
        ('{"caption": "a"}', "line 1: expected an object"),
        ('{"id": "../a", "caption": "a"}', "cannot name a file"),
        ('{"id": "a", "caption": 3}', "is not a text"),
        ('{"id": "a", "caption": " "}', "is not a text"),
        ('{"id": "a", "caption": "b"}\n{"id": "a", "caption": "c"}', "occurs twice"),
        ("", "holds no prompts"),
    ],
)
def test_wrong_prompts_are_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=message):
        read_prompts(path)


def test_missing_prompts_file(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")


def test_sheet_shows_every_picture_in_its_place():
    pictures = np.arange(7, dtype=np.uint8)[:, None, None, None] * np.ones((7, 4, 4, 3), np.uint8)
    canvas = sheet(pictures, gap=2)
    assert canvas.shape == (3 * 6 + 2, 3 * 6 + 2, 3)
    for i in range(7):
        y, x = 2 + (i // 3) * 6, 2 + (i % 3) * 6
        assert (canvas[y : y + 4, x : x + 4] == i).all()
    assert (canvas[:2] == 255).all()
