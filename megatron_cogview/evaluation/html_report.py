"""One self-contained page for a run: pictures are embedded, nothing is loaded, no script runs.

Draws what ``report.py`` has read; measures nothing itself.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from megatron_cogview.configs.errors import DataError
from megatron_cogview.evaluation.loss_curves import draw
from megatron_cogview.evaluation.report import JUDGED, RunFiles, series

SHOWN = 32
"""Pictures of each group that are open at once; the others are folded away."""
MOST_EMBEDDED = 600
"""Pictures of the page in all; it says so when there are more."""
LARGE_PNG = 20_000
"""Bytes above which a picture is embedded as JPEG."""
GROUPS = {
    "held_out": ("Combinations never seen in training", "held out"),
    "seen": ("Combinations seen in training", "seen"),
    "": ("Captions from the training data", ""),
}

STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--fg:#1d1f23;--soft:#666b74;--line:#dfdcd6;--card:#fff;
--good:#1a7f4b;--bad:#b3352c;--accent:#2f5fd0}
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e8e6e1;--soft:#9aa0aa;--line:#32363d;
--card:#1d2025;--good:#58c48b;--bad:#f0857c;--accent:#8db0ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:28px 18px 60px;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans","PingFang SC","Microsoft YaHei",
"Noto Sans CJK SC","Noto Sans SC",sans-serif}
h1{font-size:1.8rem;line-height:1.2;margin:0 0 4px}h2{font-size:1.25rem;margin:44px 0 10px}
h3{font-size:1rem;margin:22px 0 8px}p{margin:6px 0 12px}.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;
margin-top:22px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;white-space:nowrap;font-size:1.4rem;line-height:1.25;
font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(108px,1fr));gap:10px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:6px}
figure img{width:100%;display:block;border-radius:6px;image-rendering:auto}
figcaption{font-size:.78rem;line-height:1.3;padding:5px 2px 1px;overflow-wrap:anywhere}
.mark{font-weight:600;display:block}.right .mark{color:var(--good)}.wrong .mark{color:var(--bad)}
figure.wrong{border-color:var(--bad)}
details{margin:12px 0}summary{cursor:pointer;color:var(--accent);margin-bottom:10px}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:14px}
.curves svg{width:100%;height:auto;display:block;color:var(--fg)}
.scroll{overflow-x:auto}table{border-collapse:collapse;min-width:50%;font-size:.92rem}
th,td{text-align:right;padding:5px 12px;border-bottom:1px solid var(--line);
font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left;padding-left:0}
th{color:var(--soft);font-weight:600}.sheet{max-width:100%;background:#fff;border-radius:8px}
"""


