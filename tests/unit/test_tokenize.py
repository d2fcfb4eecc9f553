"""data.tokenize: tars to shards; kills, bad input, foreign outputs, real pictures."""

import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_cogview.configs.errors import ConfigError, DataError
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.data import images, token_folder
from megatron_cogview.data.encode import PairEncoder
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.shards import sample_id
from megatron_cogview.data.tokenize import Work, tokenize_dataset
from megatron_cogview.data.webdataset import WebDatasetTars
from megatron_cogview.tokenization.text import TextTokenizer, normalise, train

SEQUENCE = SequenceConfig(length=26, text_budget=6, codes_per_side=(4,))
REPOSITORY = Path(__file__).resolve().parents[2]
COLOURS = ("red", "green", "blue")


class FakeImageTokenizer:
    """Codes are block means; made from the interface alone."""

    fingerprint = "f" * 64
    encoder_precision = "fp32"

    def __init__(self, image_size=16, codes_per_side=4, num_codes=256):
        self.config = SimpleNamespace(
            image_size=image_size, codes_per_side=codes_per_side, num_codes=num_codes
        )
        self.calls = 0

    def encode(self, pictures_NHWC):
        self.calls += 1
        block = self.config.image_size // self.config.codes_per_side
        means = torch.nn.functional.avg_pool2d(pictures_NHWC.double().mean(-1), block)
        return (means * self.config.num_codes / 256).long()


