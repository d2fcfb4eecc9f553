"""Three-region and dense causal attention behind one name each, on any device.

Importing needs no Triton.  ``torch.ops.cogview.three_region_attention`` is for tracing compilers;
callers use the functions here.

Shapes: B batch, N heads of this rank, S queries, K keys, D head dim, P slots.
"""

from typing import Any, NamedTuple

import torch

from megatron_cogview.kernels.dispatch import Wanted, choose
from megatron_cogview.kernels.pb_relax_attention.reference import causal_mask
from megatron_cogview.kernels.pivot_attention.launch import Settings
from megatron_cogview.kernels.pivot_attention.plan import FAR, Plan, dense_plan, make_plan
from megatron_cogview.kernels.pivot_attention.reference import (
    kept_weights,
    key_regions,
    masked_attention,
)

_EVERYTHING = (FAR, 1)
"""One block that no sequence fills."""
_SEED_BITS = 2**63 - 1
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_COLUMNS = 128
_MOST_HEADS = 65_535
"""Of all samples: the second axis of a grid."""


class _Stream(NamedTuple):
    """What drops weights."""

    dropout: float
    seed: int
    batch_offset: int
    head_offset: int


def three_region_attention(
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    pivot_key_B2: torch.Tensor,
    *,
    total_length: int,
    window_block: int,
    window_blocks: int,
    num_pivots: int,
    layer_number: int,
    seed: int,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    batch_offset: int = 0,
    head_offset: int = 0,
    pivot_bias: float = 0.0,
    max_text: int | None = None,
    padding_B2: torch.Tensor | None = None,
    plan: Plan | None = None,
    implementation: Wanted = "auto",
) -> torch.Tensor:
    """Attention to all text, the layer's pivots and a window of blocks, causally (P-ATT-1..7).

    Args:
        q_BNSD, k_BNKD, v_BNKD: queries of the last S of K tokens; keys and values of all K.
        pivot_key_B2: int64 ``[B, 2]``: sample number, count of text-region tokens.
        total_length: tokens of the whole sequence, at least K; pivots are drawn among them.
        window_block, window_blocks: tokens of a block (W), and blocks seen with the own (T).
        num_pivots, layer_number, seed: see ``sampler.pivot_mask``.
        dropout, dropout_seed, batch_offset, head_offset: see :func:`dense_attention`.
        pivot_bias: added to the scores of text and pivots before the window.
        max_text: no sample has more text-region tokens; makes slots and memory fewer.
        padding_B2: int64 ``[B, 2]``, see ``reference.key_regions``.
        plan: of :func:`plan_of` with the same arguments, for many calls; the kernels' alone.
        implementation: see ``dispatch.choose``.

    Returns:
        ``[B, N, S, D]`` in the dtype of the queries.

    Raises:
        ValueError: shapes or numbers that do not fit.
        ConfigError: Triton is asked for by name and cannot run.
    """
    num_queries, num_keys = _check(q_BNSD, k_BNKD, v_BNKD, dropout)
    _check_regions(pivot_key_B2, q_BNSD, num_keys, total_length, window_block, window_blocks)
    blocks = {"window_block": window_block, "window_blocks": window_blocks}
    drawn: dict[str, Any] = {"num_pivots": num_pivots, "layer_number": layer_number, "seed": seed}
    stream = _Stream(dropout, dropout_seed & _SEED_BITS, batch_offset, head_offset)
    if choose("three_region_attention", implementation, q_BNSD.device) == "reference":
        drawn |= {**blocks, "padding_B2": padding_B2}
        inside, outside = key_regions(pivot_key_B2, num_queries, num_keys, total_length, **drawn)
        bias = pivot_bias * outside if pivot_bias else None
        return _written_out(q_BNSD, k_BNKD, v_BNKD, inside | outside, stream, bias)
    if window_block * window_blocks >= num_keys:
        return _kernels(q_BNSD, k_BNKD, v_BNKD, None, padding_B2, _EVERYTHING, 0.0, stream)
    drawn |= {"max_text": max_text, "padding_B2": padding_B2}
    plan = plan or plan_of(pivot_key_B2, total_length, **drawn)
    window = (window_block, window_blocks)
    return _kernels(q_BNSD, k_BNKD, v_BNKD, plan, padding_B2, window, pivot_bias, stream)


