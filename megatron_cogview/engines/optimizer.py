"""megatron-core's optimizer for our configuration, and three repairs of its torch-AdamW fallback.

Without apex and TransformerEngine megatron-core 0.16.1 falls back to torch's AdamW.  With its
distributed optimizer that fallback cannot load a checkpoint into a fresh optimizer, asks for a
``step`` that its own checkpoints leave out, and then gives all parameters one shared ``step``
tensor, so that AdamW counts one step per parameter.  The repairs leave other optimizers alone.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import distrib_optimizer as distributed

from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.run import RunConfig


def build_optimizer(
    config: RunConfig, model: Sequence[DistributedDataParallel], dtype: torch.dtype
) -> MegatronOptimizer:
    """Adam with decoupled weight decay off norms and biases (P-OPT-2), clip and loss scale."""
    repair_torch_adam()
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
    )
    optimizer = get_megatron_optimizer(settings, list(model))
    apply_settings(optimizer, o)
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


def create_adam_state(optimizer: MegatronOptimizer) -> None:
    """Give a fresh torch AdamW the state that loading a checkpoint expects to find."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        if not isinstance(inner, torch.optim.AdamW):
            continue
        for group in inner.param_groups:
            for parameter in group["params"]:
                if not inner.state[parameter]:
                    inner.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter.data),
                        "exp_avg_sq": torch.zeros_like(parameter.data),
                    }


def repair_torch_adam() -> None:
    """Repair checkpoint loading of the distributed optimizer on torch's AdamW.  Safe to repeat."""
    owner: Any = distributed.DistributedOptimizer
    if distributed.HAVE_APEX_OR_TE or hasattr(owner.load_state_dict, "__wrapped__"):
        return
    set_states, load = owner._set_main_param_and_optimizer_states, owner.load_state_dict

    @functools.wraps(set_states)
    def set_states_with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" not in tensors and "step" in state:
            tensors = {**tensors, "step": state["step"]}
        return set_states(self, model_param, tensors)

    @functools.wraps(load)
    def load_with_own_steps(self: Any, state_dict: dict[str, Any]) -> Any:
        result = load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
        return result

    owner._set_main_param_and_optimizer_states = set_states_with_step
    owner.load_state_dict = load_with_own_steps
