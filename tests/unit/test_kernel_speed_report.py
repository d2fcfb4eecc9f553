"""The kernel benchmark's files: verdicts, tables, picture, going on after a stop, the tool."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cogview.analysis.kernel_speed import attention, by_rows, plot, report
from megatron_cogview.analysis.kernel_speed.acceptance import Verdict, acceptance
from megatron_cogview.analysis.kernel_speed.peers import OUT_OF_MEMORY, Case, Peer
from megatron_cogview.analysis.kernel_speed.tables import REHEARSAL, sections, tables
from megatron_cogview.configs.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "bench_kernels.py"
BOTH = "forward + backward"
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses without a GPU")


def entry(ms: float, mib: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"ms": ms, "extra_bytes": int(mib * 2**20), "alone": False, **more}


def attention_row(length: int, mode: str, **peers: dict[str, Any]) -> dict[str, Any]:
    names = {
        "ours": attention.OURS,
        "plan": attention.PLAN,
        "released": attention.RELEASED,
        "flex": attention.FLEX,
        "dense": attention.DENSE,
        "flash": attention.FLASH,
        "cudnn": attention.CUDNN,
        "eager": attention.EAGER,
        "products": attention.PRODUCTS,
    }
    return {
        "row": f"attention {length} {mode}",
        "operation": "attention",
        "mode": mode,
        "length": length,
        "batch": 4,
        "peers": {names[name]: value for name, value in peers.items()},
        "problems": [],
    }


def rowwise(operation: str, mode: str, **peers: dict[str, Any]) -> dict[str, Any]:
    names = {"ours": by_rows.OURS, "eager": by_rows.EAGER, "compiled": by_rows.COMPILED}
    names |= {"plain": by_rows.OURS_PLAIN, "copy": by_rows.COPY}
    return {
        "row": f"{operation} {mode}",
        "operation": operation,
        "mode": mode,
        "tokens": 32_768,
        "peers": {names[name]: value for name, value in peers.items()},
        "problems": [],
    }


def verdict(verdicts: list[Verdict], *words: str) -> Verdict:
    (found,) = [v for v in verdicts if all(word in v.rule for word in words)]
    return found


def test_without_rows_only_the_configuration_is_judged() -> None:
    found = acceptance([])
    judged = [v for v in found if v.is_met is not None]
    assert [v.rule for v in judged] == [verdict(found, "1,088", "auto").rule]
    assert judged[0].is_met
    assert sum(v.kind == "must" for v in found) == 18
    assert verdict(found, "junction forward", "copy").why == "no such row"


@pytest.mark.parametrize(("ours_ms", "is_met"), [(2.0, True), (2.1, False)])
def test_junction_against_copy_and_chains(ours_ms: float, is_met: bool) -> None:
    """The copy moves 1,000 bytes a millisecond, ours 1,720 in 2 of them: 86 %."""
    row = rowwise(
        "junction",
        "forward",
        ours=entry(ours_ms, least_bytes=1720),
        eager=entry(3.1, agrees=True),
        compiled=entry(1.9, agrees=True),
        copy=entry(4.0, least_bytes=4000),
    )
    found = acceptance([row])
    copied = verdict(found, "junction forward", "copy")
    assert copied.figure == pytest.approx(1.72 / ours_ms)
    assert copied.is_met == is_met  # At least 0.85.
    eager = verdict(found, "junction forward", "eager")
    assert eager.figure == pytest.approx(3.1 / ours_ms)
    assert eager.is_met == is_met  # At least 1.5.
    compiled = verdict(found, "junction forward", "compiled")
    assert compiled.is_met == is_met  # At least 0.95.
    assert verdict(found, "junction backward", "eager").is_met is None


def test_norm_is_compared_with_our_plain_one_and_with_eager() -> None:
    row = rowwise(
        "norm", "forward", ours=entry(1.04), plain=entry(1.0), eager=entry(2.0, agrees=True)
    )
    found = acceptance([row])
    assert verdict(found, "norm", "plain").is_met
    assert not verdict(found, "norm", "eager").is_met
    # Another number of tokens is another matter.
    assert verdict(acceptance([row | {"tokens": 8704}]), "norm", "plain").is_met is None


def test_attention_is_compared_with_the_fastest_that_agrees() -> None:
    row = attention_row(
        4096,
        BOTH,
        ours=entry(2.0, 115),
        plan=entry(0.02),
        products=entry(8.0),
        released=entry(21.0, 700, agrees=True),
        flex=entry(2.2, agrees=True),
        dense=entry(1.9),
        flash=entry(2.8, 100, agrees=True),
        cudnn=entry(0.5, agrees=False),
        eager=entry(6.0, 200, agrees=True),
    )
    found = acceptance([row])
    title = "three regions forward + backward, 4,096"

    def figure(*words: str) -> tuple[float | None, bool | None]:
        one = verdict(found, title, *words)
        return one.figure and round(one.figure, 4), one.is_met

    # cuDNN's result is another one: it does not count, and our dense kernel is the fastest.
    assert figure("speed", "best dense kernel") == (0.95, False)
    assert figure("speed", "SDPA flash") == (1.4, True)
    assert figure("speed", "written out") == (3.0, True)
    assert figure("memory", "written out") == (0.575, True)
    assert figure("memory", "SDPA flash") == (1.15, True)
    assert figure("speed", "original") == (10.5, True)
    assert figure("memory", "original") == (0.1643, False)
    assert figure("FlexAttention") == (1.1, False)
    assert figure("plan") == (0.002, True)
    assert verdict(found, "three regions forward,", "best").why == "no such row"
    assert verdict(found, "16,384").is_met is None


def test_what_did_not_run_is_not_judged_and_says_why() -> None:
    row = attention_row(
        4096,
        BOTH,
        ours=entry(2.0, 115),
        eager={"absent": OUT_OF_MEMORY},
        flash=entry(2.8, 100, agrees=False),
    )
    found = acceptance([row])
    memory = verdict(found, "peak memory", "written out")
    assert (memory.figure, memory.is_met) == (None, None)
    assert memory.why == f"{attention.EAGER}: {OUT_OF_MEMORY}"
    flash = verdict(found, "forward + backward", "speed", "SDPA flash")
    assert flash.why == f"{attention.FLASH} computes something else"
    without_ours = attention_row(
        4096, BOTH, ours={"absent": "not available: x"}, flash=entry(2.0, agrees=True)
    )
    found = acceptance([without_ours])
    best = verdict(found, "4,096", "speed", "best dense kernel")
    assert (best.is_met, best.why) == (None, f"{attention.OURS}: not available: x")


def test_tables_show_figures_problems_and_absences() -> None:
    row = attention_row(
        4096,
        BOTH,
        ours=entry(2.0, 115.5, flops=4 * 10**9),
        flash=entry(3.0, 100, agrees=True, relative_error=0.0021),
        cudnn=entry(0.5, agrees=False, relative_error=None, alone=True),
        eager={"absent": "out | of memory"},
    )
    row["problems"] = ["SDPA cuDNN computes something else"]
    failed = {"row": "norm", "operation": "norm", "failed": "RuntimeError: x"}
    text = sections([row, failed], rehearsal=False)
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
    assert (
        lines["ours, three regions"] == "| ours, three regions | 2 | 1.00 | 115.5 | 2 TFLOP/s |  |"
    )
    assert lines["SDPA flash"] == "| SDPA flash | 3 | 1.50 | 100.0 |  | 2.1e-03 |"
    assert lines["SDPA cuDNN (alone)"].endswith("| **not finite: differs** |")
    assert "out \\| of memory" in lines[attention.EAGER]
    assert "- attention 4096 forward + backward: SDPA cuDNN computes something else" in text
    assert "- norm: RuntimeError: x" in text
    title = "three regions forward + backward, 4,096 tokens: speed over dense SDPA flash"
    assert lines[title] == f"| {title} | 1.5 | >= 1.3 | met |"
    assert "**missed**" not in lines[title]
    rehearsed = tables({"torch": "2"}, [row], rehearsal=True)
    assert REHEARSAL in rehearsed.splitlines()[2]
    assert "| met |" not in rehearsed.split("## Rows")[0].split("|---|---|---|---|")[1]


def test_shares_of_the_copy_rate_are_printed() -> None:
    peers = {"ours": entry(2.0, least_bytes=10**9), "copy": entry(4.0, least_bytes=4 * 10**9)}
    text = sections([rowwise("junction", "forward", **peers)], rehearsal=False)
    assert "| ours | 2 | 1.00 | 0.0 | 50.0% |  |" in text
    assert "| copy | 4 | 2.00 | 0.0 | 1000 GB/s |  |" in text


def test_picture_has_a_line_a_peer_and_one_sequence_as_its_unit(tmp_path: Path) -> None:
    rows = [
        attention_row(length, mode, ours=entry(8.0, 64), eager=entry(16.0, 128))
        for length in (1088, 4096)
        for mode in ("forward", BOTH)
    ]
    rows.append(attention_row(16384, BOTH, ours=entry(5.0, 7), eager={"absent": OUT_OF_MEMORY}))
    rows[-1]["batch"] = 1
    forward, both, memory = plot.draw(rows, "a device").axes
    assert [line.get_label() for line in both.lines] == [attention.OURS, attention.EAGER]
    assert both.lines[0].get_xydata().tolist() == [[1088, 2], [4096, 2], [16384, 5]]
    assert both.lines[1].get_xydata().tolist() == [[1088, 4], [4096, 4]]
    assert memory.lines[0].get_xydata().tolist() == [[1088, 16], [4096, 16], [16384, 7]]
    assert len(forward.lines[0].get_xydata()) == 2
    assert {axes.get_xscale() + axes.get_yscale() for axes in (forward, both)} == {"loglog"}
    assert plot.save(rows, tmp_path / "a.png", "a device")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not plot.save([rowwise("norm", "forward", ours=entry(1.0))], tmp_path / "b.png", "")
    assert not (tmp_path / "b.png").exists()


class Cases:
    """Made-up rows in the place of the real ones; which of them ran, and what is to happen."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.stop_at = ""
        self.breaks: dict[str, Exception] = {}

    def __call__(self, sizes: Any, operations: Any) -> list[Case]:
        return [self._case(name) for name in "abc"]

    def _case(self, name: str) -> Case:
        def peers(device: torch.device) -> list[Peer]:
            self.ran.append(name)
            if name == self.stop_at:
                raise KeyboardInterrupt
            if name in self.breaks:
                raise self.breaks[name]
            return [Peer(name="ours", prepare=lambda: lambda: torch.ones(1))]

        facts = {"operation": "made up", "mode": "forward"}
        return Case(name=name, estimate_s=10, facts=facts, peers=peers)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Cases:
    chosen = Cases()
    monkeypatch.setattr(report, "all_cases", chosen)
    return chosen


