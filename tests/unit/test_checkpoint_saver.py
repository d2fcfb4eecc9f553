"""checkpoint.saver on one rank: what is saved is the state of its step, and a disk that refuses, at
whatever call, costs a save and nothing else."""

import contextlib
import errno
import io
import os
import random
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_cogview.checkpoint import blobs, commit, snapshot
from megatron_cogview.checkpoint.boxes import Box
from megatron_cogview.checkpoint.reader import CheckpointReader
from megatron_cogview.checkpoint.saver import Saver, Status
from megatron_cogview.checkpoint.scalars import read_common
from megatron_cogview.checkpoint.snapshot import Piece, ShardedState
from megatron_cogview.configs.errors import CheckpointError

ALONE: Any = SimpleNamespace(rank=0, world_size=1, is_main=True, device=torch.device("cpu"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)


def state(seed: int, numel: int = 1000) -> ShardedState:
    """Some tensors that depend on the seed, each in two parts; the second is another rank's."""
    g = torch.Generator().manual_seed(seed)
    pieces = []
    for number, dtype in enumerate(DTYPES):
        data = (torch.randn(numel, generator=g) * 100).to(dtype)
        pieces.append(Piece(f"tensor{number}", (numel,), Box((0,), (numel,)), data, True))
        pieces.append(Piece("a copy", (numel,), Box((0,), (numel,)), data, False))
    return ShardedState(pieces, {"adam_step": seed}, ["decoder._extra_state/shard_0_1"])


def is_state(folder: Path, seed: int) -> bool:
    """Whether the checkpoint holds :func:`state`, bit for bit."""
    assert commit.verify(folder)["step"] == int(folder.name[5:13])
    reader = CheckpointReader(folder)
    return read_common(folder)["adam_step"] == seed and all(
        torch.equal(reader.whole(piece.key), piece.data)
        for piece in state(seed).pieces
        if piece.is_written
    )


def newest(root: Path) -> Path:
    found = commit.newest_valid(root)
    assert found is not None
    return found[0]


def save(root: Path, step: int, **settings: Any) -> Path | None:
    settings = {"keep": 2, "asynchronous": False} | settings
    saver = Saver(root, ALONE, **settings)
    saver.begin(step, {"run": "this"}, state(step))
    saved = saver.wait()
    assert saver.failures == (saved is None)
    return saved


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = save(tmp_path / "new" / "folder", 7, asynchronous=True)
    assert saved is not None and saved.name == "step_00000007"
    assert is_state(saved, 7)
    assert commit.verify(saved)["state"] == {"run": "this"}
    assert (saved.parent / commit.POINTER).read_text() == "step_00000007\n"
    assert sorted(p.name for p in saved.iterdir()) == [
        *(".metadata", "__0_0.distcp", "common.json", "common.pt", "manifest.json"),
        "metadata.json",
    ]


def test_the_same_state_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a", 3), save(tmp_path / "b", 3, asynchronous=True)
    assert one is not None and other is not None
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_training_goes_on_while_the_state_of_the_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, write = threading.Event(), blobs.write_some

    def late(file: Any, data: memoryview) -> int:
        assert held.wait(30)
        return write(file, data)

    monkeypatch.setattr(blobs, "write_some", late)
    saver = Saver(tmp_path, ALONE, keep=2)
    for step in (1, 2):
        held.clear()
        live = state(step)
        saver.begin(step, {}, live)
        for piece in live.pieces:
            piece.data.zero_()
        assert saver.status is Status.WRITING
        with pytest.raises(AssertionError, match="in flight"):
            saver.begin(3, {}, live)
        held.set()
        saved = saver.wait()
        assert saver.status is Status.IDLE
        assert saved is not None and is_state(saved, step)
    assert saver.wait() is None and saver.failures == 0


def test_host_memory_is_kept_from_save_to_save(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, keep=2)
    saver.reserve(state(0))
    places = {chunk.data_ptr() for chunk in saver._snapshot._chunks}
    for step in range(3):
        saver.begin(step, {}, state(step))
        assert saver.wait() is not None
        places.update(chunk.data_ptr() for chunk in saver._snapshot._chunks)
        assert not saver._snapshot._copies, "the live tensors would be kept alive"
    assert len(places) == 1


class Dead(BaseException):
    """Stands for a kill: no handler of the product catches it."""


class Disk:
    """Counts the calls that reach the disk, and lets one of them fail or be the last.

    Args:
        monkeypatch: takes everything back.
        fail_at: number of the call that fails, from 0.
        error: errno; None: the process dies there, and whatever it would still do is not done.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fail_at: int = -1, error: int | None = errno.EIO
    ) -> None:
        self.calls: list[str] = []
        self.fail_at, self.error, self.dead = fail_at, error, False
        for module, name in (
            *((os, n) for n in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open")),
            *((blobs, n) for n in ("write_some", "sync")),
            (io, "open"),
            (torch, "save"),
        ):
            monkeypatch.setattr(module, name, self._watched(name, getattr(module, name)))

    def _watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.dead:
                raise Dead
            if name in ("unlink", "rmdir") and self.error is not None:
                return call(*args, **kwargs)
            number = len(self.calls)
            self.calls.append(f"{name} {args[:2]}")
            if number == self.fail_at and self.error is None:
                self.dead = True
                raise Dead
            if number == self.fail_at:
                raise OSError(self.error, os.strerror(self.error))
            return call(*args, **kwargs)

        return watched


def faults(
    root: Path, step: int, error: int | None, before: Callable[[], None]
) -> Iterator[tuple[str, Path | None]]:
    """Save ``step`` once for each call that a save makes, and let that one fail: what was called,
    and what came of it.  ``before`` makes ``root`` anew."""
    calls = _with_fault(root, step, -1, error, before)[0]
    for number, call in enumerate(calls):
        # torch writes a tensor in dozens of small pieces.
        if not call.startswith("write_some") or number % 11 == 0:
            yield call, _with_fault(root, step, number, error, before)[1]


def _with_fault(
    root: Path, step: int, number: int, error: int | None, before: Callable[[], None]
) -> tuple[list[str], Path | None]:
    before()
    saver, saved = Saver(root, ALONE, keep=2, asynchronous=False), None
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, number, error)
        with contextlib.suppress(Dead):
            saver.begin(step, {}, state(step))
            saved = saver.wait()
        # Killed or not, nothing of this save goes on after it.
        saver._finish_removal()
    return disk.calls, saved


def two_saved(root: Path, *steps: int) -> Callable[[], None]:
    """Makes ``root`` a folder that holds checkpoints of these steps."""
    kept = root.with_name("kept")
    for step in steps:
        assert save(kept, step) is not None

    def before() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(kept, root)

    return before


def left_over(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.suffix in (".incomplete", ".replaced")]


@pytest.fixture
def no_flushing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut could tell the difference, and hundreds of saves take a while."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize(
    ("error", "again"), [(errno.ENOSPC, False), (errno.EIO, True)], ids=["new", "again"]
)
@pytest.mark.usefixtures("no_flushing")
def test_any_call_may_fail(error: int, again: bool, tmp_path: Path) -> None:
    """Also when the step is saved again."""
    root, step = tmp_path / "root", 5 if again else 6
    failed = 0
    for call, saved in faults(root, step, error, two_saved(root, 4, 5)):
        assert not list(root.glob(f"step_{step:08d}.*.incomplete")), call
        found = newest(root)
        assert is_state(found, int(found.name[5:13])), call
        if saved is None:
            failed += 1
            assert is_state(root / "step_00000004", 4), call
            assert is_state(newest(root), 5 if again else int(found.name[5:13])), call
        else:
            assert is_state(saved, step)
        later = save(root, 7)
        assert later is not None and is_state(later, 7), call
        assert not left_over(root), call
    assert failed > 20


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.usefixtures("no_flushing")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_kill_at_any_call(again: bool, tmp_path: Path) -> None:
    """A kill between renaming and the pointer among them."""
    root, step = tmp_path / "root", 5 if again else 6
    seen = set()
    for call, _ in faults(root, step, None, two_saved(root, 4, 5)):
        found = newest(root)
        seen.add(found.name)
        assert is_state(found, int(found.name[5:13])), call
        assert int(found.name[5:13]) in (5, step), call
        later = save(root, 7)
        assert later is not None and is_state(later, 7), call
        assert not left_over(root), call
    assert len(seen) == 2, "no kill came after the new one was there"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fills_up(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any tenth of the bytes, written by a thread, a few bytes at a time."""
    saver = Saver(tmp_path, ALONE, keep=2)
    saver.begin(1, {}, state(1))
    first = saver.wait()
    assert first is not None
    total, write = (first / "__0_0.distcp").stat().st_size, blobs.write_some
    for tenth in range(10):
        left = total * tenth // 10

        def little(file: Any, data: memoryview) -> int:
            nonlocal left
            if left <= 0:
                raise OSError(error, os.strerror(error), file.name)
            count = write(file, data[: max(1, min(left, 777))])
            left -= count
            return count

        with monkeypatch.context() as patch:
            patch.setattr(blobs, "write_some", little)
            saver.begin(2, {}, state(2))
            assert saver.wait() is None
        assert saver.last_error is not None and os.strerror(error) in saver.last_error
        assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [first.name]
        assert is_state(first, 1)
    assert saver.failures == 10
    saver.begin(2, {}, state(2))
    second = saver.wait()
    assert second is not None and is_state(second, 2)


def test_the_kernel_refuses(tmp_path: Path) -> None:
    """A limit on the size of files, which lets the last write before it be a short one."""
    assert save(tmp_path, 1) is not None
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_001, usual[1]))
        assert save(tmp_path, 2, asynchronous=True) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert is_state(newest(tmp_path), 1)
    assert not list(tmp_path.glob("*.incomplete"))


