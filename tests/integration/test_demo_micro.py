"""The whole demo at micro size: every command, the report's fields, resuming, wrong input."""

import json
from pathlib import Path

import pytest

from tests.integration.micro_demo import demo

STAGES = ("pairs", "text tokenizer", "image tokenizer", "tokens", "pretrain", "generate", "check")


def test_the_report_has_every_field(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text(encoding="utf-8"))
    for split in ("seen", "held_out"):
        shares = [report["accuracy"][split][n] for n in ("colour", "shape", "size", "position")]
        assert all(0.0 <= share <= 1.0 for share in shares)
        assert report["accuracy"][split]["all"] <= min(shares)
        assert report["accuracy"][split]["count"] == 120
    assert report["accuracy"]["renders"] >= 0.95
    assert 0.0 <= report["accuracy"]["reconstructions"] <= 1.0
    assert set(report["seconds"]) == {*STAGES, "total"}
    assert report["seconds"]["total"] == pytest.approx(
        sum(report["seconds"][stage] for stage in STAGES)
    )
    assert 10**8 < report["peak_rss_bytes"] < 4 * 10**9
    for kind in ("text", "image"):
        assert 0.0 < report["losses"][kind]["last"] < report["losses"][kind]["first"]
    assert report["rejected"] == 0
    assert report["counts"] == {
        "pairs": 200,
        "records": 200,
        "training_steps": 10,
        "generated": 240,
    }
    assert report["reconstruction_psnr"] > 5.0
    assert report["versions"]["megatron-core"] == "0.16.1"


def test_the_page_is_there_and_loads_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 241
    assert page.count('src="data:image/') == 241
    assert "<script" not in page


def test_a_second_run_skips_every_stage(finished: Path) -> None:
    before = (finished / "report.json").stat().st_mtime_ns
    done = demo("--output", str(finished))
    assert done.returncode == 0, done.stderr
    for stage in (*STAGES, "report"):
        assert f"== {stage}: nothing changed, skipped" in done.stdout
    assert "$ " not in done.stdout
    assert (finished / "report.json").stat().st_mtime_ns == before


def test_a_vqgan_takes_the_vqvaes_place(tmp_path: Path) -> None:
    """The whole path again, with a discriminator at work in the image tokenizer's training."""
    run = tmp_path / "run"
    done = demo("--output", str(run), "--image-tokenizer", "tiny_vqgan")
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    used = json.loads((run / "image_tokenizer" / "config.json").read_text(encoding="utf-8"))
    assert used["image_tokenizer"]["kind"] == "vqgan"
    last = (run / "image_tokenizer" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last)["discriminator_loss"] > 0.0
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["counts"]["generated"] == 240


def test_a_missing_data_folder_is_one_error(tmp_path: Path) -> None:
    done = demo("--output", str(tmp_path / "run"), "--data", str(tmp_path / "absent"))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: --data {tmp_path / 'absent'}: no such folder, or no *.tar in it"
    ]
    assert not (tmp_path / "run").exists()