def run(folder: Path, **settings: Any) -> list[dict[str, Any]]:
    return report.run(report.Settings(output=folder, device="cpu", **settings))


@without_cuda
def test_a_second_start_goes_on_where_the_first_stopped(
    made_up: Cases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made_up.stop_at = "c"
    made_up.breaks = {"a": RuntimeError("a defect")}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "bench_kernels.jsonl").open()]
    assert lines[0]["about"]["torch"] == torch.__version__
    assert [line["row"] for line in lines[1:]] == ["a", "b"]
    assert lines[1]["failed"] == "RuntimeError: a defect"
    kept = lines[2]
    # What failed runs once more, what is there does not.
    made_up.stop_at, made_up.breaks, made_up.ran = "", {}, []
    with caplog.at_level("INFO"):
        rows = run(tmp_path)
    assert made_up.ran == ["a", "c"]
    assert "1 of 3 rows are there already" in caplog.text
    assert {row["row"] for row in rows} == {"a", "b", "c"}
    assert kept in rows
    assert all("failed" not in row for row in rows)
    whole = json.loads((tmp_path / "bench_kernels.json").read_text())
    assert whole["rows"] == rows
    assert whole["about"]["rehearsal"] is True
    assert whole["acceptance"] is None
    run(tmp_path)
    assert made_up.ran == ["a", "c"]


