"""The image tokenizer's model and file against a recomputation from the released key layout."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig, VQGANConfig
from megatron_cogview.configs.presets import preset
from megatron_cogview.storage.digest import sha256_file
from megatron_cogview.testing.vqvae_oracle import plain_decode, plain_latents, released_weights
from megatron_cogview.tokenization.image import (
    ImageTokenizer,
    load_image_tokenizer,
    save_image_tokenizer,
)
from megatron_cogview.tokenization.pixels import OURS, SCALINGS, PixelScaling
from megatron_cogview.tokenization.quantizer import flatten_latents
from megatron_cogview.tokenization.vq_model import VQModel
from megatron_cogview.tokenization.vqgan import SelfAttention

VQGAN = ImageTokenizerConfig(
    kind="vqgan",
    image_size=32,
    hidden_size=16,
    code_dim=8,
    num_codes=40,
    vqgan=VQGANConfig(multipliers=(1, 2, 2, 2), residual_blocks=1, norm_groups=8),
)
SMALL = ImageTokenizerConfig(image_size=32, hidden_size=16, code_dim=8, num_codes=40)


def pictures(number: int, side: int = 32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, side, side, 3), generator=generator, dtype=torch.uint8)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = VQModel(SMALL)
    model.load_state_dict(released_weights(16, 8, 40), strict=True)
    save_image_tokenizer(model, SMALL, tmp_path / "tokenizer.safetensors")
    return tmp_path / "tokenizer.safetensors"


def test_state_dict_is_the_released_layout() -> None:
    """Names and shapes at the paper's size."""
    with torch.device("meta"):
        ours = VQModel(ImageTokenizerConfig()).state_dict()
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
    model = VQModel(config)
    output = model(OURS.to_float(pictures(2)))
    assert output.reconstruction_BCSS.shape == (2, 3, 32, 32)
    assert output.codes_BHW.shape == (2, config.codes_per_side, config.codes_per_side)
    names = [n for n, _ in model.named_parameters() if n.startswith("enc_b") and "weight" in n]
    assert names == [f"enc_b.blocks.{2 * i}.weight" for i in range(layers + 1)]


LARGER = [
    ImageTokenizerConfig(image_size=64, hidden_size=96, code_dim=64, num_codes=512),
    dataclasses.replace(VQGAN, image_size=64, hidden_size=32, num_codes=512),
]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sharp(config: ImageTokenizerConfig) -> VQModel:
    """A model whose attention, if it has any, blows rounding up."""
    torch.manual_seed(0)
    model = VQModel(config).eval().requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, SelfAttention):
            layer.query_key_value.weight.mul_(10.0)
            layer.projection.weight.mul_(10.0)
            layer.query_key_value.weight[: 2 * layer.projection.in_channels].mul_(30.0)
    return model


def latents_of(model: VQModel, images: Tensor) -> Tensor:
    return torch.cat([model._latents(padded)[:n] for padded, n in model._passes(images)])


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("config", LARGER, ids=lambda config: config.kind)
def test_nothing_depends_on_the_batch(config: ImageTokenizerConfig, number: int) -> None:
    """Latents bit for bit, codes and pictures: in a batch of 64, alone, and in any order."""
    model = sharp(config)
    batch = 64 if number == 1 else 24
    images = OURS.to_float(pictures(batch, side=64))
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(3))
    # At different places of a pass of 8; of 64, at every place.
    some = torch.arange(0, batch, 9)
    with threads(number):
        latents = latents_of(model, images)
        model.quantize_t.initialise_from(flatten_latents(latents))
        singles = torch.cat([latents_of(model, image[None]) for image in images[some]])
        assert torch.equal(latents[some], singles)
        assert torch.equal(latents[order], latents_of(model, images[order]))
        for encode in (model.encode, model.encode_bf16):
            codes = encode(images)
            assert len(codes.unique()) > 100
            singles = torch.cat([encode(image[None]) for image in images[some]])
            assert torch.equal(codes[some], singles)
            assert torch.equal(codes[order[:20]], encode(images[order[:20]]))
        decoded = model.decode(codes[some])
        singles = torch.cat([model.decode(grid[None]) for grid in codes[some]])
        assert torch.equal(decoded, singles)
        assert torch.equal(decoded.flip(0), model.decode(codes[some].flip(0)))


def test_rounding_that_depends_on_the_batch_size_would_be_seen() -> None:
    """What the test above guards against happens without passes of one size."""
    model = sharp(LARGER[1])
    images = OURS.to_float(pictures(64, side=64))
    together = model.enc_b(images)
    alone = torch.cat([model.enc_b(image[None]) for image in images])
    assert not torch.equal(together, alone)


