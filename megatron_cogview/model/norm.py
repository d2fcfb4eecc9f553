"""LayerNorm with PB-relax, and the end-of-branch LayerNorm of Sandwich-LN.

With our kernels the end of a branch computes the norm that starts the next branch as well, and
leaves it there: :func:`join_norms` tells each end which norm that is.

Shapes: S sequence, B batch, H hidden.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state

from megatron_cogview.kernels.dispatch import choose
from megatron_cogview.kernels.sandwich_junction.operator import sandwich_junction
from megatron_cogview.kernels.scaled_layer_norm.operator import scaled_layer_norm
from megatron_cogview.model.kernel_choice import current_device, host_seed
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
        self.implementation = choose("LayerNorm", norm.backend, current_device())
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None
        dtype = config.params_dtype
        # None is the default device: the CPU, or "meta" in a dry run.
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_SBH: torch.Tensor) -> torch.Tensor:
        """Normalise ``[S, B, H]`` over H."""
        made, self._made = self._made, None
        if made is not None and _is_same(made[0], x_SBH, made[1]):
            return made[1]
        group = None
        if self.sequence_parallel and self.rule == "tensor_max_over_8":
            group = parallel_state.get_tensor_model_parallel_group()
        return scaled_layer_norm(
            x_SBH,
            self.weight,
            self.bias,
            self.epsilon,
            self.rule,
            group,
            implementation=self.implementation,
        )

    def offer(self, x_SBH: torch.Tensor, normed_SBH: torch.Tensor) -> None:
        """Take what this norm would make of its next input, if that is ``x_SBH``."""
        self._made = x_SBH, normed_SBH


def _is_same(x_SBH: torch.Tensor, other_SBH: torch.Tensor, normed_SBH: torch.Tensor) -> bool:
    """Whether two tensors are one, at the same place of the same graph.

    megatron-core may have wrapped it anew.  The memory cannot be another's, because ``x_SBH`` holds
    it.  What was made without a graph is of no use where there is one.
    """
    return (
        x_SBH.data_ptr() == other_SBH.data_ptr()
        and x_SBH.shape == other_SBH.shape
        and x_SBH.dtype == other_SBH.dtype
        and (normed_SBH.requires_grad == other_SBH.requires_grad or not torch.is_grad_enabled())
    )


class NormedBiasDropoutAdd(torch.nn.Module):
    """End of a branch under Sandwich-LN: ``residual + LN(dropout(x + bias))`` (P-STAB-8, P-STAB-9).

    It stands in megatron-core's bias-dropout-add slot, which asks for a function by calling
    ``module(training, fused)``.
    """

    def __init__(self, config: CogViewTransformerConfig) -> None:
        super().__init__()
        self.norm = PbRelaxLayerNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.is_joined = (
            self.norm.implementation == "triton"
            and config.joined_norms != "none"
            and self.norm.rule != "tensor_max_over_8"
        )
        # Ranks that hold other parts of the sequence drop other elements.
        self._stream = (
            parallel_state.get_tensor_model_parallel_rank() if config.sequence_parallel else 0
        )
        # In a list, because it is another module's part.
        self._next: list[PbRelaxLayerNorm] = []

    def join(self, norm: PbRelaxLayerNorm) -> None:
        """Compute this norm too, which is the next thing that happens to the result."""
        if self.is_joined and norm.rule != "tensor_max_over_8":
            self._next = [norm]

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The add function of this branch; ``fused`` is megatron-core's business and ignored."""

        def add(
            x_with_bias: tuple[torch.Tensor, torch.Tensor | None],
            residual_SBH: torch.Tensor,
            probability: float,
        ) -> torch.Tensor:
            dropout = probability if training else 0.0
            if self.is_joined:
                return self._join(*x_with_bias, residual_SBH, dropout)
            x_SBH, bias_H = x_with_bias
            if bias_H is not None:
                x_SBH = x_SBH + bias_H
            return residual_SBH + self.norm(F.dropout(x_SBH, dropout, training))

        return add

    def _join(
        self,
        x_SBH: torch.Tensor,
        bias_H: torch.Tensor | None,
        residual_SBH: torch.Tensor,
        dropout: float,
    ) -> torch.Tensor:
        norm, following = self.norm, self._next[0] if self._next else None
        assert norm.rule != "tensor_max_over_8"
        rule = "none" if following is None else following.rule
        assert rule != "tensor_max_over_8"
        z_SBH, normed_SBH = sandwich_junction(
            x_SBH,
            bias_H,
            residual_SBH,
            norm.weight,
            norm.bias,
            None if following is None else following.weight,
            None if following is None else following.bias,
            epsilon=norm.epsilon,
            end_rule=norm.rule,
            next_rule=rule,
            dropout=dropout,
            seed=host_seed() + self._stream if dropout else 0,
            implementation="triton",
        )
        if following is not None and normed_SBH is not None:
            following.offer(z_SBH, normed_SBH)
        return z_SBH


def join_norms(
    layers: Iterable[Any], final_norm: Any, within: Literal["none", "layer", "block"]
) -> None:
    """Tell the end of each branch which norm follows it.

    Args:
        layers: megatron-core's transformer layers of one model chunk, in order.
        final_norm: the norm behind them, if it stands in this chunk.
        within: how far a branch may look ahead, see ``transformer_config``.
    """
    if within == "none":
        return
    layers = list(layers)
    following = [layer.input_layernorm for layer in layers[1:]] + [final_norm]
    for layer, norm in zip(layers, following, strict=True):
        if not isinstance(layer.self_attn_bda, NormedBiasDropoutAdd):
            return
        layer.self_attn_bda.join(layer.pre_mlp_layernorm)
        if within == "block" and isinstance(norm, PbRelaxLayerNorm):
            layer.mlp_bda.join(norm)
