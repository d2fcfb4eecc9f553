"""One self-contained page for a preview: pictures are embedded, nothing is loaded, no script runs.

Captions are anybody's text: they are escaped, kept from disturbing what stands around them, and
characters that cannot be seen are spelt out.
"""

import base64
import html
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from PIL import Image

from megatron_cogview.data.preview import Pixels, Preview, Shown

LARGE_PNG = 20_000
"""Bytes above which a picture is embedded as JPEG."""
INVISIBLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    r"\ufff9-\ufffb\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)
"""Control characters, direction overrides, half surrogate pairs, tags."""

STYLE = """
:root{color-scheme:light dark;--bg:#fbfaf8;--fg:#1d1f23;--soft:#666b74;--line:#dfdcd6;--card:#fff;
--bad:#b3352c;--accent:#2f5fd0}
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e8e6e1;--soft:#9aa0aa;--line:#32363d;
--card:#1d2025;--bad:#f0857c;--accent:#8db0ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 18px 60px;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI","Noto Sans","PingFang SC","Microsoft YaHei",
"Noto Sans CJK SC","Noto Sans SC",sans-serif}
h1{font-size:1.8rem;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:44px 0 10px}p{margin:6px 0 12px}.soft{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;
margin-top:22px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px}
.tile b{display:block;white-space:nowrap;font-size:1.4rem;line-height:1.25;
font-variant-numeric:tabular-nums}.tile span{color:var(--soft);font-size:.85rem}
.columns{columns:2 380px;column-gap:40px;margin-top:30px}
section{break-inside:avoid;padding-bottom:26px}section h2{margin:0 0 6px}
table{border-collapse:collapse;width:100%;font-size:.92rem;table-layout:fixed}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--line);
vertical-align:top;overflow-wrap:anywhere}
th{color:var(--soft);font-weight:600;width:38%}
td{font-variant-numeric:tabular-nums}
.bars{display:flex;align-items:flex-end;gap:1px;height:120px;border-bottom:1px solid var(--line)}
.bars i{flex:1;background:var(--accent);min-width:1px}
.ends{display:flex;justify-content:space-between;color:var(--soft);font-size:.85rem}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(215px,1fr));gap:12px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:8px;
min-width:0}
.pictures{display:flex;gap:6px;align-items:flex-start}
.pictures img{flex:1;min-width:0;width:100%;display:block;border-radius:6px}
img.codes{image-rendering:pixelated}
figcaption{font-size:.85rem;line-height:1.35;padding:6px 2px 1px;overflow-wrap:anywhere}
bdi{display:block;margin-bottom:4px}.fault{color:var(--bad);margin:4px 0}
.spelt{border:1px solid var(--line);border-radius:4px;padding:0 3px;color:var(--soft);
font-size:.75em}
.about,details{font-size:.75rem;color:var(--soft)}summary{cursor:pointer}
"""


def render(preview: Preview) -> str:
    """The page as HTML text."""
    name = escape(preview.folder.resolve().name)
    parts = [
        f"<h1>Token shards: {name}</h1>",
        f'<p class="soft">{escape(str(preview.folder.resolve()))}</p>',
        _tiles(preview),
        '<div class="columns">',
        *(f"<section>{section}</section>" for section in _sections(preview)),
        "</div>",
        f"<h2>{len(preview.shown):,} records</h2>",
        f'<div class="gallery">{"".join(_figure(item) for item in preview.shown)}</div>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """HTML of any text; what cannot be seen or written is spelt out."""
    return INVISIBLE.sub(
        lambda found: f'<span class="spelt">U+{ord(found[0]):04X}</span>', html.escape(text)
    )


def data_uri(pixels: Pixels) -> str:
    """A picture as a ``data:`` address; PNG if small, else JPEG."""
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    image.save(buffer, "PNG")
    kind = "png"
    if buffer.tell() > LARGE_PNG and pixels.ndim == 3:
        kind, buffer = "jpeg", io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _tiles(preview: Preview) -> str:
    records = preview.manifest["records"]
    rejected = sum(preview.manifest.get("rejected", {}).values())
    tiles = [
        (f"{records:,}", "records"),
        (f"{len(preview.manifest['shards']):,}", "shards"),
        (_size(preview.num_bytes), "on disk"),
        (_size(preview.num_bytes / records * 1e6), "per million pairs"),
        (f"{rejected / max(1, rejected + records):.2%}", f"rejected: {rejected:,}"),
        (f"{preview.num_train:,}", "training records"),
        (f"{preview.num_validation:,}", f"validation, at {preview.fraction}"),
    ]
    cells = (f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for value, what in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _size(num_bytes: float) -> str:
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))
    unit, name = next((u for u in units if num_bytes >= u[0]), (1e3, "kB"))
    return f"{num_bytes / unit:.1f} {name}"


