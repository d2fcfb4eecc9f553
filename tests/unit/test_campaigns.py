"""testing.data_faults: a short sample of the kill and fuzz campaigns, and their journal."""

import io
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_cogview.data import images, token_folder
from megatron_cogview.testing.data_faults import fuzz, journal, mutations
from megatron_cogview.testing.data_faults.fuzz import KINDS, FuzzCampaign
from megatron_cogview.testing.data_faults.kills import KillCampaign
from megatron_cogview.testing.data_faults.mutations import Mutator


def test_killed_tokenisations_end_with_the_same_bytes(tmp_path: Path) -> None:
    campaign = KillCampaign(tmp_path)
    trials = [campaign.trial(number) for number in range(1, 7)]
    assert all(trial["ok"] and trial["killed"] for trial in trials)
    assert {trial["way"] for trial in trials} == {"one", "two", "late", "grown"}


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
    line = FuzzCampaign(tmp_path, cases_per_trial=300).trial(0)
    assert line["findings"] == []
    assert line["ok"]
    # Neither everything refused nor everything taken: the cases reach beyond the first check.
    assert set(line["taken"]) == set(line["refused"]) == set(KINDS)


def test_seeds_are_sound_pictures_of_many_kinds() -> None:
    pictures = [Image.open(io.BytesIO(data)) for data in mutations.seeds()]
    assert {"RGB", "L", "RGBA", "P", "I;16", "1", "LA", "CMYK"} == {p.mode for p in pictures}
    assert sum("progressive" in picture.info for picture in pictures) >= 6
    assert sum(picture.getexif().get(0x0112, 1) != 1 for picture in pictures) >= 20
    assert max(picture.width for picture in pictures) > 150
    # All can be decoded, and all but the tiniest have something to see.
    assert sum(images.decode(data, 32).std() > 20 for data in mutations.seeds()) >= 45
    assert (
        Mutator(np.random.default_rng(5)).picture() == Mutator(np.random.default_rng(5)).picture()
    )


def _doing(act: Callable[[int, Path, Path], None]) -> Callable[..., Callable[[], None]]:
    """A replacement of ``FuzzCampaign._prepare``."""

    def prepare(
        self: FuzzCampaign, case: int, kind: str, folder: Path, output: Path
    ) -> Callable[[], None]:
        return lambda: act(case, folder, output)

    return prepare


def test_what_the_campaign_looks_for_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path.parent / "outside.txt"

    def bad(case: int, folder: Path, output: Path) -> None:
        if case == 0:
            (output / "fine.txt").write_text("x")
        if case == 1:
            outside.write_text("x")
        if case == 2:
            raise KeyError("unexpected")
        if case == 3:
            os.system("true")
        if case == 4:
            (folder / "beside_the_input.txt").write_text("x")
        if case == 5:
            subprocess.run(["true"], check=True)
        if case == 6:
            begin = time.process_time()
            while time.process_time() < begin + 0.3:
                pass

    monkeypatch.setattr(fuzz, "HANG_CPU_SECONDS", 0.2)
    monkeypatch.setattr(FuzzCampaign, "_prepare", _doing(bad))
    line = FuzzCampaign(tmp_path, cases_per_trial=7).trial(0)
    assert not line["ok"]
    found = " ".join(line["findings"])
    assert "case 0" not in found
    assert "case 1" in found and "outside.txt" in found
    assert "KeyError" in found
    assert "os.system" in found
    assert "beside_the_input.txt" in found
    assert "subprocess.Popen" in found
    assert "case 6 (tar): 0.3 s" in found

    def crash(case: int, folder: Path, output: Path) -> None:
        if case == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(FuzzCampaign, "_prepare", _doing(crash))
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
