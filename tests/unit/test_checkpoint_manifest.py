"""checkpoint.commit and checkpoint.scalars: what a folder says of itself, honest or not."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_cogview.checkpoint import commit
from megatron_cogview.checkpoint.scalars import FILE, read_common, write_common
from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.storage.digest import sha256_bytes, write_json_with_digest

CONTENT = b"content"
ABOUT = {"bytes": len(CONTENT), "sha256": sha256_bytes(CONTENT)}


def folder_of(root: Path, manifest: dict[str, Any] | None = None) -> Path:
    """A folder of one file, with an honest manifest or another."""
    folder = root / "step_00000003"
    folder.mkdir()
    (folder / "data").write_bytes(CONTENT)
    honest = {"step": 3, "state": {}, "files": {"data": ABOUT}}
    write_json_with_digest(folder / commit.MANIFEST, honest | (manifest or {}))
    return folder


def test_an_honest_folder(tmp_path: Path) -> None:
    assert commit.verify(folder_of(tmp_path))["step"] == 3


@pytest.mark.parametrize(
    "name",
    [
        "../data",
        "/etc/passwd",
        "a/../../data",
        "..",
        ".",
        "",
        "absent",
        "a\0b",
        "x" * 300,
        "\ud800",
    ],
)
def test_names_that_are_no_file_of_the_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(CONTENT)
    with pytest.raises(CheckpointError):
        commit.verify(folder_of(tmp_path, {"files": {name: ABOUT}}))


@pytest.mark.parametrize(
    "change",
    [
        *({"step": value} for value in (None, "3", 3.0, True, -1, 1 << 60, [3])),
        *({"files": value} for value in (None, [], "data", {"data": None}, {"data": []})),
        *({"files": {"data": ABOUT | {"bytes": value}}} for value in (None, "7", 7.0, [], -1)),
        *({"files": {"data": ABOUT | {"sha256": value}}} for value in (None, 7, "", [])),
        *({"state": value} for value in (None, [], "x")),
    ],
    ids=str,
)
def test_wrong_types_with_a_right_digest(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        commit.verify(folder_of(tmp_path, change))


def signed(head: str) -> bytes:
    """Any text with the digest that a manifest ends with."""
    return f'{head}\n "digest": "{sha256_bytes(head.encode())}"\n}}\n'.encode()


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"digest": 3}', b"[" * 100_000),
        *(signed("["), signed("garbage"), signed('{"a": ' + "[" * 100_000), signed("{")),
        signed('{"step": ' + "9" * 10_000 + ","),
    ],
    ids=lambda data: str(data[:10]),
)
def test_garbage_in_the_place_of_a_manifest(data: bytes, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / commit.MANIFEST).write_bytes(data)
    with pytest.raises(CheckpointError):
        commit.verify(folder)


def _link(path: Path) -> None:
    target = path.parent.parent / "target"
    target.write_bytes(CONTENT)
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["data", commit.MANIFEST])
@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, Path.touch, _link, lambda path: None])
def test_no_ordinary_file(make: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(CheckpointError):
        commit.verify(folder)


def test_a_manifest_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(CheckpointError, match="larger than any manifest"):
        commit.verify(folder_of(tmp_path))


def test_common_comes_back(tmp_path: Path) -> None:
    values = {"adam_step": 7, "loss_scale": {"scale": 65536.0, "growth_tracker": 1}}
    write_common(tmp_path, values)
    assert read_common(tmp_path) == values
    with pytest.raises(FileExistsError):
        write_common(tmp_path, values)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "[" * 100_000, '"x"', "\udcff", " " * 2**21]
)
def test_garbage_in_the_place_of_common(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError):
        read_common(tmp_path)


NO_STEPS = ["NaN", "Infinity", "-1", "1e400", "1.5", "true", "null", '"3"', "[]", "{}", "9" * 40]


@pytest.mark.parametrize("value", [*NO_STEPS, "9" * 5000])
def test_adam_steps_that_are_none(value: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(f'{{"adam_step": {value}}}')
    with pytest.raises(CheckpointError):
        read_common(tmp_path)


@pytest.mark.parametrize("value", ["NaN", "0", "-1.0", "1e400", "Infinity", "true", '"3"', "null"])
def test_loss_scales_that_are_none(value: str, tmp_path: Path) -> None:
    for text in (value, f'{{"scale": {value}}}', f'{{"scale": 1.0, "growth_tracker": {value}}}'):
        (tmp_path / FILE).write_text(f'{{"adam_step": 3, "loss_scale": {text}}}')
        if text == "null" or text.endswith('growth_tracker": 0}'):
            continue
        with pytest.raises(CheckpointError):
            read_common(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, _link, lambda path: None])
def test_common_is_no_ordinary_file(make: Callable[[Path], Any], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder / FILE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_common(folder)


def test_a_folder_inside_may_lead_anywhere(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "data").write_bytes(CONTENT)
    folder = folder_of(tmp_path, {"files": {"inside/data": ABOUT}})
    (folder / "inside").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="no file of its folder"):
        commit.verify(folder)


def saved(root: Path, step: int) -> Path:
    temporary = commit.prepare(root, step)
    (temporary / "data").write_bytes(CONTENT)
    return commit.commit(temporary, step, {"a": 1}, {})


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_retention(tmp_path: Path) -> None:
    for step in range(1, 9):
        assert commit.verify(saved(tmp_path, step))["step"] == step
        commit.remove(commit.retain(tmp_path, keep=2, keep_every=3))
    assert names(tmp_path) == [f"step_0000000{n}" for n in (3, 6, 7, 8)]
    commit.remove(commit.retain(tmp_path, keep=1))
    assert names(tmp_path) == ["step_00000008"]
    assert (tmp_path / commit.POINTER).read_text() == "step_00000008\n"


def test_what_may_be_gone_back_to_is_kept(tmp_path: Path) -> None:
    """Here the run went wrong behind step 4, and was asked to stop and save several times."""
    for step in (2, 4, 5, 6, 7):
        saved(tmp_path, step)
        commit.remove(commit.retain(tmp_path, keep=2, newest=step, hold=4 if step > 4 else None))
    assert names(tmp_path) == [f"step_0000000{n}" for n in (4, 6, 7)]


def test_a_removal_that_was_cut_short_is_finished(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    # What a kill in the middle of removing leaves.
    os.rename(tmp_path / "step_00000001", tmp_path / "step_00000001.incomplete")
    saved(tmp_path, 2)
    assert names(tmp_path) == ["step_00000002"]


def test_the_same_step_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    temporary = commit.prepare(tmp_path, 1)
    (temporary / "data").write_bytes(b"new")
    folder = commit.commit(temporary, 1, {}, {})
    commit.verify(folder)
    assert (folder / "data").read_bytes() == b"new"
    assert names(tmp_path) == ["step_00000001"]


def test_of_two_runs_in_one_folder_the_first_loses_its_save_and_nothing_is_mixed(
    tmp_path: Path,
) -> None:
    first = commit.prepare(tmp_path, 7)
    (first / "data").write_bytes(b"first")
    second = commit.prepare(tmp_path, 7)
    (second / "data").write_bytes(b"second")
    with pytest.raises(OSError, match="No such file"):
        commit.commit(first, 7, {}, {})
    folder = commit.commit(second, 7, {}, {})
    commit.verify(folder)
    assert (folder / "data").read_bytes() == b"second"
    assert names(tmp_path) == ["step_00000007"]
