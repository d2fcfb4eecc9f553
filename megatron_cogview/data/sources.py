"""Which reader a path on the command line needs."""

import dataclasses
import logging
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.data.caption_map import CaptionMap
from megatron_cogview.data.captions import PICTURES_ONLY, CaptionFrom, CaptionRule, Recaptioned
from megatron_cogview.data.raw import PairSource, mode_of, names_in
from megatron_cogview.data.table_rows import DELIMITERS
from megatron_cogview.data.tables import IMAGE_KEY, ROWS_PER_PART, TableSource
from megatron_cogview.data.webdataset import COMPRESSED_SUFFIXES, WebDatasetTars

logger = logging.getLogger(__name__)

Kind = Literal["auto", "webdataset", "table"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """How a source of pairs is read."""

    kind: Kind = "auto"
    """What the data is: tars (webdataset) or a table that names pictures."""
    caption_key: str = "caption"
    """Field of the JSON, or column of the table, that holds the caption."""
    language: str | None = None
    """Take the field with this ending instead: with zh, caption_zh."""
    caption_from: CaptionFrom = "auto"
    """Tars: the JSON's field, the .txt, or the field where it holds text and else the .txt."""
    caption_map: Path | None = None
    """Replace captions by id: JSON lines with id and caption, or a .tsv of both without header."""
    image_key: str | None = None
    """Tables: column of file names; image, file_name, path or filepath if not given."""
    image_root: Path | None = None
    """Tables: folder that file names are relative to; that of the table if not given."""
    rows_per_part: int | None = None
    """Tables: rows of one shard; 10,000 if not given."""


def open_source(path: Path, options: SourceOptions | None = None) -> PairSource:
    """The reader for a folder or file.

    Raises:
        ConfigError: an option that cannot work, or that this kind of data does not have.
        DataError: nothing there that can be read.
    """
    options = options or SourceOptions()
    rule = CaptionRule(
        key=options.caption_key,
        language=options.language,
        caption_from=options.caption_from,
        # The map is asked before a pair without a caption of its own is rejected.
        required=options.caption_map is None,
    )
    source = _open(Path(path), options, rule)
    if options.caption_map is None:
        return source
    return Recaptioned(source, CaptionMap(options.caption_map))


def open_pictures(path: Path) -> WebDatasetTars | TableSource:
    """The reader for whom captions do not matter: pairs without one are given too.

    Raises:
        DataError: as :func:`open_source`.
    """
    return _open(Path(path), SourceOptions(), PICTURES_ONLY)


def read_captions(path: Path, keys: Sequence[str], kind: Kind = "auto") -> Iterator[str]:
    """Captions under each of ``keys`` from all of a data set, without touching the pictures.

    With one key, text files count as they do for :func:`open_source`; with several, only fields.

    Raises:
        ConfigError: no key.
        DataError: no data, or a key that no pair at the beginning has.
    """
    if not keys:
        raise refuse("caption_keys", keys, "name at least one")
    rules = [CaptionRule(key=key) for key in keys]
    first = _open(Path(path), SourceOptions(kind=kind), rules[0])
    if len(rules) > 1 and isinstance(first, WebDatasetTars):
        rules = [dataclasses.replace(rule, caption_from="json") for rule in rules]
    for rule in rules:
        type(first)(Path(path), rule).check_captions()
    for part in first.parts():
        yield from first.texts(part, rules)


def _open(path: Path, options: SourceOptions, rule: CaptionRule) -> WebDatasetTars | TableSource:
    kind = options.kind if options.kind != "auto" else _kind_of(path)
    if kind == "table":
        return TableSource(
            path,
            rule,
            image_key=options.image_key if options.image_key is not None else IMAGE_KEY,
            image_root=options.image_root,
            rows_per_part=(
                options.rows_per_part if options.rows_per_part is not None else ROWS_PER_PART
            ),
        )
    for name in ("image_key", "image_root", "rows_per_part"):
        value = getattr(options, name)
        if value is not None:
            raise refuse(name, value, f"is for tables, and {path} is read as tars")
    return WebDatasetTars(path, rule)


def _kind_of(path: Path) -> Literal["webdataset", "table"]:
    """Tars or a table, by the names there are."""
    mode = mode_of(path)
    if not mode:
        raise DataError(f"{path}: no such file or folder")
    names = names_in(path) if stat.S_ISDIR(mode) else [path.name]
    tars = [name for name in names if name.endswith((".tar", *COMPRESSED_SUFFIXES))]
    tables = [name for name in names if Path(name).suffix.lower() in DELIMITERS]
    if tars and tables:
        # Lists of prompts, statistics and the like often lie beside tars.
        logger.warning(
            "%s: holds tars (%s, ...) and tables (%s, ...); the tars are read (for the tables: "
            "kind = 'table')",
            path, tars[0], tables[0],
        )  # fmt: skip
    if tars or tables:
        return "webdataset" if tars else "table"
    endings = Counter(Path(name).suffix or "no ending" for name in names)
    there = ", ".join(f"{count} x {ending}" for ending, count in endings.most_common(5))
    raise DataError(
        f"{path}: neither tars (.tar) nor a table ({', '.join(DELIMITERS)}); there are: "
        f"{there or 'no files'}; name the file, or choose with kind = 'webdataset' or 'table'"
    )
