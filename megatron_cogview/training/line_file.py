"""Files of JSON lines that grow while a run goes on, and outlive kills and full disks.

A file is opened for each row and closed again: what happened to it in between, such as a network
file system's restart, does no harm to the next row.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def line_of(row: Row) -> bytes:
    """One line.  JSON knows neither NaN nor infinity; such a number is null."""
    clean = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return (json.dumps(clean, ensure_ascii=False) + "\n").encode("utf-8")


def append(path: Path, row: Row) -> None:
    """Add one row by one write.  A last line that a kill cut off stays one of its own.

    Raises:
        OSError: the row is not in the file, and no part of it is.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        end = os.fstat(descriptor).st_size
        torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
        data = b"\n" * torn + line_of(row)
        try:
            written = os.write(descriptor, data)
            if written != len(data):
                raise OSError(f"{path}: {written} of {len(data)} bytes written")
        except OSError:
            # To give space back needs none.
            os.ftruncate(descriptor, end)
            raise
    finally:
        os.close(descriptor)


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Rows that can be read, and the number of other lines.

    A last line without its end is neither: a kill cut it off.
    """
    rows, damaged = [], 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        row = _parsed(line)
        if row is None:
            damaged += 1
        else:
            rows.append(row)
    return rows, damaged


def cut_after(path: Path, step: int, aside: Path) -> None:
    """Move everything from the first row on whose ``step`` is larger to the end of another file.

    Raises:
        OSError: some rows are in neither file, for the disk has no room for both.
    """
    end = 0
    moved: list[dict[str, Any] | None] = []
    for line in path.read_bytes().splitlines(keepends=True):
        row = _parsed(line)
        if moved or (row is not None and row["step"] > step):
            moved.append(row)
        else:
            end += len(line)
    try:
        for row in moved:
            if row is not None:
                append(aside, row)
    finally:
        # Two accounts of one step would be worse than one that is lost.
        if moved:
            os.truncate(path, end)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None