def plan_of(pivot_key_B2: torch.Tensor, total_length: int, **drawn: Any) -> Plan:
    """The kernels' plan, its draws made by a kernel too; arguments as of ``plan.make_plan``."""
    from megatron_cogview.kernels.pivot_attention.triton_sampler import draws

    return make_plan(pivot_key_B2, total_length, draw=draws, **drawn)


def dense_attention(
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    *,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    batch_offset: int = 0,
    head_offset: int = 0,
    implementation: Wanted = "auto",
) -> torch.Tensor:
    """Causal attention by the same kernels: a window over everything.

    Args:
        q_BNSD, k_BNKD, v_BNKD: queries of the last S of K tokens; keys and values of all K.
        dropout: probability of dropping an attention weight, below 1.
        dropout_seed: of 63 bits; must differ between layers and steps.
        batch_offset, head_offset: global numbers of the first sample and the first head, so that
            ranks with other samples or heads drop other weights, and one with the same the same.
        implementation: see ``dispatch.choose``.

    Returns:
        ``[B, N, S, D]`` in the dtype of the queries.

    Raises:
        ValueError: shapes or numbers that do not fit.
        ConfigError: Triton is asked for by name and cannot run.
    """
    num_queries, num_keys = _check(q_BNSD, k_BNKD, v_BNKD, dropout)
    stream = _Stream(dropout, dropout_seed & _SEED_BITS, batch_offset, head_offset)
    if choose("dense_attention", implementation, q_BNSD.device) == "reference":
        visible = causal_mask(num_queries, num_keys, q_BNSD.device)
        return _written_out(q_BNSD, k_BNKD, v_BNKD, visible, stream, None)
    return _kernels(q_BNSD, k_BNKD, v_BNKD, None, None, _EVERYTHING, 0.0, stream)


def _check(
    q_BNSD: torch.Tensor, k_BNKD: torch.Tensor, v_BNKD: torch.Tensor, dropout: float
) -> tuple[int, int]:
    """Numbers of queries and keys of tensors that fit each other."""
    shapes = f"{tuple(q_BNSD.shape)}, {tuple(k_BNKD.shape)} and {tuple(v_BNKD.shape)}"
    if q_BNSD.dim() != 4 or k_BNKD.dim() != 4 or k_BNKD.shape != v_BNKD.shape:
        raise ValueError(f"attention: expected [B, N, S, D] and twice [B, N, K, D], got {shapes}")
    batch, heads, num_queries, head_dim = q_BNSD.shape
    num_keys = k_BNKD.shape[2]
    if k_BNKD.shape != (batch, heads, num_keys, head_dim) or not 0 < num_queries <= num_keys:
        raise ValueError(f"attention: queries must be the last tokens of the keys, got {shapes}")
    if not q_BNSD.dtype == k_BNKD.dtype == v_BNKD.dtype:
        raise ValueError(f"attention: {q_BNSD.dtype}, {k_BNKD.dtype} and {v_BNKD.dtype} differ")
    if not 0 <= dropout < 1:
        raise ValueError(f"attention: dropout = {dropout} must be in [0, 1)")
    return num_queries, num_keys


def _check_regions(
    pivot_key_B2: torch.Tensor,
    q_BNSD: torch.Tensor,
    num_keys: int,
    total_length: int,
    window_block: int,
    window_blocks: int,
) -> None:
    if pivot_key_B2.shape != (len(q_BNSD), 2):
        raise ValueError(
            f"three_region_attention: expected pivot keys [{len(q_BNSD)}, 2], got "
            f"{tuple(pivot_key_B2.shape)}"
        )
    if total_length < num_keys:
        raise ValueError(
            f"three_region_attention: total_length = {total_length} is less than {num_keys} keys"
        )
    if window_block < 1 or window_blocks < 1:
        raise ValueError(
            f"three_region_attention: window_block = {window_block} and window_blocks = "
            f"{window_blocks} must be at least 1"
        )


