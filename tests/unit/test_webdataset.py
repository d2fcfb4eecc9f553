"""data.webdataset: every kind of bad member has its rule; nothing stops the run or disappears."""

import gzip
import hashlib
import io
import json
import random
import shutil
import tarfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import tar_members, webdataset
from megatron_cogview.data.captions import PICTURES_ONLY, CaptionRule
from megatron_cogview.data.raw import RawPair, Rejected
from megatron_cogview.data.webdataset import WebDatasetTars

BLOCK = 512
ENGLISH = CaptionRule(key="text_en")


def write_tar(path, members, **options):
    """A tar of ``(name, bytes)`` or TarInfo objects."""
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return path


def meta(**fields):
    return json.dumps(fields).encode()


def read_all(folder, *rule):
    source = WebDatasetTars(folder, *rule)
    return [item for part in source.parts() for item in source.read(part)]


def good_and_rejected(items):
    return (
        [item for item in items if isinstance(item, RawPair)],
        [(item.id, item.reason) for item in items if isinstance(item, Rejected)],
    )


def test_good_pairs_in_order_of_their_keys(tmp_path):
    write_tar(tmp_path / "b.tar", [("9.webp", b"w"), ("9.json", meta(caption="later", id=7))])
    write_tar(
        tmp_path / "a.tar",
        [
            ("./x/1.jpg", b"j"),
            ("2.json", meta(caption="二", id="given", other=1)),
            ("x/1.json", meta(caption="one")),
            ("2.PNG", b"p"),
            ("2.txt", b"ignored"),
        ],
    )
    expected = [
        RawPair("a/x/1", b"j", "one", "a.tar"),
        RawPair("given", b"p", "二", "a.tar"),
        RawPair("7", b"w", "later", "b.tar"),
    ]
    assert read_all(tmp_path) == expected
    assert read_all(tmp_path / "b.tar") == expected[2:]
    # Ids and names do not depend on where the folder lies.
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert read_all(tmp_path / "elsewhere") == expected


@pytest.mark.parametrize("given", ["", None, True, 1.5, ["x"]])
def test_what_is_no_id_falls_back_to_tar_and_key(tmp_path, given):
    about = meta(caption="c", id=given)
    for tar in ("a", "b"):
        write_tar(tmp_path / f"{tar}.tar", [("000000.jpg", b"j"), ("000000.json", about)])
    assert [item.id for item in read_all(tmp_path)] == ["a/000000", "b/000000"]


def test_img2dataset_output(tmp_path):
    """Picture, caption and JSON as img2dataset 1.45 names them, with its sidecars beside."""

    def sample(key: str, caption: str | None, **fields: Any) -> list[tuple[str, bytes]]:
        about = {"caption": caption, "url": "http://u", "key": key, "status": "success", **fields}
        return [
            (f"{key}.jpg", key.encode()),
            (f"{key}.txt", (caption or "").encode()),
            (f"{key}.json", meta(**about)),
        ]

    failed = {"key": "000000003", "status": "failed_to_download", "caption": "c"}
    write_tar(
        tmp_path / "00000.tar",
        [
            *sample("000000001", "one"),
            *sample("000000002", None),
            ("000000003.json", meta(**failed)),
        ],
    )
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    (tmp_path / "00000_stats.json").write_text("{}")
    items = read_all(tmp_path)
    assert items == [
        RawPair("00000/000000001", b"000000001", "one", "00000.tar"),
        # The pipeline counts an empty caption under its own name.
        RawPair("00000/000000002", b"000000002", "", "00000.tar"),
        Rejected("00000/000000003", "no image", "00000.tar", "status 'failed_to_download'"),
    ]
    json_only = CaptionRule(caption_from="json")
    assert good_and_rejected(read_all(tmp_path, json_only))[1][0] == (
        "00000/000000002",
        "no caption",
    )


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("k.png", b"p")], ("t/k", "no caption")),
        ([("k.json", meta(caption="c", id="i"))], ("i", "no image")),
        ([("k.gif", b"g"), ("k.json", meta(caption="c"))], ("t/k", "no image")),
        ([("k.png", b"p"), ("k.json", b"{")], ("t/k", "invalid json")),
        ([("k.png", b"p"), ("k.json", b"{"), ("k.txt", b"c")], ("t/k", "invalid json")),
        ([("k.png", b"p"), ("k.json", b'{"id": ' + b"9" * 5000 + b"}")], ("t/k", "invalid json")),
        ([("k.png", b"p"), ("k.json", b"[1]")], ("t/k", "invalid json")),
        ([("k.png", b"p"), ("k.json", b'{"caption": "\xff"}')], ("t/k", "invalid json")),
        ([("k.png", b"p"), ("k.json", b"[" * 100_000)], ("t/k", "invalid json")),
        ([("k.png", b"p"), ("k.json", meta(id="i"))], ("i", "no caption")),
        ([("k.png", b"p"), ("k.json", meta(id="i", caption=None))], ("i", "no caption")),
        ([("k.png", b"p"), ("k.json", meta(caption=["c"]))], ("t/k", "caption is not text")),
        ([("k.png", b"p"), ("k.txt", b"\xff")], ("t/k", "caption is not valid Unicode")),
        (
            [("k.png", b"p"), ("k.json", b'{"caption": "\\ud800"}')],
            ("t/k", "caption is not valid Unicode"),
        ),
        ([("k.png", b"p"), ("k.jpg", b"j"), ("k.txt", b"c")], ("t/k", "duplicate member")),
        ([("k.png", b"p"), ("k.png", b"q"), ("k.txt", b"c")], ("t/k", "duplicate member")),
        ([("k.png", b"p"), ("k.txt", b"c"), ("k.txt", b"c")], ("t/k", "duplicate member")),
        (
            [("k.png", b"p"), ("k.json", meta(caption="c")), ("k.json", b"{}")],
            ("t/k", "duplicate member"),
        ),
        ([("/k.png", b"p")], ("/k.png", "unsafe member name")),
        ([("a/../../k.png", b"p")], ("a/../../k.png", "unsafe member name")),
    ],
)
def test_rejections(tmp_path, members, expected):
    good = [("z.png", b"z"), ("z.json", meta(caption="good"))]
    write_tar(tmp_path / "t.tar", [*members, *good])
    kept, rejected = good_and_rejected(read_all(tmp_path))
    assert rejected == [expected]
    assert kept == [RawPair("t/z", b"z", "good", "t.tar")]


