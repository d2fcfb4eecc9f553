"""data.raw: every kind of bad member has its rule; nothing stops the run or disappears."""

import io
import json
import tarfile

import pytest

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import raw
from megatron_cogview.data.raw import RawPair, Rejected, WebDatasetTars, read_captions


def write_tar(path, members):
    """A tar of ``(name, bytes)`` or TarInfo objects."""
    with tarfile.open(path, "w") as tar:
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


def read_all(folder, **options):
    source = WebDatasetTars(folder, **options)
    return [item for path in source.shards() for item in source.read(path)]


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
    assert read_all(tmp_path) == [
        RawPair("x/1", b"j", "one", "a.tar"),
        RawPair("given", b"p", "二", "a.tar"),
        RawPair("7", b"w", "later", "b.tar"),
    ]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("k.png", b"p")], ("k", "no json")),
        ([("k.json", meta(caption="c"))], ("k", "no image")),
        ([("k.gif", b"g"), ("k.json", meta(caption="c"))], ("k", "no image")),
        ([("k.png", b"p"), ("k.json", b"{")], ("k", "invalid json")),
        ([("k.png", b"p"), ("k.json", b"[1]")], ("k", "invalid json")),
        ([("k.png", b"p"), ("k.json", b'{"caption": "\xff"}')], ("k", "invalid json")),
        ([("k.png", b"p"), ("k.json", b"[" * 100_000)], ("k", "invalid json")),
        ([("k.png", b"p"), ("k.json", meta(id="i"))], ("i", "no caption")),
        ([("k.png", b"p"), ("k.json", meta(id="i", caption=None))], ("i", "caption is not text")),
        ([("k.png", b"p"), ("k.json", meta(caption=["c"]))], ("k", "caption is not text")),
        (
            [("k.png", b"p"), ("k.json", b'{"caption": "\\ud800"}')],
            ("k", "caption is not valid Unicode"),
        ),
        (
            [("k.png", b"p"), ("k.jpg", b"j"), ("k.json", meta(caption="c"))],
            ("k", "duplicate member"),
        ),
        (
            [("k.png", b"p"), ("k.png", b"q"), ("k.json", meta(caption="c"))],
            ("k", "duplicate member"),
        ),
        (
            [("k.png", b"p"), ("k.json", meta(caption="c")), ("k.json", b"{}")],
            ("k", "duplicate member"),
        ),
        ([("/k.png", b"p")], ("/k.png", "unsafe member name")),
        ([("a/../../k.png", b"p")], ("a/../../k.png", "unsafe member name")),
    ],
)
def test_rejections(tmp_path, members, expected):
    good = [("z.png", b"z"), ("z.json", meta(caption="good"))]
    write_tar(tmp_path / "t.tar", [*members, *good])
    items = read_all(tmp_path)
    rejected = [item for item in items if isinstance(item, Rejected)]
    assert [(item.id, item.reason, item.source) for item in rejected] == [(*expected, "t.tar")]
    assert [item for item in items if isinstance(item, RawPair)] == [
        RawPair("z", b"z", "good", "t.tar")
    ]


def test_links_and_devices_are_not_followed(tmp_path):
    members = []
    for index, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE)):
        member = tarfile.TarInfo(f"{index}.png")
        member.type, member.linkname = kind, "/etc/passwd"
        members.append(member)
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    write_tar(tmp_path / "t.tar", [folder, *members])
    assert [item.reason for item in read_all(tmp_path)] == ["unsafe member name"] * 3


def test_size_limits_hold_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "MAX_IMAGE_BYTES", 10)
    monkeypatch.setattr(raw, "MAX_JSON_BYTES", 30)
    write_tar(
        tmp_path / "t.tar",
        [
            ("1.png", b"p" * 11),
            ("1.json", meta(caption="c")),
            ("2.png", b"p"),
            ("2.json", meta(caption="c" * 30)),
        ],
    )
    items = read_all(tmp_path)
    assert [item.reason for item in items] == ["file too large"] * 2
    assert "image 11 bytes" in items[0].detail
    monkeypatch.setattr(raw, "MAX_MEMBERS", 2)
    assert [item.reason for item in read_all(tmp_path)] == ["file too large", "damaged tar"]


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
        items = read_all(tmp_path)
        kept = [item for item in items if isinstance(item, RawPair)]
        assert kept == good[: len(kept)]
        assert any(item.reason == "damaged tar" for item in items if isinstance(item, Rejected))
    # A damaged header in the middle: tarfile alone would end there without a word.
    damaged = bytearray(data)
    damaged[2560 + 20] ^= 0xFF
    (tmp_path / "t.tar").write_bytes(damaged)
    items = read_all(tmp_path)
    assert [type(item).__name__ for item in items] == ["RawPair", "Rejected"]
    assert items[1].reason == "damaged tar"


def test_no_tars_and_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"no \*.tar"):
        WebDatasetTars(tmp_path).shards()
    with pytest.raises(DataError, match="no such folder"):
        WebDatasetTars(tmp_path / "none").shards()


def test_missing_caption_key_is_one_error_that_lists_the_keys(tmp_path):
    write_tar(tmp_path / "t.tar", [("1.json", meta(id=1)), ("2.json", meta(text_en="x", url=""))])
    with pytest.raises(DataError, match=r"'caption'.*keys there: id, text_en, url"):
        WebDatasetTars(tmp_path).check()
    WebDatasetTars(tmp_path, "text_en").check()
    (tmp_path / "t.tar").write_bytes(b"not a tar" * 100)
    with pytest.raises(DataError, match=r"no readable \.json"):
        WebDatasetTars(tmp_path).check()


def test_read_captions(tmp_path):
    write_tar(
        tmp_path / "t.tar",
        [("1.json", meta(zh="红", en="red")), ("2.json", meta(zh=None)), ("3.json", b"{")],
    )
    assert list(read_captions(tmp_path, ("zh", "en"))) == ["红", "red"]
    with pytest.raises(DataError, match="'fr'"):
        list(read_captions(tmp_path, ("zh", "fr")))
