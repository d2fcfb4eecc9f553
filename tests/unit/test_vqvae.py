"""The VQ-VAE and its file against a plain recomputation from the released key layout."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.storage.digest import sha256_file
from megatron_cogview.tokenization.image import (
    ImageTokenizer,
    load_image_tokenizer,
    save_image_tokenizer,
)
from megatron_cogview.tokenization.vqvae import VQVAE, to_float, to_uint8

SMALL = ImageTokenizerConfig(image_size=32, hidden_size=16, code_dim=8, num_codes=40)


def released_weights(hidden: int, dim: int, codes: int, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint with the released names and shapes (three stride-2 layers)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    weights = {}
    for part, first, last in (("enc_b", 3, dim), ("dec", dim, 3)):
        for index in (0, 2, 4):
            inputs = first if index == 0 else hidden
            shape = (hidden, inputs) if part == "enc_b" else (inputs, hidden)
            weights[f"{part}.blocks.{index}.weight"] = normal(*shape, 4, 4)
            weights[f"{part}.blocks.{index}.bias"] = normal(hidden)
        weights[f"{part}.blocks.6.weight"] = normal(last, hidden, 1, 1)
        weights[f"{part}.blocks.6.bias"] = normal(last)
    # Centred on the latents' bias, or most pictures would share few codes.
    weights["quantize_t.embed"] = 0.3 * normal(dim, codes) + weights["enc_b.blocks.6.bias"][:, None]
    weights["quantize_t.cluster_size"] = torch.ones(codes)
    weights["quantize_t.embed_avg"] = weights["quantize_t.embed"].clone()
    return weights


def plain_latents(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    for index in (0, 2, 4):
        w, b = weights[f"enc_b.blocks.{index}.weight"], weights[f"enc_b.blocks.{index}.bias"]
        x = functional.conv2d(x, w, b, stride=2, padding=1).relu()
    return functional.conv2d(x, weights["enc_b.blocks.6.weight"], weights["enc_b.blocks.6.bias"])


def plain_decode(weights: dict[str, Tensor], codes: Tensor) -> Tensor:
    x = weights["quantize_t.embed"].t()[codes].permute(0, 3, 1, 2)
    for index in (0, 2, 4):
        w, b = weights[f"dec.blocks.{index}.weight"], weights[f"dec.blocks.{index}.bias"]
        x = functional.conv_transpose2d(x, w, b, stride=2, padding=1).relu()
    return functional.conv2d(x, weights["dec.blocks.6.weight"], weights["dec.blocks.6.bias"])


def pictures(number: int, side: int = 32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, side, side, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = VQVAE(SMALL)
    model.load_state_dict(released_weights(16, 8, 40), strict=True)
    save_image_tokenizer(model, SMALL, tmp_path / "tokenizer.safetensors")
    return tmp_path / "tokenizer.safetensors"


def test_state_dict_is_the_released_layout() -> None:
    """Names and shapes at the paper's size."""
    with torch.device("meta"):
        ours = VQVAE(ImageTokenizerConfig()).state_dict()
        theirs = released_weights_shapes()
    assert {name: tuple(value.shape) for name, value in ours.items()} == theirs


def released_weights_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "enc_b.blocks.0.weight": (512, 3, 4, 4),
        "enc_b.blocks.6.weight": (256, 512, 1, 1),
        "enc_b.blocks.6.bias": (256,),
        "dec.blocks.0.weight": (256, 512, 4, 4),
        "dec.blocks.6.weight": (3, 512, 1, 1),
        "dec.blocks.6.bias": (3,),
        "quantize_t.embed": (256, 8192),
        "quantize_t.embed_avg": (256, 8192),
        "quantize_t.cluster_size": (8192,),
    }
    for part in ("enc_b", "dec"):
        shapes |= {f"{part}.blocks.{i}.weight": (512, 512, 4, 4) for i in (2, 4)}
        shapes |= {f"{part}.blocks.{i}.bias": (512,) for i in (0, 2, 4)}
    return shapes


