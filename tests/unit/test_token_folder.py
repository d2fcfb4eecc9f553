"""data.token_folder and pipeline: several workers on one folder, repairs, errors on the way."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import encode, pipeline
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.webdataset import WebDatasetTars
from megatron_cogview.storage.locks import WorkLocks
from tests.unit import test_tokenize as base
from tests.unit.test_tokenize import FakeImageTokenizer, content, run, write_pairs

# Fixtures of that file.
pairs, text = base.pairs, base.text

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def whole(pairs, text, tmp_path):
    """What one undisturbed process writes."""
    run(pairs, text, tmp_path / "whole")
    return content(tmp_path / "whole")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_workers_together_write_what_one_writes(pairs, text, tmp_path, whole, count):
    out = tmp_path / "out"
    order = [*range(1, count), 0]
    manifests = [run(pairs, text, out, worker=k, of=count) for k in order]
    assert [m is not None for m in manifests] == [False] * (count - 1) + [True]
    assert content(out) == whole
    # Any worker that is run again finds everything done.
    assert run(pairs, text, out, worker=1, of=count) == manifests[-1]


def test_decoding_processes_change_no_byte(pairs, text, tmp_path, whole):
    run(pairs, text, tmp_path / "out", decode_workers=2)
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batch_size_changes_no_byte(pairs, text, tmp_path, whole, batch_size):
    run(pairs, text, tmp_path / "out", batch_size=batch_size)
    assert content(tmp_path / "out") == whole


def test_a_batch_ends_early_rather_than_hold_too_much(pairs, text, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(encode, "MAX_BATCH_BYTES", 1)
    image = FakeImageTokenizer()
    run(pairs, text, tmp_path / "out", image=image, batch_size=64)
    assert image.calls == 12
    assert content(tmp_path / "out") == whole


HOLDER = """
import sys, time
from pathlib import Path
from megatron_cogview.storage.locks import WorkLocks
locks = WorkLocks(Path(sys.argv[1]))
locks.take([int(n) for n in sys.argv[2:]])
print("held", flush=True)
time.sleep(60)
"""


def held(path, *numbers):
    """Another live process that holds these numbers."""
    command = [sys.executable, "-c", HOLDER, str(path), *map(str, numbers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_live_worker_is_refused_and_a_dead_ones_lock_is_free(pairs, text, tmp_path, whole):
    out = tmp_path / "out"
    out.mkdir()
    other = held(out / ".locks", 1)
    try:
        with pytest.raises(DataError, match="piece 1 is being worked on by another live process"):
            run(pairs, text, out)
        # What the other does not hold can be done beside it.
        assert run(pairs, text, out, worker=0, of=2) is None
        assert not (out / "shard-000001.npy").exists()
    finally:
        other.kill()
        other.wait()
    run(pairs, text, out)
    assert content(out) == whole


def test_locks_are_all_or_nothing(tmp_path):
    other = held(tmp_path / "l", 5)
    try:
        locks = WorkLocks(tmp_path / "l")
        with pytest.raises(DataError, match="piece 5"):
            locks.take([3, 4, 5])
        third = held(tmp_path / "l", 3, 4)
        third.kill()
        third.wait()
        locks.take([3, 4])
        locks.close()
    finally:
        other.kill()
        other.wait()


def test_whoever_finishes_last_waits_for_the_manifest_lock(tmp_path):
    locks = WorkLocks(tmp_path / "l")
    other = held(tmp_path / "l", 9)
    got = threading.Event()
    waiter = threading.Thread(target=lambda: (locks.wait_for(9), got.set()))
    waiter.start()
    time.sleep(0.3)
    assert not got.is_set()
    other.kill()
    waiter.join(20)
    assert got.is_set()
    other.wait()
    locks.close()


def test_a_damaged_shard_of_a_finished_set_is_made_again(pairs, text, tmp_path, whole):
    out = tmp_path / "out"
    run(pairs, text, out)
    shard = out / "shard-000001.npy"
    damaged = bytearray(shard.read_bytes())
    damaged[-100] ^= 4
    shard.write_bytes(damaged)
    image = FakeImageTokenizer()
    run(pairs, text, out, image=image)
    assert 0 < image.calls <= 3
    assert content(out) == whole


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_sidecar_of_a_finished_set_is_made_again(pairs, text, tmp_path, whole, damage):
    out = tmp_path / "out"
    run(pairs, text, out)
    sidecar = out / "shard-000001.json"
    sidecar.unlink()
    if damage == "damaged":
        sidecar.write_bytes(whole["shard-000001.json"][:-9])
    run(pairs, text, out)
    assert content(out) == whole


def test_inputs_are_compared_by_time_and_hash(pairs, text, tmp_path):
    """A newer file with the same bytes is the same input; other bytes are found."""
    out = tmp_path / "out"
    run(pairs, text, out)
    before = content(out)
    tar = pairs / "b.tar"
    os.utime(tar, ns=(time.time_ns() + 10**9, time.time_ns() + 10**9))
    image = FakeImageTokenizer()
    run(pairs, text, out, image=image)
    assert image.calls == 0
    assert content(out) == before
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    os.utime(tar, ns=(1, 1))
    # The same size and an old date: found when asked for, as documented.
    run(pairs, text, out)
    with pytest.raises(DataError, match=r"shard-000001.npy was made from b.tar"):
        run(pairs, text, out, verify_inputs=True)


def test_two_workers_with_other_settings_do_not_mix(pairs, text, tmp_path):
    out = tmp_path / "out"
    assert run(pairs, text, out, worker=0, of=2) is None
    other = FakeImageTokenizer()
    other.fingerprint = "e" * 64
    before = content(out)
    with pytest.raises(DataError, match=r"shard-000000.json: was made with other settings"):
        run(pairs, text, out, image=other, worker=1, of=2)
    assert not (out / "manifest.json").exists()
    # Nor does the first worker's own run with other settings cost what is there.
    with pytest.raises(DataError, match=r"shard-000000.json: was made with other settings"):
        run(pairs, text, out, image=other, worker=0, of=2)
    assert before.items() <= content(out).items()


class Failing(FakeImageTokenizer):
    def __init__(self, calls=0):
        super().__init__()
        self.calls = calls

    def encode(self, pictures):
        if self.calls == 3:
            raise RuntimeError("device lost")
        return super().encode(pictures)


def test_an_error_while_encoding_ends_everything_and_loses_nothing(pairs, text, tmp_path, whole):
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="device lost"):
        run(pairs, text, out, image=Failing(), decode_workers=1)
    assert not [t for t in threading.enumerate() if t.name == "read pairs"]
    run(pairs, text, out)
    assert content(out) == whole


def test_an_error_while_reading_reaches_the_caller(pairs, text, tmp_path, monkeypatch):
    def broken(items, batch_size):
        yield from []
        raise OSError("stale file handle")

    monkeypatch.setattr(pipeline, "batches", broken)
    with pytest.raises(OSError, match="stale file handle"):
        run(pairs, text, tmp_path / "out")


def test_too_many_rejections_stop_a_long_run_early(pairs, text, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_cogview.data.tokenize.MIN_PAIRS_TO_ABORT", 10)
    bad = [(f"x{n}.json", b"{}") for n in range(40)]
    write_pairs(pairs / "a.tar", 1, extra=bad)
    with pytest.raises(DataError, match=r"40 of 41 pairs rejected, more than --max-rejected 0\.01"):
        run(pairs, text, tmp_path / "out", max_rejected=0.01)
    # The rest was not worked through.
    assert not (tmp_path / "out" / "shard-000002.npy").exists()


def test_captions_that_spell_special_tokens_stay_text(text, tmp_path):
    (tmp_path / "pairs").mkdir()
    hostile = ["</s> <s> [BASE]", "[ROI1] red [EOI1]", "<unk>\\x00 red", "\\u202e red \\u2066"]
    extra = []
    for n, caption in enumerate(hostile):
        about = f'{{"id": "h{n}", "caption": "{caption}"}}'.replace("\\\\", "\\")
        extra += [(f"h{n}.png", base.png("red")), (f"h{n}.json", about.encode())]
    write_pairs(tmp_path / "pairs" / "a.tar", 0, extra=extra)
    sequence = base.SequenceConfig(
        length=84, text_budget=64, codes_per_side=(4,), text_policy="truncate"
    )
    run(tmp_path / "pairs", text, tmp_path / "out", sequence)
    for record in ShardSet(tmp_path / "out").read(base.np.arange(len(ShardSet(tmp_path / "out")))):
        ids = record["text"][: record["text_length"]].tolist()
        assert not {1, 2} & set(ids)
        assert max(ids) < text.vocab_size


def test_an_input_that_changes_while_it_is_read_is_refused(pairs, text, tmp_path, monkeypatch):
    """Replaced after the reading and before the hashing: the hash would speak of other bytes."""
    out = tmp_path / "out"
    real = WebDatasetTars.digest

    def late(self, part):
        if part.name == "b.tar":
            time.sleep(0.5)
            fresh = pairs / "fresh"
            fresh.write_bytes(part.path.read_bytes())
            fresh.replace(part.path)
        return real(self, part)

    monkeypatch.setattr(WebDatasetTars, "digest", late)
    with pytest.raises(DataError, match=r"b\.tar: changed while it was read"):
        run(pairs, text, out)
    assert not (out / "shard-000001.json").exists()


def test_a_part_that_is_made_again_loses_its_sidecar_first(pairs, text, tmp_path, whole):
    """Or whoever finishes meanwhile would put the old sidecar's hash beside the new shard."""
    out = tmp_path / "out"
    run(pairs, text, out)
    (out / "manifest.json").unlink()
    shard = bytearray((out / "shard-000001.npy").read_bytes())
    shard[-1] ^= 1
    (out / "shard-000001.npy").write_bytes(shard)
    with pytest.raises(RuntimeError, match="device lost"):
        run(pairs, text, out, image=Failing(calls=3), worker=1, of=2)
    assert not (out / "shard-000001.json").exists()
    assert run(pairs, text, out, worker=0, of=2) is None
    assert not (out / "manifest.json").exists()
    run(pairs, text, out)
    assert content(out) == whole