@pytest.mark.parametrize(
    ("name", "on_cpu", "on_gpu"),
    [("fashion_3b", 1, 4), ("base_4b", 1, 16), ("photos_64", 8, 64), ("tiny_vqgan", 8, 64)],
)
def test_passes_fit_the_memory(name: str, on_cpu: int, on_gpu: int) -> None:
    """A network holds some 7 activations of the widest layer, of all pictures of a pass."""
    config = preset(name).image_tokenizer
    with torch.device("meta"):
        model = VQModel(config)
        sizes: list[int] = []
        for layer in model.modules():
            if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
                layer.register_forward_hook(lambda _, given, out: sizes.append(out.numel()))
        latents = model.enc_b(torch.empty(1, 3, config.image_size, config.image_size))
        model.dec(latents)
    assert model._activation_bytes == 4 * max(sizes)
    # The meta device stands for a GPU: it is no CPU.
    assert model.pictures_per_pass == on_gpu
    assert 7 * on_gpu * model._activation_bytes < 16 << 30
    model.quantize_t.to_empty(device="cpu")
    with threads(1):
        assert model.pictures_per_pass == on_cpu


def test_every_pass_has_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VQModel(SMALL).eval()
    monkeypatch.setattr(VQModel, "pictures_per_pass", 4)
    seen: list[int] = []
    for network in (model.enc_b, model.dec):
        network.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    codes = model.encode(OURS.to_float(pictures(6)))
    assert codes.shape == (6, 4, 4)
    assert model.decode(codes[:5]).shape == (5, 3, 32, 32)
    assert model.encode(OURS.to_float(pictures(6)[:0])).shape == (0, 4, 4)
    assert seen == [4] * 5


def test_bf16_codes_are_nearly_the_nearest() -> None:
    """Nearly all agree; where they do not, the code is about as near."""
    torch.manual_seed(0)
    model = VQModel(LARGER[0]).eval()
    images = OURS.to_float(pictures(16, side=64))
    with torch.no_grad():
        latents = flatten_latents(model.enc_b(images))
        model.quantize_t.initialise_from(latents)
    codes, rough = model.encode(images).flatten(), model.encode_bf16(images).flatten()
    differing = codes != rough
    assert 0 < differing.sum() < 0.1 * len(codes)
    distances = torch.cdist(latents.double(), model.quantize_t.embed.t().double())
    nearest = distances.gather(1, codes[:, None])
    chosen = distances.gather(1, rough[:, None])
    assert (chosen[differing] < 1.05 * nearest[differing]).all()


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=lambda scaling: scaling.name)
def test_pixel_scaling_is_exact_for_every_value(scaling: PixelScaling) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    scaled = scaling.to_float(values)
    for channel in range(3):
        plain = (values.double() / 255 - scaling.mean[channel]) / scaling.deviation[channel]
        torch.testing.assert_close(scaled[:, channel].double(), plain[..., 0], rtol=0, atol=1e-6)
    assert torch.equal(scaling.to_uint8(scaled), values)
    assert torch.equal(scaling.to_uint8(scaled - 100.0), torch.zeros_like(values))
    assert torch.equal(scaling.to_uint8(scaled + 100.0), torch.full_like(values, 255))


def test_our_pictures_span_minus_one_to_one() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 1, 3)
    assert OURS.to_float(ends)[:, :, 0, 0].tolist() == [[-1.0] * 3, [1.0] * 3]


def test_a_file_from_before_the_vqgan_still_loads(saved: Path) -> None:
    """Fields that the configuration has gained since take their defaults."""
    old = ("kind", "image_size", "downsampling_layers", "hidden_size", "code_dim", "num_codes")
    old += ("ema_decay", "codebook_init", "revive_dead_codes", "commitment")
    config = {name: getattr(SMALL, name) for name in old}
    about = json.dumps({"config": config, "pixels": "uint8 / 127.5 - 1"}, sort_keys=True)
    codes = load_image_tokenizer(saved).encode(pictures(3))
    save_file(load_file(saved), saved, metadata={"megatron_cogview.image_tokenizer": about})
    tokenizer = load_image_tokenizer(saved)
    assert tokenizer.config == SMALL
    assert torch.equal(tokenizer.encode(pictures(3)), codes)


def test_a_vqgan_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQModel(VQGAN)
    path = tmp_path / "vqgan.safetensors"
    save_image_tokenizer(model, VQGAN, path)
    tokenizer = load_image_tokenizer(path)
    assert tokenizer.config == VQGAN
    images = pictures(3)
    codes = model.encode(OURS.to_float(images))
    assert torch.equal(tokenizer.encode(images), codes)
    assert torch.equal(tokenizer.decode(codes), OURS.to_uint8(model.decode(codes)))


def test_saved_file_loads_with_its_configuration_and_fingerprint(saved: Path) -> None:
    tokenizer = load_image_tokenizer(saved)
    assert isinstance(tokenizer, ImageTokenizer)
    assert tokenizer.config == SMALL
    assert tokenizer.fingerprint == sha256_file(saved)
    weights = load_file(saved)
    assert all(torch.equal(weights[k], v) for k, v in released_weights(16, 8, 40).items())


def test_the_same_weights_give_the_same_bytes(saved: Path) -> None:
    first = saved.read_bytes()
    model = VQModel(SMALL)
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
    save_image_tokenizer(VQModel(SMALL), dataclasses.replace(SMALL, num_codes=41), bad)
    with pytest.raises(DataError, match=r"quantize_t\.\w+ is torch.float32 \[.*40\]"):
        load_image_tokenizer(bad)
    save_image_tokenizer(VQModel(SMALL), dataclasses.replace(SMALL, downsampling_layers=2), bad)
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
