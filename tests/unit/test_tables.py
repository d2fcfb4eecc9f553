"""data.tables: rows are cut and read alike, every kind of bad row or path has its rule."""

import csv
import hashlib
import io
import json
import os
import random
import socket
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.data import table_rows, tables
from megatron_cogview.data.captions import PICTURES_ONLY, CaptionRule
from megatron_cogview.data.raw import RawPair, Rejected
from megatron_cogview.data.table_rows import TableFile
from megatron_cogview.data.tables import TableSource

Item = RawPair | Rejected


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures ``0.png`` ... ``9.png`` whose bytes are their names."""
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(f"{number}.png".encode())
    return tmp_path


def read_all(source: TableSource) -> list[Item]:
    return [item for part in source.parts() for item in source.read(part)]


def read_table(path: Path, content: str | bytes, **options: Any) -> list[Item]:
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(data)
    return read_all(TableSource(path, **options))


def reasons(items: list[Item]) -> list[tuple[str, str, str]]:
    return [(i.id, i.reason, i.detail) for i in items if isinstance(i, Rejected)]


def pairs(items: list[Item]) -> list[tuple[str, str]]:
    return [(i.id, i.caption) for i in items if isinstance(i, RawPair)]


ROWS = [("0.png", "red"), ("1.png", 'two\nlines, "quoted"'), ("2.png", "三，\t tab"), ("3.png", "")]


def as_csv(rows: list[tuple[str, ...]], delimiter: str, end: str = "\r\n") -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=end)
    writer.writerows([("image", "caption"), *rows])
    return text.getvalue()


def as_jsonl(rows: list[tuple[str, ...]], end: str = "\n") -> str:
    return "".join(json.dumps({"image": i, "caption": c}) + end for i, c in rows)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last_line", ["whole", "without end"])
@pytest.mark.parametrize("rows_per_part", [1, 2, 3, 100])
def test_all_formats_give_the_same_pairs_however_they_are_cut(
    folder: Path, end: str, mark: str, last_line: str, rows_per_part: int
) -> None:
    contents = {
        "a.csv": as_csv(ROWS, ",", end),
        "a.tsv": as_csv(ROWS, "\t", end),
        "a.jsonl": as_jsonl(ROWS, end),
    }
    for name, content in contents.items():
        text = mark + (content if last_line == "whole" else content.removesuffix(end))
        path = folder / name
        items = read_table(path, text, rows_per_part=rows_per_part)
        assert pairs(items) == ROWS, name
        assert [i.image.decode() for i in items if isinstance(i, RawPair)] == [i for i, _ in ROWS]
        assert items[0].source == f"{name}#0"
        parts = TableSource(path, rows_per_part=rows_per_part).parts()
        assert [p.name for p in parts] == [f"{name}#{k}" for k in range(len(parts))]
        assert len(parts) == -(-len(ROWS) // rows_per_part)
        assert sum(p.num_pairs for p in parts) == len(ROWS)
        # Parts lie one behind the other and cover everything behind the header.
        header = parts[0].start
        assert sum(p.num_bytes for p in parts) == path.stat().st_size - header
        ends = [p.start + p.num_bytes for p in parts]
        assert [p.start for p in parts] == [header, *ends[:-1]]
        path.unlink()


def test_cutting_agrees_with_reading_as_a_whole_on_random_bytes(tmp_path: Path) -> None:
    """Oracle: the rows of one range over everything, for any bytes and any cut."""
    rng = random.Random(1)
    alphabet = [b'"', b'"', b",", b"\n", b"\n", b"\r\n", b"\r", b"a", "é".encode(), b"\xff", b"{}"]
    for trial in range(200):
        body = b"".join(rng.choices(alphabet, k=rng.randrange(1, 60)))
        for suffix, header in ((".csv", b"image,caption\n"), (".jsonl", b"")):
            path = tmp_path / f"t{suffix}"
            path.write_bytes(header + body)
            table = TableFile(path)
            whole = list(table.rows(table.first_row, len(header + body)))
            for count in (1, 2, 5):
                ranges = table.cut(count)
                cut = [list(table.rows(start, stop)) for start, stop, _ in ranges]
                assert [row for rows in cut for row in rows] == whole, (trial, body)
                assert all(len(rows) == count for rows in cut[:-1])
                assert [len(rows) for rows in cut] == [count for *_, count in ranges]


def test_lines_are_counted_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_rows, "_CHUNK_BYTES", 7)
    path = tmp_path / "t.jsonl"
    lines = [b"x" * (n % 5) + b"\n" for n in range(50)]
    path.write_bytes(b"".join(lines))
    for count in (1, 3, 7, 50, 60):
        ranges = TableFile(path).cut(count)
        expected = [b"".join(lines[k : k + count]) for k in range(0, 50, count)]
        data = path.read_bytes()
        found = [(data[start:stop], rows) for start, stop, rows in ranges]
        assert found == [(each, each.count(b"\n")) for each in expected]


def test_digest_is_that_of_header_and_rows(folder: Path) -> None:
    source = TableSource(folder / "a.csv", rows_per_part=2)
    (folder / "a.csv").write_text("image,caption\n0.png,a\n1.png,b\n2.png,c\n")
    parts = source.parts()
    wanted = hashlib.sha256(b"image,caption\n2.png,c\n").hexdigest()
    assert [source.digest(part) for part in parts][1] == wanted
    # Added rows: only the last, incomplete part changes.
    with open(folder / "a.csv", "a") as file:
        file.write("3.png,d\n4.png,e\n")
    grown = TableSource(folder / "a.csv", rows_per_part=2)
    more = grown.parts()
    assert more[0] == parts[0]
    assert grown.digest(more[0]) == source.digest(parts[0])
    assert grown.digest(more[1]) != wanted
    assert len(more) == 3
    # The way out: a new file that sorts behind leaves every part as it is.
    (folder / "b.csv").write_text("image,caption\n5.png,f\n")
    several = TableSource(folder, rows_per_part=2).parts()
    assert several[:3] == more
    assert several[3].name == "b.csv#0"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("{", ("t.jsonl:2", "invalid json", "row 2")),
        ("[1]", ("t.jsonl:2", "invalid json", "row 2")),
        ("[" * 100_000, ("t.jsonl:2", "invalid json", "row 2")),
        (b'{"image": "\xff"}', ("t.jsonl:2", "row is not valid UTF-8", "row 2")),
        ('{"caption": "c"}', ("t.jsonl:2", "no image name", "row 2")),
        ('{"image": 5, "id": 7}', ("7", "no image name", "row 2")),
        ('{"image": "1.png"}', ("1.png", "no caption", "row 2: 'caption' is missing")),
        (
            '{"image": "1.png", "caption": null}',
            ("1.png", "no caption", "row 2: 'caption' is null"),
        ),
        ('{"image": "1.png", "caption": 1, "id": "i"}', ("i", "caption is not text", "row 2: int")),
        (
            '{"image": "1.png", "caption": "\\ud800"}',
            ("1.png", "caption is not valid Unicode", "row 2"),
        ),
        ('{"image": "no", "caption": ""}', ("no", "no image file", "row 2: no")),
        ('{"image": "1.png/x", "caption": ""}', ("1.png/x", "no image file", "row 2: 1.png/x")),
        ('{"image": ".", "caption": ""}', (".", "not a plain file", "row 2: .")),
        ('{"image": "\\ud800", "caption": ""}', ("\\ud800", "unsafe path", "row 2: \\ud800")),
    ],
)
def test_bad_rows(folder: Path, row: str | bytes, expected: tuple[str, str, str]) -> None:
    bad = row.encode() if isinstance(row, str) else row
    good = [json.dumps({"image": f"{n}.png", "caption": "c"}).encode() for n in (0, 2)]
    items = read_table(folder / "t.jsonl", b"\n".join([good[0], bad, good[1]]))
    assert reasons(items) == [expected]
    assert pairs(items) == [("0.png", "c"), ("2.png", "c")]


def test_bad_csv_rows_and_their_numbers_in_later_parts(folder: Path) -> None:
    text = (
        b"id,image,caption\r\n"
        b"a,0.png,one\r\n"
        b"\r\n"
        b"b,1.png\r\n"
        b'c,2.png,"quoted" wrongly\r\n'
        b"d,3.png,\xff\r\n"
        b"e,no.png,gone\r\n"
        b",4.png,no id\r\n"
    )
    expected = [
        ("t.csv:3", "wrong number of columns", "row 3: 2, the header has 3"),
        ("t.csv:4", "invalid row", "row 4: ',' expected after '\"'"),
        ("t.csv:5", "row is not valid UTF-8", "row 5"),
        ("e", "no image file", "row 6: no.png"),
    ]
    for rows_per_part in (1, 2, 100):
        items = read_table(folder / "t.csv", text, rows_per_part=rows_per_part)
        assert reasons(items) == expected
        assert pairs(items) == [("a", "one"), ("4.png", "no id")]


def test_large_rows_are_rejected_in_little_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line without end, and a quotation mark that is never closed."""
    long = b"x" * (32 << 20)
    for name, start, row in (
        ("t.jsonl", b"", b'{"image": "0.png", "caption": "%s"}\n' % long),
        ("t.csv", b"image,caption\n", b"0.png,%s\n" % long),
    ):
        (folder / name).write_bytes(start + row)
        source = TableSource(folder / name)
        tracemalloc.start()
        assert [r[1] for r in reasons(read_all(source))] == ["row too large"]
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
        tracemalloc.stop()
    monkeypatch.setattr(table_rows, "MAX_CAPTION_BYTES", 100)
    rows = ["0.png,good", '1.png,"never closed', *["x,y"] * 40, "2.png,good"]
    items = read_table(folder / "t.csv", "image,caption\n" + "\n".join(rows))
    assert reasons(items)[0][1] == "row too large"
    assert "quotation mark" in reasons(items)[0][2]
    assert pairs(items) == [("0.png", "good"), ("2.png", "good")]


