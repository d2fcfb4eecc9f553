"""storage: atomic replacement, locks, digests."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_cogview.configs.errors import DataError
from megatron_cogview.storage.atomic import (
    TEMPORARY_NAME,
    locked_directory,
    remove_stale,
    replacing,
    replacing_directory,
    write_bytes,
    write_text,
)
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_bytes,
    sha256_file,
    write_json_with_digest,
)


def test_replacing_shows_the_old_content_until_the_end(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_an_error_keeps_the_old_content_and_leaves_no_file(tmp_path):
    path = tmp_path / "a.bin"
    write_text(path, "文")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "文"
    assert len(list(tmp_path.iterdir())) == 1


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_bytes(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_kill_in_the_middle_leaves_the_old_file_and_removable_rubbish(tmp_path):
    path = tmp_path / "a.bin"
    write_bytes(path, b"old")
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from megatron_cogview.storage.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as f:\n"
        "    f.write(b'x' * 100000); f.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False, cwd=root)
    assert done.returncode == -9
    assert path.read_bytes() == b"old"
    rubbish = [p for p in tmp_path.iterdir() if p != path]
    assert len(rubbish) == 1
    assert TEMPORARY_NAME.fullmatch(rubbish[0].name)
    (tmp_path / ".mine.tmp").touch()
    assert remove_stale(tmp_path, "b.bin".__eq__) == 0
    assert remove_stale(tmp_path, "a.bin".__eq__) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "a.bin"]


def test_replacing_directory(tmp_path):
    target = tmp_path / "d"
    with replacing_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "f").write_bytes(b"1")
        assert not target.exists()
    assert (target / "sub" / "f").read_bytes() == b"1"
    with pytest.raises(FileExistsError), replacing_directory(target):
        raise AssertionError("the block must not run")
    with pytest.raises(FileExistsError), replacing_directory(tmp_path / "e"):
        (tmp_path / "e").mkdir()
    with pytest.raises(RuntimeError), replacing_directory(tmp_path / "g"):
        raise RuntimeError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "e"]


def test_lock_refuses_a_second_writer_and_ends_with_the_first(tmp_path):
    with (
        locked_directory(tmp_path),
        pytest.raises(DataError, match="another process"),
        locked_directory(tmp_path),
    ):
        raise AssertionError("the block must not run")
    with locked_directory(tmp_path):
        assert not list(tmp_path.iterdir())


def test_json_round_trip_and_every_bit_flip(tmp_path):
    path = tmp_path / "m.json"
    value = {"b": [2.5e-05, None], "a": "文"}
    write_json_with_digest(path, value)
    assert read_json_with_digest(path) == value
    data = path.read_bytes()
    undetected = []
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read_json_with_digest(path)
            undetected.append(bit)
        except DataError:
            pass
    assert undetected == []
    for length in (0, 1, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(DataError):
            read_json_with_digest(path)


def test_json_errors(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_json_with_digest(tmp_path / "none")
    (tmp_path / "plain.json").write_text("{}")
    with pytest.raises(DataError, match="digest"):
        read_json_with_digest(tmp_path / "plain.json")
    with pytest.raises(ValueError, match="reserved"):
        write_json_with_digest(tmp_path / "x", {"digest": 1})


def test_sha256(tmp_path):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert sha256_bytes(b"") == empty
    (tmp_path / "a").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "a") == sha256_bytes(b"abc" * 100_000)
