"""testing.data_faults: a short sample of the kill and fuzz campaigns, and their journal."""

import json
import os
import signal
from pathlib import Path

import pytest

from megatron_cogview.data import token_folder
from megatron_cogview.testing.data_faults import journal
from megatron_cogview.testing.data_faults.fuzz import FuzzCampaign
from megatron_cogview.testing.data_faults.kills import KillCampaign


def test_killed_tokenisations_end_with_the_same_bytes(tmp_path: Path) -> None:
    campaign = KillCampaign(tmp_path)
    trials = [campaign.trial(number) for number in range(1, 7)]
    assert all(trial["ok"] for trial in trials)
    assert sum(trial["killed"] for trial in trials) >= 4


def test_a_commit_that_is_not_atomic_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same campaign against a tokenisation that takes any sidecar for a finished part."""
    campaign = KillCampaign(tmp_path)
    real = token_folder.write_json_with_digest

    def early(path: Path, value: dict[str, object]) -> None:
        real(path, value)
        if path.name == "shard-000002.json":
            path.with_suffix(".npy").write_bytes(b"")

    monkeypatch.setattr(token_folder, "write_json_with_digest", early)
    monkeypatch.setattr(token_folder, "sha256_file", lambda path: None)
    assert not campaign.trial(1)["ok"]


def test_hostile_input(tmp_path: Path) -> None:
    line = FuzzCampaign(tmp_path, cases_per_trial=200).trial(0)
    assert line["findings"] == []
    assert line["ok"]
    # Neither everything refused nor everything taken: the cases reach beyond the first check.
    assert all(line["taken"][kind] and line["refused"][kind] for kind in line["taken"])
    assert set(line["taken"]) == {"tar", "table", "image", "pickle"}


def test_what_the_campaign_looks_for_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path.parent / "outside.txt"

    def bad(self: FuzzCampaign, case: int, kind: str, folder: Path) -> None:
        if case == 1:
            outside.write_text("x")
        if case == 2:
            raise KeyError("unexpected")
        if case == 3:
            os.system("true")

    monkeypatch.setattr(FuzzCampaign, "_case", bad)
    line = FuzzCampaign(tmp_path, cases_per_trial=5).trial(0)
    assert not line["ok"]
    found = " ".join(line["findings"])
    assert "case 1" in found and "outside.txt" in found
    assert "KeyError" in found
    assert "os.system" in found

    def crash(self: FuzzCampaign, case: int, kind: str, folder: Path) -> None:
        if case == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(FuzzCampaign, "_case", crash)
    line = FuzzCampaign(tmp_path, cases_per_trial=5).trial(0)
    assert not line["ok"]
    assert line["case"] == 3
    assert line["exit_code"] == -9


def test_a_journal_goes_on_behind_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    numbers: list[int] = []

    def trial(number: int) -> dict[str, object]:
        numbers.append(number)
        return {"trial": number, "ok": True}

    journal.run(path, trial, 3, minutes=5)
    path.write_text(path.read_text() + '{"trial": 3, "o')
    lines = journal.run(path, trial, 6, minutes=5)
    assert numbers == [0, 1, 2, 3, 4, 5]
    assert [line["trial"] for line in lines] == numbers
    assert [json.loads(line)["trial"] for line in path.read_text().splitlines()] == numbers
    assert journal.run(path, trial, 9, minutes=0) == lines
