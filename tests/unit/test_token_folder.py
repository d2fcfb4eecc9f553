"""data.token_folder and pipeline: several workers on one folder, repairs, errors on the way."""

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
    with pytest.raises(DataError, match=r"shard-000000.json: was made with other settings"):
        run(pairs, text, out, image=other, worker=1, of=2)
    assert not (out / "manifest.json").exists()


class Failing(FakeImageTokenizer):
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
