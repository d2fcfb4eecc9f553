"""data.captions and data.caption_map: which text counts, and replacing it by id."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data import caption_map
from megatron_cogview.data.caption_map import CaptionMap
from megatron_cogview.data.captions import CaptionRule, Recaptioned
from megatron_cogview.data.fields import Trouble
from megatron_cogview.data.raw import MAX_CAPTION_BYTES, Part, RawPair, Rejected
from megatron_cogview.data.shards import sample_id


@pytest.mark.parametrize(
    ("options", "fields", "text", "expected"),
    [
        ({}, {"caption": " c "}, b"t", " c "),
        ({}, {"caption": ""}, b"t", ""),
        ({}, {"caption": None}, b" t\n", "t"),
        ({}, {"caption": 5}, b"t", "t"),
        ({}, {}, b"\xef\xbb\xbft", "t"),
        ({}, None, b"t", "t"),
        ({}, None, None, Trouble("no caption", "no .json, no .txt")),
        ({}, {"caption": None}, None, Trouble("no caption", "'caption' is null")),
        ({}, {}, None, Trouble("no caption", "'caption' is missing")),
        ({}, {"caption": ["c"]}, None, Trouble("caption is not text", "list")),
        ({}, {"caption": "\ud800"}, b"t", Trouble("caption is not valid Unicode")),
        ({}, {}, b"ab\xff", Trouble("caption is not valid Unicode", "byte 2 of the .txt")),
        ({"key": "text"}, {"caption": "c", "text": "x"}, None, "x"),
        ({"language": "zh"}, {"caption": "c", "caption_zh": "红"}, b"t", "红"),
        # A text file does not say its language, so it is no substitute.
        (
            {"language": "zh"},
            {"caption": "c"},
            b"t",
            Trouble("no caption", "'caption_zh' is missing"),
        ),
        ({"caption_from": "json"}, {"caption": "c"}, b"t", "c"),
        ({"caption_from": "json"}, {}, b"t", Trouble("no caption", "'caption' is missing")),
        ({"caption_from": "json"}, None, b"t", Trouble("no caption", "no .json")),
        ({"caption_from": "txt"}, {"caption": "c"}, b"t", "t"),
        ({"caption_from": "txt"}, {"caption": "c"}, None, Trouble("no caption", "no .txt")),
    ],
)
def test_rule(
    options: dict[str, Any], fields: dict[str, Any] | None, text: bytes | None, expected: Any
) -> None:
    assert CaptionRule(**options).find(fields, text) == expected
    found = "" if isinstance(expected, Trouble) else expected
    assert CaptionRule(**options, required=False).find(fields, text) == found


def test_rules_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="caption_key = ''"):
        CaptionRule(key="")
    with pytest.raises(ConfigError, match="language = ''"):
        CaptionRule(language="")
    with pytest.raises(ConfigError, match=r"language = 'zh': a .txt has no language"):
        CaptionRule(language="zh", caption_from="txt")


def test_description_is_equal_where_the_same_captions_are_read() -> None:
    chinese = CaptionRule(language="zh").description
    assert chinese == CaptionRule(key="caption_zh", caption_from="json").description
    assert chinese != CaptionRule(key="caption_zh").description


def write_map(path: Path, entries: dict[str, str], end: str = "\n") -> Path:
    if path.suffix == ".tsv":
        lines = [f"{name}\t{caption}{end}" for name, caption in entries.items()]
    else:
        lines = [json.dumps({"id": n, "caption": c, "more": 1}) + end for n, c in entries.items()]
    path.write_bytes("".join(lines).encode())
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_map_finds_every_line_and_nothing_else(tmp_path: Path, suffix: str, end: str) -> None:
    entries = {f"id/{n}": f'caption "{n}" 红{"x" * (n % 7) * 1500}' for n in range(300)}
    entries["空"] = ""
    path = write_map(tmp_path / f"map{suffix}", entries, end)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().removesuffix(end.encode()))
    found = CaptionMap(path)
    assert len(found) == 301
    assert {name: found.replace(name, "old") for name in entries} == {
        name: (caption, True) for name, caption in entries.items()
    }
    assert found.replace("id/300", "old") == ("old", False)
    assert found.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.first_id == "id/0"


def test_map_needs_16_bytes_a_line_and_the_hash_of_the_shards(tmp_path: Path) -> None:
    found = CaptionMap(write_map(tmp_path / "m.tsv", {str(n): "c" * 90 for n in range(1000)}))
    assert found._hashes_N.nbytes + found._offsets_N.nbytes == 16_000
    assert sorted(found._hashes_N.tolist()) == sorted(sample_id(str(n)) for n in range(1000))


def test_ids_that_share_a_hash_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_map, "sample_id", lambda name: len(name))
    entries = {f"{n:02d}": f"caption {n}" for n in range(20)} | {"x": "short", "long": "long"}
    found = CaptionMap(write_map(tmp_path / "m.jsonl", entries))
    assert all(found.replace(n, "")[0] == c for n, c in entries.items())
    assert found.replace("99", "old") == ("old", False)
    write_map(tmp_path / "m.tsv", entries)
    with open(tmp_path / "m.tsv", "a") as file:
        file.write("07\tagain\n")
    with pytest.raises(DataError, match="lines 8 and 23 have the same id '07'"):
        CaptionMap(tmp_path / "m.tsv")


def test_repeated_ids_are_an_error_that_names_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    lines = [json.dumps({"id": str(n % 40), "caption": "c"}) for n in range(41)]
    path.write_text("\n".join(["", *lines]))
    with pytest.raises(DataError, match=r"m\.jsonl: lines 2 and 42 have the same id '0'"):
        CaptionMap(path)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("m.jsonl", b"{", "no JSON object"),
        ("m.jsonl", b'{"caption": "c"}', "has no id"),
        ("m.jsonl", b'{"id": "i"}', "no caption"),
        ("m.jsonl", b'{"id": "i", "caption": null}', "no caption"),
        ("m.jsonl", b'{"id": "i", "caption": "\\ud800"}', "no caption that is valid text"),
        ("m.jsonl", b'{"id": "i", "caption": "\xff"}', "not valid UTF-8"),
        ("m.jsonl", b"x" * (MAX_CAPTION_BYTES + 5), "is longer than"),
        ("m.tsv", b"id", "has 1 columns"),
        ("m.tsv", b"id\ta\tb", "has 3 columns"),
        ("m.tsv", b"\tcaption", "has no id"),
    ],
)
def test_bad_lines_of_a_map_name_file_and_line(
    tmp_path: Path, name: str, line: bytes, message: str
) -> None:
    good = b"ok\tc\n" if name.endswith("tsv") else b'{"id": "ok", "caption": "c"}\n'
    (tmp_path / name).write_bytes(good + line)
    with pytest.raises(DataError, match=rf"{name}: line 2: .*{message}"):
        CaptionMap(tmp_path / name)


def test_maps_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be a \.jsonl or a \.tsv"):
        CaptionMap(tmp_path / "m.csv")
    with pytest.raises(DataError, match="cannot be read"):
        CaptionMap(tmp_path / "m.tsv")
    (tmp_path / "m.tsv").write_text("\n")
    with pytest.raises(DataError, match="holds no captions"):
        CaptionMap(tmp_path / "m.tsv")
    found = CaptionMap(write_map(tmp_path / "m.jsonl", {"a": "c"}))
    (tmp_path / "m.jsonl").write_text("{")
    with pytest.raises(DataError, match="was changed while it was used"):
        found.replace("a", "")


def test_a_map_on_a_file_system_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_map(tmp_path / "m.tsv", {"a": "c"})
    found = CaptionMap(path)

    def fail(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    message = r"m\.tsv: cannot be read \(Stale file handle\).*run the same command again"
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(DataError, match=message):
            found.replace("a", "")
    with monkeypatch.context() as patch:
        patch.setattr(caption_map, "open", fail, raising=False)
        with pytest.raises(DataError, match=message):
            CaptionMap(path)
    assert found.replace("a", "") == ("c", True)


class Fixed:
    """A source of one part with given items."""

    def __init__(self, items: list[RawPair | Rejected], required: bool = False) -> None:
        self.items, self.required = items, required
        self.checked = False

    @property
    def description(self) -> dict[str, Any]:
        return {"kind": "fixed", "caption_required": self.required}

    def parts(self) -> list[Part]:
        return [Part("p", Path("p"), 1)]

    def read(self, part: Part) -> Iterator[RawPair | Rejected]:
        return iter(self.items)

    def digest(self, part: Part) -> str:
        return "d"

    def check(self) -> None:
        self.checked = True


def test_recaptioned(tmp_path: Path) -> None:
    bad = Rejected("r", "no image", "p")
    given = [("a", "A"), ("b", ""), ("c", "C"), ("d", ""), ("e", "E")]
    inner = Fixed([*(RawPair(n, n.encode(), c, "p") for n, c in given), bad])
    found = CaptionMap(write_map(tmp_path / "m.tsv", {"a": "甲", "b": "乙", "e": ""}))
    source = Recaptioned(inner, found)
    source.check()
    assert inner.checked
    for _ in range(2):
        assert list(source.read(source.parts()[0])) == [
            RawPair("a", b"a", "甲", "p"),
            RawPair("b", b"b", "乙", "p"),
            RawPair("c", b"c", "C", "p"),
            Rejected("d", "no caption", "p", "neither of its own nor in the caption map"),
            # The pipeline counts an empty caption under its own name.
            RawPair("e", b"e", "", "p"),
            bad,
        ]
        assert source.counts("p") == {"replaced": 3, "kept": 1}
    assert source.description["caption_map"] == found.fingerprint
    assert source.digest(source.parts()[0]) == "d"


def test_a_map_with_other_ids_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = CaptionMap(write_map(tmp_path / "m.tsv", {"000": "甲"}))
    with pytest.raises(DataError, match="a pair is 't/000', a line of the map '000'"):
        Recaptioned(Fixed([RawPair("t/000", b"", "", "p")]), found).check()
    assert not caplog.text
    Recaptioned(Fixed([RawPair("t/000", b"", "own", "p")]), found).check()
    assert "none of the first 1 pairs of p is in the map" in caplog.text
    with pytest.raises(ConfigError, match="required=False"):
        Recaptioned(Fixed([], required=True), found)