def _sections(preview: Preview) -> Iterator[str]:
    manifest = preview.manifest
    yield _lengths(preview.text_lengths)
    yield _rejected(manifest)
    for title, values in (
        ("Layout", manifest["layout"]),
        ("Text tokenizer", manifest["tokenizers"]["text"]),
        ("Image tokenizer", manifest["tokenizers"]["image"]),
        ("Source", manifest.get("source")),
        ("Counts", manifest.get("counts")),
    ):
        if values:
            yield f"<h2>{title}</h2>{_table(values)}"


def _table(values: dict[str, Any]) -> str:
    rows = (
        f"<tr><th>{escape(str(key).replace('_', ' '))}</th><td>{_value(value)}</td></tr>"
        for key, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _value(value: Any) -> str:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return escape(json.dumps(value, ensure_ascii=False))


def _rejected(manifest: dict[str, Any]) -> str:
    reasons: dict[str, int] = manifest.get("rejected", {})
    if not reasons:
        return '<h2>Rejected pairs</h2><p class="soft">None.</p>'
    ordered = dict(sorted(reasons.items(), key=lambda item: -item[1]))
    return f"<h2>Rejected pairs</h2>{_table(ordered)}"


def _lengths(lengths: Sequence[int]) -> str:
    """Bars of text lengths, each as high as its length is frequent."""
    counts = Counter(lengths)
    most, longest = max(counts.values(), default=1), max(lengths, default=0)
    bars = (
        f'<i style="height:{100 * counts[n] / most:.1f}%" title="{n} ids: {counts[n]:,}"></i>'
        for n in range(longest + 1)
    )
    mean = sum(lengths) / max(1, len(lengths))
    return (
        f"<h2>Text lengths</h2>"
        f'<p class="soft">Ids of {len(lengths):,} records; {mean:.1f} on average.</p>'
        f'<div class="bars">{"".join(bars)}</div>'
        f'<div class="ends"><span>0</span><span>{longest}</span></div>'
    )


def _figure(item: Shown) -> str:
    pictures = "".join(_picture(pixels, item.number) for pixels in item.pictures)
    caption = '<span class="soft">no text tokenizer: ids only</span>'
    if item.caption is not None:
        caption = escape(item.caption)
    faults = "".join(f'<p class="fault">{escape(fault)}</p>' for fault in item.faults)
    about = _lines(
        [
            f"record {item.number:,} of the set, {item.part}",
            item.place,
            f"id {item.sample_id}",
        ]
    )
    ids = f"<details><summary>{len(item.text_ids)} ids</summary>{_ids(item.text_ids)}</details>"
    return (
        f'<figure id="record-{item.number}"><div class="pictures">{pictures}</div><figcaption>'
        f'<bdi dir="auto">{caption}</bdi>{faults}<div class="about">{about}</div>{ids}'
        "</figcaption></figure>"
    )


def _picture(pixels: Pixels, number: int) -> str:
    kind, what = ("codes", "codes") if pixels.ndim == 2 else ("picture", "picture")
    side = f"{pixels.shape[0]} x {pixels.shape[1]}"
    return (
        f'<img class="{kind}" src="{data_uri(pixels)}" title="{side}" '
        f'alt="{what} of record {number}" loading="lazy">'
    )


def _ids(ids: Iterable[int]) -> str:
    return " ".join(str(i) for i in ids)


def _lines(lines: Iterable[str]) -> str:
    return "<br>".join(escape(line) for line in lines)
