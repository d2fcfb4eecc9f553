"""report.json and report.html from a synthetic run folder whose numbers are known."""

import base64
import importlib.util
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_cogview import __version__
from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.shards import FORMAT, FORMAT_VERSION
from megatron_cogview.evaluation.html_report import embed, evenly, render
from megatron_cogview.evaluation.report import build_report, losses, read_run
from megatron_cogview.storage.digest import write_json_with_digest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "make_report.py"
HOSTILE = '<script>alert("x")</script> & 红色的圆'
SPLITS = ("seen", "held_out")


def shares(value: float) -> dict[str, float | int]:
    return dict.fromkeys(("colour", "shape", "size", "position", "all"), value) | {"count": 50}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_png(path: Path, side: int = 8, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of 50 pictures a split, every fifth of them wrong."""
    write_json(tmp_path / "image_tokenizer" / "summary.json", {"psnr": 27.5, "codes_used": 300})
    (tmp_path / "tokens").mkdir()
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "records": 95,
        "rejected": {"no image": 3, "no json": 2},
    }
    write_json_with_digest(tmp_path / "tokens" / "manifest.json", manifest)
    rows: list[dict[str, Any]] = [
        {"step": s, "loss": 3.0, "text_loss": 8.0 / s, "image_loss": 6.0 - s} for s in (1, 2, 4)
    ]
    rows.insert(2, {"step": 2, "validation_text_loss": 5.0, "validation_image_loss": None})
    (tmp_path / "pretrain").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "text_l'
    (tmp_path / "pretrain" / "metrics.jsonl").write_text(text)
    prompts = [
        {"id": f"{split}-{i}", "caption": f"{HOSTILE} {i}", "split": split, "colour": "red"}
        for split in SPLITS
        for i in range(50)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
    samples = [{**p, "file": f"{p['id']}.png", "codes": []} for p in prompts]
    for seed, sample in enumerate(samples):
        write_png(tmp_path / "generated" / sample["file"], seed=seed)
    settings = {"temperature": 1.0, "top_k": 0}
    write_json(tmp_path / "generated" / "samples.json", {"settings": settings, "samples": samples})
    pictures = [
        {"id": p["id"], "read": {"colour": "red" if i % 5 else "blue"}, "right": bool(i % 5)}
        for i, p in enumerate(prompts)
    ]
    checked = {"seen": shares(0.9), "held_out": shares(0.8), "pictures": pictures}
    more = {"renders": 0.998, "reconstructions": 0.99, "missing": []}
    write_json(tmp_path / "accuracy.json", checked | more)
    stages = {
        "tokens": {"seconds": 2.5, "peak_rss_bytes": 10**9},
        "pretrain": {"seconds": 60.0, "peak_rss_bytes": 2 * 10**9},
    }
    write_json(tmp_path / "timings.json", {"stages": stages})
    write_png(tmp_path / "reconstructions" / "sheet.png", side=200)
    return tmp_path


def judged(run: Path) -> tuple[dict[str, Any], str]:
    files = read_run(run, run / "accuracy.json", run / "prompts.jsonl")
    report = build_report(files)
    return report, render(report, files)


class Page(HTMLParser):
    """Collects what a browser would fetch or run, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_numbers_are_those_of_the_stages(run: Path) -> None:
    report, _ = judged(run)
    assert report["accuracy"]["seen"] == shares(0.9)
    assert report["accuracy"]["held_out"]["all"] == 0.8
    assert (report["accuracy"]["renders"], report["accuracy"]["reconstructions"]) == (0.998, 0.99)
    assert "pictures" not in report["accuracy"]
    assert report["seconds"] == {"tokens": 2.5, "pretrain": 60.0, "total": 62.5}
    assert report["peak_rss_bytes"] == 2 * 10**9
    assert report["losses"]["text"] == {"first": 8.0, "last": 2.0, "drop": 0.75}
    assert report["losses"]["image"]["drop"] == pytest.approx(0.6)
    assert report["validation_losses"]["text"]["last"] == 5.0
    assert report["validation_losses"]["image"]["last"] is None
    assert report["rejected"] == 5
    assert report["rejected_reasons"] == {"no image": 3, "no json": 2}
    assert report["reconstruction_psnr"] == 27.5
    assert report["generation"] == {"temperature": 1.0, "top_k": 0}
    counts = {"pairs": 100, "records": 95, "training_steps": 4, "generated": 100}
    assert report["counts"] == counts
    assert report["versions"]["megatron-cogview"] == __version__
    assert set(report["versions"]) >= {"python", "torch", "megatron-core", "numpy"}
    json.dumps(report, allow_nan=False)


def test_the_page_loads_nothing_and_runs_nothing(run: Path) -> None:
    _, page = judged(run)
    parsed = Page(page)
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert all(source.startswith(("data:image/", "#")) for source in parsed.sources)
    assert "url(http" not in page
    assert "@import" not in page
    # What is left of addresses are the two names of XML vocabularies.
    assert set(re.findall(r'https?://[^"\s]+', page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert parsed.tags.count("svg") == 2


def test_captions_are_shown_as_they_are_and_every_picture_once(run: Path) -> None:
    _, page = judged(run)
    assert HOSTILE not in page
    words = Page(page).words
    for i in range(50):
        assert words.count(f"{HOSTILE} {i}") == 2
    assert page.count('<figure class="right">') == 80
    assert page.count('<figure class="wrong">') == 20
    assert page.count("✗ colour blue") == 20
    # 100 samples and the sheet.
    assert page.count("<img ") == 101


def test_the_open_pictures_are_a_fair_draw(run: Path) -> None:
    _, page = judged(run)
    open_part = page[: page.index("<details>")]
    wrong = open_part.count('<figure class="wrong">')
    assert open_part.count("<figure ") == 32
    assert 4 <= wrong <= 9  # a fifth of 32 is 6.4


def test_without_a_checker_accuracy_is_null(run: Path) -> None:
    files = read_run(run)
    report = build_report(files)
    assert report["accuracy"] is None
    page = render(report, files)
    assert "not measured" in page
    assert 'class="wrong"' not in page


def test_without_timings_nothing_is_invented(run: Path) -> None:
    (run / "timings.json").unlink()
    report, page = judged(run)
    assert report["seconds"] == {"total": 0}
    assert report["peak_rss_bytes"] is None
    assert "Time and memory" not in page


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert judged(run) == judged(run)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("image_tokenizer/summary.json", None, "no such file"),
        ("image_tokenizer/summary.json", "{}", "no field 'psnr'"),
        ("image_tokenizer/summary.json", "[1", "cannot be read as JSON"),
        ("generated/samples.json", "[]", "expected a JSON object"),
        ("pretrain/metrics.jsonl", None, "run pretraining first"),
        ("pretrain/metrics.jsonl", "{]\n", "damaged"),
        ("tokens/manifest.json", None, "not found"),
        ("accuracy.json", "{}", "no field 'seen'"),
        ("prompts.jsonl", "[]\n", "not a prompts file"),
        ("generated/seen-3.png", None, "not a readable PNG"),
        ("generated/seen-3.png", "x", "not a readable PNG"),
    ],
)
def test_missing_and_damaged_files_are_one_error(
    run: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        judged(run)
    assert name.split("/")[-1] in str(error.value)


def test_losses_of_nothing_and_of_one_value() -> None:
    assert losses([], "x") == {"first": None, "last": None, "drop": None}
    assert losses([{"step": 1, "x": 2.0}], "x") == {"first": 2.0, "last": 2.0, "drop": 0.0}


def test_evenly_spreads_over_all() -> None:
    assert evenly(range(10), 5) == [0, 2, 4, 6, 8]
    assert evenly(range(3), 5) == [0, 1, 2]
    assert len(set(evenly(range(120), 32))) == 32


def test_small_pictures_are_exact_and_large_ones_become_jpeg(tmp_path: Path) -> None:
    write_png(tmp_path / "small.png")
    head, _, data = embed(tmp_path / "small.png").partition(",")
    assert head == "data:image/png;base64"
    assert base64.b64decode(data) == (tmp_path / "small.png").read_bytes()
    write_png(tmp_path / "large.png", side=200)
    head, _, data = embed(tmp_path / "large.png").partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (200, 200)


def test_the_tool_writes_both_files_or_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("make_report", TOOL)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setattr(sys, "argv", ["make_report.py", "--run", str(run)])
    tool.main()
    assert json.loads((run / "report.json").read_text(encoding="utf-8"))["accuracy"] is None
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (run / "image_tokenizer" / "summary.json").unlink()
    with pytest.raises(SystemExit, match=r"^error: .*summary\.json: no such file"):
        tool.main()
