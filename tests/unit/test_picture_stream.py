"""The order, windows, split and cache of training pictures."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import images
from megatron_cogview.data.captions import PICTURES_ONLY
from megatron_cogview.data.webdataset import WebDatasetTars
from megatron_cogview.testing.picture_tars import write_tars
from megatron_cogview.training import picture_stream
from megatron_cogview.training.picture_stream import Pictures, Sizes, training_batch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("stream") / "tars")


def tars(folder: Path) -> WebDatasetTars:
    return WebDatasetTars(folder, PICTURES_ONLY)


def stored(pixels: np.ndarray) -> Pictures:
    """Every picture is trained on."""
    none = np.zeros((0, 4, 4, 3), np.uint8)
    return Pictures(pixels, np.arange(len(pixels)), none, [], {})


def flat_pictures(count: int) -> Pictures:
    """Picture i: left half i, right half i + 100."""
    pixels = np.zeros((count, 4, 4, 3), np.uint8)
    pixels += np.arange(count, dtype=np.uint8)[:, None, None, None]
    pixels[:, :, 2:] += 100
    return stored(pixels)


def test_order_is_one_permutation_per_epoch_for_any_number_of_processes() -> None:
    pictures = flat_pictures(30)
    settings: dict[str, Any] = {"image_size": 4, "batch_size": 7, "seed": 5, "flip": True}
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
    settings |= {"flip": False}
    plain = training_batch(pictures, 0, **settings)
    assert (plain[:, 0, 0, 0] == plain.min(axis=(1, 2, 3))).all()
    other = training_batch(pictures, 0, **{**settings, "seed": 6})
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


def test_windows_lie_everywhere_in_the_stored_picture() -> None:
    """Each pixel names its place, so a window says where it was taken and whether mirrored."""
    rows, columns = np.mgrid[0:9, 0:9]
    one = np.stack([rows, columns, rows * 0], axis=2).astype(np.uint8)
    pictures = stored(np.stack([one + np.array([0, 0, i], np.uint8) for i in range(10)]))
    settings: dict[str, Any] = {"image_size": 6, "batch_size": 7, "seed": 5, "flip": True}
    batches = [training_batch(pictures, step, **settings) for step in range(100)]
    places, mirrored = set(), 0
    for window in np.concatenate(batches).astype(int):
        flipped = window[0, 0, 1] > window[0, 1, 1]
        window = window[:, ::-1] if flipped else window
        mirrored += flipped
        top, left = window[0, 0, :2]
        places.add((top, left))
        expected = one[top : top + 6, left : left + 6, :2]
        assert np.array_equal(window[:, :, :2], expected)
    assert places == {(top, left) for top in range(4) for left in range(4)}
    assert 280 < mirrored < 420
    parts = [training_batch(pictures, 3, part=(r, 3), **settings) for r in range(3)]
    assert np.array_equal(np.concatenate(parts), batches[3])


@pytest.mark.parametrize("side", [16, 20])
def test_held_out_pictures_are_as_the_tokenisation_tool_sees_them(data: Path, side: int) -> None:
    found = picture_stream.load(
        [tars(data)], Sizes(16, side), 0.3, data / "none", always_file=False
    )
    assert found.pixels_NLLC.shape[1:] == (side, side, 3)
    assert 3 < len(found.validation_ids) == len(found.validation_VSSC)
    source = tars(data)
    by_id = {p.id: p.image for part in source.parts() for p in source.read(part)}
    for identity, view in zip(found.validation_ids, found.validation_VSSC, strict=True):
        assert np.array_equal(view, images.decode(by_id[identity], 16))
        assert np.array_equal(view, np.asarray(Image.open(io.BytesIO(by_id[identity]))))


def test_several_folders_are_one_data_set(data: Path, tmp_path: Path) -> None:
    other = write_tars(tmp_path / "more", number=10)
    both = picture_stream.load(
        [tars(data), tars(other)],
        Sizes(16, 16),
        0.2,
        tmp_path / "c",
        always_file=False,
    )
    assert len(both.pixels_NLLC) == 39 + 9
    assert both.rejected == {"bad image": 2}


def test_file_cache_holds_the_same_pictures_as_memory(data: Path, tmp_path: Path) -> None:
    sizes = Sizes(16, 18)

    def load(stem: str, **settings: Any) -> Pictures:
        arguments = {"always_file": False, **settings}
        return picture_stream.load([tars(data)], sizes, 0.2, tmp_path / stem, **arguments)

    held = load("a")
    spilled = load("b", memory_limit=18 * 18 * 3 * 10)
    again = load("b", always_file=True)
    assert not (tmp_path / "a.bin").exists()
    assert isinstance(spilled.pixels_NLLC, np.memmap)
    for other in (spilled, again):
        assert np.array_equal(held.pixels_NLLC, other.pixels_NLLC)
        assert np.array_equal(held.train_rows, other.train_rows)
        assert np.array_equal(held.validation_VSSC, other.validation_VSSC)
        assert held.validation_ids == other.validation_ids
        assert held.rejected == other.rejected
    assert len(held.pixels_NLLC) == 39, "pictures without caption or JSON were lost"
    (tmp_path / "b.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="size"):
        picture_stream.open_cache(tmp_path / "b", sizes, 0.2)


def test_a_data_set_too_small_for_its_fraction_still_holds_one_out(tmp_path: Path) -> None:
    few = write_tars(tmp_path / "few", number=6)
    found = picture_stream.load([tars(few)], Sizes(16, 20), 1e-6, tmp_path / "c", always_file=False)
    assert len(found.validation_VSSC) == len(found.validation_ids) == 1
    assert found.validation_VSSC.shape == (1, 16, 16, 3)
    assert len(found.train_rows) == 5
