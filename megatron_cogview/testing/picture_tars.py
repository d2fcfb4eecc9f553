"""Small tars of pictures for tests of the image tokenizer's training."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """A member of this name and content."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def png(index: int) -> bytes:
    """A smooth picture: two colours blended along a direction that depends on the index."""
    rng = np.random.default_rng(index)
    ramp = np.linspace(0, 1, 16)[:, None, None] * np.ones((1, 16, 1))
    ramp = ramp if index % 2 else ramp.transpose(1, 0, 2)
    colours = rng.integers(0, 256, (2, 3))
    file = io.BytesIO()
    pixels = (ramp * colours[0] + (1 - ramp) * colours[1]).astype(np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tars(folder: Path, number: int = 40) -> Path:
    """Two tars; one picture without JSON, one without caption, one that is no picture."""
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"{part:06d}.tar", "w") as tar:
            for index in range(part, number, 2):
                add(tar, f"{index:06d}.png", b"broken" if index == 7 else png(index))
                about = {"id": f"p{index}", "caption": "圆"}
                if index == 4:
                    del about["caption"]
                if index != 3:
                    add(tar, f"{index:06d}.json", json.dumps(about).encode())
    return folder
