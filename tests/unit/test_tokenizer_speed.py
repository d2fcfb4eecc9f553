"""The speed benchmark: its rival is right, its memory counter sees, its counts are exact."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_cogview.analysis import tokenizer_speed
from megatron_cogview.analysis.tokenizer_speed import (
    Settings,
    Subject,
    bf16_mismatch,
    measure,
    released_codes,
    report,
    smooth_pictures,
)
from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.testing.picture_tars import write_tars
from megatron_cogview.tokenization.image import save_image_tokenizer
from megatron_cogview.tokenization.pixels import OURS
from megatron_cogview.tokenization.quantizer import flatten_latents
from megatron_cogview.tokenization.vq_model import VQModel

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
SMALL = ImageTokenizerConfig(image_size=32, hidden_size=16, code_dim=8, num_codes=40)


def small_model() -> VQModel:
    torch.manual_seed(0)
    model = VQModel(SMALL).eval().requires_grad_(False)
    pictures = OURS.to_float(torch.from_numpy(smooth_pictures(8, 32)))
    model.quantize_t.initialise_from(flatten_latents(model.enc_b(pictures)))
    return model


def test_the_rival_finds_the_nearest_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, embed = (
        torch.randn(50, 6, generator=generator),
        torch.randn(6, 30, generator=generator),
    )
    codes, chosen = released_codes(vectors, embed)
    assert torch.equal(codes, torch.cdist(vectors.double(), embed.t().double()).argmin(1))
    assert torch.equal(chosen, embed.t()[codes])


def test_codes_that_differ_are_judged_by_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A released way that errs by hand in three codes, and ours in a fourth."""
    model = small_model()
    pictures = OURS.to_float(torch.from_numpy(smooth_pictures(4, 32)))
    ways = {name: getattr(tokenizer_speed, name) for name in ("our_codes", "released_codes")}

    def wrong(name: str, places: slice) -> None:
        def erring(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            codes, vectors = ways[name](*tensors)
            codes[places] = (codes[places] + 1) % SMALL.num_codes
            return codes, vectors

        monkeypatch.setattr(tokenizer_speed, name, erring)

    wrong("released_codes", slice(5, 8))
    wrong("our_codes", slice(11, 12))
    found = measure(Subject(model, pictures), 1)
    assert found["codes_differ"] == 4
    assert found["nearest_of_those"] == {"ours": 3, "released": 1}


def test_bf16_codes_are_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bf16 encoder that errs by hand: one code to a chosen distance in each picture."""
    model = small_model()
    pictures = OURS.to_float(torch.from_numpy(smooth_pictures(4, 32)))
    vectors = flatten_latents(model.enc_b(pictures)).double()
    exact = model.encode(pictures)
    distances = torch.cdist(vectors, model.quantize_t.embed.t().double())
    order = distances.sort(1)
    wrong = exact.flatten().clone()
    wrong[:3] = order.indices[:3, 1]
    wrong[3] = order.indices[3, -1]
    quotients = order.values[:4, [1, 1, 1, -1]].diagonal() / order.values[:4, 0]
    monkeypatch.setattr(model, "encode_bf16", lambda _: wrong.view_as(exact))
    found = bf16_mismatch(model, [pictures])
    assert found["vectors"] == exact.numel()
    assert found["mismatch"] == pytest.approx(4 / exact.numel())
    assert found["within_1_percent"] == pytest.approx((quotients <= 1.01).double().mean())
    squared = (quotients**2 <= 1.01).double().mean()
    assert found["within_1_percent_squared"] == pytest.approx(squared)
    monkeypatch.setattr(model, "encode_bf16", model.encode)
    assert bf16_mismatch(model, [pictures])["mismatch"] == 0.0


def test_the_tool_reports_on_given_weights_and_pictures(tmp_path: Path) -> None:
    weights = tmp_path / "tokenizer.safetensors"
    save_image_tokenizer(small_model(), SMALL, weights)
    data = write_tars(tmp_path / "tars")
    command = [sys.executable, "tools/bench_tokenizer.py", "--image-tokenizer", str(weights)]
    command += ["--data", str(data), "--batch-size", "4", "--batches", "2", "--repeats", "1"]
    command += ["--threads", "1", "--output", str(tmp_path / "bench.json")]
    run = subprocess.run(command, cwd=ROOT, check=True, timeout=120, capture_output=True, text=True)
    assert "times as fast" in run.stdout
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["vectors"] == 4 * 16
    assert found["bf16"]["vectors"] == 8 * 16
    assert sum(found["nearest_of_those"].values()) <= found["codes_differ"]
    machine = {"device", "cores", "threads", "system", "python", "numpy", "torch", "commit"}
    assert machine <= found.keys()
    assert found["threads"] == 1 and found["torch"] == torch.__version__
    for part in ("quantizer", "encode"):
        ours, released = found[part]["ours"], found[part]["released"]
        assert found[part]["speedup"] == pytest.approx(released["seconds"] / ours["seconds"])
        assert ours["pictures_per_second"] == pytest.approx(4 / ours["seconds"])
        assert ours["peak_bytes"] >= 0


def test_input_that_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="repeats = 0"):
        report(Settings(repeats=0))
    weights = tmp_path / "tokenizer.safetensors"
    save_image_tokenizer(small_model(), SMALL, weights)
    data = write_tars(tmp_path / "tars", number=4)
    with pytest.raises(DataError, match="4 pictures, 128 are needed"):
        report(Settings(image_tokenizer=weights, data=(data,)))
