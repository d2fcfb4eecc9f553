"""Reconstruction of a folder of tars: files, records and PSNR against a known error."""

import io
import json
import tarfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.evaluation import reconstruction
from megatron_cogview.evaluation.reconstruction import reconstruct
from megatron_cogview.tokenization import fidelity

SIDE = 16


class Darkening:
    """Keeps each picture as it is, minus a fixed amount: the error is known."""

    config = ImageTokenizerConfig(image_size=SIDE, downsampling_layers=1)
    fingerprint = "f" * 64

    def __init__(self, amount: int) -> None:
        self.amount = amount
        self.batches: list[int] = []

    def encode(self, images_NHWC: Tensor) -> Tensor:
        self.batches.append(len(images_NHWC))
        return images_NHWC

    def decode(self, codes_NHW: Tensor) -> Tensor:
        return (codes_NHW.int() - self.amount).to(torch.uint8)


def write_tar(path: Path, pictures: dict[str, np.ndarray | bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, (name, picture) in enumerate(pictures.items()):
            buffer = io.BytesIO()
            if isinstance(picture, bytes):
                buffer.write(picture)
            else:
                Image.fromarray(picture).save(buffer, "PNG")
            text = json.dumps({"id": name, "caption": "c", "colour": "红"}).encode()
            for extension, data in (("png", buffer.getvalue()), ("json", text)):
                member = tarfile.TarInfo(f"{key:06d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def pictures(count: int, start: int = 0) -> dict[str, np.ndarray | bytes]:
    rng = np.random.default_rng(start)
    return {
        f"p-{start + i}": rng.integers(50, 200, (SIDE, SIDE, 3), dtype=np.uint8)
        for i in range(count)
    }


def test_pictures_records_and_psnr(tmp_path: Path) -> None:
    given = pictures(70) | {"broken": b"no picture"}
    write_tar(tmp_path / "a.tar", given)
    write_tar(tmp_path / "b.tar", pictures(30, start=100))
    tokenizer = Darkening(10)
    summary = reconstruct([tmp_path], tokenizer, tmp_path / "out", limit=80)
    # Mean squared error 100: 10 log10(255^2 / 100).
    assert summary["psnr"] == pytest.approx(28.1308, abs=1e-3)
    assert summary["pictures"] == sum(tokenizer.batches) == 80
    assert summary["skipped"] == {"unusable image": 1}
    lines = (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    originals = np.stack([given[name] for name in list(given)[:70]])
    ssim = fidelity.ssim(originals, originals - 10)
    assert [r["ssim"] for r in records[:70]] == pytest.approx(ssim.tolist())
    assert ssim.max() < 1.0
    assert summary["ssim"] == pytest.approx(np.mean([r["ssim"] for r in records]))
    assert [r["id"] for r in records[:71]] == [*list(given)[:70], "p-100"]
    assert records[0]["colour"] == "红"
    with Image.open(tmp_path / "out" / "p-3.png") as image:
        assert np.array_equal(np.asarray(image) + 10, given["p-3"])
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size == (4 * (2 * 64 + 10), 4 * (64 + 14))
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_an_exact_copy_has_a_finite_psnr(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pictures(2))
    summary = reconstruct([tmp_path], Darkening(0), tmp_path / "out")
    assert (summary["psnr"], summary["ssim"]) == pytest.approx((100.0, 1.0))


def test_the_sheet_says_psnr_and_ssim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def text(self: object, place: object, caption: str, **options: object) -> None:
        drawn.append(caption)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    given = pictures(3)
    write_tar(tmp_path / "a.tar", given)
    reconstruct([tmp_path], Darkening(10), tmp_path / "out")
    originals = np.stack(list(given.values()))
    ssim = fidelity.ssim(originals, originals - 10)
    assert drawn == [f"28.1 dB  {value:.2f}" for value in ssim]


def test_several_folders_in_their_order_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def metadata(path: Path) -> dict[str, dict[str, Any]]:
        read.append(path.name)
        return {}

    monkeypatch.setattr(reconstruction, "_metadata", metadata)
    # A bar that is switched off does not count.
    monkeypatch.setattr(reconstruction, "tqdm", partial(tqdm, disable=True))
    for start, folder in enumerate(("second", "first")):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "1.tar", pictures(3, start=10 * start))
    write_tar(tmp_path / "second" / "2.tar", pictures(3, start=20))
    folders = [tmp_path / "first", tmp_path / "second"]
    assert reconstruct(folders, Darkening(1), tmp_path / "out", limit=5)["pictures"] == 5
    lines = (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["p-10", "p-11", "p-12", "p-0", "p-1"]
    assert read == ["1.tar", "1.tar"]
    with pytest.raises(DataError, match=r"id 'p-10' occurs twice"):
        reconstruct([folders[0], folders[0]], Darkening(1), tmp_path / "twice")
    with pytest.raises(ConfigError, match=r"data = .* at least one folder"):
        reconstruct([], Darkening(1), tmp_path / "none")


def test_ids_that_cannot_name_files_get_names_that_can(tmp_path: Path) -> None:
    names = ["../escape", "a/b", "a_b", ".hidden", "图", "x" * 300]
    picture = pictures(1)["p-0"]
    write_tar(tmp_path / "a.tar", dict.fromkeys(names, picture))
    out = tmp_path / "out"
    assert reconstruct([tmp_path], Darkening(0), out)["pictures"] == len(names)
    lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    files = {record["id"]: record["file"] for record in map(json.loads, lines)}
    assert list(files) == names
    assert files["a_b"] == "a_b.png"
    assert len(set(files.values())) == len(names)
    assert {p.name for p in out.glob("**/*.png")} == {*files.values(), "sheet.png"}
    assert not [p for p in tmp_path.iterdir() if p.name not in ("a.tar", "out")]


def test_pictures_without_captions_and_tables_are_reconstructed(tmp_path: Path) -> None:
    """What an image tokenizer was trained on can be looked at."""
    buffer = io.BytesIO()
    Image.fromarray(pictures(1)["p-0"]).save(buffer, "PNG")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        member = tarfile.TarInfo("1.png")
        member.size = len(buffer.getvalue())
        tar.addfile(member, io.BytesIO(buffer.getvalue()))
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "1.png").write_bytes(buffer.getvalue())
    (tmp_path / "table" / "pairs.jsonl").write_text('{"image": "1.png"}\n')
    for folder in ("tars", "table"):
        assert reconstruct([tmp_path / folder], Darkening(0), tmp_path / f"{folder}-out")


def test_pairs_without_an_id_are_named_after_tar_and_key(tmp_path: Path) -> None:
    """As img2dataset writes them; two tars may hold the same key."""
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            buffer = io.BytesIO()
            Image.fromarray(pictures(1)["p-0"]).save(buffer, "PNG")
            for extension, data in (("png", buffer.getvalue()), ("txt", b"caption")):
                member = tarfile.TarInfo(f"000.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    reconstruct([tmp_path], Darkening(0), tmp_path / "out")
    lines = (tmp_path / "out" / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["id"] for record in records] == ["a/000", "b/000"]
    assert all((tmp_path / "out" / record["file"]).is_file() for record in records)


def test_repeated_ids_and_empty_input_are_refused(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, pictures(1))
    with pytest.raises(DataError, match="occurs twice"):
        reconstruct([tmp_path], Darkening(0), tmp_path / "out")
    with pytest.raises(ConfigError, match="limit = 0"):
        reconstruct([tmp_path], Darkening(0), tmp_path / "out", limit=0)
    (tmp_path / "bad").mkdir()
    write_tar(tmp_path / "bad" / "a.tar", {"x": b"no picture"})
    with pytest.raises(DataError, match="no usable pair"):
        reconstruct([tmp_path / "bad"], Darkening(0), tmp_path / "out")
