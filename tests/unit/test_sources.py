"""data.sources: the right reader for each path, and the same pairs from each."""

import csv
import errno
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data import webdataset
from megatron_cogview.data.captions import CaptionRule, Recaptioned
from megatron_cogview.data.raw import PairSource, RawPair, Rejected
from megatron_cogview.data.sources import (
    SourceOptions,
    open_pictures,
    open_source,
    read_captions,
)
from megatron_cogview.data.tables import TableSource
from megatron_cogview.data.webdataset import WebDatasetTars


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_tar(path: Path, pairs: list[RawPair]) -> Path:
    """As img2dataset writes it, with the id among the additional columns."""
    with tarfile.open(path, "w") as tar:
        for number, pair in enumerate(pairs):
            key = f"{number:09d}"
            about = {"caption": pair.caption, "id": pair.id, "key": key, "status": "success"}
            add(tar, f"{key}.jpg", pair.image)
            add(tar, f"{key}.txt", pair.caption.encode())
            add(tar, f"{key}.json", json.dumps(about).encode())
    return path


def read_all(source: PairSource) -> list[RawPair | Rejected]:
    return [item for part in source.parts() for item in source.read(part)]


def export(folder: Path, pairs: list[RawPair], kind: str) -> Path:
    """The pairs in a new folder of that kind."""
    folder.mkdir()
    if kind == "tar":
        return write_tar(folder / "00000.tar", pairs).parent
    rows = []
    for number, pair in enumerate(pairs):
        name = f"pictures/{number}.jpg"
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / name).write_bytes(pair.image)
        rows.append({"image": name, "caption": pair.caption, "id": pair.id})
    with open(folder / f"pairs.{kind}", "w", encoding="utf-8", newline="") as file:
        if kind == "jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=",\t"[kind == "tsv"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def content(items: list[RawPair | Rejected]) -> list[tuple[str, str, bytes]]:
    assert all(isinstance(item, RawPair) for item in items)
    return [(i.id, i.caption, i.image) for i in items if isinstance(i, RawPair)]


@pytest.mark.parametrize("kind", ["tar", "jsonl", "csv", "tsv"])
def test_real_pairs_are_the_same_in_every_format(
    tmp_path: Path, shared_data: Path, kind: str
) -> None:
    photos = read_all(WebDatasetTars(shared_data / "coco_photos"))
    pairs = [item for item in photos if isinstance(item, RawPair)]
    assert len(pairs) == len(photos) == 44
    folder = export(tmp_path / "data", pairs, kind)
    source = open_source(folder)
    source.check()
    assert content(read_all(source)) == content(photos)
    (file,) = [p for p in folder.iterdir() if p.is_file()]
    assert content(read_all(open_source(file))) == content(photos)
    # Texts alone, also where the pictures are somewhere else.
    for picture in folder.glob("pictures/*"):
        picture.unlink()
    assert list(read_captions(folder, ("caption",))) == [pair.caption for pair in pairs]


PAIRS = [RawPair(f"i{n}", b"%d" % n, f"caption {n}", "") for n in range(3)]


def test_options_reach_the_reader(tmp_path: Path) -> None:
    folder = export(tmp_path / "t", PAIRS, "csv")
    options = SourceOptions(
        caption_key="id", image_key="image", image_root=tmp_path, rows_per_part=2
    )
    expected = TableSource(
        folder, CaptionRule(key="id"), image_key="image", image_root=tmp_path, rows_per_part=2
    )
    assert open_source(folder, options).description == expected.description
    with pytest.raises(ConfigError, match="rows_per_part = 0"):
        open_source(folder, SourceOptions(rows_per_part=0))
    tars = export(tmp_path / "w", PAIRS, "tar")
    rule = CaptionRule(key="text", language="zh", caption_from="json")
    found = open_source(tars, SourceOptions(caption_key="text", language="zh", caption_from="json"))
    assert found.description == WebDatasetTars(tars, rule).description
    for name, value in (("image_key", "x"), ("image_root", tmp_path), ("rows_per_part", 5)):
        with pytest.raises(ConfigError, match=f"{name} = .* is for tables"):
            open_source(tars, SourceOptions(**{name: value}))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["tar", "jsonl", "csv"])
def test_pictures_are_read_with_and_without_captions(tmp_path: Path, kind: str) -> None:
    folder = export(tmp_path / "data", PAIRS, kind)
    assert content(read_all(open_pictures(folder))) == content(read_all(open_source(folder)))
    bare = export(tmp_path / "bare", PAIRS, "tar")
    (bare / "00000.tar").unlink()
    if kind == "tar":
        with tarfile.open(bare / "0.tar", "w") as tar:
            add(tar, "k.png", b"p")
    else:
        (bare / "k.png").write_bytes(b"p")
        row = '{"image": "k.png"}\n' if kind == "jsonl" else "image\nk.png\n"
        (bare / f"rows.{kind}").write_text(row)
    source = open_pictures(bare)
    source.check()
    (pair,) = read_all(source)
    assert isinstance(pair, RawPair)
    assert (pair.image, pair.caption) == (b"p", "")
    assert [i.reason for i in read_all(open_source(bare)) if isinstance(i, Rejected)] == [
        "no caption"
    ]
    with pytest.raises(DataError, match="no such file or folder"):
        open_pictures(tmp_path / "none")