def png(colour, size=(20, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(path, count, first=0, extra=()):
    members = []
    for n in range(first, first + count):
        caption = {"id": f"id{n}", "caption": f"a {COLOURS[n % 3]} square"}
        members += [(f"{n}.png", png(COLOURS[n % 3])), (f"{n}.json", json.dumps(caption).encode())]
    with tarfile.open(path, "w") as tar:
        for name, data in [*members, *extra]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    captions = [f"a {c} square" for c in COLOURS]
    return train(captions, tmp_path_factory.mktemp("text") / "t.model", 400)


@pytest.fixture
def pairs(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    bad = [
        ("b1.png", b"not a picture"),
        ("b1.json", b'{"caption": "a red square"}'),
        ("b2.png", png("red")),
        ("b2.json", b'{"caption": " \\n"}'),
        ("b3.png", png("red")),
        ("b3.json", json.dumps({"caption": "a red square " * 9}).encode()),
        ("b4.json", b"{}"),
    ]
    write_pairs(folder / "a.tar", 5)
    write_pairs(folder / "b.tar", 4, first=5, extra=bad)
    write_pairs(folder / "c.tar", 3, first=9)
    return folder


def run(pairs, text, output, sequence=SEQUENCE, image=None, vocab=None, **options):
    encoder = PairEncoder(text, image or FakeImageTokenizer(), sequence, vocab)
    work = Work(**{"batch_size": 2, "decode_workers": 0, **options})
    return tokenize_dataset(WebDatasetTars(pairs), encoder, output, work)


def content(folder):
    """Everything but the lock file."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != token_folder.LOCKS}


def by_id(folder):
    """Records of a folder by their hashed ids."""
    shards = ShardSet(folder)
    return {int(r["sample_id"]): r for r in shards.read(np.arange(len(shards)))}


def test_records_hold_captions_and_pictures(pairs, text, tmp_path):
    manifest = run(pairs, text, tmp_path / "out")
    shards = ShardSet(tmp_path / "out")
    assert len(shards) == manifest["records"] == 12
    assert shards.manifest == manifest
    shards.check_tokenizers(text.fingerprint, "f" * 64)
    records = by_id(tmp_path / "out")
    for n in range(12):
        record = records[sample_id(f"id{n}")]
        ids = record["text"][: record["text_length"]].tolist()
        assert text.decode(ids) == f"a {COLOURS[n % 3]} square"
        assert not record["text"][record["text_length"] :].any()
        picture = images.decode(png(COLOURS[n % 3]), 16)
        expected = FakeImageTokenizer().encode(torch.from_numpy(picture)[None])[0]
        assert (record["image0"] == expected.numpy()).all()
    digest = hashlib.sha256(b"id3").digest()
    assert sample_id("id3") == int.from_bytes(digest[:8], "little")


def test_rejections_are_counted_and_logged_in_order(pairs, text, tmp_path):
    manifest = run(pairs, text, tmp_path / "out")
    lines = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    logged = [json.loads(line) for line in lines]
    assert [(item["id"], item["reason"], item["source"]) for item in logged] == [
        ("b/b1", "unusable image", "b.tar"),
        ("b/b2", "empty caption", "b.tar"),
        ("b/b3", "caption over the text budget", "b.tar"),
        ("b/b4", "no image", "b.tar"),
    ]
    assert sum(manifest["rejected"].values()) == 4
    assert [e["records"] for e in manifest["shards"]] == [5, 4, 3]


def test_truncate_policy_keeps_the_pair_and_counts_the_cut(pairs, text, tmp_path):
    sequence = SequenceConfig(length=26, text_budget=6, codes_per_side=(4,), text_policy="truncate")
    manifest = run(pairs, text, tmp_path / "out", sequence)
    assert manifest["records"] == 13
    assert manifest["counts"]["truncated"] == 1
    assert manifest["layout"]["longest_text"] == 6
    record = by_id(tmp_path / "out")[sample_id("b/b3")]
    assert record["text"][:6].tolist() == text.encode("a red square " * 9)[:6]


def test_two_grids_come_from_one_picture(pairs, text, tmp_path):
    sequence = SequenceConfig(
        template="super_resolution", length=40, text_budget=6, codes_per_side=(2, 4)
    )
    run(pairs, text, tmp_path / "out", sequence)
    record = by_id(tmp_path / "out")[sample_id("id0")]
    assert record["image0"].shape == (2, 2)
    assert record["image0"][0, 0] == record["image1"][0, 0] == 85


def test_a_second_run_does_nothing_and_output_does_not_depend_on_place(pairs, text, tmp_path):
    run(pairs, text, tmp_path / "out")
    first = content(tmp_path / "out")
    image = FakeImageTokenizer()
    run(pairs, text, tmp_path / "out", image=image)
    assert image.calls == 0
    assert content(tmp_path / "out") == first
    pairs.rename(tmp_path / "elsewhere")
    run(tmp_path / "elsewhere", text, tmp_path / "other")
    assert content(tmp_path / "other") == first


KILLED_RUN = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_tokenize as t
from pathlib import Path
from megatron_cogview.storage import atomic
from megatron_cogview.tokenization.text import TextTokenizer
left, real = int(sys.argv[5]), os.fsync
def fsync(descriptor):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
atomic.os.fsync = fsync
t.run(Path(sys.argv[2]), TextTokenizer(Path(sys.argv[3])), Path(sys.argv[4]))
"""


def test_killed_at_any_commit_and_run_again_gives_the_same_bytes(pairs, text, tmp_path):
    """SIGKILL at several flushes to the disk; after each the next run starts on what is left."""
    run(pairs, text, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    arguments = [os.path.dirname(__file__), str(pairs), str(text.path), str(tmp_path / "out")]
    kills = 0
    for flush in (1, 4, 3):
        command = [sys.executable, "-c", KILLED_RUN, *arguments, str(flush)]
        done = subprocess.run(command, check=False, capture_output=True, cwd=REPOSITORY)
        kills += done.returncode == -9
    assert kills == 3
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert any(p.name.endswith(".tmp") for p in (tmp_path / "out").iterdir())
    image = FakeImageTokenizer()
    run(pairs, text, tmp_path / "out", image=image)
    assert content(tmp_path / "out") == expected


def test_every_interruption_point_in_process(pairs, text, tmp_path, monkeypatch):
    """An error before each commit in turn; the rerun must end with the same bytes."""
    run(pairs, text, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    for limit in range(7):
        output = tmp_path / f"out{limit}"
        commits = itertools.count()

        def stop(real, commits=commits, limit=limit):
            def wrapped(*arguments):
                if next(commits) == limit:
                    raise KeyboardInterrupt
                return real(*arguments)

            return wrapped

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name in ("write_shard", "write_json_with_digest", "write_manifest"):
                patch.setattr(token_folder, name, stop(getattr(token_folder, name)))
            run(pairs, text, output)
        run(pairs, text, output)
        assert content(output) == expected


def test_sidecars_of_other_inputs_and_damaged_shards_are_not_reused(pairs, text, tmp_path):
    out = tmp_path / "out"
    run(pairs, text, out)
    expected = content(out)
    (out / "manifest.json").unlink()
    damaged = bytearray(expected["shard-000000.npy"])
    damaged[-1] ^= 1
    (out / "shard-000000.npy").write_bytes(damaged)
    sidecar = expected["shard-000001.json"].replace(b"f" * 64, b"e" * 64)
    (out / "shard-000001.json").write_bytes(sidecar)
    run(pairs, text, out)
    assert content(out) == expected
    other = FakeImageTokenizer()
    other.fingerprint = "e" * 64
    with pytest.raises(DataError, match=f"image tokenizer {'f' * 64}, not {'e' * 64}"):
        run(pairs, text, out, image=other)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match="made with other settings"):
        run(pairs, text, out, image=other)
    assert other.calls == 0


def test_appending_tars_keeps_the_old_shards_and_other_changes_are_refused(pairs, text, tmp_path):
    out = tmp_path / "out"
    run(pairs, text, out)
    before = content(out)
    write_pairs(pairs / "d.tar", 2, first=20)
    assert run(pairs, text, out)["records"] == 14
    after = content(out)
    assert all(after[n] == before[n] for n in before if n.startswith("shard-"))
    write_pairs(pairs / "a.tar", 2)
    with pytest.raises(DataError, match=r"shard-000000.npy was made from a.tar"):
        run(pairs, text, out)
    (pairs / "d.tar").unlink()
    with pytest.raises(DataError, match="more than 3 parts"):
        run(pairs, text, out)
    other = SequenceConfig(length=26, text_budget=5, codes_per_side=(4,))
    write_pairs(pairs / "d.tar", 2)
    with pytest.raises(DataError, match="layout"):
        run(pairs, text, out, other)


def test_limits_and_refusals(pairs, text, tmp_path):
    with pytest.raises(DataError, match=r"4 of 16 pairs rejected.*0.2: 1 caption over"):
        run(pairs, text, tmp_path / "out", max_rejected=0.2)
    assert not (tmp_path / "out" / "manifest.json").exists()
    run(pairs, text, tmp_path / "out", max_rejected=0.25)
    with pytest.raises(ConfigError, match="8 codes a side"):
        run(pairs, text, tmp_path / "x", image=FakeImageTokenizer(codes_per_side=8))
    small = VocabConfig(num_image_codes=256, num_text_ids=text.vocab_size - 1)
    with pytest.raises(ConfigError, match="num_text_ids"):
        run(pairs, text, tmp_path / "x", vocab=small)
    with pytest.raises(ConfigError, match="num_image_codes = 255"):
        run(pairs, text, tmp_path / "x", vocab=VocabConfig(num_image_codes=255))
    for field, value in (
        ("batch_size", 0), ("max_rejected", 1.5), ("decode_workers", -1), ("worker", 1)
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=field):
            Work(**{field: value})
    assert not (tmp_path / "x").exists()
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    write_pairs(nothing / "a.tar", 0, extra=[("1.json", b'{"caption": "c"}')])
    with pytest.raises(DataError, match=r"no pair could be used.*1 no image"):
        run(nothing, text, tmp_path / "y")


def test_the_encoders_precision_is_recorded_and_not_mixed(pairs, text, tmp_path):
    image = FakeImageTokenizer()
    image.encoder_precision = "bf16"
    manifest = run(pairs, text, tmp_path / "out", image=image)
    assert manifest["tokenizers"]["image"]["encoder_precision"] == "bf16"
    with pytest.raises(DataError, match="bf16"):
        run(pairs, text, tmp_path / "out")


REAL_SETS = ("noto_emoji", "clothing", "grocery", "coco_photos")


@pytest.mark.parametrize("name", REAL_SETS)
def test_real_pictures_with_cogviews_text_tokenizer(name, shared_data, tmp_path):
    """The first 50 pairs of each set: nothing rejected, captions come back."""
    cogview = TextTokenizer(shared_data / "cogview_sentencepiece" / "cog-pretrain.model")
    captions = {}
    (tmp_path / "pairs").mkdir()
    with (
        tarfile.open(shared_data / name / "train-000000.tar") as tar,
        tarfile.open(tmp_path / "pairs" / "a.tar", "w") as cut,
    ):
        for member in itertools.islice(tar, 100):
            data = tar.extractfile(member).read()
            if member.name.endswith(".json"):
                about = json.loads(data)
                captions[sample_id(about["id"])] = about["caption"]
            cut.addfile(member, io.BytesIO(data))
    sequence = SequenceConfig(length=200, text_budget=64, codes_per_side=(8,))
    image = FakeImageTokenizer(64, 8, 512)
    manifest = run(tmp_path / "pairs", cogview, tmp_path / "out", sequence, image, batch_size=64)
    assert manifest["rejected"] == {}
    assert manifest["records"] == len(captions) >= 44
    records = by_id(tmp_path / "out")
    assert records.keys() == captions.keys()
    processor = cogview._processor
    for key, record in records.items():
        caption = captions[key]
        ids = record["text"][: record["text_length"]].tolist()
        assert cogview.decode(ids) == processor.decode(processor.encode(normalise(caption)))
        if 0 not in ids:
            folded = processor.normalize(normalise(caption)).replace("▁", " ").strip()
            assert cogview.decode(ids) == folded
