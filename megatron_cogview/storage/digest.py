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
    """Replace ``path`` by ``obj`` as JSON plus a ``digest`` field over its canonical form."""
    if DIGEST_KEY in obj:
        raise ValueError(f"{DIGEST_KEY!r} is reserved for the file's own hash")
    write_text(path, _render(obj))


def read_json_with_digest(path: Path) -> dict[str, Any]:
    """Read what :func:`write_json_with_digest` wrote, without the digest.

    Raises:
        DataError: no such file, not JSON, or any byte differs from what was written.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{path}: damaged (not JSON); make it again") from None
    if not isinstance(value, dict) or DIGEST_KEY not in value:
        raise DataError(
            f"{path}: carries no {DIGEST_KEY!r} field; it was not written by this package"
        )
    stated = value.pop(DIGEST_KEY)
    # Comparing the text, not only the digest, also catches bytes that JSON does not mind.
    if stated != _digest(value) or text != _render(value):
        raise DataError(
            f"{path}: does not match its own digest; it was damaged or edited; make it again"
        )
    return value


def _digest(obj: Mapping[str, Any]) -> str:
    canonical = json.dumps(
        obj, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return sha256_bytes(canonical.encode("ascii"))


def _render(obj: Mapping[str, Any]) -> str:
    # Through JSON first: tuples become lists and keys strings, so that reading gives the same text.
    plain = json.loads(json.dumps(obj, allow_nan=False))
    plain[DIGEST_KEY] = _digest(plain)
    return json.dumps(plain, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
