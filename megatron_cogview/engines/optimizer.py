"""megatron-core's optimizer for our configuration."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.run import RunConfig


def build_optimizer(
    config: RunConfig, model: Sequence[DistributedDataParallel], dtype: torch.dtype
) -> MegatronOptimizer:
    """Adam with decoupled weight decay off norms and biases (P-OPT-2), clip and loss scale."""
    sharers = model[0].dp_cp_group.size()
    o, p = config.optimizer, config.precision
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.lr * o.min_lr_ratio,
        weight_decay=o.weight_decay,
        adam_beta1=o.beta1,
        adam_beta2=o.beta2,
        adam_eps=o.epsilon,
        clip_grad=o.clip_grad,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        initial_loss_scale=p.initial_loss_scale,
        min_loss_scale=p.min_loss_scale,
        loss_scale_window=p.loss_scale_window,
        hysteresis=p.hysteresis,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_parameters and sharers > 1,
    )
    optimizer = get_megatron_optimizer(settings, list(model))
    apply_settings(optimizer, o)
    prepare_adam(optimizer)
    return optimizer


def apply_settings(optimizer: MegatronOptimizer, settings: OptimizerConfig) -> None:
    """Put the configuration's numbers into every parameter group, also over a checkpoint's."""
    for group in optimizer.param_groups:
        # megatron-core leaves this product to its own scheduler; without it norms and biases decay.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        group["betas"] = (settings.beta1, settings.beta2)
        group["eps"] = settings.epsilon


def set_lr(optimizer: MegatronOptimizer, lr: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def prepare_adam(optimizer: MegatronOptimizer) -> None:
    """Give torch's AdamW, which megatron-core falls back to, its state and its fast form.

    The state is there from the start, so that a run whose first steps are refused can be saved, and
    one that is resumed filled.
    """
    for part in optimizer.chained_optimizers:
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            # apex's or TransformerEngine's; megatron-core knows how their state begins.
            part.init_state_fn(inner, part.config)
            continue
        for group in inner.param_groups:
            # One pass over all tensors of a group instead of a dozen.
            group["fused"], group["foreach"] = True, False
            for parameter in group["params"]:
                inner.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }
