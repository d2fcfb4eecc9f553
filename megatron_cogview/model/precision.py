"""Which number format a run uses on this device."""

import torch

from megatron_cogview.configs.precision import PrecisionConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_dtype(precision: PrecisionConfig) -> torch.dtype:
    """``auto`` is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU (OP-7)."""
    if precision.dtype != "auto":
        return DTYPES[precision.dtype]
    if not torch.cuda.is_available():
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
