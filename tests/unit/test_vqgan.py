"""The VQGAN's networks and its discriminator against plain recomputations."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig, VQGANConfig
from megatron_cogview.configs.presets import preset
from megatron_cogview.configs.tokenizer_training import AdversarialConfig
from megatron_cogview.tokenization.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from megatron_cogview.tokenization.vq_model import VQModel
from megatron_cogview.tokenization.vqgan import (
    ResidualBlock,
    SelfAttention,
    build_decoder,
    build_encoder,
)

SMALL = ImageTokenizerConfig(
    kind="vqgan",
    image_size=16,
    downsampling_layers=2,
    hidden_size=8,
    code_dim=4,
    num_codes=32,
    vqgan=VQGANConfig(multipliers=(1, 2, 3), residual_blocks=2, norm_groups=4),
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def plain_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group normalisation written out."""
    grouped = x.view(len(x), norm.num_groups, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped - mean).square().mean(2, keepdim=True)
    scaled = ((grouped - mean) / (variance + norm.eps).sqrt()).view_as(x)
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize("outputs", [8, 12])
def test_residual_block(outputs: int) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, outputs, 4).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = normal(2, 8, 5, 6)
    hidden = plain_norm(x, block.norm1)
    hidden = functional.conv2d(
        hidden * hidden.sigmoid(), block.conv1.weight, block.conv1.bias, padding=1
    )
    hidden = plain_norm(hidden, block.norm2)
    hidden = functional.conv2d(
        hidden * hidden.sigmoid(), block.conv2.weight, block.conv2.bias, padding=1
    )
    if outputs == 8:
        shortcut = x
    else:
        matrix = block.shortcut.weight[:, :, 0, 0]
        shortcut = torch.einsum("oc,bchw->bohw", matrix, x) + block.shortcut.bias[:, None, None]
    torch.testing.assert_close(block(x), shortcut + hidden)


def test_self_attention_is_over_all_positions_of_one_picture() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(8, 2).double()
    x = normal(3, 8, 3, 4)
    got = layer(x)
    normed = plain_norm(x, layer.norm).flatten(2)
    weight = layer.query_key_value.weight[:, :, 0, 0]
    for picture in range(3):
        query, key, value = (weight @ normed[picture]).chunk(3)
        share = (query.t() @ key / 8**0.5).softmax(1)
        mixed = (share @ value.t()).t()
        out = layer.projection.weight[:, :, 0, 0] @ mixed + layer.projection.bias[:, None]
        torch.testing.assert_close(got[picture], x[picture] + out.view(8, 3, 4))


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_attention_stands_at_the_coarsest_resolutions(levels: int) -> None:
    """Sides at which attention runs in encoder and decoder, besides the two middles."""
    vqgan = dataclasses.replace(SMALL.vqgan, attention_levels=levels)
    config = dataclasses.replace(SMALL, vqgan=vqgan)
    model = VQModel(config)
    sides: list[int] = []
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    output = model(torch.zeros(1, 3, 16, 16))
    assert output.codes_BHW.shape == (1, 4, 4)
    assert output.reconstruction_BCSS.shape == (1, 3, 16, 16)
    coarse = [4, 8, 16][:levels]
    expected = [side for side in (16, 8, 4) if side in coarse for _ in range(2)] + [4]
    expected += [4] + [side for side in (4, 8, 16) if side in coarse for _ in range(3)]
    assert sides == expected


def test_fashion_preset_gives_50_by_50_codes() -> None:
    """P-FASH-2, on shapes alone."""
    config = preset("fashion_3b").image_tokenizer
    with torch.device("meta"):
        latents = build_encoder(config)(torch.empty(1, 3, 800, 800))
        pictures = build_decoder(config)(latents)
    assert latents.shape == (1, 256, 50, 50)
    assert pictures.shape == (1, 3, 800, 800)


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model = VQModel(SMALL)
    output = model(normal(2, 3, 16, 16).float())
    (output.reconstruction_BCSS.square().mean() + output.commitment).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_discriminator_sees_each_picture_alone() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(8, 2)
    pictures = normal(4, 3, 32, 32).float()
    together = critic(pictures)
    alone = torch.cat([critic(picture[None]) for picture in pictures])
    assert together.shape == (4, 1, 6, 6)
    torch.testing.assert_close(together, alone)


def test_discriminator_widths_and_strides() -> None:
    critic = PatchDiscriminator(16, 5)
    convolutions = [m for m in critic.modules() if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [16, 32, 64, 128, 128, 128, 1]
    assert [c.stride[0] for c in convolutions] == [2, 2, 2, 2, 2, 1, 1]


def test_hinge_losses() -> None:
    real, copy = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 2.0])
    expected = 0.5 * ((0.0 + 0.5 + 2.0) / 3 + (0.0 + 1.0 + 3.0) / 3)
    assert discriminator_loss(real, copy).item() == pytest.approx(expected)
    assert generator_loss(copy).item() == pytest.approx(1.0 / 3)


def test_adaptive_weight_is_the_bounded_quotient_of_the_norms() -> None:
    three, four = torch.tensor([[0.0, 3.0]]), torch.tensor([[4.0, 0.0]])
    assert adaptive_weight(three, four, 1e4).item() == pytest.approx(0.75, rel=1e-4)
    assert adaptive_weight(four, 0 * three, 100.0).item() == 100.0


BAD: list[tuple[Any, str]] = [
    (lambda: VQGANConfig(multipliers=(1, 2)), r"vqgan\.multipliers"),
    (lambda: VQGANConfig(multipliers=(1, 0, 1)), r"vqgan\.multipliers"),
    (lambda: VQGANConfig(multipliers=(1, 1, 1), residual_blocks=0), r"vqgan\.residual_blocks"),
    (lambda: VQGANConfig(multipliers=(1, 1, 1), attention_levels=4), r"vqgan\.attention_levels"),
    (lambda: VQGANConfig(multipliers=(1, 1, 1), norm_groups=3), r"vqgan\.norm_groups"),
]


@pytest.mark.parametrize(("make", "name"), BAD)
def test_sizes_that_do_not_fit_are_refused(make: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        dataclasses.replace(SMALL, vqgan=make())


@pytest.mark.parametrize(
    ("name", "value"),
    [("weight", -1.0), ("start_step", -1), ("channels", 12), ("layers", 0), ("lr_ratio", 0.0)],
)
def test_adversarial_settings_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"tokenizer_training\.adversarial\.{name} = {value}"):
        AdversarialConfig(**{name: value})
