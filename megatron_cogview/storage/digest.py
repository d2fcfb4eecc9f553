"""SHA-256 of files, and JSON files that carry their own.  Knows nothing of what they describe."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_cogview.configs.errors import DataError
from megatron_cogview.storage.atomic import write_text

DIGEST_KEY = "digest"
"""Field that holds the SHA-256 of the others."""


def sha256_bytes(data: bytes) -> str:
    """SHA-256 in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes in lower-case hex, in constant memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json_with_digest(path: Path, obj: Mapping[str, Any]) -> None:
    """Replace ``path`` by ``obj`` as JSON whose last field, ``digest``, is the SHA-256 of all
    bytes before it."""
    if DIGEST_KEY in obj:
        raise ValueError(f"{DIGEST_KEY!r} is reserved for the file's own hash")
    body = json.dumps(dict(obj), indent=1, ensure_ascii=True, allow_nan=False)
    # "{...}" without its closing brace, or "{" alone; then the digest as one more field.
    head = body[:-2] + "," if obj else "{"
    write_text(path, head + _tail(sha256_bytes(head.encode("ascii"))))


def read_json_with_digest(path: Path) -> dict[str, Any]:
    """Read what :func:`write_json_with_digest` wrote, without the digest.

    Raises:
        DataError: no such file, not JSON, or any byte differs from what was written.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    length = len(_tail("0" * 64))
    head, tail = raw[:-length], raw[-length:]
    if head and tail == _tail(sha256_bytes(head)).encode("ascii"):
        # Written by write_json_with_digest, byte for byte: it is JSON.
        value: dict[str, Any] = json.loads(raw)
        del value[DIGEST_KEY]
        return value
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise DataError(f"{path}: damaged (not JSON); make it again") from None
    if not isinstance(value, dict) or DIGEST_KEY not in value:
        raise DataError(
            f"{path}: carries no {DIGEST_KEY!r} field; it was not written by this package"
        )
    raise DataError(
        f"{path}: does not match its own digest; it was damaged or edited; make it again"
    )


def _tail(digest: str) -> str:
    return f'\n "{DIGEST_KEY}": "{digest}"\n}}\n'
