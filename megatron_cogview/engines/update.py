"""The end of a step: reduce, test and clip gradients, and move the weights on all ranks or on none.

megatron-core refuses gradients that are not finite in fp16 only, and only within the group that
shares its norm.  Here every format is tested, on every rank, and one refusal counts for all: a
replica that moved alone would be another model from then on.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

Agree = Callable[[bool], bool]
"""Whether any rank of the world says yes."""


def update_weights(
    optimizer: MegatronOptimizer, clip: float, loss: float, agree: Agree
) -> tuple[bool, float]:
    """One optimizer step with the gradients that are there, if they are finite everywhere.

    Args:
        optimizer: megatron-core's.
        clip: largest gradient norm; 0 turns clipping off.
        loss: the step's loss; a step whose loss is not finite changes nothing either.
        agree: all ranks call it together.

    Returns:
        Whether the weights moved, and the gradient norm before clipping (NaN if it is not known).
        When they did not, nothing has changed but an fp16 loss scale.
    """
    parts: list[Any] = optimizer.chained_optimizers
    scalers = [part.grad_scaler for part in parts if getattr(part, "grad_scaler", None) is not None]
    # Kept to take back what preparing the gradients does to a rank that saw nothing wrong.
    before = [scaler.state_dict() for scaler in scalers]
    overflow = optimizer.prepare_grads()
    norm = math.nan if overflow else _norm(parts)
    if agree(overflow or not math.isfinite(norm) or not math.isfinite(loss)):
        for scaler, state in zip(scalers, before, strict=True):
            scaler.load_state_dict(state)
            scaler.update(True)
        return False, norm
    if 0 < clip < norm:
        for part in parts:
            clip_grads_with_norm_(part.get_parameters(), clip, torch.tensor(norm))
    optimizer.step_with_ready_grads()
    return True, norm


def _norm(parts: list[Any]) -> float:
    """Norm of all gradients of the model, each counted once.

    megatron-core's own way asks the device for the norm of every tensor, one after the other, where
    apex and TransformerEngine are missing.
    """
    square = 0.0
    for part in parts:
        norm = get_total_norm(part.get_main_grads_for_grad_norm()).double()
        group = part.get_grad_stats_parallel_group()
        if group.size() > 1:
            total = norm.to(part.get_loss_scale().device).square()
            dist.all_reduce(total, group=group)
            norm = total.sqrt()
        square += float(norm) ** 2 if _others_are_finite(part) else math.nan
    return math.sqrt(square)


def _others_are_finite(part: Any) -> bool:
    """Whether this rank's copies of gradients that another rank counts are finite too.

    They are few and small: norms and biases that a tensor group holds alike.
    """
    counted = {id(gradient) for gradient in part.get_main_grads_for_grad_norm()}
    gradients = [p.grad for p in part.get_parameters() if p.grad is not None]
    others = [gradient for gradient in gradients if id(gradient) not in counted]
    return not others or bool(get_total_norm(others).isfinite())
