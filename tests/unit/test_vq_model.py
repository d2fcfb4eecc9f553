"""The image tokenizer's model and file against a recomputation from the released key layout."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig, VQGANConfig
from megatron_cogview.storage.digest import sha256_file
from megatron_cogview.testing.vqvae_oracle import plain_decode, plain_latents, released_weights
from megatron_cogview.tokenization import vq_model
from megatron_cogview.tokenization.image import (
    ImageTokenizer,
    load_image_tokenizer,
    save_image_tokenizer,
)
from megatron_cogview.tokenization.pixels import OURS, SCALINGS, PixelScaling
from megatron_cogview.tokenization.quantizer import flatten_latents
from megatron_cogview.tokenization.vq_model import VQModel

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


@pytest.mark.parametrize("config", LARGER, ids=lambda config: config.kind)
def test_codes_do_not_depend_on_the_batch(config: ImageTokenizerConfig) -> None:
    """Alone, in a batch of 64 and in another order; encoders differ by less than is allowed for."""
    torch.manual_seed(0)
    model = VQModel(config).eval()
    images = OURS.to_float(pictures(64, side=64))
    with torch.no_grad():
        latents = model.enc_b(images)
        model.quantize_t.initialise_from(flatten_latents(latents))
        single = torch.cat([model.enc_b(image[None]) for image in images])
    longest = latents.norm(dim=1).amax((1, 2))
    error = (latents - single).norm(dim=1).amax((1, 2)) / longest
    assert error.max() < 0.5 * vq_model._LATENT_ERROR
    together = model.encode(images)
    alone = torch.cat([model.encode(image[None]) for image in images])
    assert len(together.unique()) > 100
    assert torch.equal(together, alone)
    assert torch.equal(together, model.encode(images.flip(0)).flip(0))


def test_large_pictures_are_encoded_alone_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = VQModel(LARGER[0]).eval()
    images = OURS.to_float(pictures(5, side=64))
    together, seen = model.encode(images), []
    monkeypatch.setattr(vq_model, "_LARGE_PICTURE", images[0].numel())
    model.enc_b.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    assert torch.equal(model.encode(images), together)
    assert seen == [1] * 5


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


def test_near_ties_are_decided_on_the_picture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding that depends on the batch, made large enough to matter, does not reach the codes."""
    torch.manual_seed(0)
    model = VQModel(SMALL).eval()
    images = OURS.to_float(pictures(8))
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