@without_cuda
def test_rows_of_other_settings_or_machines_are_not_mixed(made_up: Cases, tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"holds rows with rounds 3, and now it is 4; name"):
        run(tmp_path, rounds=4)
    with pytest.raises(ConfigError, match=r"holds rows with sizes\.lengths \[72, 256\]"):
        run(tmp_path, lengths=(128,))
    path = tmp_path / "bench_kernels.jsonl"
    text = path.read_text()
    path.write_text(text.replace(torch.__version__, "1.0", 1))
    with pytest.raises(ConfigError, match=r"holds rows with torch '1\.0'"):
        run(tmp_path)
    path.write_text("something else\n")
    with pytest.raises(ConfigError, match="is not a benchmark's"):
        run(tmp_path)


def test_time_left_follows_the_rows_that_passed(caplog: pytest.LogCaptureFixture) -> None:
    now = iter([0.0, 5.0, 15.0])
    chosen = Cases()(None, None)
    with caplog.at_level("INFO"):
        list(report._with_progress(chosen, set(), False, lambda: next(now)))
    assert [record.getMessage() for record in caplog.records] == [
        "[1/3] a ... at most 30 s left",
        "[2/3] b ... about 10 s left",
        "[3/3] c ... about 8 s left",
    ]


@without_cuda
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, "device = 'cuda': no CUDA device here"),
        ({"rounds": -1}, "rounds = -1: must be at least 1"),
        ({"tokens": (5, -2)}, "tokens = -2: must be at least 1"),
        ({"operations": ()}, "operations = (): name some of rates, junction"),
    ],
)
def test_wrong_values_are_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        report.run(report.Settings(output=tmp_path / "r", **settings))
    assert str(refused.value).startswith(message)
    assert not (tmp_path / "r").exists()


