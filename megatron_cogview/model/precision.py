"""Which number format a run uses on this device."""

from typing import TYPE_CHECKING

import torch

from megatron_cogview.configs.precision import PrecisionConfig

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_dtype(precision: PrecisionConfig) -> torch.dtype:
    """``auto`` is bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU (OP-7)."""
    if precision.dtype != "auto":
        return DTYPES[precision.dtype]
    if not torch.cuda.is_available():
        return torch.float32
    # Emulated bf16, as on a V100, is slower than the fp16 that it was made for.
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def in_precision(
    settings: "TransformerConfig", model: torch.nn.Module, dtype: torch.dtype
) -> torch.nn.Module:
    """The model in ``dtype``; half precision gets fp32 losses and logits at its end."""
    if dtype == torch.float32:
        return model
    from megatron.core.transformer.module import Float16Module

    wrapped: torch.nn.Module = Float16Module(settings, model)
    return wrapped
