"""data.images: sides out of all proportion are refused before anything is decoded."""

import io

import pytest
from PIL import Image

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data import images


@pytest.mark.parametrize("size", [(1, 65_536), (70_000, 2)])
def test_lines_are_no_pictures(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("L", size).save(buffer, "PNG")
    with pytest.raises(DataError, match=r"a side of more than 65535"):
        images.decode(buffer.getvalue(), 8)


def test_the_longest_side_of_a_jpeg_is_taken() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 65_535), "red").save(buffer, "PNG")
    assert images.decode(buffer.getvalue(), 4).shape == (4, 4, 3)
