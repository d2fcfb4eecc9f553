"""testing.data_faults: short samples of the campaigns, and that they can fail."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.testing.data_faults import flips, journal
from megatron_cogview.testing.data_faults.flips import FlipCampaign, TruncationCampaign

REPOSITORY = Path(__file__).resolve().parents[2]


def contents(folder):
    return {path.name: path.read_bytes() for path in (folder / "tokens").iterdir()}


def test_every_flip_is_detected_and_undone(tmp_path):
    campaign = FlipCampaign(tmp_path)
    before = contents(tmp_path)
    lines = [campaign.trial(number) for number in range(60)]
    assert contents(tmp_path) == before
    assert all(line["ok"] and line["detected_by"] for line in lines)
    assert "wrong data" not in {line["reader"] for line in lines}
    # All kinds of files take part.
    assert {Path(line["file"]).suffix for line in lines} == {".npy", ".json", ".jsonl"}
    # A trial's number decides what it does.
    assert [campaign.trial(number) for number in (5, 59)] == [lines[5], lines[59]]
    other = FlipCampaign(tmp_path / "other", seed=1)
    assert other.trial(5)["bit"] != lines[5]["bit"]


def test_a_flip_that_verify_overlooks_fails_its_trial(tmp_path, monkeypatch):
    campaign = FlipCampaign(tmp_path)
    monkeypatch.setattr(flips, "verify", lambda folder, quick: flips_report(folder))
    assert not any(campaign.trial(number)["ok"] for number in range(4))


def flips_report(folder):
    class Sound:
        findings = ()

    return Sound()


def test_wrong_data_for_a_reader_fails_its_trial(tmp_path, monkeypatch):
    campaign = FlipCampaign(tmp_path)
    monkeypatch.setattr(ShardSet, "_check_crc", lambda *_: None)
    lines = [campaign.trial(number) for number in range(0, 20, 2)]
    wrong = Counter(line["reader"] for line in lines)["wrong data"]
    assert wrong == sum(not line["ok"] for line in lines) > 0


def test_truncations_are_detected_and_undone(tmp_path):
    campaign = TruncationCampaign(tmp_path, records_per_shard=3)
    before = contents(tmp_path)
    lines = [campaign.trial(n) for n in range(campaign.trials)]
    assert contents(tmp_path) == before
    assert all(line["ok"] for line in lines)
    shards = {line["file"] for line in lines if line["file"].startswith("shard")}
    assert len(shards) == 3
    lengths = [line["length"] for line in lines if line["file"] == "shard-000000.npy"]
    size = len(before["shard-000000.npy"])
    assert lengths == [*range(0, size, 4096), size - 1]
    tables = [line for line in lines if not line["file"].startswith("shard")]
    assert {line["noticed_at"] for line in tables} == {"open", "split"}
    assert len(tables) == sum(
        -(-len(data) // 64) + ((len(data) - 1) % 64 != 0)
        for name, data in before.items()
        if name == "manifest.json" or name.startswith("split")
    )


def test_an_open_that_overlooks_a_truncation_fails_its_trial(tmp_path, monkeypatch):
    campaign = TruncationCampaign(tmp_path, records_per_shard=3)
    monkeypatch.setattr(ShardSet, "_check_size", lambda *_: None)
    lines = [campaign.trial(n) for n in range(campaign.trials)]
    failed = {line["file"] for line in lines if not line["ok"]}
    assert failed == {f"shard-00000{k}.npy" for k in range(3)}


def test_a_set_that_is_not_sound_is_refused(tmp_path, monkeypatch):
    class Unsound:
        findings = ("broken",)

    monkeypatch.setattr(flips, "verify", lambda folder: Unsound())
    with pytest.raises(RuntimeError, match="not sound: broken"):
        FlipCampaign(tmp_path)


def test_the_tool_goes_on_where_it_stopped(tmp_path):
    def run(*arguments):
        command = [sys.executable, "tools/data_faults.py", *map(str, arguments)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)

    def lines():
        return (tmp_path / "journal.jsonl").read_text().splitlines()

    # What a killed campaign leaves: whole lines and a broken one.
    kept = [{"trial": n, "kind": "flip", "ok": True, "mark": n} for n in range(2)]
    text = "".join(json.dumps(line) + "\n" for line in kept) + '{"trial": 2, "ki'
    (tmp_path / "journal.jsonl").write_text(text)
    done = run("flips", "--output", tmp_path, "--trials", "4")
    assert done.returncode == 0, done.stderr
    assert "4 trials, 0 failed" in done.stdout
    found = journal.read(tmp_path / "journal.jsonl")
    assert found[:2] == kept
    assert [line["trial"] for line in found] == [0, 1, 2, 3]
    before = lines()
    failed = json.dumps(kept[0] | {"ok": False})
    (tmp_path / "journal.jsonl").write_text("\n".join([failed, *before[1:]]) + "\n")
    assert run("flips", "--output", tmp_path, "--trials", "4").returncode == 1
    assert lines()[1:] == before[1:]
