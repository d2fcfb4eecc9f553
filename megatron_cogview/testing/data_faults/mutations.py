"""Hostile tars, tables, maps, pictures and token rows, each a function of its random generator.

Pictures are drawn from seeds that are encoded once, because encoding costs more than decoding.
"""

import functools
import io
import json
import os
import pickle
import re
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from megatron_cogview.data.token_rows import VOCAB

_T = TypeVar("_T")
ROI1, BASE, BOI1, EOI1 = map(VOCAB.command_id, ("[ROI1]", "[BASE]", "[BOI1]", "[EOI1]"))

_CAPTIONS: tuple[object, ...] = (
    "a red square", "红色的方块", "", "   ", "\x00\x01", "[ROI1] </s> <s> [BASE]", "\u202e\u2066 b",
    "\ud800 half", "e\u0301" * 50, "x" * 5000, None, 7, ["a"], {"a": 1}, 1e308, True,
)  # fmt: skip
_NAMES = (
    "../up.png", "/etc/passwd", "a/../../b.png", "./ok.png", "a\x00b.png", "..", ".", "",
    "x" * 300 + ".png", "con.png", "C:\\x.png", "~/x.png", "a//b.png", "\ud83d.png", "-rf.png",
)  # fmt: skip
_NEAR_THE_LIMIT = ((6324, 6324), (40_000_000, 1), (1, 40_000_000), (2, 20_000_000), (6325, 6325))
_SEED_MODES = {
    "PNG": ("RGB", "L", "RGBA", "P", "I;16", "1", "LA"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
}
_BOMBS, _LARGE = 0.02, 0.001
"""Shares of pictures that are to take more time or memory than their bytes let expect."""
_HUGE = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 65_535, 1 << 20, 0x80000000)


