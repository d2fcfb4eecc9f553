"""The Philox stream against the published vectors and against Triton's."""

import pytest
import torch

from megatron_cogview.kernels import philox

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("seed", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (2**32 - 1,) * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_published_vectors(seed, counter, expected):
    """Of Random123's file kat_vectors, philox4x32 with ten rounds."""
    assert " ".join(f"{int(word):08x}" for word in philox.words(seed, *counter)) == expected


@triton.jit
def draw(out, seed, step, LENGTH: tl.constexpr):
    at = tl.arange(0, LENGTH)
    tl.store(out + at, tl.rand(seed, at.to(tl.int64) * step))


@pytest.mark.parametrize("seed", [3, 2**40 + 5])
@pytest.mark.parametrize("step", [1, 123_456_789_123])
def test_uniform_numbers_are_triton_s(seed, step):
    out = torch.empty(64, device=DEVICE)
    draw[(1,)](out, seed, step, 64)
    expected = philox.uniform(seed, torch.arange(64, device=DEVICE) * step)
    assert torch.equal(out, expected)


def test_numbers_are_uniform():
    numbers = philox.uniform(7, torch.arange(100_000)).double()
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    counts = torch.histc(numbers, 100, 0, 1)
    # 99 degrees of freedom.
    assert 60 < float(((counts - 1000) ** 2 / 1000).sum()) < 150
