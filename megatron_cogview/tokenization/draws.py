"""Random draws that follow from whole numbers, and so are the same in every life of a run.

Knows nothing of what is drawn.
"""

import torch

from megatron_cogview.storage.digest import sha256_bytes


def generator(device: torch.device, *key: int) -> torch.Generator:
    """A generator that ``key`` decides; every number in it, of any size, and its place matter."""
    # Hashed, because on a CPU torch takes the lowest 32 bits of a seed and nothing of the rest.
    digest = sha256_bytes(" ".join(map(str, key)).encode())
    return torch.Generator(device).manual_seed(int(digest[:15], 16))
