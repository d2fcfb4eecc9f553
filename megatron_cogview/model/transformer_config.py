"""Our configuration as megatron-core's TransformerConfig."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cogview.configs.model import AttentionConfig, NormConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.model.kernel_choice import (
    choose_attention,
    current_device,
    effective_attention,
)
from megatron_cogview.model.precision import resolve_dtype

gelu_tanh: Callable[[torch.Tensor], torch.Tensor] = partial(F.gelu, approximate="tanh")
"""The released model's GELU; megatron-core's default is the erf form."""


@dataclass
class CogViewTransformerConfig(TransformerConfig):
    """TransformerConfig with what CogView's own modules need to know."""

    cogview_norm: NormConfig | None = None
    cogview_attention: AttentionConfig | None = None
    embedding_gradient_scale: float = 1.0
    sequence_length: int = 0
    """Tokens of a whole training sequence; pivots are drawn among them."""
    longest_text: int = 0
    """Text-region tokens that no sequence has more of."""
    joined_norms: Literal["none", "layer", "block"] = "none"
    """How far a branch's end may be computed together with the norm of the next branch."""


def transformer_config(config: RunConfig) -> CogViewTransformerConfig:
    """Translate a run's configuration.

    Fused element-wise paths of megatron-core stay off: they need a GPU, and its fused GELU and
    dropout-add do not pass through the slots that hold CogView's norms.
    """
    dtype = resolve_dtype(config.precision)
    with warnings.catch_warnings():
        # It asks whether attention that is recomputed is fused: _recompute_settings has looked.
        warnings.filterwarnings("ignore", "If you are using transformer_engine")
        return _settings(config, dtype)


def _settings(config: RunConfig, dtype: torch.dtype) -> CogViewTransformerConfig:
    model, parallel = config.model, config.parallel
    interleaved = parallel.virtual_pipeline > 1
    return CogViewTransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=4 * model.hidden_size,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        layernorm_epsilon=model.norm.epsilon,
        init_method_std=model.init_std,
        activation_func=gelu_tanh,
        add_bias_linear=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        sequence_parallel=parallel.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=not torch.cuda.is_available(),
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        # Over gloo the interleaved schedule is right only with these three values.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=not interleaved,
        # The token table's gradient is then added up in one order.
        deterministic_mode=config.training.deterministic,
        cogview_norm=model.norm,
        cogview_attention=effective_attention(model.attention, config.sequence.model_length),
        embedding_gradient_scale=model.embedding_gradient_scale,
        sequence_length=config.sequence.model_length,
        longest_text=config.sequence.longest_text_region,
        joined_norms=_joined_norms(config),
        **_recompute_settings(config, dtype),
    )


def _joined_norms(config: RunConfig) -> Literal["none", "layer", "block"]:
    """Where the next branch's weights are at hand when a branch ends."""
    if config.parallel.overlap_parameters:
        # They are collected when their own module is called, and not before.
        return "none"
    # Layers that are computed again begin anew; what was made ahead for them would be kept.
    return "layer" if config.parallel.recompute == "full" else "block"


def _recompute_settings(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What the backward pass computes again.

    ``selective`` is the attention core alone, and only where it keeps its scores: there it gives up
    most of a layer's memory for a few percent of arithmetic, while a fused kernel keeps nothing
    worth the second run.  Of megatron-core's other modules the MLP would save less than half of a
    layer for two thirds of what ``full`` costs, and the norms need TransformerEngine in 0.16.1.
    """
    if config.parallel.recompute == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if config.parallel.recompute == "none" or not _keeps_scores(config, dtype):
        return {}
    return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}


def _keeps_scores(config: RunConfig, dtype: torch.dtype) -> bool:
    """Whether attention is written out here."""
    attention = effective_attention(config.model.attention, config.sequence.model_length)
    dropout = config.model.attention_dropout
    return choose_attention(attention, dtype, current_device(), dropout) == "written out"
