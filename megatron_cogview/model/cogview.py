"""CogViewModel: embedding, transformer block and tied head, whole or one pipeline stage of it.

Shapes: B batch, S sequence, H hidden, V vocabulary rows of this rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import TransformerBlock

from megatron_cogview.configs.run import RunConfig
from megatron_cogview.model.attention import log_attention_choice
from megatron_cogview.model.embedding import ShrunkGradientEmbedding
from megatron_cogview.model.layer_spec import block_spec
from megatron_cogview.model.linear import linear_layers
from megatron_cogview.model.norm import join_norms
from megatron_cogview.model.transformer_config import CogViewTransformerConfig, transformer_config


class CogViewModel(LanguageModule):
    """A GPT over text and image tokens (P-GPT-1).

    Args:
        config: the transformer's configuration.
        vocab_size: padded rows of the embedding table.
        max_positions: rows of the position table.
        pre_process: this stage holds the embeddings.
        post_process: this stage holds the final norm and the head.
        vp_stage: number of the model chunk under the interleaved schedule.
    """

    def __init__(
        self,
        config: CogViewTransformerConfig,
        vocab_size: int,
        max_positions: int,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = True
        self.vocab_size = vocab_size
        self.model_type = None
        if pre_process:
            self.embedding = ShrunkGradientEmbedding(
                config, vocab_size, max_positions, "learned_absolute"
            )
        self.decoder = TransformerBlock(
            config,
            spec=block_spec(config, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        join_norms(self.decoder.layers, self.decoder.final_layernorm, config.joined_norms)
        if post_process:
            self.output_layer = linear_layers(config)[0](
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process,
            )
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Hand over the previous stage's output; called by the pipeline schedules."""
        first = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(first)

    def forward(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        pivot_key_B2: torch.Tensor | None = None,
        labels_BS: torch.Tensor | None = None,
        inference_context: StaticInferenceContext | None = None,
    ) -> torch.Tensor:
        """Run this stage.

        Args:
            tokens_BS: global ids.
            positions_BS: rows of the position table.
            pivot_key_B2: keys of the pivot sampler; needed by three-region attention.
            labels_BS: next ids; without them the head's logits are returned.
            inference_context: key-value cache of a generation.

        Returns:
            Losses ``[B, S]``; without labels logits ``[B, S, padded vocabulary]`` gathered over
            the tensor axis, of the last token only when there is a cache; on an earlier pipeline
            stage hidden states ``[S, B, H]``.
        """
        hidden_SBH = self.embedding(tokens_BS, positions_BS) if self.pre_process else None
        hidden_SBH = self.decoder(
            hidden_states=hidden_SBH,
            attention_mask=pivot_key_B2,
            inference_context=inference_context,
        )
        if not self.post_process:
            return hidden_SBH
        if inference_context is not None:
            hidden_SBH = hidden_SBH[-1:]
        logits_SBV, _ = self.output_layer(
            hidden_SBH, weight=self.shared_embedding_or_output_weight()
        )
        if labels_BS is None:
            whole_SBV = tensor_parallel.gather_from_tensor_model_parallel_region(logits_SBV)
            return whole_SBV.transpose(0, 1)
        return self._losses(labels_BS, logits_SBV)

    def _losses(self, labels_BS: torch.Tensor, logits_SBV: torch.Tensor) -> torch.Tensor:
        """Cross-entropy ``[B, S]`` of each label, in fp32."""
        if self.config.tensor_model_parallel_size > 1 or logits_SBV.is_cuda:
            # It knows split vocabularies, and needs one copy of the logits where torch needs two.
            return self.compute_language_model_loss(labels_BS, logits_SBV)
        length, batch, _ = logits_SBV.shape
        losses = F.cross_entropy(
            logits_SBV.flatten(0, 1).float(), labels_BS.t().flatten(), reduction="none"
        )
        return losses.view(length, batch).t()


def build_model(config: RunConfig) -> list[CogViewModel]:
    """This rank's model chunks: one, or several under the interleaved schedule.

    Needs initialised process groups (``parallel.topology.initialize``) and seeds.
    """
    from megatron.core import parallel_state as state

    settings = transformer_config(config)
    log_attention_choice(settings, config.model.attention)
    chunks = []
    for number in range(config.parallel.virtual_pipeline):
        stage = number if config.parallel.virtual_pipeline > 1 else None
        chunks.append(
            CogViewModel(
                settings,
                config.model.vocab.padded_size,
                config.model.max_positions,
                pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                vp_stage=stage,
            )
        )
    return chunks