def test_kinds_are_told_by_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        open_source(tmp_path / "none")
    with pytest.raises(DataError, match="there are: no files"):
        open_source(tmp_path)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r"1 x \.parquet.*kind = 'webdataset' or 'table'"):
        open_source(tmp_path)
    with pytest.raises(DataError, match=r"a\.parquet: neither tars"):
        open_source(tmp_path / "a.parquet")
    write_tar(tmp_path / "a.tar", PAIRS)
    assert isinstance(open_source(tmp_path), WebDatasetTars)
    (tmp_path / "rows.csv").write_text("image,caption\na.png,c\n")
    # Lists of prompts and the like lie beside tars: those are read, and a word is said.
    assert isinstance(open_source(tmp_path), WebDatasetTars)
    assert re.search(r"tars \(a\.tar.*tables \(rows\.csv.*kind = 'table'", caplog.text)
    assert isinstance(open_source(tmp_path, SourceOptions(kind="table")), TableSource)
    assert isinstance(open_source(tmp_path, SourceOptions(kind="webdataset")), WebDatasetTars)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "a.tar.gz").touch()
    with pytest.raises(DataError, match="gunzip"):
        open_source(tmp_path / "packed").parts()


@pytest.mark.parametrize("kind", ["tar", "jsonl"])
def test_a_map_gives_captions_to_pairs_that_have_none(tmp_path: Path, kind: str) -> None:
    folder = export(tmp_path / "data", PAIRS, kind)
    captions = tmp_path / "zh.tsv"
    captions.write_text("i0\t零\ni2\t二\n", encoding="utf-8")
    source = open_source(folder, SourceOptions(caption_map=captions))
    source.check()
    assert [c for _, c, _ in content(read_all(source))] == ["零", "caption 1", "二"]
    # No pair has this language, and the map stands in where it can.
    source = open_source(folder, SourceOptions(caption_map=captions, language="zh"))
    source.check()
    items = read_all(source)
    assert [item.caption for item in items if isinstance(item, RawPair)] == ["零", "二"]
    assert [(i.id, i.reason) for i in items if isinstance(i, Rejected)] == [("i1", "no caption")]
    assert isinstance(source, Recaptioned)
    assert source.counts(source.parts()[0].name) == {"replaced": 2, "kept": 0}


def test_read_captions(tmp_path: Path) -> None:
    rows = [{"zh": "红", "en": "red"}, {"zh": None}, {"en": "blue", "zh": "蓝"}]
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for number, row in enumerate(rows):
            add(tar, f"{number}.json", json.dumps(row).encode())
            add(tar, f"{number}.txt", b"from the text file")
        add(tar, "3.json", b"{")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    for name in ("t.tar", "t.jsonl"):
        path = tmp_path / name
        assert list(read_captions(path, ("zh", "en"))) == ["红", "red", "蓝", "blue"]
        with pytest.raises(DataError, match="'fr'"):
            list(read_captions(path, ("zh", "fr")))
        with pytest.raises(ConfigError, match="caption_keys"):
            list(read_captions(path, ()))
    found = list(read_captions(tmp_path / "t.tar", ("en",)))
    assert found == ["red", "from the text file", "blue"]


def fail(monkeypatch: pytest.MonkeyPatch, function: str, code: int, ending: str) -> None:
    """Let ``os.function`` fail for paths with that ending."""
    real = getattr(os, function)

    def failing(path: Any, *arguments: Any, **options: Any) -> Any:
        if os.fspath(path).endswith(ending):
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize("kind", ["tar", "jsonl", "csv"])
def test_no_method_lets_an_error_of_the_machine_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = export(tmp_path / "data", PAIRS, kind)
    (file,) = [p for p in folder.iterdir() if p.is_file()]
    source = open_pictures(folder)
    (part,) = source.parts()

    def calls(source: WebDatasetTars | TableSource) -> list[Callable[[], object]]:
        return [
            lambda: source.digest(part),
            source.check,
            source.check_captions,
            lambda: list(source.read(part)),
            lambda: list(source.texts(part, [CaptionRule()])),
        ]

    def fail_always(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    message = rf"{file.name}: cannot be read \(Stale file handle\).*run the same command again"
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fail_always)
        for call in calls(source):
            with pytest.raises(DataError, match=message):
                call()
    for function, ending in (("stat", file.name), ("stat", "data"), ("listdir", "data")):
        with monkeypatch.context() as patch:
            fail(patch, function, errno.ESTALE, ending)
            for call in (source.parts, source.check, lambda: open_source(folder).parts()):
                with pytest.raises(DataError, match=r"cannot be read \(Stale file handle\)"):
                    call()
    file.unlink()
    for call in calls(source)[::3]:
        with pytest.raises(DataError, match=rf"{file.name}: cannot be read \(No such file"):
            call()
    # A file of a file system that is away must not be left out without a word.
    file.symlink_to(tmp_path / "away" / file.name)
    with pytest.raises(DataError, match=rf"{file.name}: cannot be read \(No such file"):
        source.parts()


