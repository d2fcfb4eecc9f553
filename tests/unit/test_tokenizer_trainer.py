"""The tokenizer's training on a few small pictures: order, resume, ranks, skips and outputs."""

import dataclasses
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.presets import tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.tokenizer_training import AdversarialConfig, TokenizerTrainingConfig
from megatron_cogview.data.captions import PICTURES_ONLY
from megatron_cogview.data.webdataset import WebDatasetTars
from megatron_cogview.testing.picture_tars import add, write_tars
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.training import tokenizer_trainer
from megatron_cogview.training.tokenizer_report import perplexity
from megatron_cogview.training.tokenizer_trainer import train_tokenizer
from megatron_cogview.training.tokenizer_update import TokenizerUpdate
from tests.unit.tokenizer_cases import CPU, config, rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tokenizer") / "tars")


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    """Output folder of a run."""
    train_tokenizer(config(data, data.parent / "finished"), CPU)
    return data.parent / "finished"


def test_run_leaves_everything_it_promises(finished: Path) -> None:
    tokenizer = load_image_tokenizer(finished / "image_tokenizer.safetensors")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["fingerprint"] == tokenizer.fingerprint
    assert summary["rejected"] == {"bad image": 1}
    assert summary["training_pictures"] + summary["validation_pictures"] == 39
    assert summary["pictures_judged"] == summary["validation_pictures"] > 0
    assert 1 <= summary["perplexity"] <= summary["codes_used"] <= 256
    listing = json.loads((finished / "reconstructions.json").read_text())
    shown = Image.open(finished / "reconstructions.png")
    assert len(listing) == min(16, summary["pictures_judged"])
    assert shown.width == min(8, len(listing)) * 20
    assert [r["step"] for r in rows(finished)] == [4, 6, 8, 12]
    for name in ("l1", "l2", "psnr", "ssim", "perplexity", "codes_used"):
        assert f"validation_{name}" in rows(finished)[1]
        assert rows(finished)[3][f"validation_{name}"] == pytest.approx(summary[name])
    assert list((finished / "tensorboard").iterdir())
    assert not (finished / "cache").exists()
    assert (
        RunConfig.from_json((finished / "config.json").read_text()).tokenizer_training.steps == 12
    )


def test_psnr_in_the_summary_is_that_of_the_file(finished: Path, data: Path) -> None:
    """Recomputed from the listed pictures with the formula written out."""
    tokenizer = load_image_tokenizer(finished / "image_tokenizer.safetensors")
    source = WebDatasetTars(data, PICTURES_ONLY)
    by_id = {p.id: p.image for part in source.parts() for p in source.read(part)}
    for line in json.loads((finished / "reconstructions.json").read_text()):
        original = np.asarray(Image.open(io.BytesIO(by_id[line["id"]])))
        copy = tokenizer.decode(tokenizer.encode(torch.from_numpy(original[None].copy())))[
            0
        ].numpy()
        mse = np.mean((original.astype(float) - copy) ** 2)
        assert line["psnr"] == pytest.approx(10 * np.log10(255**2 / mse), abs=2e-3)


def test_it_learns(data: Path, tmp_path: Path) -> None:
    train_tokenizer(config(data, tmp_path / "run", steps=150, log_every=1, save_every=150), CPU)
    losses = [r["reconstruction_loss"] for r in rows(tmp_path / "run")]
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["psnr"] > 15


def test_finished_run_returns_at_once_and_a_foreign_folder_is_refused(
    finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenizer_trainer, "_Run", None)
    with caplog.at_level("INFO"):
        train_tokenizer(config(data, finished), CPU)
    assert "already trained" in caplog.text
    with pytest.raises(DataError, match=r"tokenizer_training\.lr: 0\.01 -> 0\.02"):
        train_tokenizer(config(data, finished, lr=0.02), CPU)


def test_bf16_networks_train_fp32_weights(data: Path, tmp_path: Path) -> None:
    """Losses near fp32's; weights, moments and codebook stay fp32; fp32 cannot take over."""
    output = tmp_path / "bf16"
    train_tokenizer(config(data, output, precision="bf16"), CPU)
    exact = tmp_path / "fp32"
    train_tokenizer(config(data, exact, precision="fp32"), CPU)
    state = load_file(output / "checkpoints/step-000000012.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float32}
    for rough, fine in zip(rows(output), rows(exact), strict=True):
        name = "loss" if "loss" in fine else "validation_l2"
        assert rough[name] == pytest.approx(fine[name], rel=0.1)
    assert rows(output)[0]["loss"] != rows(exact)[0]["loss"]
    with pytest.raises(DataError, match="bf16: True -> False"):
        train_tokenizer(config(data, output, precision="fp32"), CPU)


def test_training_runs_with_repeatable_kernels(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TF32, as precision = fp32 says; the switches are put back."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32
    seen: set[tuple[bool, bool]] = set()
    step = TokenizerUpdate.__call__

    def noted(self: TokenizerUpdate, *arguments: Any) -> Any:
        seen.add((torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32))
        return step(self, *arguments)

    monkeypatch.setattr(TokenizerUpdate, "__call__", noted)
    train_tokenizer(config(data, tmp_path / "run", precision="fp32"), CPU)
    assert seen == {(True, False)}
    assert before == (torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32)


def test_perceptual_weights_must_be_there(data: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "vgg16.pt")
    settings = {"perceptual_weight": 1.0, "perceptual_weights": absent}
    with pytest.raises(DataError, match=r"vgg16\.pt"):
        train_tokenizer(config(data, tmp_path / "run", **settings), CPU)


def test_an_adversarial_phase_that_never_begins_is_refused(data: Path, tmp_path: Path) -> None:
    critic = AdversarialConfig(weight=0.1, start_step=12, channels=8, layers=1)
    refusal = r"adversarial\.start_step = 12: .* tokenizer_training\.steps = 12, .*weight to 0"
    with pytest.raises(ConfigError, match=refusal):
        config(data, tmp_path, "vqgan", adversarial=critic)
    config(data, tmp_path, "vqgan", adversarial=dataclasses.replace(critic, start_step=11))
    config(data, tmp_path, "vqgan", adversarial=dataclasses.replace(critic, weight=0.0))


def test_unusable_input(data: Path, tmp_path: Path) -> None:
    nameless = TokenizerTrainingConfig(output=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"tokenizer_training\.data"):
        train_tokenizer(dataclasses.replace(tiny(), tokenizer_training=nameless), CPU)
    with pytest.raises(DataError, match="no such file or folder"):
        train_tokenizer(config(tmp_path / "absent", tmp_path / "b"), CPU)
    bad = tmp_path / "bad"
    bad.mkdir()
    with tarfile.open(bad / "0.tar", "w") as tar:
        add(tar, "0.png", b"broken")
    with pytest.raises(DataError, match="no usable picture"):
        train_tokenizer(config(bad, tmp_path / "c"), CPU)


def test_perplexity_values() -> None:
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4.0)
    assert perplexity(torch.tensor([0, 7, 0])) == pytest.approx(1.0)
