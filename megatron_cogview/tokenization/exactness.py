"""How the image tokenizer's networks compute where the same numbers must come out every time.

Knows nothing of networks, nor of autocast: a context of it around several steps would keep the
weights that it has cast at the first.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """fp32 operations without TF32, and on a GPU only kernels that add up in one order."""
    with ExitStack() as stack:
        stack.enter_context(
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            )
        )
        if device.type == "cuda":
            # Of fused attention the gradients are sums in any order, and fp32 is not plain fp32.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            matmul = torch.backends.cuda.matmul
            stack.callback(setattr, matmul, "allow_tf32", matmul.allow_tf32)
            matmul.allow_tf32 = False
        yield


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """:func:`exact` for a training: scattered sums, too, are in one order on a GPU."""
    memory: Any = torch.utils.deterministic
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        memory.fill_uninitialized_memory,
    )
    with exact(device):
        try:
            if device.type == "cuda":
                # Max pooling's gradient (perceptual loss) has no such kernel; torch says so.
                torch.use_deterministic_algorithms(True, warn_only=True)
                memory.fill_uninitialized_memory = False
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            memory.fill_uninitialized_memory = before[2]
