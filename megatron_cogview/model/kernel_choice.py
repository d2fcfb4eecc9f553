"""Which implementation of attention and norms a model runs with on this machine."""

from dataclasses import replace
from typing import Literal

import torch

from megatron_cogview.configs.model import AttentionConfig
from megatron_cogview.kernels.dispatch import choose
from megatron_cogview.kernels.pb_relax_attention.reference import fused_is_safe

AttentionChoice = Literal["kernel", "fused", "written out"]


def current_device() -> torch.device:
    """Where a model that is built now will run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def host_seed() -> int:
    """A seed for one kernel's dropout, drawn from the host's random state: nothing waits for the
    device, recomputation draws it again, and ranks of one tensor group draw the same.

    Raises:
        RuntimeError: a CUDA graph is being captured, which would repeat one seed for ever.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dropout of the kernels takes its seed from the host, and a CUDA graph would repeat "
            "it at every replay: set model.hidden_dropout and model.attention_dropout to 0"
        )
    return int(torch.randint(1 << 62, ()))


def effective_attention(attention: AttentionConfig, length: int) -> AttentionConfig:
    """Under backend ``auto`` dense attention stands in for three regions at lengths where these
    compute hardly fewer pairs.  A matter of the configuration alone: generation decides as training
    did."""
    if attention.kind == "pivot" and attention.backend == "auto" and not attention.saves(length):
        return replace(attention, kind="dense")
    return attention


def choose_attention(
    attention: AttentionConfig, dtype: torch.dtype, device: torch.device, dropout: float
) -> AttentionChoice:
    """Which attention runs on a device.

    ``auto`` takes our kernel for three regions where it can run; for dense attention PyTorch's
    fused kernels, whose scores stay in fp32 too.

    Raises:
        ConfigError: Triton is asked for by name and cannot run.
    """
    if attention.is_written_out:
        return "written out"
    if attention.kind == "pivot" or attention.backend == "triton":
        chosen = choose(f"{attention.kind} attention", attention.backend, device)
        return "kernel" if chosen == "triton" else "written out"
    return "fused" if fused_is_safe(dtype, device, dropout) else "written out"