def test_fields_over_the_csv_modules_own_limit(folder: Path) -> None:
    before = csv.field_size_limit(1000)
    try:
        text = as_csv([("0.png", "c" * 500_000)], ",")
        assert [len(c) for _, c in pairs(read_table(folder / "t.csv", text))] == [500_000]
        # Never lowered, because others may need it.
        csv.field_size_limit(1 << 30)
        read_table(folder / "t.csv", text)
        assert csv.field_size_limit() == 1 << 30
    finally:
        csv.field_size_limit(before)


def test_nothing_outside_the_root_is_opened(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "in-too"
    for each in (folder, outside):
        each.mkdir()
        (each / "1.png").write_bytes(b"p")
    (folder / "link.png").symlink_to(outside / "1.png")
    (folder / "way").symlink_to(outside)
    (folder / "inner.png").symlink_to(folder / "1.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    names = [
        "../in-too/1.png",
        str(folder / "1.png"),
        "link.png",
        "way/1.png",
        "a/../1.png",
        "x\0y",
    ]
    rows = [(name, "c") for name in [*names, "circle.png", "x" * 300, "inner.png"]]
    items = read_table(folder / "t.jsonl", as_jsonl(rows))
    assert [reason for _, reason, _ in reasons(items)] == [
        *["unsafe path"] * 6,
        *["unreadable image file"] * 2,
    ]
    assert pairs(items) == [("inner.png", "c")]
    # The user's own choice of the root may lead anywhere.
    assert pairs(read_all(TableSource(folder / "t.jsonl", image_root=folder / "way"))) == []
    (folder / "t.jsonl").write_text(as_jsonl([("1.png", "c")]))
    rooted = TableSource(folder / "t.jsonl", image_root=folder / "way")
    assert pairs(read_all(rooted)) == [("1.png", "c")]


def test_pipes_and_sockets_are_not_opened_and_large_files_not_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(folder)
        server.bind("socket.png")
    monkeypatch.setattr(tables, "MAX_IMAGE_BYTES", 5)
    (folder / "big.png").write_bytes(b"123456")
    rows = [(f"{name}.png", "c") for name in ("pipe", "socket", "big", "0")]
    # An end that nobody writes to would be waited for without end.
    items = read_table(folder / "t.csv", as_csv(rows, ","))
    assert reasons(items) == [
        ("pipe.png", "not a plain file", "row 1: pipe.png"),
        ("socket.png", "not a plain file", "row 2: socket.png"),
        ("big.png", "file too large", "row 3: big.png: 6 bytes"),
    ]
    assert pairs(items) == [("0.png", "c")]


def test_columns(folder: Path) -> None:
    for name in ("file_name", "path", "filepath"):
        text = f"{name},caption,caption_zh,id\n0.png,red,红,x\n"
        path = folder / "t.csv"
        assert pairs(read_table(path, text)) == [("x", "red")]
        chinese = CaptionRule(language="zh")
        assert pairs(read_table(path, text, captions=chinese)) == [("x", "红")]
        # A column that was asked for has no substitute.
        assert reasons(read_table(path, text, image_key="picture"))[0][1] == "no image name"
    text = "image,picture,caption\n0.png,1.png,c\n"
    assert pairs(read_table(path, text, image_key="picture")) == [("1.png", "c")]
    assert pairs(read_table(path, "image\n0.png\n", captions=PICTURES_ONLY)) == [("0.png", "")]
    (folder / "t.jsonl").write_text('{"id": 0, "path": "0.png", "caption": "c"}')
    assert pairs(read_all(TableSource(folder / "t.jsonl"))) == [("0", "c")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "0.png,red\n1.png,blue\n",
            r"the header, has no column 'image'.*columns there: 0.png, red",
        ),
        ("image,text\n0.png,c\n", r"no column 'caption' \(caption_key\).*image, text"),
        ("image,caption,caption\n", "several columns 'caption'"),
        ("", "no header"),
        ('"image,caption\n0.png,c\n', "no header"),
        ("image,caption\nno.png,c\n", r"none of the first 1 rows.*1 x no image file.*no\.png"),
        ("image,caption\n".encode("utf-16"), "is UTF-16"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_before_the_run(
    folder: Path, content: str | bytes, message: str
) -> None:
    (folder / "a.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        TableSource(folder / "a.csv").check()
    # Another table's header is looked at, too; rows of the first decide otherwise.
    (folder / "a.csv").rename(folder / "b.csv")
    (folder / "a.csv").write_text("image,caption\n0.png,c\n")
    if "none of" in message:
        TableSource(folder).check()
    else:
        with pytest.raises(DataError, match=message):
            TableSource(folder).check()


def test_jsonl_without_the_columns_is_refused_before_the_run(folder: Path) -> None:
    path = folder / "a.jsonl"
    path.write_text('{"img": "0.png", "text": "c"}\n' * 3)
    with pytest.raises(DataError, match=r"3 x no image name.*columns there: img, text"):
        TableSource(path).check()
    TableSource(path, CaptionRule(key="text"), image_key="img").check()
    with pytest.raises(DataError, match="column 'caption'; columns there: img, text"):
        TableSource(path).check_captions()
    TableSource(path, CaptionRule(key="text")).check_captions()


def test_which_tables(folder: Path) -> None:
    with pytest.raises(DataError, match="holds no table"):
        TableSource(folder).parts()
    with pytest.raises(DataError, match="no such folder, or table"):
        TableSource(folder / "none.csv").parts()
    with pytest.raises(DataError, match="no such folder, or table"):
        TableSource(folder / "0.png").parts()
    (folder / "a.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match="holds no row"):
        TableSource(folder).parts()
    (folder / "b.CSV").write_text("image,caption\n0.png,c\n")
    assert [part.name for part in TableSource(folder).parts()] == ["b.CSV#0"]
    (folder / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"several kinds \(a.csv, a.jsonl"):
        TableSource(folder).parts()


def test_options_are_checked(folder: Path) -> None:
    with pytest.raises(ConfigError, match="rows_per_part = 0"):
        TableSource(folder, rows_per_part=0)
    with pytest.raises(ConfigError, match="image_key = ''"):
        TableSource(folder, image_key="")
    with pytest.raises(ConfigError, match="caption_from = 'txt'"):
        TableSource(folder, CaptionRule(caption_from="txt"))
    with pytest.raises(DataError, match="image_root"):
        TableSource(folder, image_root=folder / "none")


def test_description_does_not_name_the_place(tmp_path: Path) -> None:
    for name in ("here", "there"):
        (tmp_path / name / "pictures").mkdir(parents=True)
    described = [
        TableSource(tmp_path / name, image_root=tmp_path / name / root).description
        for name, root in (("here", "pictures"), ("there", "pictures"), ("there", "."))
    ]
    assert described[0] == described[1] != described[2]
    assert described[0] == json.loads(json.dumps(described[0]))


def test_a_table_that_becomes_shorter_stops_the_run(folder: Path) -> None:
    path = folder / "t.csv"
    path.write_text(as_csv(ROWS, ","))
    (part,) = (source := TableSource(path)).parts()
    path.write_bytes(b"image,caption\r\n0.png,c\n1.p")
    for call in (source.digest, lambda part: list(source.read(part))):
        with pytest.raises(DataError, match=r"t\.csv: has become shorter"):
            call(part)
