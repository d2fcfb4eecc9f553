"""LayerNorm with PB-relax, and the end-of-branch LayerNorm of Sandwich-LN.

Shapes: S sequence, B batch, H hidden.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from megatron_cogview.kernels.scaled_layer_norm.reference import scaled_layer_norm
from megatron_cogview.model.transformer_config import CogViewTransformerConfig


class PbRelaxLayerNorm(torch.nn.Module):
    """LayerNorm whose input is first divided by its maximum (P-STAB-3), where the config says so.

    megatron-core's own norm refuses sequence parallelism; this one marks its parameters, so that
    their gradients are summed over the tensor axis.

    Args:
        config: the transformer's configuration.
        hidden_size: H.
        eps: added to the variance.
        is_final: the norm after the last layer, the only one relaxed under scope ``final``.
    """

    def __init__(
        self,
        config: CogViewTransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        is_final: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        assert config.cogview_norm is not None
        norm = config.cogview_norm
        self.epsilon = eps
        self.rule = norm.relax_rule if is_final or norm.relax_scope == "all" else "none"
        self.sequence_parallel = config.sequence_parallel
        dtype = config.params_dtype
        # None is the default device: the CPU, or "meta" in a dry run.
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Normalise ``[S, B, H]`` over H."""
        group = None
        if self.sequence_parallel and self.rule == "tensor_max_over_8":
            from megatron.core import parallel_state

            group = parallel_state.get_tensor_model_parallel_group()
        return scaled_layer_norm(x_SBH, self.weight, self.bias, self.epsilon, self.rule, group)


class NormedBiasDropoutAdd(torch.nn.Module):
    """End of a branch under Sandwich-LN: ``residual + LN(dropout(x + bias))`` (P-STAB-8, P-STAB-9).

    It stands in megatron-core's bias-dropout-add slot, which asks for a function by calling
    ``module(training, fused)``.
    """

    def __init__(self, config: CogViewTransformerConfig) -> None:
        super().__init__()
        self.norm = PbRelaxLayerNorm(config, config.hidden_size, config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The add function of this branch; ``fused`` is megatron-core's business and ignored."""

        def add(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None],
            residual_SBH: torch.Tensor,
            probability: float,
        ) -> torch.Tensor:
            x_SBH, bias_H = x_with_bias
            if bias_H is not None:
                x_SBH = x_SBH + bias_H
            return residual_SBH + self.norm(F.dropout(x_SBH, probability, training))

        return add