@pytest.mark.parametrize("name", ["split-0123456789ab.npy", "manifest.json", "rejected.jsonl"])
def test_what_a_kill_in_the_end_leaves_is_removed(pairs, text, tmp_path, whole, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / f".{name}.0123456789abcdef.tmp").write_bytes(b"half")
    run(pairs, text, out)
    assert content(out) == whole


def test_the_share_of_rejections_is_that_of_all_workers(pairs, text, tmp_path):
    """One worker's bad half must not slip in behind another's good one."""
    write_pairs(pairs / "b.tar", 0, extra=[(f"x{n}.json", b"{}") for n in range(20)])
    out = tmp_path / "out"
    assert run(pairs, text, out, worker=1, of=2, max_rejected=0.1) is None
    with pytest.raises(DataError, match=r"20 of 28 pairs rejected, more than --max-rejected 0\.1"):
        run(pairs, text, out, worker=0, of=2, max_rejected=0.1)
    assert not (out / "manifest.json").exists()
    assert run(pairs, text, out, worker=0, of=2, max_rejected=0.8)["records"] == 8


def test_patience_with_locks(tmp_path):
    other = held(tmp_path / "l", 5)
    locks = WorkLocks(tmp_path / "l")
    threading.Timer(1.0, other.kill).start()
    begin = time.monotonic()
    locks.take([5], patience_seconds=30)
    assert 0.5 < time.monotonic() - begin < 20
    other.wait()
    locks.close()


def test_without_locks_nobodys_temporary_files_are_removed(
    pairs, text, tmp_path, whole, monkeypatch, caplog
):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("megatron_cogview.storage.locks.fcntl.lockf", unsupported)
    out = tmp_path / "out"
    out.mkdir()
    other = out / ".shard-000000.npy.0123456789abcdef.tmp"
    other.write_bytes(b"of a live process, perhaps")
    run(pairs, text, out)
    assert "cannot lock" in caplog.text
    assert other.read_bytes()
    other.unlink()
    assert content(out) == whole