def test_codes_and_pixels_equal_a_plain_recomputation(saved: Path) -> None:
    tokenizer = load_image_tokenizer(saved)
    images = pictures(6)
    weights = {k: v.double() for k, v in released_weights(16, 8, 40).items()}
    scaled = (images.double().permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    latents = plain_latents(weights, scaled).permute(0, 2, 3, 1).reshape(-1, 8)
    expected = torch.cdist(latents, weights["quantize_t.embed"].t()).argmin(1).view(6, 4, 4)
    codes = tokenizer.encode(images)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > 5, "too few codes to show anything"

    decoded = tokenizer.decode(codes)
    plain = ((plain_decode(weights, codes).clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == images.shape
    # Rounding to whole levels: half a level, and a hair for fp32.
    assert (decoded.double() - plain).abs().max() <= 0.5 + 1e-3


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_every_depth_reconstructs_the_shape(layers: int) -> None:
    config = dataclasses.replace(SMALL, downsampling_layers=layers)
    model = VQVAE(config)
    output = model(to_float(pictures(2)))
    assert output.reconstruction_BCSS.shape == (2, 3, 32, 32)
    assert output.codes_BHW.shape == (2, config.codes_per_side, config.codes_per_side)
    names = [n for n, _ in model.named_parameters() if n.startswith("enc_b") and "weight" in n]
    assert names == [f"enc_b.blocks.{2 * i}.weight" for i in range(layers + 1)]


def test_codes_do_not_depend_on_the_batch() -> None:
    """Alone, in a batch of 64 and in another order, at a size where convolutions do differ."""
    torch.manual_seed(0)
    config = ImageTokenizerConfig(image_size=64, hidden_size=96, code_dim=64, num_codes=512)
    model = VQVAE(config).eval()
    images = to_float(pictures(64, side=64))
    together = model.encode(images)
    alone = torch.cat([model.encode(image[None]) for image in images])
    assert torch.equal(together, alone)
    assert torch.equal(together, model.encode(images.flip(0)).flip(0))


def test_near_ties_are_decided_on_the_picture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding that depends on the batch, made large enough to matter, does not reach the codes."""
    torch.manual_seed(0)
    model = VQVAE(SMALL).eval()
    images = to_float(pictures(8))
    with torch.no_grad():
        latents = model.enc_b(images)
        vectors = latents.permute(0, 2, 3, 1).reshape(-1, 8)
        # Pairs of codes around a latent, nearly at the same distance.
        offset = 1e-3 * torch.randn(20, 8)
        model.quantize_t.embed[:, 0::2] = (vectors[:20] + offset * (1 + 1e-7)).t()
        model.quantize_t.embed[:, 1::2] = (vectors[:20] - offset).t()
    plain = model.enc_b.forward

    def disturbed(x: Tensor) -> Tensor:
        """One and the same direction of error for a batch, another for another batch size."""
        noise = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(len(x)))
        clean = plain(x)
        return clean + 2e-6 * clean.norm(dim=1, keepdim=True) * noise / 8**0.5

    monkeypatch.setattr(model.enc_b, "forward", disturbed)
    together = model.encode(images)
    alone = torch.cat([model.encode(image[None]) for image in images])
    direct = [model.quantize_t.quantize(disturbed(images[:n])).codes_BHW[0] for n in (1, 8)]
    assert not torch.equal(*direct), "the disturbance changes no code; the test shows nothing"
    assert torch.equal(together, alone)


def test_pixel_scaling_is_exact_for_every_value() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    scaled = to_float(values)
    assert scaled.min() == -1.0
    assert scaled.max() == 1.0
    assert torch.equal(to_uint8(scaled), values)
    assert torch.equal(to_uint8(scaled * 3)[0, 0, 0], torch.zeros(3, dtype=torch.uint8))


def test_saved_file_loads_with_its_configuration_and_fingerprint(saved: Path) -> None:
    tokenizer = load_image_tokenizer(saved)
    assert isinstance(tokenizer, ImageTokenizer)
    assert tokenizer.config == SMALL
    assert tokenizer.fingerprint == sha256_file(saved)
    weights = load_file(saved)
    assert all(torch.equal(weights[k], v) for k, v in released_weights(16, 8, 40).items())


def test_the_same_weights_give_the_same_bytes(saved: Path) -> None:
    first = saved.read_bytes()
    model = VQVAE(SMALL)
    model.load_state_dict(load_file(saved))
    save_image_tokenizer(model, SMALL, saved)
    assert saved.read_bytes() == first


def test_foreign_files_are_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such image tokenizer"):
        load_image_tokenizer(tmp_path / "absent.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"not safetensors at all")
    with pytest.raises(DataError, match="not a readable safetensors"):
        load_image_tokenizer(bad)
    bad.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(DataError, match="not a readable safetensors"):
        load_image_tokenizer(bad)
    save_file(load_file(saved), bad)
    with pytest.raises(DataError, match="metadata"):
        load_image_tokenizer(bad)
    save_image_tokenizer(VQVAE(SMALL), dataclasses.replace(SMALL, num_codes=41), bad)
    with pytest.raises(DataError, match=r"quantize_t\.\w+ is torch.float32 \[.*40\]"):
        load_image_tokenizer(bad)
    save_image_tokenizer(VQVAE(SMALL), dataclasses.replace(SMALL, downsampling_layers=2), bad)
    with pytest.raises(DataError, match="unknown"):
        load_image_tokenizer(bad)


def test_wrong_input_is_refused(saved: Path) -> None:
    tokenizer = load_image_tokenizer(saved)
    with pytest.raises(DataError, match=r"expected uint8 \[N, 32, 32, 3\]"):
        tokenizer.encode(pictures(1, side=16))
    with pytest.raises(DataError, match="expected uint8"):
        tokenizer.encode(pictures(1).float())
    with pytest.raises(DataError, match=r"0\.\.39"):
        tokenizer.decode(torch.full((1, 4, 4), 40))
    with pytest.raises(DataError, match="expected integers"):
        tokenizer.decode(torch.zeros(1, 4, 4))
    assert tokenizer.encode(pictures(1)[:0]).shape == (0, 4, 4)
    assert tokenizer.decode(torch.zeros(0, 4, 4, dtype=torch.int64)).shape == (0, 32, 32, 3)
    codes = tokenizer.encode(pictures(2))
    assert torch.equal(tokenizer.decode(codes.to(torch.uint16)), tokenizer.decode(codes))