def test_pictures_whose_captions_do_not_matter(tmp_path):
    write_tar(
        tmp_path / "t.tar",
        [
            *[("1.png", b"1"), ("2.png", b"2"), ("2.json", meta(id="two"))],
            *[("3.png", b"3"), ("3.json", b"{"), ("4.png", b"4"), ("4.txt", b"\xff")],
            *[("5.png", b"5"), ("5.txt", b" five\n"), ("6.json", meta(caption="c"))],
        ],
    )
    good, rejected = good_and_rejected(read_all(tmp_path, PICTURES_ONLY))
    assert [(p.id, p.image, p.caption) for p in good] == [
        *[("t/1", b"1", ""), ("two", b"2", ""), ("t/3", b"3", ""), ("t/4", b"4", "")],
        ("t/5", b"5", "five"),
    ]
    assert rejected == [("t/6", "no image")]
    WebDatasetTars(tmp_path, PICTURES_ONLY).check()


def test_links_devices_and_sparse_files_are_not_followed(tmp_path):
    members = []
    for index, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)):
        member = tarfile.TarInfo(f"{index}.png")
        member.type, member.linkname = kind, "/etc/passwd"
        members.append(member)
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    sparse = tarfile.TarInfo("3.png")
    sparse.pax_headers = {"GNU.sparse.size": "1000000000000", "GNU.sparse.map": "0,1"}
    write_tar(tmp_path / "t.tar", [folder, *members, sparse], format=tarfile.PAX_FORMAT)
    assert [item.reason for item in read_all(tmp_path)] == ["unsafe member name"] * 4


