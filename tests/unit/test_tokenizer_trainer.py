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
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file

from megatron_cogview.configs.errors import CheckpointError, ConfigError, DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig, VQGANConfig
from megatron_cogview.configs.presets import tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.tokenizer_training import AdversarialConfig, TokenizerTrainingConfig
from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.testing.picture_tars import add, write_tars
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.training import tokenizer_trainer
from megatron_cogview.training.metrics import read_metrics
from megatron_cogview.training.picture_stream import PictureTars
from megatron_cogview.training.tokenizer_report import perplexity
from megatron_cogview.training.tokenizer_trainer import train_tokenizer
from megatron_cogview.training.tokenizer_update import TokenizerUpdate
from megatron_cogview.training.world import World

VARIANTS = ("moving_average", "straight_through", "gumbel", "fixed", "vqgan")
CPU = World(device=torch.device("cpu"))
MICRO: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "lr": 1e-2,
    "warmup_steps": 2,
    "validation_fraction": 0.2,
    "log_every": 4,
    "save_every": 5,
    "validate_every": 6,
    "random_crop": 0.0,
}


def config(data: Path, output: Path, variant: str = "moving_average", **training: Any) -> RunConfig:
    """Micro size: 16-pixel pictures, 8 x 8 codes of the demo's vocabulary."""
    base = tiny()
    tokenizer: dict[str, Any] = {
        "image_size": 16,
        "downsampling_layers": 1,
        "hidden_size": 8,
        "code_dim": 4,
        "num_codes": 256,
        "codebook_init": "data",
        "revive_dead_codes": True,
    }
    if variant == "vqgan":
        tokenizer |= {"kind": "vqgan", "vqgan": VQGANConfig(multipliers=(1, 2), norm_groups=4)}
        critic = AdversarialConfig(weight=0.8, start_step=3, channels=8, layers=1)
        training = {"adversarial": critic, "random_crop": 0.25, "lr": 1e-3, **training}
    elif variant != "moving_average":
        tokenizer |= {"codebook": variant, "revive_dead_codes": False}
    if variant == "gumbel":
        # Codes on top of vectors would make the norm's slope, and so a draw, a matter of rounding.
        tokenizer |= {"codebook_init": "xavier"}
    return dataclasses.replace(
        base,
        image_tokenizer=ImageTokenizerConfig(**tokenizer),
        tokenizer_training=TokenizerTrainingConfig(
            **{"data": (str(data),), "output": str(output), **MICRO, **training}
        ),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tokenizer") / "tars")


@pytest.fixture(scope="module")
def runs(data: Path) -> dict[str, Path]:
    """Output folders of uninterrupted runs."""
    folders = {variant: data.parent / variant for variant in VARIANTS}
    for variant, folder in folders.items():
        train_tokenizer(config(data, folder, variant), CPU)
    return folders


@pytest.fixture(scope="module")
def finished(runs: dict[str, Path]) -> Path:
    """Output folder of one of them."""
    return runs["moving_average"]


def rows(path: Path) -> list[dict[str, float]]:
    """Metrics without the clock."""
    kept = read_metrics(path / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k != "pictures_per_second"} for r in kept]


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
    by_id = {
        p.id: p.image for tar in PictureTars(data).shards() for p in PictureTars(data).read(tar)
    }
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_is_bitwise_the_uninterrupted_one(
    variant: str,
    runs: dict[str, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finished = runs[variant]
    output = tmp_path / "run"
    step = tokenizer_trainer._Run._step

    def killed(self: Any, number: int) -> Any:
        if number == 7:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(tokenizer_trainer._Run, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(config(data, output, variant), CPU)
    assert not (output / "image_tokenizer.safetensors").exists()
    resumed: list[int] = []

    def noted(self: Any, number: int) -> Any:
        resumed.append(number)
        return step(self, number)

    monkeypatch.setattr(tokenizer_trainer._Run, "_step", noted)
    train_tokenizer(config(data, output, variant), CPU)
    assert resumed == list(range(5, 12)), "it did not resume at the checkpoint of step 5"
    name = "image_tokenizer.safetensors"
    assert (output / name).read_bytes() == (finished / name).read_bytes()
    last = "checkpoints/step-000000012.safetensors"
    one, other = load_file(finished / last), load_file(output / last)
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())
    # The killed run had written the line of step 6 already; codes of step 5 to 8 are of one life.
    assert rows(output)[-1] == rows(finished)[-1]


def test_finished_run_returns_at_once_and_a_foreign_folder_is_refused(
    finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tokenizer_trainer, "_Run", None)
    with caplog.at_level("INFO"):
        train_tokenizer(config(data, finished), CPU)
    assert "already trained" in caplog.text
    with pytest.raises(DataError, match=r"tokenizer_training\.lr: 0\.01 -> 0\.02"):
        train_tokenizer(config(data, finished, lr=0.02), CPU)


def test_damaged_checkpoints(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train_tokenizer(config(data, output), CPU)
    final = (output / "image_tokenizer.safetensors").read_bytes()
    (output / "summary.json").unlink()
    newest, older = sorted((output / "checkpoints").iterdir(), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-10])
    train_tokenizer(config(data, output), CPU)
    assert (output / "image_tokenizer.safetensors").read_bytes() == final
    (output / "summary.json").unlink()
    for path in (newest, older):
        path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints"):
        train_tokenizer(config(data, output), CPU)


def two_process_case(arguments: dict[str, str]) -> None:
    group = dist.group.WORLD
    world = World(torch.device("cpu"), dist.get_rank(), dist.get_world_size(), group, group)
    for variant in VARIANTS:
        output = Path(arguments["output"]) / variant
        train_tokenizer(config(Path(arguments["data"]), output, variant), world)


def test_two_processes_train_what_one_does(
    runs: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    """Losses, weights, codebooks, moments and discriminator, to fp32 rounding."""
    arguments = {"data": str(data), "output": str(tmp_path)}
    run_distributed(f"{__name__}:two_process_case", 2, arguments, timeout_s=150.0)
    last = "checkpoints/step-000000012.safetensors"
    for variant, folder in runs.items():
        one, two = load_file(folder / last), load_file(tmp_path / variant / last)
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(
                two[key],
                value,
                rtol=1e-3,
                atol=2e-5,
                msg=lambda m, k=key, v=variant: f"{v} {k}: {m}",
            )
        for first, second in zip(rows(folder), rows(tmp_path / variant), strict=True):
            assert first == pytest.approx(second, rel=1e-3), variant


def test_the_adversarial_phase_begins_where_it_should(runs: dict[str, Path]) -> None:
    """The discriminator learns from its first step on, and both losses are reported."""
    last = rows(runs["vqgan"])[-1]
    assert {"adversarial_loss", "discriminator_loss", "adversarial_weight"} <= last.keys()
    assert 0.0 < last["adversarial_weight"] <= 0.8e4
    state = load_file(runs["vqgan"] / "checkpoints/step-000000012.safetensors")
    steps = {v.item() for k, v in state.items() if k.startswith("discriminator.adam.step")}
    assert steps == {9.0}


def test_adversarial_weight_balances_the_gradients_of_the_last_layer(data: Path) -> None:
    """Recomputed from the networks of the first step, by plain autograd."""
    settings = config(data, data.parent / "weight", "vqgan")
    critic = dataclasses.replace(settings.tokenizer_training.adversarial, start_step=0)
    training = dataclasses.replace(settings.tokenizer_training, adversarial=critic)
    settings = dataclasses.replace(settings, tokenizer_training=training)
    update = TokenizerUpdate(settings, CPU)
    other = TokenizerUpdate(settings, CPU)
    pictures = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    losses, _ = update(0, pictures)
    assert other.discriminator is not None
    result = other.model(pictures)
    copy = result.reconstruction_BCSS
    last = other.model.dec[-1].weight
    pixels = (copy - pictures).square().mean()
    scores = -other.discriminator(copy).mean()
    norms = [torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (pixels, scores)]
    expected = 0.8 * norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(losses["adversarial_weight"], expected, rtol=1e-4, atol=0.0)
    whole = pixels + 0.25 * result.commitment + expected * scores
    torch.testing.assert_close(losses["loss"], whole.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["moving_average", "straight_through"])
def test_a_codebook_drawn_late_starts_from_a_trained_encoder(
    variant: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it there are no codes and no losses of theirs; a resume across it is exact."""
    late: dict[str, Any] = {"codebook_warmup_steps": 6, "log_every": 1}
    for name in ("one", "other"):
        folder = tmp_path / name
        if name == "other":
            step = tokenizer_trainer._Run._step

            def killed(self: Any, number: int, inner: Any = step) -> Any:
                if number == 6:
                    raise KeyboardInterrupt
                return inner(self, number)

            monkeypatch.setattr(tokenizer_trainer._Run, "_step", killed)
            with pytest.raises(KeyboardInterrupt):
                train_tokenizer(config(data, folder, variant, **late), CPU)
            monkeypatch.setattr(tokenizer_trainer._Run, "_step", step)
            assert (folder / "checkpoints" / "step-000000005.safetensors").is_file()
        train_tokenizer(config(data, folder, variant, **late), CPU)
    curve = rows(tmp_path / "one")
    assert [r["commitment_loss"] == 0.0 for r in curve] == [True] * 6 + [False] * 6
    assert [r["codes_in_use"] > 0 for r in curve] == [False] * 6 + [True] * 6
    assert curve[5]["perplexity"] is None
    # Validation is due after steps 6 and 12; after 6 there is no codebook yet.
    assert [r["step"] for r in curve if "validation_l2" in r] == [12]
    for name in ("image_tokenizer.safetensors", "checkpoints/step-000000012.safetensors"):
        one, other = load_file(tmp_path / "one" / name), load_file(tmp_path / "other" / name)
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    with pytest.raises(ConfigError, match=r"codebook_warmup_steps = 12"):
        config(data, tmp_path, codebook_warmup_steps=12)


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


def test_perceptual_weights_must_be_there(data: Path, tmp_path: Path) -> None:
    absent = str(tmp_path / "vgg16.pt")
    settings = {"perceptual_weight": 1.0, "perceptual_weights": absent}
    with pytest.raises(DataError, match=r"vgg16\.pt"):
        train_tokenizer(config(data, tmp_path / "run", **settings), CPU)


def test_unusable_input(data: Path, tmp_path: Path) -> None:
    nameless = TokenizerTrainingConfig(output=str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"tokenizer_training\.data"):
        train_tokenizer(dataclasses.replace(tiny(), tokenizer_training=nameless), CPU)
    with pytest.raises(DataError, match="no such folder"):
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
