"""Import of the released VQ-VAE: synthetic checkpoints against a plain recomputation."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.testing.vqvae_oracle import plain_decode, plain_latents, released_weights
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.tokenization.released import read_released_vqvae

ROOT = Path(__file__).resolve().parents[2]
# original-formats: pictures are scaled to [0, 1], then normalised.
MEAN = torch.tensor([0.79093, 0.76271, 0.75340], dtype=torch.float64)
DEVIATION = torch.tensor([0.30379, 0.32279, 0.32800], dtype=torch.float64)
HIDDEN, DIM, CODES, SIDE = 16, 8, 40, 32


def write(path: Path, weights: dict[str, Any]) -> Path:
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


def checkpoint() -> dict[str, Tensor]:
    return released_weights(HIDDEN, DIM, CODES)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_imported_tokenizer_equals_a_plain_recomputation(
    tmp_path: Path, prefix: str, suffix: str
) -> None:
    weights = checkpoint()
    file = write(tmp_path / f"released{suffix}", {prefix + k: v for k, v in weights.items()})
    output = tmp_path / "new" / "image_tokenizer.safetensors"
    command = [sys.executable, "tools/import_tokenizer.py", "--checkpoint", str(file)]
    command += ["--output", str(output), "--image-size", str(SIDE)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True)
    tokenizer = load_image_tokenizer(output)
    assert tokenizer.config == ImageTokenizerConfig(
        image_size=SIDE, hidden_size=HIDDEN, code_dim=DIM, num_codes=CODES
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (6, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    exact = {key: value.double() for key, value in weights.items()}
    scaled = ((images.double() / 255 - MEAN) / DEVIATION).permute(0, 3, 1, 2)
    latents = plain_latents(exact, scaled).permute(0, 2, 3, 1).reshape(-1, DIM)
    expected = torch.cdist(latents, exact["quantize_t.embed"].t()).argmin(1).view(6, 4, 4)
    codes = tokenizer.encode(images)
    assert torch.equal(codes, expected)
    assert len(codes.unique()) > 5, "too few codes to show anything"
    plain = (plain_decode(exact, codes).permute(0, 2, 3, 1) * DEVIATION + MEAN) * 255
    # Rounding to whole levels: half a level, and a hair for fp32.
    assert (tokenizer.decode(codes).double() - plain.clamp(0, 255)).abs().max() <= 0.5 + 1e-3


def test_sizes_follow_from_shapes(tmp_path: Path) -> None:
    """The paper's sizes, and 16-bit weights."""
    weights = {k: v.half() for k, v in released_weights(512, 256, 8192).items()}
    model, config = read_released_vqvae(write(tmp_path / "vqvae.pt", weights))
    assert config == ImageTokenizerConfig()
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def missing(weights: dict[str, Any]) -> None:
    del weights["dec.blocks.4.bias"]


def unknown(weights: dict[str, Any]) -> None:
    weights["extra"] = torch.zeros(3)


def mixed(weights: dict[str, Any]) -> None:
    weights["module.dec.blocks.4.bias"] = weights.pop("dec.blocks.4.bias")


def misshapen(weights: dict[str, Any]) -> None:
    weights["dec.blocks.0.weight"] = torch.zeros(8, 15, 4, 4)


def integers(weights: dict[str, Any]) -> None:
    weights["quantize_t.cluster_size"] = torch.ones(CODES, dtype=torch.int64)


def infinite(weights: dict[str, Any]) -> None:
    weights["enc_b.blocks.2.bias"][3] = float("nan")


def nested(weights: dict[str, Any]) -> None:
    inner = dict(weights)
    weights.clear()
    weights["state_dict"] = inner


REFUSED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (missing, r"missing \['dec\.blocks\.4\.bias'\]"),
    (unknown, r"unknown \['extra'\]"),
    (mixed, r"some keys begin with 'module\.'"),
    (misshapen, r"dec\.blocks\.0\.weight is \[8, 15, 4, 4\], expected \[8, 16, 4, 4\]"),
    (integers, r"quantize_t\.cluster_size is not a floating-point tensor"),
    (infinite, r"enc_b\.blocks\.2\.bias holds values that are not finite"),
    (nested, r"not the released VQ-VAE; it needs .* and has \['state_dict'\]"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_other_files_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    weights: dict[str, Any] = checkpoint()
    change(weights)
    with pytest.raises(DataError, match=message):
        read_released_vqvae(write(tmp_path / "bad.pt", weights), SIDE)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def test_a_pickle_that_runs_code_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"quantize_t.embed": Hostile()}, "hostile.pt")
    with pytest.raises(DataError, match="cannot be read as weights only"):
        read_released_vqvae(Path("hostile.pt"))
    assert not Path("executed").exists()
    with pytest.raises(DataError, match="no such file"):
        read_released_vqvae(Path("absent.pt"))
    Path("text.pt").write_text("nothing")
    with pytest.raises(DataError, match="cannot be read as weights only"):
        read_released_vqvae(Path("text.pt"))
