"""The rows as Markdown: what must be reached, then every peer of every case."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_cogview.analysis.kernel_speed import by_rows
from megatron_cogview.analysis.kernel_speed.acceptance import (
    Verdict,
    acceptance,
    share_of_copy,
)
from megatron_cogview.analysis.kernel_speed.peers import Row

REHEARSAL = "CPU REHEARSAL, NOT A RESULT"
LEGEND = """\
`times ours`: time of the peer over that of the row's first peer. `MiB`: peak above the inputs.
`rate`: share of the copy rate in the same rounds, for operations that memory limits; else TFLOP/s
over the pairs that the peer's key sets contain, a backward pass counted as two forward ones.
`error`: distance from the results of ours that compute the same, relative; for codes, the part that
differs. `alone`: took no turns with the others, for its memory would disturb them.
"""


def tables(about: Mapping[str, Any], rows: Sequence[Row], rehearsal: bool) -> str:
    """The whole report; of a rehearsal nothing is judged.

    Args:
        about: hardware, versions and settings, printed first.
        rows: of ``peers.measure``, or with ``failed`` in the place of ``peers``.
        rehearsal: label it so.
    """
    lines = ["# Kernels against their peers", ""]
    if rehearsal:
        lines += [f"**{REHEARSAL}**", ""]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in about.items()]
    return "\n".join(lines) + "\n\n" + sections(rows, rehearsal)


def sections(rows: Sequence[Row], rehearsal: bool) -> str:
    """Acceptance, problems and one table a case."""
    good = [row for row in rows if "peers" in row]
    lines = ["## Acceptance", "", "| rule | measured | limit | met |", "|---|---|---|---|"]
    lines += [_judged(verdict, rehearsal) for verdict in acceptance(good)]
    problems = [f"- {row['row']}: {_cell(problem)}" for row in rows for problem in problems_of(row)]
    if problems:
        lines += ["", "## Problems", "", *problems]
    lines += ["", "## Rows", "", LEGEND.rstrip()]
    for row in good:
        lines += ["", f"### {row['row']}", "", *_row_table(row)]
    return "\n".join(lines) + "\n"


def problems_of(row: Row) -> list[str]:
    """What a reader must know before believing the row's figures."""
    return [row["failed"]] if "failed" in row else list(row["problems"])


def _judged(verdict: Verdict, rehearsal: bool) -> str:
    if rehearsal:
        figure, met = "not judged: a rehearsal", ""
    else:
        figure = verdict.why if verdict.figure is None else f"{verdict.figure:.3g}"
        met = {True: "met", False: "**missed**", None: "not measured"}[verdict.is_met]
    limit = verdict.limit if verdict.kind == "must" else f"target {verdict.limit}"
    return f"| {verdict.rule} | {_cell(figure)} | {limit} | {met} |"


def _row_table(row: Row) -> Iterator[str]:
    yield "| peer | ms | times ours | MiB | rate | error |"
    yield "|---|---:|---:|---:|---:|---:|"
    first, entry = next(iter(row["peers"].items()))
    base = entry.get("ms") if first.startswith("ours") else None
    for name, entry in row["peers"].items():
        if "absent" in entry:
            yield f"| {name} | {_cell(entry['absent'])} | | | | |"
            continue
        alone = " (alone)" if entry.get("alone") else ""
        times = f"{entry['ms'] / base:.2f}" if base else ""
        memory = entry["extra_bytes"]
        size = "" if memory is None else f"{memory / 2**20:,.1f}"
        yield (
            f"| {name}{alone} | {entry['ms']:.4g} | {times} | {size} | {_rate(row, name)} | "
            f"{_error(entry)} |"
        )


def _rate(row: Row, name: str) -> str:
    entry = row["peers"][name]
    if name == by_rows.COPY:
        return f"{entry['least_bytes'] / entry['ms'] / 1e6:.4g} GB/s"
    if "least_bytes" in entry:
        share = share_of_copy(row, name)
        return share if isinstance(share, str) else f"{share:.1%}"
    if "flops" in entry:
        return f"{entry['flops'] / entry['ms'] / 1e9:.3g} TFLOP/s"
    return ""


def _error(entry: Mapping[str, Any]) -> str:
    if "agrees" not in entry:
        return ""
    if entry["agrees"] is None:
        return "not compared"
    error = entry["relative_error"]
    text = "not finite" if error is None else f"{error:.1e}" if error else "0"
    return text if entry["agrees"] else f"**{text}: differs**"


def _cell(value: Any) -> str:
    """Text that cannot break a table."""
    return " ".join(str(value).replace("|", "\\|").split())
