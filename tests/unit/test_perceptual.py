"""The perceptual loss against a plain fp64 recomputation, and what its file must hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from megatron_cogview.configs.errors import DataError
from megatron_cogview.tokenization.perceptual import load_perceptual_loss

GROUPS = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
WIDTHS = [4, 6, 8, 8, 10]


def synthetic(heads: bool = True) -> dict[str, Tensor]:
    """torchvision's names on a narrow net, with what else such files hold."""
    generator = torch.Generator().manual_seed(0)
    weights, inputs = {}, 3
    for depth, (group, width) in enumerate(zip(GROUPS, WIDTHS, strict=True)):
        for index in group:
            shape = (width, inputs, 3, 3)
            weights[f"features.{index}.weight"] = torch.randn(shape, generator=generator) / 4
            weights[f"features.{index}.bias"] = torch.randn(width, generator=generator) / 4
            inputs = width
        if heads:
            weights[f"lin{depth}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    weights["classifier.0.weight"] = torch.zeros(2, 2)
    return weights


def plain(weights: dict[str, Tensor], x: Tensor, y: Tensor, heads: bool) -> Tensor:
    """LPIPS as published, in the inputs' precision."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64).view(1, 3, 1, 1)
    x, y = (x - shift) / scale, (y - shift) / scale
    total = torch.zeros((), dtype=torch.float64)
    for depth, group in enumerate(GROUPS):
        if depth:
            x, y = functional.max_pool2d(x, 2), functional.max_pool2d(y, 2)
        for index in group:
            w = weights[f"features.{index}.weight"].double()
            b = weights[f"features.{index}.bias"].double()
            x = functional.conv2d(x, w, b, padding=1).relu()
            y = functional.conv2d(y, w, b, padding=1).relu()
        unit_x = x / (x.pow(2).sum(1, keepdim=True) + 1e-10).sqrt()
        unit_y = y / (y.pow(2).sum(1, keepdim=True) + 1e-10).sqrt()
        squares = (unit_x - unit_y) ** 2
        if heads:
            head = weights[f"lin{depth}.model.1.weight"].double()
            total = total + (squares * head.view(1, -1, 1, 1)).sum(1).mean()
        else:
            total = total + squares.mean()
    return total


def write(path: Path, weights: dict[str, Any]) -> Path:
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_value_and_gradient(tmp_path: Path, suffix: str, heads: bool) -> None:
    weights = synthetic(heads)
    loss = load_perceptual_loss(write(tmp_path / f"vgg{suffix}", weights))
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1 for _ in range(2))
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    value, expected = loss(x, y), plain(weights, exact, y.double(), heads)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0.0)
    (got,) = torch.autograd.grad(value, x)
    (want,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-5 * want.abs().max().item())
    assert loss(y, y).item() == 0.0
    assert list(loss.parameters()) == []


def without(name: str) -> Callable[[dict[str, Any]], None]:
    def change(weights: dict[str, Any]) -> None:
        del weights[name]

    return change


def as_bytes(weights: dict[str, Any]) -> None:
    weights["features.0.bias"] = weights["features.0.bias"].to(torch.int8)


def narrower(weights: dict[str, Any]) -> None:
    weights["features.7.weight"] = weights["features.7.weight"][:, :5].clone()


def negative(weights: dict[str, Any]) -> None:
    weights["lin2.model.1.weight"][0, 1] = -0.1


def too_wide(weights: dict[str, Any]) -> None:
    weights["lin4.model.1.weight"] = torch.ones(1, 11, 1, 1)


def infinite(weights: dict[str, Any]) -> None:
    weights["features.28.bias"][0] = float("inf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("features.24.bias"), r"lacks \['features\.24\.bias'\]"),
        (without("lin3.model.1.weight"), r"lacks \['lin3\.model\.1\.weight'\]"),
        (as_bytes, r"features\.0\.bias is not a floating-point tensor"),
        (narrower, r"features\.7\.weight has shape \[6, 5, 3, 3\], expected \['any', 6, 3, 3\]"),
        (infinite, r"features\.28\.bias holds values that are not finite"),
        (negative, r"lin2\.model\.1\.weight holds negative values"),
        (too_wide, r"lin4\.model\.1\.weight has shape .*, expected \[1, 10, 1, 1\]"),
    ],
)
def test_unusable_weights_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    weights: dict[str, Any] = synthetic()
    change(weights)
    with pytest.raises(DataError, match=message):
        load_perceptual_loss(write(tmp_path / "vgg.pt", weights))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file; .* needs VGG-16 weights"):
        load_perceptual_loss(tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("nothing")
    with pytest.raises(DataError, match="cannot be read as weights"):
        load_perceptual_loss(tmp_path / "text.pt")
    (tmp_path / "text.safetensors").write_text("nothing")
    with pytest.raises(DataError, match="cannot be read as weights"):
        load_perceptual_loss(tmp_path / "text.safetensors")
    with pytest.raises(DataError, match="holds a list"):
        load_perceptual_loss(write(tmp_path / "list.pt", [torch.zeros(1)]))
