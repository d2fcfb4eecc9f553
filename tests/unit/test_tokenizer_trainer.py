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
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig, TokenizerTrainingConfig
from megatron_cogview.configs.presets import tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.training import picture_stream, tokenizer_trainer
from megatron_cogview.training.metrics import read_metrics
from megatron_cogview.training.picture_stream import Pictures, PictureTars, training_batch
from megatron_cogview.training.tokenizer_report import perplexity, psnr
from megatron_cogview.training.tokenizer_trainer import World, train_tokenizer

CPU = World(device=torch.device("cpu"))
MICRO: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "lr": 1e-2,
    "warmup_steps": 2,
    "validation_fraction": 0.2,
    "log_every": 4,
    "save_every": 5,
}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def png(index: int) -> bytes:
    """A smooth picture: two colours blended along a direction that depends on the index."""
    rng = np.random.default_rng(index)
    ramp = np.linspace(0, 1, 16)[:, None, None] * np.ones((1, 16, 1))
    ramp = ramp if index % 2 else ramp.transpose(1, 0, 2)
    colours = rng.integers(0, 256, (2, 3))
    file = io.BytesIO()
    pixels = (ramp * colours[0] + (1 - ramp) * colours[1]).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tars(folder: Path, number: int = 40) -> Path:
    """Two tars; one picture without JSON, one without caption, one that is no picture."""
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"{part:06d}.tar", "w") as tar:
            for index in range(part, number, 2):
                add(tar, f"{index:06d}.png", b"broken" if index == 7 else png(index))
                about = {"id": f"p{index}", "caption": "圆"}
                if index == 4:
                    del about["caption"]
                if index != 3:
                    add(tar, f"{index:06d}.json", json.dumps(about).encode())
    return folder


def config(data: Path, output: Path, **training: Any) -> RunConfig:
    """Micro size: 16-pixel pictures, 8 x 8 codes of the demo's vocabulary."""
    base = tiny()
    return dataclasses.replace(
        base,
        image_tokenizer=ImageTokenizerConfig(
            image_size=16,
            downsampling_layers=1,
            hidden_size=8,
            code_dim=4,
            num_codes=256,
            codebook_init="data",
            revive_dead_codes=True,
        ),
        tokenizer_training=TokenizerTrainingConfig(
            **{"data": str(data), "output": str(output), **MICRO, **training}
        ),
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tokenizer") / "tars")


@pytest.fixture(scope="module")
def finished(data: Path) -> Path:
    """Output folder of one uninterrupted run."""
    train_tokenizer(config(data, data.parent / "run"), CPU)
    return data.parent / "run"


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
    assert [r["step"] for r in rows(finished)] == [4, 8, 12]
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


def test_resumed_run_is_bitwise_the_uninterrupted_one(
    finished: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    step = tokenizer_trainer._Run._step

    def killed(self: Any, number: int) -> Any:
        if number == 7:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(tokenizer_trainer._Run, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(config(data, output), CPU)
    assert not (output / "image_tokenizer.safetensors").exists()
    resumed: list[int] = []

    def noted(self: Any, number: int) -> Any:
        resumed.append(number)
        return step(self, number)

    monkeypatch.setattr(tokenizer_trainer._Run, "_step", noted)
    train_tokenizer(config(data, output), CPU)
    assert resumed == list(range(5, 12)), "it did not resume at the checkpoint of step 5"
    name = "image_tokenizer.safetensors"
    assert (output / name).read_bytes() == (finished / name).read_bytes()
    last = "checkpoints/step-000000012.safetensors"
    one, other = load_file(finished / last), load_file(output / last)
    assert all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())
    assert [r["loss"] for r in rows(output)][-1] == [r["loss"] for r in rows(finished)][-1]


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
    train_tokenizer(config(Path(arguments["data"]), Path(arguments["output"])), world)


def test_two_processes_train_what_one_does(finished: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = {"data": str(data), "output": str(output)}
    run_distributed(f"{__name__}:two_process_case", 2, arguments, timeout_s=90.0)
    name = "image_tokenizer.safetensors"
    one, two = load_file(finished / name), load_file(output / name)
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-5)
    for first, second in zip(rows(finished), rows(output), strict=True):
        assert first == pytest.approx(second, rel=1e-4)


def flat_pictures(count: int) -> Pictures:
    """Picture i: left half i, right half i + 100."""
    pixels = np.zeros((count, 4, 4, 3), np.uint8)
    pixels += np.arange(count, dtype=np.uint8)[:, None, None, None]
    pixels[:, :, 2:] += 100
    return Pictures(pixels, [], np.arange(count), np.arange(0), {})


def test_order_is_one_permutation_per_epoch_for_any_number_of_processes() -> None:
    pictures = flat_pictures(30)
    settings: dict[str, Any] = {"batch_size": 7, "seed": 5, "flip": True}
    whole = [training_batch(pictures, step, **settings) for step in range(60)]
    parts = [
        np.concatenate([training_batch(pictures, s, part=(r, 3), **settings) for r in range(3)])
        for s in range(60)
    ]
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
    seen = np.concatenate(whole).min(axis=(1, 2, 3))
    epochs = seen.reshape(14, 30)
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 14
    mirrored = np.concatenate(whole)[:, 0, 0, 0] != seen
    assert 0.4 < mirrored.mean() < 0.6
    plain = training_batch(pictures, 0, batch_size=7, seed=5, flip=False)
    assert (plain[:, 0, 0, 0] == plain.min(axis=(1, 2, 3))).all()
    other = training_batch(pictures, 0, batch_size=7, seed=6, flip=False)
    assert not np.array_equal(plain, other)


def test_split_follows_the_ids_alone() -> None:
    ids = [f"id{i}" for i in range(2000)]
    train, held_out = picture_stream.split(ids, 0.1)
    assert sorted([*train, *held_out]) == list(range(2000))
    assert 150 < len(held_out) < 250
    fewer = {ids[i] for i in picture_stream.split(ids[:700], 0.1)[1]}
    assert fewer == {ids[i] for i in held_out if i < 700}
    for fraction in (1e-9, 1 - 1e-9):
        sides = picture_stream.split(ids[:10], fraction)
        assert min(len(side) for side in sides) == 1
    with pytest.raises(DataError, match="at least"):
        picture_stream.split(["same", "same"], 0.1)


def test_file_cache_holds_the_same_pictures_as_memory(data: Path, tmp_path: Path) -> None:
    held = picture_stream.decode_all(PictureTars(data), 16, tmp_path / "a", always_file=False)
    spilled = picture_stream.decode_all(
        PictureTars(data), 16, tmp_path / "b", always_file=False, memory_limit=16 * 16 * 3 * 10
    )
    again = picture_stream.decode_all(PictureTars(data), 16, tmp_path / "b", always_file=True)
    assert not (tmp_path / "a.bin").exists()
    assert isinstance(spilled[0], np.memmap)
    for other in (spilled, again):
        assert np.array_equal(held[0], other[0])
        assert held[1:] == other[1:]
    assert len(held[1]) == 39
    assert {"p4", "000003"} <= set(held[1]), "pictures without caption or JSON were lost"
    (tmp_path / "b.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="size"):
        picture_stream.open_cache(tmp_path / "b", 16)


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


def test_psnr_and_perplexity_values() -> None:
    black = np.zeros((1, 2, 2, 3), np.uint8)
    assert psnr(black, black)[0] == 100.0
    assert psnr(black, black + 255)[0] == 0.0
    assert psnr(black, black + 16)[0] == pytest.approx(20 * np.log10(255 / 16))
    assert perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4.0)
