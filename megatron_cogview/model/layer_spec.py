"""THE ModuleSpec tree: the one file that says which module stands in which megatron-core slot."""

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_cogview.model.attention import CogViewCoreAttention
from megatron_cogview.model.linear import linear_layers
from megatron_cogview.model.norm import NormedBiasDropoutAdd, PbRelaxLayerNorm
from megatron_cogview.model.transformer_config import CogViewTransformerConfig


def layer_spec(config: CogViewTransformerConfig) -> ModuleSpec:
    """One transformer layer: Sandwich-LN (or pre-LN) around attention and MLP."""
    assert config.cogview_norm is not None
    sandwich = config.cogview_norm.placement == "sandwich"
    column_linear, row_linear = linear_layers(config)

    def end_of_branch() -> object:
        if sandwich:
            return ModuleSpec(module=NormedBiasDropoutAdd, params={"config": config})
        return get_bias_dropout_add

    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ModuleSpec(module=PbRelaxLayerNorm),
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column_linear,
                    core_attention=CogViewCoreAttention,
                    linear_proj=row_linear,
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=end_of_branch(),
            pre_mlp_layernorm=ModuleSpec(module=PbRelaxLayerNorm),
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=column_linear, linear_fc2=row_linear),
            ),
            mlp_bda=end_of_branch(),
            # Names in checkpoints, fixed for good: they do not speak of megatron-core's slots.
            sharded_state_dict_keys_map={
                "self_attn_bda.norm.": "post_attn_layernorm.",
                "mlp_bda.norm.": "post_mlp_layernorm.",
            },
        ),
    )


def block_spec(
    config: CogViewTransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the final norm, which a layer spec would lose."""
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config)] * num_layers,
        layer_norm=ModuleSpec(module=PbRelaxLayerNorm, params={"is_final": True}),
    )
