"""Hostile tars, tables, pictures and pickled rows, each a function of its random generator."""

import io
import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

_CAPTIONS: tuple[object, ...] = (
    "a red square", "红色的方块", "", "   ", "\x00\x01", "[ROI1] </s> <s> [BASE]", "\u202e\u2066 b",
    "\ud800 half", "e\u0301" * 50, "x" * 5000, None, 7, ["a"], {"a": 1}, 1e308, True,
)  # fmt: skip
_NAMES = (
    "../up.png", "/etc/passwd", "a/../../b.png", "./ok.png", "a\x00b.png", "..", ".", "",
    "x" * 300 + ".png", "con.png", "C:\\x.png", "~/x.png", "a//b.png", "\ud83d.png", "-rf.png",
)  # fmt: skip
_HUGE = (0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 65_535, 1 << 20, 0x80000000)


class Mutator:
    """Draws everything from one generator, so a case can be made again."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def picture(self) -> bytes:
        """An encoded picture with some of its bytes changed, moved or missing."""
        kind = ("PNG", "JPEG", "WEBP")[self._rng.integers(3)]
        mode = ("RGB", "L", "RGBA", "P", "CMYK", "I;16", "1", "LA")[self._rng.integers(8)]
        if (kind == "JPEG" and mode not in ("RGB", "L", "CMYK")) or (
            kind == "WEBP" and mode not in ("RGB", "RGBA")
        ):
            mode = "RGB"
        if kind == "PNG" and mode == "CMYK":
            mode = "RGB"
        height, width = self._rng.integers(1, 48, 2).tolist()
        image = Image.new(mode, (width, height), int(self._rng.integers(0, 2)))
        buffer = io.BytesIO()
        options = {"progressive": True} if kind == "JPEG" and self._rng.integers(2) else {}
        image.save(buffer, kind, **options)
        data = bytearray(buffer.getvalue())
        if kind == "PNG" and self._rng.random() < 0.3:
            # Sizes out of all proportion, in the place where they stand, with a valid checksum.
            data = self._resized_png(data)
        return bytes(data) if self._rng.random() < 0.1 else self.bytes_(data)

    def row(self) -> bytes:
        """A pickled token row with changed bytes, or a pickle that would run something."""
        draw = self._rng.random()
        if draw < 0.1:
            return pickle.dumps(_Runs(), protocol=int(self._rng.integers(0, 6)))
        ids = self._rng.integers(0, 8192, int(self._rng.integers(1, 300)))
        kind = ("int32", "int64", "uint16", ">i4", "float32", "object")[self._rng.integers(6)]
        value: object = ids.astype(kind)
        if self._rng.integers(2):
            value = ("a caption 图", value)
        data = bytearray(pickle.dumps(value, protocol=int(self._rng.integers(0, 6))))
        return self.bytes_(data)

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
        (folder / "ok.png").write_bytes(self.picture())
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

    def _resized_png(self, data: bytearray) -> bytearray:
        for at in (16, 20):
            data[at : at + 4] = int(self._hostile(_HUGE)).to_bytes(4, "big")  # type: ignore[call-overload]
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
        return data


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
