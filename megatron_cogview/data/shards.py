"""Token shards on disk (AD-5): fixed-stride records in ``.npy`` files and one ``manifest.json``.

Ids are local to their tokenizers.  There is no index: record n of a shard lies at a known offset.
``split-HASH.npy`` says where the validation part of each shard ends.  Reading is
``shard_set.py``.  Knows nothing of sequences, shuffling or tensors.
"""

import functools
import hashlib
import io
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.sequence import MAX_SHARD_TEXT
from megatron_cogview.data.split import split_counts
from megatron_cogview.storage.atomic import replacing, write_bytes
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_bytes,
    write_json_with_digest,
)

FORMAT = "megatron_cogview token shards"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SPLIT_TABLE = re.compile(r"split-[0-9a-f]{12}\.npy")
SHARD_NAME = re.compile(r"shard-\d{6,}\.npy")

Records = NDArray[np.void]
"""Structured array of :func:`record_dtype`."""


def shard_name(index: int) -> str:
    """File name of the shard of part ``index``."""
    return f"shard-{index:06d}.npy"


def record_dtype(codes_per_side: Sequence[int]) -> np.dtype[np.void]:
    """One record: text, its length, one grid per image, id hash, CRC32; packed, little-endian.

    ``sample_id`` is the first 8 bytes of the SHA-256 of the source's id.
    """
    grids = [(f"image{i}", "<u2", (side, side)) for i, side in enumerate(codes_per_side)]
    return np.dtype(
        [
            ("text", "<u2", (MAX_SHARD_TEXT,)),
            ("text_length", "<u2"),
            *grids,
            ("sample_id", "<u8"),
            ("crc32", "<u4"),
        ]
    )


def sample_id(name: str) -> int:
    """What a record keeps of its source id."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "little")


def compute_crc32(records: Records) -> NDArray[np.uint32]:
    """CRC32 of each record's bytes but its last four, which hold the CRC itself."""
    stride = records.dtype.itemsize
    raw = np.ascontiguousarray(records).view(np.uint8).data
    crc32, covered = zlib.crc32, stride - 4
    sums = [crc32(raw[at : at + covered]) for at in range(0, len(raw), stride)]
    return np.array(sums, dtype=np.uint32)


@functools.lru_cache(maxsize=256)
def npy_header(dtype: np.dtype[np.void], count: int) -> bytes:
    """The bytes before the records of a shard of ``count`` records."""
    buffer = io.BytesIO()
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (count,),
    }
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def write_shard(path: Path, records: Records) -> dict[str, Any]:
    """Sort records by ``sample_id``, fill in their CRCs and write one shard atomically.

    Returns:
        Its entry of the manifest, ``{name, records, bytes, sha256}``, and under ``split`` its
        column of the split table.
    """
    records = records[np.argsort(records["sample_id"], kind="stable")]
    records["crc32"] = compute_crc32(records)
    header = npy_header(records.dtype, len(records))
    body = records.view(np.uint8).data
    digest = hashlib.sha256(header)
    digest.update(body)
    with replacing(path) as file:
        file.write(header)
        file.write(body)
    return {
        "name": path.name,
        "records": len(records),
        "bytes": len(header) + len(body),
        "sha256": digest.hexdigest(),
        "split": split_counts(records["sample_id"]).tolist(),
    }


def write_manifest(
    folder: Path, entries: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the split table and, last, the manifest; give the manifest.

    Args:
        folder: where the shards are.
        entries: what :func:`write_shard` gave, in shard order, with whatever else is to be kept.
        about: ``layout`` and ``tokenizers``, which readers need, and provenance.
    """
    table = np.array([entry["split"] for entry in entries], dtype="<u4").T
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(table), allow_pickle=False)
    data = buffer.getvalue()
    digest = sha256_bytes(data)
    # Named by its content: readers of the manifest that is there find their own table.
    name = f"split-{digest[:12]}.npy"
    write_bytes(folder / name, data)
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **about,
        "records": sum(entry["records"] for entry in entries),
        "split_table": {
            "name": name,
            "bytes": len(data),
            "sha256": digest,
        },
        "shards": [{k: v for k, v in entry.items() if k != "split"} for entry in entries],
    }
    write_json_with_digest(folder / MANIFEST, manifest)
    for path in folder.glob("split-*.npy"):
        if SPLIT_TABLE.fullmatch(path.name) and path.name != name:
            path.unlink(missing_ok=True)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked content of ``manifest.json``.

    Raises:
        DataError: missing, damaged, or of another format version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{path}: not found; the folder holds no finished token shards "
            f"(make them with tools/tokenize_dataset.py)"
        )
    manifest = read_json_with_digest(path)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path}: is not a manifest of token shards; name another folder")
    if manifest.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format version {manifest.get('version')!r}, this program reads "
            f"{FORMAT_VERSION}; tokenise again or use the matching release"
        )
    return manifest