@without_cuda
def test_the_tool_says_a_wrong_value_in_one_line(tmp_path: Path) -> None:
    done = tool("--output", str(tmp_path / "r"), "--lengths", "128", "0")
    assert done.returncode == 2
    assert done.stderr == "error: lengths = 0: must be at least 1\n"
    assert "goes" in tool("--help").stdout


def tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment},
    )


def rehearsed(folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Rows of the tool at tiny shapes; its files are there and labelled."""
    options = ["--device", "cpu", "--rounds", "1", "--lengths", "48"]
    done = tool("--output", str(folder), *options, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{folder / 'bench_kernels.md'}\n"
    assert "[1/8] rates" in done.stderr
    table = (folder / "bench_kernels.md").read_text()
    assert table.count(REHEARSAL) == 1
    assert "missed" not in table
    assert (folder / "bench_kernels.png").stat().st_size > 10_000
    rows = json.loads((folder / "bench_kernels.json").read_text())["rows"]
    assert len(rows) == 8
    assert all(row["problems"] == [] for row in rows)
    return rows


@without_cuda
def test_the_tool_rehearses_everything(tmp_path: Path) -> None:
    """Without the compiler, for it takes a minute; every other peer runs or says why not."""
    rows = {row["row"]: row for row in rehearsed(tmp_path, TORCHDYNAMO_DISABLE="1")}
    both = rows["attention, 48 tokens, batch 2: forward + backward"]["peers"]
    forward = rows["attention, 48 tokens, batch 2: forward"]["peers"]
    for name in (attention.OURS, attention.RELEASED, attention.DENSE, attention.EAGER):
        assert both[name]["ms"] > 0
    for name in (attention.FLEX, attention.FLEX_GIVEN):
        assert both[name] == {
            "absent": "not available: FlexAttention has no backward pass on a CPU"
        }
        assert forward[name]["agrees"]
    assert both[attention.CUDNN]["absent"].startswith("not available: RuntimeError")
    compared = [e for row in rows.values() for e in row["peers"].values() if "agrees" in e]
    assert len(compared) > 20
    assert all(e["agrees"] for e in compared)


@without_cuda
@pytest.mark.slow
def test_the_tool_rehearses_compiled_peers(tmp_path: Path) -> None:
    rows = {row["row"]: row["peers"] for row in rehearsed(tmp_path)}
    compiled = [rows[name][by_rows.COMPILED] for name in rows if "norm" in name or "junc" in name]
    compiled += [peers[attention.COMPILED] for name, peers in rows.items() if "attention" in name]
    assert len(compiled) == 6
    assert all(entry["agrees"] for entry in compiled)
    assert rows["attention, 48 tokens, batch 2: forward"][attention.FLEX]["agrees"]
