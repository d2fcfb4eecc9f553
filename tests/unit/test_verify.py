"""data.verify: a sound set passes; each kind of damage is found, named and located."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import verify as verify_module
from megatron_cogview.data.shards import (
    MANIFEST,
    shard_name,
    write_manifest,
    write_shard,
)
from megatron_cogview.data.verify import verify, verify_all
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_file,
    write_json_with_digest,
)
from megatron_cogview.testing.data_faults.small_set import (
    NUM_CODES,
    VOCAB_SIZE,
    random_records,
    write_set,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SIDES = (4, 2)
COUNTS = (9, 0, 5)


@pytest.fixture
def tokens(tmp_path):
    """A sound set of three shards, one of them empty."""
    parts = [random_records(n, SIDES, seed=k) for k, n in enumerate(COUNTS)]
    write_set(tmp_path / "tokens", parts)
    return tmp_path / "tokens"


def checks(folder, **options):
    """Which checks fail where."""
    return [(f.check, f.file, f.record) for f in verify(folder, **options).findings]


def damage(path, at, value=None):
    """Change one byte in place."""
    data = bytearray(path.read_bytes())
    data[at] = data[at] ^ 1 if value is None else value
    path.write_bytes(data)


def rewrite_manifest(folder, **changes):
    """Another manifest with a right digest; ``a__b`` is field b of a."""
    manifest = read_json_with_digest(folder / MANIFEST)
    for name, value in changes.items():
        *path, last = name.split("__")
        target = manifest
        for key in path:
            target = target[int(key) if key.isdigit() else key]
        if value is None:
            del target[last]
        else:
            target[last] = value
    write_json_with_digest(folder / MANIFEST, manifest)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sound_set_passes(tokens, workers):
    heard = []
    report = verify(tokens, workers, heard.append)
    assert report.sound
    assert report.findings == []
    assert report.notes == []
    assert (report.shards, report.records, report.duplicates) == (3, 14, 0)
    assert report.num_bytes == sum(heard) == sum(p.stat().st_size for p in tokens.glob("shard*npy"))
    assert verify(tokens, quick=True).sound


def test_processes_find_what_one_finds(tokens):
    damage(tokens / shard_name(2), -30)
    damage(tokens / shard_name(0), 0)
    alone = verify(tokens).findings
    assert {f.file for f in alone} == {shard_name(0), shard_name(2)}
    assert verify(tokens, workers=2).findings == alone


def test_all_problems_of_all_files_are_reported(tokens):
    damage(tokens / shard_name(0), -30)
    (tokens / shard_name(1)).unlink()
    damage(tokens / "rejected.jsonl", 3)
    damage(tokens / "shard-000002.json", 9)
    found = checks(tokens)
    assert ("crc32", shard_name(0), 8) in found
    assert {(check, file) for check, file, _ in found} >= {
        ("sha256", shard_name(0)),
        ("unreadable", shard_name(1)),
        ("rejected_log", "rejected.jsonl"),
        ("sidecar", "shard-000002.json"),
    }
    assert all(f.remedy and f.what for f in verify(tokens).findings)


def test_wrong_fields_of_the_manifest_are_reported(tokens):
    rewrite_manifest(tokens, records=15, layout__text_ids=63)
    findings = verify(tokens).findings
    assert [f.check for f in findings] == ["manifest"] * 2
    assert "layout.text_ids is 63, must be" in findings[0].what
    assert "its shards have 14" in findings[1].what


def test_damaged_missing_and_old_manifests(tokens):
    whole = (tokens / MANIFEST).read_bytes()
    damage(tokens / MANIFEST, 100)
    assert checks(tokens) == [("manifest", MANIFEST, None)]
    (tokens / MANIFEST).write_bytes(whole)
    rewrite_manifest(tokens, version=1)
    assert "version 1" in verify(tokens).findings[0].what
    (tokens / MANIFEST).unlink()
    assert "no finished data set" in verify(tokens).findings[0].what
    assert not verify(tokens / "nowhere").sound


def test_split_table(tokens):
    (path,) = tokens.glob("split-*.npy")
    good = path.read_bytes()
    damage(path, -1)
    assert checks(tokens, quick=True) == checks(tokens) == [("split_table", path.name, None)]
    path.unlink()
    assert checks(tokens, quick=True) == [("split_table", path.name, None)]
    path.write_bytes(good)
    wrong = np.load(path)
    wrong[500, 2] += 1
    for array, what in (
        (wrong, "column 2"),
        (wrong[:, :2], "must be"),
        (wrong.astype("i4"), "int32"),
    ):
        np.save(path, array)
        rewrite_manifest(tokens, split_table__sha256=sha256_file(path))
        (finding,) = verify(tokens).findings
        assert finding.check == "split_table"
        assert what in finding.what
    path.write_bytes(b"no array")
    rewrite_manifest(tokens, split_table__sha256=sha256_file(path))
    assert checks(tokens) == [("split_table", path.name, None)]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("shard", "name"), "shard-000007.npy"),
        (("shard", "records"), 8),
        (("shard", "bytes"), 1),
        (("shard", "sha256"), "0" * 64),
        (("shard", "split"), [0]),
        (("source",), "other.tar"),
        (("source_bytes",), 1),
        (("source_sha256",), "1" * 64),
        (("settings", "tokenizers"), {}),
        (("settings", "layout", "text_policy"), "truncate"),
        (("counts",), None),
        (("rejected",), None),
    ],
)
def test_sidecars_agree_with_the_manifest(tokens, path, value):
    file = tokens / "shard-000000.json"
    sidecar = read_json_with_digest(file)
    target = sidecar
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    write_json_with_digest(file, sidecar)
    # Nothing depends on the counts but the totals of a manifest that is made again.
    expected = [] if path == ("counts",) else [("sidecar", file.name, None)]
    assert checks(tokens) == expected
    assert checks(tokens, quick=True) == []


def test_rejections_of_manifest_and_sidecars_agree(tokens):
    rewrite_manifest(tokens, rejected={"empty caption": 2})
    assert checks(tokens) == [("manifest", MANIFEST, None)]


def test_a_set_without_sidecars_is_sound_and_noted(tokens):
    (tokens / "shard-000001.json").unlink()
    report = verify(tokens)
    assert report.sound
    assert report.notes == [
        "1 of 3 shards have no .json beside them: they can be read, but nothing can be added to "
        "this data set"
    ]


def test_a_set_of_another_writer_is_sound(tmp_path):
    records = random_records(3, (2,))
    entry = write_shard(tmp_path / shard_name(0), records)
    about = {
        "layout": {"codes_per_side": [2], "longest_text": 64},
        "tokenizers": {
            "text": {"fingerprint": "a", "vocab_size": VOCAB_SIZE},
            "image": {"fingerprint": "b", "num_codes": NUM_CODES},
        },
    }
    write_manifest(tmp_path, [entry], about)
    assert verify(tmp_path).sound


def test_surplus_files(tokens):
    for name in ("shard-000003.npy", "shard-000003.json"):
        (tokens / name).write_bytes(b"x")
    (tokens / "split-0123456789ab.npy").write_bytes(b"x")
    (tokens / ".shard-000000.npy.0123456789abcdef.tmp").write_bytes(b"x")
    (tokens / "README.md").write_text("mine")
    report = verify(tokens, quick=True)
    assert {(f.check, f.file) for f in report.findings} == {
        ("surplus", "shard-000003.npy"),
        ("surplus", "shard-000003.json"),
    }
    assert any("split-0123456789ab.npy" in note for note in report.notes)
    assert any(note.startswith("1 temporary file ") for note in report.notes)
    (tokens / ".manifest.json.0123456789abcdef.tmp").write_bytes(b"x")
    report = verify(tokens, quick=True)
    assert any(note.startswith("2 temporary files ") for note in report.notes)


def test_duplicates_are_counted_and_no_error(tmp_path):
    first, second = random_records(6, (2,), seed=1), random_records(4, (2,), seed=2)
    second["sample_id"][:2] = first["sample_id"][:2]
    second["sample_id"][2] = second["sample_id"][0]
    write_set(tmp_path, [first, second])
    report = verify(tmp_path, workers=2)
    assert report.sound
    assert report.duplicates == 3
    assert report.notes[0].startswith("3 records have the sample_id of another one")


def killed(plan, quick):
    os._exit(9)


def test_a_killed_process_is_an_error_with_advice(tokens, monkeypatch):
    monkeypatch.setattr(verify_module, "check_shard", killed)
    with pytest.raises(DataError, match="fewer --workers"):
        verify(tokens, workers=2)


def test_tool(tokens, tmp_path):
    write_set(tmp_path / "more", [random_records(2, (2,))])
    damage(tokens / shard_name(0), -30)

    def run(*arguments):
        command = [sys.executable, "tools/verify_shards.py", "--shards", *map(str, arguments)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    done = run(tokens, tmp_path / "more", "--workers", "1")
    assert done.returncode == 1, done.stderr
    assert "tokens: NOT SOUND (3 shards, 14 records" in done.stdout
    assert "[crc32] shard-000000.npy, record 8:" in done.stdout
    assert "more: sound (1 shards, 2 records" in done.stdout
    assert run(tokens, "--quick").returncode == 0
    assert "workers" in run(tokens, "--workers", "0").stderr


def test_several_folders(tokens, tmp_path):
    reports = verify_all([tokens, tmp_path / "nowhere"])
    assert [r.sound for r in reports] == [True, False]