def test_no_memory_no_thread_no_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has nothing to do with a disk ends a save in the same way."""
    saver = Saver(tmp_path, ALONE, keep=2)

    def refuse(*_: Any) -> None:
        raise RuntimeError("cannot allocate")

    for owner, name in ((snapshot.Snapshot, "take"), (threading.Thread, "start")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, refuse)
            saver.begin(1, {}, state(1))
            assert saver.status is Status.FAILED
            assert saver.commit() is None
        assert "cannot allocate" in str(saver.last_error)
    saver.begin(1, {"run": object()}, state(1))
    assert saver.commit() is None
    assert "JSON" in str(saver.last_error)
    assert saver.failures == 3
    assert not list(tmp_path.iterdir())


def test_a_file_that_vanished_is_missed(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, keep=2, asynchronous=False)
    saver.begin(1, {}, state(1))
    (written,) = tmp_path.glob("step_00000001.*/__0_0.distcp")
    written.unlink()
    assert saver.commit() is None
    assert "not there any more" in str(saver.last_error)


@pytest.mark.usefixtures("no_flushing")
def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    """And so is a file that is cut, gone, or in the place of another."""
    for step in (1, 2):
        assert save(tmp_path, step) is not None
    folder, rng = tmp_path / "step_00000002", random.Random(5)
    files = {path: path.read_bytes() for path in folder.iterdir()}
    for path, data in files.items():
        places = {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(8))}
        changed = [
            data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] for at in places
        ]
        for other in (*changed, data[:-1], data[: len(data) // 2], b"", data + b"\0", None):
            path.unlink() if other is None else path.write_bytes(other)
            with pytest.raises(CheckpointError, match=path.name):
                commit.verify(folder)
            assert newest(tmp_path).name == "step_00000001"
            path.write_bytes(data)
    one, other = folder / "__0_0.distcp", tmp_path / "step_00000001" / "__0_0.distcp"
    shutil.copy(other, one)
    with pytest.raises(CheckpointError, match="SHA-256"):
        commit.verify(folder)
    # A whole folder under another's name.
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "step_00000001", folder)
    assert newest(tmp_path).name == "step_00000001"


def test_damaged_ones_do_not_push_out_the_ones_that_are_whole(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        assert save(tmp_path, step, keep=3) is not None
    for step in (20, 30):
        (tmp_path / commit.checkpoint_name(step) / "common.pt").write_bytes(b"damaged")
    assert newest(tmp_path).name == "step_00000010"
    for step in (12, 14, 16):
        assert save(tmp_path, step) is not None
        assert is_state(newest(tmp_path), step)
    kept = [p.name for p in sorted(tmp_path.glob("step_*"))]
    assert kept == [commit.checkpoint_name(step) for step in (14, 16, 20, 30)]


def test_retention(tmp_path: Path) -> None:
    for step in range(2, 14, 2):
        assert save(tmp_path, step, keep_every=4) is not None
    kept = [int(p.name[5:]) for p in sorted(tmp_path.glob("step_*"))]
    assert kept == [4, 8, 10, 12]


def test_going_back(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        assert save(tmp_path, step, keep=3) is not None
    assert newest(tmp_path).name == "step_00000003"
    found = commit.newest_valid(tmp_path, before=3)
    assert found is not None and found[0].name == "step_00000002"
    assert commit.newest_valid(tmp_path, before=1) is None
    assert commit.newest_valid(tmp_path / "nowhere") is None