class FailingFile(io.BufferedReader):
    """A file on a file system that fails after a number of reads."""

    def __init__(self, path: Path, left: Iterator[int], code: int) -> None:
        super().__init__(io.FileIO(path))
        self.left, self.code = left, code

    def read(self, size: int | None = -1, /) -> bytes:
        if next(self.left, None) is None:
            raise OSError(self.code, os.strerror(self.code))
        return super().read(size)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ECONNRESET, errno.EACCES])
@pytest.mark.parametrize("good_reads", [0, 25, 61, 62, 62 + 25, 62 + 59])
def test_a_tar_that_cannot_be_read_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good_reads: int, code: int
) -> None:
    """It was committed as a damaged tar: 21 of 30 records, for ever."""
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for number in range(30):
            add(tar, f"{number}.txt", b"c")
            add(tar, f"{number}.png", b"p")
    source = WebDatasetTars(tmp_path)
    (part,) = source.parts()
    whole = list(source.read(part))
    found = []
    words = rf"t\.tar: cannot be read \({os.strerror(code)}\).*run the same command again"
    with monkeypatch.context() as patch:
        left = iter(range(good_reads))
        patch.setattr(webdataset, "open", lambda p, _: FailingFile(p, left, code), raising=False)
        with pytest.raises(DataError, match=words):
            for item in source.read(part):
                found.append(item)
    # 60 headers and twice the end, then the contents, two of a pair.
    assert found == whole[: max(0, good_reads - 62) // 2]
    assert list(source.read(part)) == whole


OF_THE_MACHINE = [
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ECONNRESET, errno.EMFILE, errno.ENFILE),
    *(errno.ENOMEM, errno.ETIMEDOUT, errno.EAGAIN, errno.ENODEV, errno.EREMOTEIO, errno.EPERM),
]
OF_THE_PICTURE = {
    errno.ENOENT: "no image file",
    errno.ENOTDIR: "no image file",
    errno.ELOOP: "unreadable image file",
    errno.ENAMETOOLONG: "unreadable image file",
    errno.EACCES: "unreadable image file",
    errno.EISDIR: "unreadable image file",
}


@pytest.mark.parametrize("function", ["lstat", "stat", "open"])
@pytest.mark.parametrize("code", [*OF_THE_MACHINE, *OF_THE_PICTURE])
def test_only_what_a_picture_says_of_itself_is_a_rejection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    source = TableSource(export(tmp_path / "data", PAIRS, "csv"))
    (part,) = source.parts()
    fail(monkeypatch, function, code, "1.jpg")
    if code in OF_THE_PICTURE:
        items = list(source.read(part))
        assert [(i.id, i.reason) for i in items if isinstance(i, Rejected)] == [
            ("i1", OF_THE_PICTURE[code])
        ]
        assert len(items) == 3
        return
    found = []
    message = rf"1\.jpg: cannot be read \({os.strerror(code)}\).*run the same command again"
    with pytest.raises(DataError, match=message):
        for item in source.read(part):
            found.append(item)
    assert len(found) == 1
    fail(monkeypatch, function, code, "0.jpg")
    with pytest.raises(DataError, match=r"0\.jpg: cannot be read"):
        source.check()


@pytest.mark.parametrize("loss", ["gone", "mount point", "other folder", "emptied", "forbidden"])
def test_a_root_that_goes_away_makes_no_picture_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(3):
        (root / f"{number}.png").write_bytes(b"p")
    rows = [f"{name}.png,c" for name in ("0", "no", "1", "2")]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption", *rows]))
    source = TableSource(tmp_path / "t.csv", image_root=root)
    (part,) = source.parts()
    items = source.read(part)
    # As long as the folder is there, a picture may be missing.
    assert [type(next(items)) for _ in range(2)] == [RawPair, Rejected]
    if loss == "emptied":
        for picture in root.iterdir():
            picture.unlink()
    elif loss == "forbidden":
        fail(monkeypatch, "lstat", errno.EACCES, ".png")
        monkeypatch.setattr(os, "scandir", lambda _: (_ for _ in ()).throw(PermissionError()))
    else:
        root.rename(tmp_path / "elsewhere")
        if loss != "gone":
            root.mkdir()
        if loss == "other folder":
            (root / "0.png").write_bytes(b"p")
    message = r"pictures: (the folder of pictures was replaced|cannot be read).*same command again"
    with pytest.raises(DataError, match=message):
        next(items)
    if loss in ("gone", "mount point", "other folder"):
        if root.exists():
            for picture in root.iterdir():
                picture.unlink()
            root.rmdir()
        (tmp_path / "elsewhere").rename(root)
        assert [type(item) for item in source.read(part)] == [RawPair, Rejected, RawPair, RawPair]
