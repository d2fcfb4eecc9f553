"""data.sources: the right reader for each path, and the same pairs from each."""

import csv
import io
import json
import tarfile
from pathlib import Path

import pytest

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data.captions import CaptionRule, Recaptioned
from megatron_cogview.data.raw import PairSource, RawPair, Rejected
from megatron_cogview.data.sources import SourceOptions, open_source, read_captions
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


def test_what_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match=r"1 tar.*a\.tar.*1 table.*rows\.csv.*kind ="):
        open_source(tmp_path)
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
