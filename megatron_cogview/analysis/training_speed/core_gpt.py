"""megatron-core's own GPT on its local layers, trained as its examples do: the second rival.

Size, dropout, optimizer and precision are ours; norms, attention, loss and settings are what the
library gives without TransformerEngine.  It has no norm at a branch's end, so it does a little less
than we do.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.batch import Batch
from megatron_cogview.model.transformer_config import gelu_tanh


class CoreTrainer:
    """Model, replicas' gradients and optimizer of the library, on one process in fp32."""

    def __init__(self, config: RunConfig) -> None:
        m, o = config.model, config.optimizer
        settings = TransformerConfig(
            num_layers=m.num_layers,
            hidden_size=m.hidden_size,
            num_attention_heads=m.num_heads,
            ffn_hidden_size=4 * m.hidden_size,
            hidden_dropout=m.hidden_dropout,
            attention_dropout=m.attention_dropout,
            layernorm_epsilon=m.norm.epsilon,
            init_method_std=m.init_std,
            activation_func=gelu_tanh,
            use_cpu_initialization=not torch.cuda.is_available(),
        )
        model = GPTModel(
            settings,
            get_gpt_layer_local_spec(),
            m.vocab.padded_size,
            m.max_positions,
            share_embeddings_and_output_weights=True,
        )
        replicas = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(settings, replicas, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=o.lr,
                weight_decay=o.weight_decay,
                adam_beta1=o.beta1,
                adam_beta2=o.beta2,
                adam_eps=o.epsilon,
                clip_grad=o.clip_grad,
            ),
            [self.model],
        )
        settings.grad_scale_func = self.optimizer.scale_loss
        settings.finalize_model_grads_func = finalize_model_grads

    def step(self, micro_batches: Sequence[Batch], lr: float) -> float:
        """One step; the mean over micro-batches of their weighted mean losses."""
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        shape = micro_batches[0].tokens_BS.shape
        reported = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(micro_batches),
            model=self.model,
            num_microbatches=len(micro_batches),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=False,
        )
        self.optimizer.step()
        return sum(float(one["loss"]) for one in reported) / len(reported)


def _forward(iterator: Iterator[Batch], model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(iterator)
    # Without a mask the local softmax makes a causal one, once.
    losses_BS = model(batch.tokens_BS, batch.positions_BS, None, labels=batch.labels_BS)

    def mean_loss(losses_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weights_BS = batch.loss_weights_BS
        loss = (losses_BS.float() * weights_BS).sum() / weights_BS.sum()
        return loss, {"loss": loss.detach().clone()}

    return losses_BS, mean_loss