def test_long_and_foreign_names_are_read_like_tarfile_reads_them(tmp_path):
    names = ["x" * 300, "é" * 90, "d/" * 60 + "k", "中文/键"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        write_tar(path, [(f"{n}.png", n.encode()) for n in names], format=form)
        with open(path, "rb") as file:
            found = [(m.name, m.offset, m.size) for m in tar_members.members(file)]
        with tarfile.open(path) as tar:
            assert found == [(m.name, m.offset_data, m.size) for m in tar]
    good, rejected = good_and_rejected(read_all(tmp_path, PICTURES_ONLY))
    assert not rejected
    assert [p.id for p in good[:4]] == [f"{tarfile.GNU_FORMAT}/{n}" for n in names]


def test_names_that_are_not_utf8_are_printable(tmp_path):
    write_tar(tmp_path / "t.tar", [("\udcff.png", b"p"), ("../\udcff.png", b"p")])
    good, rejected = good_and_rejected(read_all(tmp_path, PICTURES_ONLY))
    assert [p.id for p in good] == ["t/\\udcff"]
    assert rejected == [("../\\udcff.png", "unsafe member name")]


def test_size_limits_hold_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_IMAGE_BYTES", 10)
    monkeypatch.setattr(webdataset, "MAX_CAPTION_BYTES", 30)
    write_tar(
        tmp_path / "t.tar",
        [
            *[("1.png", b"p" * 11), ("1.json", meta(caption="c"))],
            *[("2.png", b"p"), ("2.json", meta(caption="c" * 30))],
            *[("3.png", b"p"), ("3.txt", b"c" * 31)],
            *[("4.png", b"p" * 10), ("4.txt", b"c" * 30)],
        ],
    )
    good, rejected = good_and_rejected(read_all(tmp_path))
    assert [reason for _, reason in rejected] == ["file too large"] * 3
    assert len(good) == 1
    assert read_all(tmp_path)[0].detail == "image of 11 bytes, limit 10"
    monkeypatch.setattr(tar_members, "MAX_MEMBERS", 2)
    assert [item.reason for item in read_all(tmp_path)] == ["file too large", "damaged tar"]


def header(name: str, kind: bytes, size: int, data: bytes = b"") -> bytes:
    """One member with whatever size is claimed for it."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    # Base 256, which can be huge or negative.
    block[124:136] = (b"\x80" if size >= 0 else b"\xff") + size.to_bytes(11, "big", signed=True)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")


@pytest.mark.parametrize("size", [-512, -1, 1 << 62, 1 << 70, 1 << 40])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME,
                                  tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE, b"?"])  # fmt: skip
def test_a_tar_that_claims_impossible_sizes_costs_neither_memory_nor_time(tmp_path, size, kind):
    good = write_tar(tmp_path / "good.tar", [("1.png", b"p"), ("1.txt", b"c")]).read_bytes()
    (tmp_path / "good.tar").unlink()
    data = good[: 4 * BLOCK] + header("2.png", kind, size, b"x" * 600) + good
    (tmp_path / "t.tar").write_bytes(data)
    tracemalloc.start()
    began = time.process_time()
    kept, rejected = good_and_rejected(read_all(tmp_path))
    assert time.process_time() - began < 1
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert [p.id for p in kept] == ["t/1"]
    assert rejected[-1] == ("t.tar", "damaged tar")


def test_extended_headers_that_take_others_hours_take_no_time(tmp_path):
    """CVE-2024-6232: a long row of digits; and one that has no end."""
    for data in (b"1" * 60_000, b"13 path=a\n\n\n\n" * 4000, b"0 \n" * 9000, b""):
        block = header("x", tarfile.XHDTYPE, len(data), data)
        (tmp_path / "t.tar").write_bytes(block + header("1.png", b"0", 1, b"p") + bytes(1024))
        began = time.process_time()
        read_all(tmp_path)
        assert time.process_time() - began < 0.5


def test_a_tar_cut_or_damaged_anywhere_is_reported(tmp_path):
    """Whatever the cut: no exception, whole pairs only, and the loss is named."""
    pairs = [(f"{n}.{e}", meta(caption=str(n)) if e == "json" else b"p" * 700)
             for n in range(3) for e in ("json", "png")]  # fmt: skip
    data = write_tar(tmp_path / "t.tar", pairs).read_bytes()
    end_of_members = 3 * (512 + 512 + 512 + 1024)
    good = [item for item in read_all(tmp_path) if isinstance(item, RawPair)]
    assert len(good) == 3
    for cut in range(0, end_of_members + 1, 256):
        (tmp_path / "t.tar").write_bytes(data[:cut])
        kept, rejected = good_and_rejected(read_all(tmp_path))
        assert kept == good[: len(kept)]
        assert ("t.tar", "damaged tar") in rejected
    # A damaged header in the middle: tarfile alone would end there without a word.
    damaged = bytearray(data)
    damaged[2560 + 20] ^= 0xFF
    (tmp_path / "t.tar").write_bytes(damaged)
    items = read_all(tmp_path)
    assert [type(item).__name__ for item in items] == ["RawPair", "Rejected"]
    assert items[1].reason == "damaged tar"
    # Two tars in one file: what lies behind the first end mark is not dropped in silence.
    (tmp_path / "t.tar").write_bytes(data * 2)
    kept, rejected = good_and_rejected(read_all(tmp_path))
    assert kept == good
    assert rejected == [("t.tar", "damaged tar")]


def test_random_damage_raises_nothing(tmp_path):
    pairs = [("1.png", b"p" * 700), ("1.json", meta(caption="c")), ("é" * 200 + ".txt", b"t")]
    data = write_tar(tmp_path / "t.tar", pairs, format=tarfile.PAX_FORMAT).read_bytes()
    rng = random.Random(0)
    for _ in range(250):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "t.tar").write_bytes(damaged)
        assert all(isinstance(item, RawPair | Rejected) for item in read_all(tmp_path))


@pytest.mark.parametrize("good", [1, 4, 30])
def test_a_damaged_tar_counts_as_the_pairs_behind_the_damage(tmp_path, good):
    """It counted as one rejection, so --max-rejected 0.01 let 90 % of the pairs go."""
    sizes = random.Random(good).choices(range(600, 1400), k=40)
    pairs = [m for n, size in enumerate(sizes)
             for m in ((f"{n}.png", b"p" * size), (f"{n}.txt", b"c"))]  # fmt: skip
    data = bytearray(write_tar(tmp_path / "t.tar", pairs).read_bytes())
    with tarfile.open(tmp_path / "t.tar") as tar:
        place = tar.getmember(f"{good}.png").offset
    data[place + 20] ^= 0xFF
    (tmp_path / "t.tar").write_bytes(data)
    *_, last = items = read_all(tmp_path)
    assert (len(items), last.reason) == (good + 1, "damaged tar")
    # Every pair takes a block for each header and text, and two to four for the picture.
    assert 0.7 * (40 - good) < last.pairs < 2 * (40 - good)
    assert read_all(tmp_path) == items
    # A size that leads beyond the end hides all that stands behind it.
    data[place : place + 512] = header(f"{good}.png", b"0", 1 << 40)
    (tmp_path / "t.tar").write_bytes(data)
    assert abs(read_all(tmp_path)[-1].pairs - last.pairs) <= 1
    # Nothing to learn the mean from; and what was cut off is not there to be counted.
    (tmp_path / "t.tar").write_bytes(b"x" * 1_050_000)
    assert [item.pairs for item in read_all(tmp_path)] == [round(1_050_000 / 100_000)]
    (tmp_path / "t.tar").write_bytes(data[:place])
    assert read_all(tmp_path)[-1].pairs == 1
    assert Rejected("i", "no image", "t.tar").pairs == 1


def test_no_tars_and_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"no \*.tar"):
        WebDatasetTars(tmp_path).parts()
    with pytest.raises(DataError, match="no such folder"):
        WebDatasetTars(tmp_path / "none").parts()


def test_compressed_tars_are_refused_with_the_remedy(tmp_path):
    packed = gzip.compress(write_tar(tmp_path / "a.tar", [("1.png", b"p")]).read_bytes())
    (tmp_path / "b.tar").write_bytes(packed)
    items = read_all(tmp_path, PICTURES_ONLY)
    assert items[1] == Rejected(
        "b.tar", "damaged tar", "b.tar", "compressed with gzip; uncompress it with gunzip"
    )
    with pytest.raises(DataError, match=r"b\.tar: compressed with gzip; .* gunzip"):
        WebDatasetTars(tmp_path / "b.tar").check()
    (tmp_path / "c.tar.gz").write_bytes(packed)
    for path in (tmp_path, tmp_path / "c.tar.gz"):
        with pytest.raises(DataError, match=r"c\.tar\.gz.*gunzip"):
            WebDatasetTars(path).parts()


def test_missing_caption_key_is_one_error_that_lists_the_keys(tmp_path):
    first = [("1.json", meta(id=1)), ("2.json", meta(text_en="x", url=""))]
    write_tar(tmp_path / "t.tar", first)
    with pytest.raises(DataError, match=r"'caption'.*keys there: id, text_en, url"):
        WebDatasetTars(tmp_path).check()
    WebDatasetTars(tmp_path, ENGLISH).check()
    # A download that failed as a whole leaves an empty tar, which says nothing.
    write_tar(tmp_path / "a.tar", [])
    WebDatasetTars(tmp_path, ENGLISH).check()
    write_tar(tmp_path / "b.tar", [("1.txt", b"text")])
    WebDatasetTars(tmp_path).check()
    for name in ("a", "b", "t"):
        (tmp_path / f"{name}.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DataError, match=r"no readable \.json"):
        WebDatasetTars(tmp_path).check()


def test_parts_digests_and_description_say_what_is_read(tmp_path):
    data = write_tar(tmp_path / "a.tar", [("1.png", b"p")]).read_bytes()
    (tmp_path / "folder.tar").mkdir()
    source = WebDatasetTars(tmp_path)
    (part,) = source.parts()
    assert (part.name, part.path, part.num_bytes) == ("a.tar", tmp_path / "a.tar", len(data))
    assert source.digest(part) == hashlib.sha256(data).hexdigest()
    rule = CaptionRule(key="text", language="zh")
    described = [WebDatasetTars(tmp_path, r).description for r in (rule, replace(rule, key="t"))]
    assert described[0] != described[1]
    assert described[0] == json.loads(json.dumps(described[0]))
    assert str(tmp_path) not in json.dumps(described[0])
    moved = shutil.copytree(tmp_path, Path(f"{tmp_path}-moved"))
    assert WebDatasetTars(moved, rule).description == described[0]