def render(report: dict[str, Any], run: RunFiles) -> str:
    """The page as HTML text.

    Raises:
        DataError: a picture that the run lists is missing or damaged.
    """
    name = html.escape(run.folder.resolve().name)
    parts = [
        f"<h1>Pictures from captions: {name}</h1>",
        f'<p class="soft">{_subtitle(report)}</p>',
        _tiles(report),
        "<h2>Generated pictures</h2>",
        _galleries(run),
        _accuracy_table(report["accuracy"]),
        _reconstructions(report, run),
        _curves(report, run),
        _stage_table(report),
        _settings(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _subtitle(report: dict[str, Any]) -> str:
    counts = report["counts"]
    return (
        f"{counts['records']:,} training pairs, {counts['training_steps']:,} steps, "
        f"{counts['generated']:,} pictures generated; {report['rejected']:,} pairs rejected"
    )


def _tiles(report: dict[str, Any]) -> str:
    """The numbers that a reader looks for first."""
    tiles: list[tuple[str, str]] = []
    if report["accuracy"] is not None:
        tiles += [
            (_percent(report["accuracy"]["held_out"]["all"]), "right in all four, never seen"),
            (_percent(report["accuracy"]["seen"]["all"]), "right in all four, seen"),
        ]
    tiles.append((f"{report['reconstruction_psnr']:.1f} dB", "tokenizer PSNR, held-out pictures"))
    for kind in ("text", "image"):
        drop = report["losses"][kind]["drop"]
        if drop is not None:
            tiles.append((f"{-drop:+.0%}".replace("-", "−"), f"{kind} loss, first to last"))
    if len(report["seconds"]) > 1:
        tiles.append((_duration(report["seconds"]["total"]), "all stages together"))
    if report["peak_rss_bytes"] is not None:
        tiles.append((f"{report['peak_rss_bytes'] / 1e9:.2f} GB", "peak memory, all processes"))
    cells = (f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _galleries(run: RunFiles) -> str:
    """Samples by split, evenly picked over the prompts whether right or wrong."""
    verdicts = {row["id"]: row for row in (run.accuracy or {}).get("pictures", ())}
    groups: dict[str, list[dict[str, Any]]] = {key: [] for key in GROUPS}
    for sample in run.samples["samples"]:
        split = run.prompts.get(sample["id"], {}).get("split", "")
        groups[split if split in GROUPS else ""].append(sample)
    filled = {key: samples for key, samples in groups.items() if samples}
    most = MOST_EMBEDDED // max(1, len(filled))
    parts = []
    for key, samples in filled.items():
        embedded = evenly(samples, most)
        figures = [_figure(run, sample, verdicts.get(sample["id"])) for sample in embedded]
        shown = evenly(range(len(figures)), SHOWN)
        folded = [figures[i] for i in sorted(set(range(len(figures))) - set(shown))]
        parts.append(f"<h3>{GROUPS[key][0]} ({len(samples):,})</h3>")
        parts.append(_gallery(figures[i] for i in shown))
        if folded:
            what = f"{len(folded):,} more"
            if len(samples) > len(embedded):
                what += f" of {len(samples) - len(shown):,}; the rest are in the run folder"
            parts.append(f"<details><summary>{what}</summary>{_gallery(folded)}</details>")
    return "\n".join(parts)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` items at even distances, the first among them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def _gallery(figures: Iterable[str]) -> str:
    return f'<div class="gallery">{"".join(figures)}</div>'


def _figure(run: RunFiles, sample: dict[str, Any], verdict: dict[str, Any] | None) -> str:
    caption = html.escape(str(sample["caption"]))
    source = embed(run.folder / "generated" / str(sample["file"]))
    kind, mark = "", ""
    if verdict is not None:
        kind = "right" if verdict["right"] else "wrong"
        mark = f'<span class="mark">{_verdict(run, sample, verdict)}</span>'
    return (
        f'<figure class="{kind}"><img src="{source}" alt="{caption}" loading="lazy">'
        f"<figcaption>{mark}{caption}</figcaption></figure>"
    )


def _verdict(run: RunFiles, sample: dict[str, Any], verdict: dict[str, Any]) -> str:
    """``right``, or what was read where it differs from what was asked."""
    if verdict["right"]:
        return "✓ right"
    asked, read = run.prompts.get(sample["id"], {}), verdict.get("read") or {}
    wrong = [f"{name} {value}" for name, value in read.items() if asked.get(name) != value]
    return "✗ " + html.escape(", ".join(wrong) or "unreadable")


def embed(path: Path) -> str:
    """A picture as a ``data:`` address.

    Raises:
        DataError: missing or not a picture.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            image.load()
            if len(data) <= LARGE_PNG:
                return f"data:image/png;base64,{base64.b64encode(data).decode()}"
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=90)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: not a readable PNG picture ({error})") from error
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _accuracy_table(accuracy: dict[str, Any] | None) -> str:
    if accuracy is None:
        return '<p class="soft">Nothing judges these pictures: accuracy is not measured.</p>'
    rows = [
        [what, *(_percent(accuracy[split][name]) for name in JUDGED)]
        for split, what in (("seen", "seen in training"), ("held_out", "never seen"))
    ]
    checks = [
        f"{_percent(accuracy[name])} of {what}"
        for name, what in (
            ("renders", "fresh renders"),
            ("reconstructions", "tokenizer reconstructions"),
        )
        if accuracy[name] is not None
    ]
    note = f"The checker reads {' and '.join(checks)} right. " if checks else ""
    missing = f"{accuracy['missing']} pictures missing." if accuracy["missing"] else ""
    return (
        "<h2>Accuracy</h2>"
        + _table(["combinations", *JUDGED], rows)
        + f'<p class="soft">{note}Judged from pixels alone. {missing}</p>'
    )


def _reconstructions(report: dict[str, Any], run: RunFiles) -> str:
    beside = run.folder / "reconstructions" / "sheet.png"
    below = run.folder / "image_tokenizer" / "reconstructions.png"
    path, how = (beside, "beside") if beside.is_file() else (below, "below")
    if not path.is_file():
        return ""
    return (
        "<h2>The image tokenizer</h2>"
        f'<p class="soft">Originals, and {how} each what its codes give back. '
        f"{report['reconstruction_psnr']:.2f} dB on average over held-out pictures.</p>"
        f'<img class="sheet" src="{embed(path)}" alt="Originals and reconstructions">'
    )


def _curves(report: dict[str, Any], run: RunFiles) -> str:
    panels = []
    for kind in ("text", "image"):
        training = series(run.metrics, f"{kind}_loss")
        if training:
            held_out = series(run.metrics, f"validation_{kind}_loss")
            panels.append(draw(f"{kind} loss", training, held_out))
    rows = [
        [kind, *(_number(report[group][kind][end]) for group in _GROUPS for end in _ENDS)]
        for kind in ("text", "image")
    ]
    heads = ["nats per token", *(f"{what}, {end}" for what in _GROUPS.values() for end in _ENDS)]
    return f'<h2>Training</h2><div class="curves">{"".join(panels)}</div>{_table(heads, rows)}'


_ENDS = ("first", "last")
_GROUPS = {"losses": "training", "validation_losses": "validation"}


def _stage_table(report: dict[str, Any]) -> str:
    seconds, peaks = report["seconds"], report["peak_rss_bytes_by_stage"]
    if len(seconds) == 1:
        return ""
    rows = [
        [html.escape(name), _duration(value), f"{peaks[name] / 1e9:.2f} GB"]
        for name, value in seconds.items()
        if name != "total"
    ]
    rows.append(["all together", _duration(seconds["total"]), ""])
    return "<h2>Time and memory</h2>" + _table(["stage", "time", "peak memory"], rows)


def _settings(report: dict[str, Any]) -> str:
    parts = ["<h2>Settings and versions</h2>"]
    for title, values in (
        ("Versions", report["versions"]),
        ("Generation", report["generation"]),
        ("Image tokenizer", report["image_tokenizer"]),
    ):
        rows = [[html.escape(str(key)), html.escape(str(value))] for key, value in values.items()]
        inner = _table([title, ""], rows)
        parts.append(f"<details><summary>{title}</summary>{inner}</details>")
    return "\n".join(parts)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells must be escaped already."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60} s"
