"""The measurements as Markdown: where a step's time goes, and figures against their targets."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_cogview.analysis.training_speed.split import PHASES

REHEARSAL = "CPU REHEARSAL, NOT A RESULT"

_PEERS = {"plain": ("plain PyTorch", 0.97), "core": ("megatron-core's local layers", 1.2)}
"""What a rival is called, and how many times as fast as it we want to be."""
_TFLOPS, _ROOFLINE, _SLICE, _LOOP = 620.0, 0.85, 0.97, 0.01


class Row(NamedTuple):
    """One figure."""

    what: str
    figure: str
    target: str = ""
    met: bool | None = None
    """None: there is no target."""


def tables(results: dict[str, Any]) -> str:
    """Two tables; of a rehearsal nothing is judged."""
    measured = [one for one in results["shapes"] if "left_out" not in one]
    lines = [f"**{REHEARSAL}**", ""] if results["rehearsal"] else []
    lines += ["| step | total | " + " | ".join(PHASES) + " |", "|---" * (len(PHASES) + 2) + "|"]
    for one in measured:
        total = sum(one["split"].values())
        shares = " | ".join(f"{one['split'][phase] / total:.1%}" for phase in PHASES)
        lines.append(f"| {_title(one)} | {total * 1e3:.1f} ms | {shares} |")
    lines += ["", "| what | measured | target | met |", "|---|---|---|---|"]
    for row in _rows(results["shapes"]):
        is_judged = row.met is not None and not results["rehearsal"]
        verdict = ("yes" if row.met else "**no**") if is_judged else ""
        lines.append(f"| {row.what} | {row.figure} | {row.target} | {verdict} |")
    return "\n".join(lines) + "\n"


def _title(one: dict[str, Any]) -> str:
    threads = f", {one['threads']} thread(s)" if one["on_cpu"] else ""
    return f"{one['shape']}, {one['dtype']}, {one['global_batch_size']} sequences{threads}"


def _rows(shapes: list[dict[str, Any]]) -> Iterator[Row]:
    whole = {(one["shape"], one.get("threads")): one for one in shapes}
    for one in shapes:
        if "left_out" in one:
            yield Row(one["shape"], f"left out: {one['left_out']}")
            continue
        yield from _against(one)
        yield from _loop(one)
        yield from _hardware(one)
        base = whole.get((one["shape"].partition(":")[0], one["threads"]), one)
        if base is not one and "left_out" not in base:
            ratio = one["model_tflops"] / base["model_tflops"]
            what = f"{one['shape']} against {base['shape']}: model FLOPs a second"
            yield Row(what, f"{ratio:.3f} x", *_on_gpu(one, f"{_SLICE} x", ratio >= _SLICE))


def _against(one: dict[str, Any]) -> Iterator[Row]:
    found = one.get("against", {})
    if found:
        what = f"{_title(one)}: other programs meanwhile"
        rounds = f"{found['rounds_counted']} of {found['rounds']} rounds"
        yield Row(what, f"{found['others_share']:.1%} of the cores in the {rounds} that count")
    for peer, ratio in found.get("times_as_fast", {}).items():
        ours, theirs = (found["seconds"][name] * 1e3 for name in ("ours", peer))
        who, target = _PEERS[peer]
        figure = f"{ratio:.3f} x ({ours:.1f} ms a step against {theirs:.1f}"
        if one["threads"] == 1:
            figure += f"; {found['processor_times_as_fast'][peer]:.3f} x in processor time"
        what = f"{_title(one)}: throughput against {who}"
        yield Row(what, f"{figure})", f"{target} x", ratio >= target)


def _loop(one: dict[str, Any]) -> Iterator[Row]:
    share = (one["split"]["data"] + one["split"]["log"]) / sum(one["split"].values())
    yield Row(f"{_title(one)}: loader and log", f"{share:.2%} of a step", "1 %", share < _LOOP)
    facts = [f"{one['seconds'] * 1e3:.1f} ms a step", f"{one['tokens_per_second']:,.0f} tokens/s"]
    if not one["on_cpu"]:
        facts += [f"{one['peak_bytes'] / 2**30:.1f} GiB", str(one["clocks"])]
    if one["note"]:
        facts.append(one["note"])
    yield Row(f"{_title(one)}: speed", ", ".join(facts))


def _hardware(one: dict[str, Any]) -> Iterator[Row]:
    rate = one["model_tflops"]
    of = [f"{one['mfu_of_square_product']:.1%} of a square product's "
          f"{one['square_product_tflops']:.3g}"]  # fmt: skip
    if one["mfu_of_specification"] is not None:
        of.insert(0, f"{one['mfu_of_specification']:.1%} of the specification")
    is_headline = not one["on_cpu"] and one["shape"] == "base_4b"
    target = (f"{_TFLOPS:.0f} TFLOP/s", rate >= _TFLOPS) if is_headline else ("", None)
    what = f"{_title(one)}: model FLOPs"
    yield Row(what, f"{rate:.3g} TFLOP/s: {', '.join(of)}", *target)
    fraction = one["roofline_fraction"]
    yield Row(
        f"{_title(one)}: matrix products alone, at their best",
        f"{fraction:.1%} of a step ({one['products_seconds'] * 1e3:.1f} ms)",
        *_on_gpu(one, f"{_ROOFLINE:.0%}", fraction >= _ROOFLINE),
    )


def _on_gpu(one: dict[str, Any], target: str, met: bool) -> tuple[str, bool | None]:
    """A target that was set for GPUs."""
    return ("", None) if one["on_cpu"] else (target, met)