class Mutator:
    """Draws everything from one generator, so a case can be made again."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def picture(self, small: bool = False) -> bytes:
        """An encoded picture with some of its bytes changed, moved or missing.

        ``small``: none that takes long, for a picture that is decoded many times.
        """
        draw = 1.0 if small else self._rng.random()
        if draw < _LARGE:
            return self._choice(large_seeds())
        if draw < _LARGE + _BOMBS:
            return self._bomb()
        data = self._choice(seeds())
        return data if self._rng.random() < 0.1 else self.bytes_(data)

    def row(self) -> bytes:
        """A pickled token row with changed bytes, or a pickle that would run something."""
        draw = self._rng.random()
        if draw < 0.1:
            return pickle.dumps(_Runs(), protocol=int(self._rng.integers(0, 6)))
        kind = ("int32", "int64", "uint16", ">i4", "float32", "object")[self._rng.integers(6)]
        codes = self._rng.integers(0, 8192, 1024)
        text = self._rng.integers(8192, 58_192, int(self._rng.integers(0, 80)))
        value: object = codes.astype(kind)
        match int(self._rng.integers(4)):
            case 0:
                value = ("a caption 图", value)
            case 1:
                value = (text.tolist(), value)
            case 2:
                value = np.concatenate([[ROI1], text, [BASE, BOI1], codes, [EOI1]])
        data = pickle.dumps(value, protocol=int(self._rng.integers(0, 6)))
        return data if self._rng.random() < 0.2 else self.bytes_(data)

    def write_tar(self, folder: Path) -> None:
        """A tar of a few pairs, hostile names and captions, then damaged."""
        buffer = io.BytesIO()
        # The oldest format has no room for the longest names.
        kind = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)[self._rng.integers(2)]
        with tarfile.open(fileobj=buffer, mode="w", format=kind, errors="surrogateescape") as tar:
            for index in range(int(self._rng.integers(1, 5))):
                for name, data in self._members(index):
                    self._add(tar, name, data)
        data = buffer.getvalue()
        (folder / "00000.tar").write_bytes(data if self._rng.random() < 0.3 else self.bytes_(data))

    def write_table(self, folder: Path) -> None:
        """A JSONL, CSV or TSV of hostile rows, with a few pictures beside it, then damaged."""
        ending = ("jsonl", "csv", "tsv")[self._rng.integers(3)]
        (folder / "ok.png").write_bytes(self.picture(small=True))
        lines = []
        if ending != "jsonl":
            lines.append({"csv": "image,caption,id", "tsv": "image\tcaption\tid"}[ending].encode())
        for index in range(int(self._rng.integers(1, 8))):
            name = self._hostile(_NAMES) if self._rng.integers(2) else "ok.png"
            caption = self._hostile(_CAPTIONS)
            lines.append(_line(ending, name, caption, index))
        end = (b"\n", b"\r\n", b"\r")[self._rng.integers(3)]
        data = bytearray(end.join(lines))
        (folder / f"pairs.{ending}").write_bytes(
            bytes(data) if self._rng.random() < 0.3 else self.bytes_(data)
        )

    def write_caption_map(self, folder: Path, path: Path) -> Path:
        """A sound table in ``folder`` and a damaged map of captions by id beside it."""
        (folder / "ok.png").write_bytes(self.picture(small=True))
        rows = [{"image": "ok.png", "id": f"id{n}", "caption": "red" * (n % 2)} for n in range(6)]
        (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        path = path.with_suffix((".jsonl", ".tsv")[self._rng.integers(2)])
        names = [f"id{n}" for n in self._rng.permutation(9)[: int(self._rng.integers(0, 7))]]
        if self._rng.random() < 0.2:
            names *= 2
        hostile = self._rng.random() < 0.4
        captions = [self._hostile(_CAPTIONS) if hostile else f"caption of {i}" for i in names]
        if path.suffix == ".tsv":
            lines = [f"{name}\t{caption}" for name, caption in zip(names, captions, strict=True)]
        else:
            lines = [
                json.dumps({"id": i, "caption": c}) for i, c in zip(names, captions, strict=True)
            ]
        data = "\n".join(lines).encode("utf-8", "surrogatepass")
        path.write_bytes(data if self._rng.random() < 0.5 else self.bytes_(data))
        return path

    def write_binary(self, folder: Path) -> None:
        """Records of the released binary format, some ids of which are wrong, perhaps cut."""
        count = int(self._rng.integers(1, 5))
        text = self._rng.integers(8192, 58_192, (count, 64))
        text[np.arange(64) >= self._rng.integers(0, 65, (count, 1))] = -1
        codes = self._rng.integers(0, 8192, (count, 1024))
        records = np.concatenate([text, codes], axis=1).astype("<i4")
        for _ in range(int(self._rng.integers(0, 4))):
            value = self._hostile((-1, -(2**31), 2**31 - 1, 8191, 8192, 58_191, 58_192, 58_219))
            place = int(self._rng.integers((64, 1088)[self._rng.integers(2)]))
            records[int(self._rng.integers(count)), place] = value
        data = records.tobytes()
        (folder / "rows.bin").write_bytes(data if self._rng.random() < 0.6 else self.bytes_(data))

    def bytes_(self, data: bytes | bytearray) -> bytes:
        """Change, cut, repeat or insert some bytes."""
        data = bytearray(data)
        for _ in range(int(self._rng.integers(1, 6))):
            if not data:
                break
            at = int(self._rng.integers(len(data)))
            match int(self._rng.integers(7)):
                case 0:
                    data[at] ^= 1 << int(self._rng.integers(8))
                case 1:
                    data[at] = int(self._rng.integers(256))
                case 2:
                    del data[at:]
                case 3:
                    del data[at : at + int(self._rng.integers(1, 64))]
                case 4:
                    data[at:at] = data[at : at + int(self._rng.integers(1, 600))]
                case 5:
                    data[at : at + 4] = int(self._hostile(_HUGE)).to_bytes(4, "big")  # type: ignore[call-overload]
                case _:
                    data[at:at] = self._rng.bytes(int(self._rng.integers(1, 32)))
        return bytes(data)

    def _bomb(self) -> bytes:
        """A few bytes that declare, or repeat, what would take long."""
        match int(self._rng.integers(4)):
            case 0:
                damaged = bytearray(self._choice(seeds("PNG")))
                return bytes(self._resized_png(damaged, *self._choice(_NEAR_THE_LIMIT)))
            case 1:
                damaged = bytearray(self._choice(seeds("PNG")))
                sides = [int(self._choice(_HUGE)) for _ in range(2)]
                return bytes(self._resized_png(damaged, *sides))
            case 2:
                return self._scans(self._choice(seeds("JPEG")))
            case _:
                piece, data = (
                    (b"\xff\xe5\0\2", self._choice(seeds("JPEG"))),
                    (b"\0\0\0\0abCd\x39\x1f\x4a\x40", self._choice(seeds("PNG"))),
                )[self._rng.integers(2)]
                at = 2 if piece[0] else 33
                return data[:at] + piece * int(self._rng.integers(1, 60_000)) + data[at:]

    def _scans(self, data: bytes) -> bytes:
        """A JPEG whose last scan is there many times, of a size just below or above the limit."""
        starts = [found.start() for found in re.finditer(rb"\xff\xda", data)]
        last = data[starts[-1] : -2] * int(self._rng.integers(1, 120))
        repeated = bytearray(data[:-2] + last + data[-2:])
        frame = re.search(rb"\xff[\xc0\xc2]\x00[\x0b\x11\x14]\x08", data)
        if frame and self._rng.integers(2):
            sides = (6324, 6324) if self._rng.integers(2) else (65_500, 610)
            repeated[frame.end() : frame.end() + 4] = b"".join(s.to_bytes(2, "big") for s in sides)
        return bytes(repeated)

    def _choice(self, choices: Sequence[_T]) -> _T:
        return choices[int(self._rng.integers(len(choices)))]

    def _hostile(self, choices: tuple[object, ...]) -> object:
        return choices[int(self._rng.integers(len(choices)))]

    def _members(self, index: int) -> list[tuple[str, bytes]]:
        name = f"{index:04d}"
        if self._rng.random() < 0.2:
            name = str(self._hostile(_NAMES)).removesuffix(".png")
        about: object = {"caption": self._hostile(_CAPTIONS), "id": self._hostile((1, "i", None))}
        text = json.dumps(about).encode("utf-8", "surrogatepass")
        if self._rng.random() < 0.2:
            deep = int(self._rng.integers(1, 3000))
            text = (b"[" * deep, b'{"caption":' * deep, b"\xff\xfe{", b"1e999999")[
                self._rng.integers(4)
            ]
        members = [(f"{name}.png", self.picture()), (f"{name}.json", text)]
        if self._rng.integers(2):
            members.append((f"{name}.txt", self._rng.bytes(20)))
        return members

    def _add(self, tar: tarfile.TarFile, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name.encode("utf-8", "surrogatepass").decode("utf-8", "replace"))
        member.size = len(data)
        if self._rng.random() < 0.1:
            member.type = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)[
                self._rng.integers(4)
            ]
            member.linkname = "/etc/passwd"
            member.size = 0
            data = b""
        tar.addfile(member, io.BytesIO(data))

    def _resized_png(self, data: bytearray, width: int, height: int) -> bytearray:
        """Sizes out of all proportion, in the place where they stand, with a valid checksum."""
        data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
        return data


@functools.cache
def seeds(kind: str = "") -> list[bytes]:
    """Sound pictures of every mode of one format, or of all; up to 200 pixels a side."""
    if not kind:
        return [data for name in _SEED_MODES for data in seeds(name)]
    rng = np.random.default_rng(len(kind) + ord(kind[0]))
    found = []
    for mode in _SEED_MODES[kind]:
        for index, most in enumerate((6, 48, 100, 200, 200)):
            picture = _picture(rng, mode, *rng.integers(most // 2, most, 2).tolist())
            found.append(_encode(picture, kind, index))
    return found


@functools.cache
def large_seeds() -> list[bytes]:
    """Legal pictures of many pixels."""
    rng = np.random.default_rng(3)
    small = _picture(rng, "RGB", 300, 300)
    flat = Image.new("RGBA", (6324, 6324), (200, 10, 20, 128))
    wide = small.resize((2400, 1800))
    return [
        *(_encode(wide, kind, index) for kind in ("JPEG", "PNG") for index in (0, 1)),
        _encode(flat.convert("RGB"), "JPEG", 1),
        _encode(flat.convert("1"), "PNG", 0),
        _encode(flat, "PNG", 0),
    ]


def _picture(rng: np.random.Generator, mode: str, height: int, width: int) -> Image.Image:
    """Gradients and noise."""
    y, x = np.mgrid[0:height, 0:width] / 17.0
    waves = np.stack([np.sin(x + k) + np.cos(y - 2 * k) for k in range(4)], -1)
    levels = 127 + 50 * waves + rng.normal(0, 15, waves.shape)
    if mode == "I;16":
        return Image.fromarray((levels[..., 0] * 257).clip(0, 65_535).astype(np.uint16))
    pixels = levels.clip(0, 255).astype(np.uint8)
    if mode == "RGBA":
        return Image.fromarray(pixels)
    if mode == "LA":
        return Image.fromarray(pixels[..., :2])
    return Image.fromarray(np.ascontiguousarray(pixels[..., :3])).convert(mode)


def _encode(picture: Image.Image, kind: str, index: int) -> bytes:
    """The index chooses among what a format has: progression, profiles, orientation, frames."""
    options: dict[str, object] = {}
    if kind == "JPEG":
        options = {"quality": (75, 92)[index % 2], "progressive": index % 2 == 1}
        options |= {"restart_marker_blocks": 10} if index == 2 else {}
    elif kind == "PNG" and picture.mode == "P":
        options["transparency"] = bytes(range(0, 256, 2)) if index % 2 else 3
    elif kind == "PNG" and picture.mode in ("RGB", "L", "I;16", "1"):
        colour = picture.getpixel((0, 0))
        options |= {"transparency": colour} if index % 2 else {}
    if index >= 3:
        exif = Image.Exif()
        exif[0x0112] = 6 + index % 2
        options |= {"exif": exif, "icc_profile": b"profile" * 30}
    if kind == "PNG":
        options["compress_level"] = 1
    if index == 4 and kind != "JPEG":
        options |= {"save_all": True, "append_images": [picture.copy()], "duration": 40}
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


class _Runs:
    """What a hostile pickle does."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch /tmp/megatron_cogview_was_run",)


def _line(ending: str, name: object, caption: object, index: int) -> bytes:
    if ending == "jsonl":
        about = {"image": name, "caption": caption, "id": index}
        return json.dumps(about).encode("utf-8", "surrogatepass")
    separator = "," if ending == "csv" else "\t"
    cells = [str(name), f'"{caption}"' if index % 2 else str(caption), str(index)]
    return separator.join(cells).encode("utf-8", "surrogatepass")
