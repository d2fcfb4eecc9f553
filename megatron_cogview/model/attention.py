"""CogView's attention in megatron-core's ``core_attention`` slot.

Shapes: S queries, K keys, B batch, N heads of this rank, D head dim.
"""

import contextlib
import logging
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from megatron_cogview.configs.model import AttentionConfig
from megatron_cogview.kernels.pb_relax_attention.reference import (
    causal_mask,
    fused_attention,
    fused_is_safe,
    pb_relax_attention,
)
from megatron_cogview.kernels.pivot_attention.operator import (
    dense_attention,
    plan_of,
    three_region_attention,
)
from megatron_cogview.kernels.pivot_attention.plan import Plan
from megatron_cogview.kernels.pivot_attention.reference import visible_keys
from megatron_cogview.model.kernel_choice import choose_attention, current_device, host_seed
from megatron_cogview.model.transformer_config import CogViewTransformerConfig

logger = logging.getLogger(__name__)


class CogViewCoreAttention(MegatronModule):
    """PB-relax attention, dense or three-region, in training and in cached decoding.

    The mask is made here from the numbers of queries and keys: after its prefill megatron-core
    calls with ``no_mask``, which is right for single tokens only.  The ``attention_mask`` slot
    carries the pivot keys instead, because tensors in it survive recomputation and pipeline stages.
    """

    def __init__(
        self,
        config: CogViewTransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.cogview_attention is not None
        self.attention = config.cogview_attention
        self.layer_number = layer_number
        self.sequence_length, self.longest_text = config.sequence_length, config.longest_text
        self.dropout = config.attention_dropout
        self.sequence_parallel = config.sequence_parallel
        self.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        self._planned: tuple[torch.Tensor, int, Plan] | None = None
        self.choice = choose_attention(
            config.cogview_attention, config.params_dtype, current_device(), self.dropout
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: ``[S, B, N, D]``; the last S of the K tokens.
            key, value: ``[K, B, N, D]``.
            attention_mask: pivot keys, int64 ``[B, 2]`` (three-region attention only).
            attn_mask_type: ignored, see the class.

        Returns:
            ``[S, B, N * D]``.
        """
        q_BNSD, k_BNKD, v_BNKD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        with self._random_state(dropout):
            out_BNSD = self._attend(q_BNSD, k_BNKD, v_BNKD, attention_mask, dropout)
        out_SBND = out_BNSD.permute(2, 0, 1, 3).contiguous()
        return out_SBND.view(*out_SBND.shape[:2], -1)

    def _random_state(self, dropout: float) -> contextlib.AbstractContextManager[Any]:
        """Heads differ between tensor-parallel ranks, so their dropout must.

        Under sequence parallelism the transformer block has forked the tracker already; a kernel
        counts the heads.
        """
        if dropout == 0.0 or self.sequence_parallel or self.choice == "kernel":
            return contextlib.nullcontext()
        return tensor_parallel.get_cuda_rng_tracker().fork()

    def _attend(
        self,
        q_BNSD: torch.Tensor,
        k_BNKD: torch.Tensor,
        v_BNKD: torch.Tensor,
        pivot_key_B2: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        a = self.attention
        # Eq. 4 as it is written out knows no bias.
        if self.choice == "kernel" or (a.kind == "pivot" and a.pivot_bias):
            return self._kernel(q_BNSD, k_BNKD, v_BNKD, pivot_key_B2, dropout)
        if self.choice == "fused" and fused_is_safe(q_BNSD.dtype, q_BNSD.device, dropout):
            return fused_attention(q_BNSD, k_BNKD, v_BNKD, dropout)
        visible = self.visible(q_BNSD.shape[-2], k_BNKD.shape[-2], q_BNSD.device, pivot_key_B2)
        return pb_relax_attention(
            q_BNSD, k_BNKD, v_BNKD, visible, a.relax_alpha, a.relax_max, dropout
        )

    def _kernel(
        self,
        q_BNSD: torch.Tensor,
        k_BNKD: torch.Tensor,
        v_BNKD: torch.Tensor,
        pivot_key_B2: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        a = self.attention
        stream: dict[str, Any] = {
            "dropout": dropout,
            "dropout_seed": host_seed() if dropout else 0,
            "head_offset": self.tensor_rank * q_BNSD.shape[1],
            "implementation": "triton" if self.choice == "kernel" else "reference",
        }
        if a.kind == "dense":
            return dense_attention(q_BNSD, k_BNKD, v_BNKD, **stream)
        assert pivot_key_B2 is not None, "three-region attention needs the batch's pivot keys"
        drawn: dict[str, Any] = {
            "total_length": max(k_BNKD.shape[-2], self.sequence_length),
            "num_pivots": a.num_pivots,
            "layer_number": self.layer_number,
            "seed": a.pivot_seed,
            # Prompts may hold a picture; there slots are no matter.
            "max_text": self.longest_text if self.training else None,
        }
        plan = None
        if self.choice == "kernel" and not self.training:
            plan = self._kept_plan(pivot_key_B2, drawn)
        return three_region_attention(
            q_BNSD,
            k_BNKD,
            v_BNKD,
            pivot_key_B2,
            window_block=a.window_block,
            window_blocks=a.window_blocks,
            pivot_bias=a.pivot_bias,
            plan=plan,
            **drawn,
            **stream,
        )

    def _kept_plan(self, pivot_key_B2: torch.Tensor, drawn: dict[str, Any]) -> Plan:
        """All tokens of a generation share the plan of a layer, which depends on the samples alone.

        They come with one and the same tensor; it is held, so that no other has its identity.
        """
        kept, length = self._planned, drawn["total_length"]
        if kept is None or kept[0] is not pivot_key_B2 or kept[1] != length:
            kept = self._planned = (pivot_key_B2, length, plan_of(pivot_key_B2, **drawn))
        return kept[2]

    def visible(
        self,
        num_queries: int,
        num_keys: int,
        device: torch.device,
        pivot_key_B2: torch.Tensor | None,
    ) -> torch.Tensor:
        """The keys that queries attend to: ``[S, K]``, or ``[B, 1, S, K]`` with pivots."""
        a = self.attention
        if a.kind == "dense":
            return causal_mask(num_queries, num_keys, device)
        assert pivot_key_B2 is not None, "three-region attention needs the batch's pivot keys"
        return visible_keys(
            pivot_key_B2,
            num_queries,
            num_keys,
            max(num_keys, self.sequence_length),
            window_block=a.window_block,
            window_blocks=a.window_blocks,
            num_pivots=a.num_pivots,
            layer_number=self.layer_number,
            seed=a.pivot_seed,
        )


def log_attention_choice(config: CogViewTransformerConfig, asked: AttentionConfig) -> None:
    """Say once which attention runs, and why it is allowed to."""
    a = config.cogview_attention
    assert a is not None
    device = current_device()
    choice = choose_attention(a, config.params_dtype, device, config.attention_dropout)
    name = "three-region attention" if a.kind == "pivot" else "dense attention"
    said = {
        "kernel": f"{name} by our kernel: its scores stay in fp32, so alpha is not needed",
        "fused": "PyTorch's fused attention: its scores stay in fp32, so alpha is not needed",
        "written out": f"{name} written out (alpha {a.relax_alpha}, max per {a.relax_max})",
    }[choice]
    if choice == "written out" and not a.is_written_out:
        said += ": no kernel with fp32 scores for this here"
    if asked.kind != a.kind:
        said += (
            f"; dense in the place of three regions, which at {config.sequence_length} tokens "
            "compute no fewer pairs worth mentioning (model.attention.backend reference or triton "
            "takes them all the same)"
        )
    logger.info("attention: %s", said)