def _written_out(
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    visible: torch.Tensor,
    stream: _Stream,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    kept = None
    if stream.dropout > 0:
        shape = (*q_BNSD.shape[:3], k_BNKD.shape[2])
        kept = kept_weights(shape, *stream, q_BNSD.device)
    return masked_attention(
        q_BNSD, k_BNKD, v_BNKD, visible, bias=bias, kept=kept, dropout=stream.dropout
    )


def _kernels(
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    plan: Plan | None,
    padding_B2: torch.Tensor | None,
    window: tuple[int, int],
    pivot_bias: float,
    stream: _Stream,
) -> torch.Tensor:
    head_dim = q_BNSD.shape[-1]
    if q_BNSD.dtype not in _DTYPES or head_dim > _MOST_COLUMNS:
        raise ValueError(
            f"attention: Triton's kernels take fp32, fp16 and bf16 of width up to {_MOST_COLUMNS}, "
            f"got {q_BNSD.dtype} of width {head_dim}; choose the reference"
        )
    if q_BNSD.shape[0] * q_BNSD.shape[1] > _MOST_HEADS:
        raise ValueError(
            f"attention: {q_BNSD.shape[0]} samples of {q_BNSD.shape[1]} heads are more than "
            f"{_MOST_HEADS} together, which a GPU's grid does not hold; split the batch"
        )
    if padding_B2 is not None:
        padding_B2 = padding_B2.int().contiguous()
    if plan is None:
        plan = dense_plan(len(q_BNSD), q_BNSD.device)
    out_BNSD, _ = _attention(
        q_BNSD, k_BNKD, v_BNKD, *plan, padding_B2, *window, pivot_bias, *stream
    )
    return out_BNSD


def _empty_like(x_BNSD: torch.Tensor) -> torch.Tensor:
    """What the kernels return for such a tensor: sequence first in memory."""
    batch, heads, length, head_dim = x_BNSD.shape
    return x_BNSD.new_empty(length, batch, heads, head_dim).permute(1, 2, 0, 3)


@torch.library.custom_op("cogview::three_region_attention", mutates_args=())
def _attention(
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    slots_BP: torch.Tensor,
    slots_before_BL: torch.Tensor,
    slot_of_key_BL: torch.Tensor,
    padding_B2: torch.Tensor | None,
    window_block: int,
    window_blocks: int,
    pivot_bias: float,
    dropout: float,
    dropout_seed: int,
    batch_offset: int,
    head_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    from megatron_cogview.kernels.pivot_attention import triton

    plan = Plan(slots_BP, slots_before_BL, slot_of_key_BL)
    settings = Settings(
        window_block,
        window_blocks,
        pivot_bias,
        dropout,
        dropout_seed,
        batch_offset,
        head_offset,
    )
    return triton.forward(q_BNSD, k_BNKD, v_BNKD, plan, padding_B2, settings)


@_attention.register_fake
def _(q_BNSD: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_like(q_BNSD), q_BNSD.new_empty(q_BNSD.shape[:3], dtype=torch.float32)


@torch.library.custom_op("cogview::three_region_attention_backward", mutates_args=())
def _gradients(
    d_out_BNSD: torch.Tensor,
    q_BNSD: torch.Tensor,
    k_BNKD: torch.Tensor,
    v_BNKD: torch.Tensor,
    out_BNSD: torch.Tensor,
    lse_BNS: torch.Tensor,
    slots_BP: torch.Tensor,
    slots_before_BL: torch.Tensor,
    slot_of_key_BL: torch.Tensor,
    padding_B2: torch.Tensor | None,
    window_block: int,
    window_blocks: int,
    pivot_bias: float,
    dropout: float,
    dropout_seed: int,
    batch_offset: int,
    head_offset: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from megatron_cogview.kernels.pivot_attention import triton_backward

    plan = Plan(slots_BP, slots_before_BL, slot_of_key_BL)
    settings = Settings(
        window_block,
        window_blocks,
        pivot_bias,
        dropout,
        dropout_seed,
        batch_offset,
        head_offset,
    )
    return triton_backward.backward(
        d_out_BNSD, q_BNSD, k_BNKD, v_BNKD, out_BNSD, lse_BNS, plan, padding_B2, settings
    )


@_gradients.register_fake
def _(
    d_out_BNSD: torch.Tensor, q_BNSD: torch.Tensor, k_BNKD: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_like(q_BNSD), _empty_like(k_BNKD), _empty_like(k_BNKD)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.settings = inputs[7:]
    # The logarithms of the sums are for the backward alone.
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, d_out_BNSD: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    gradients = _gradients(d_out_BNSD, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, *(None for _ in range(4 + len(ctx.settings))))


_attention.register_autograd(_differentiate, setup_context=_remember)
