"""What the layouts are held to: the unsharded model in fp64, its AdamW and its losses."""

import math
from typing import Any

import torch

from megatron_cogview.configs.model import ModelConfig
from megatron_cogview.kernels.pivot_attention.reference import visible_keys
from megatron_cogview.testing.oracle import Oracle, Weights, weighted_mean
from tests.parallel.cases import (
    GLOBAL_BATCH,
    IMAGE_WEIGHT,
    LR,
    STEPS,
    TEXT_WEIGHT,
    VOCAB,
    global_batch,
)


def pivot_masks(model: ModelConfig, pivot_key_B2: torch.Tensor) -> list[torch.Tensor] | None:
    """Each layer's visible keys; None where attention is causal."""
    a, length = model.attention, model.max_positions
    if a.kind == "dense":
        return None
    return [
        visible_keys(
            pivot_key_B2,
            length,
            length,
            length,
            window_block=a.window_block,
            window_blocks=a.window_blocks,
            num_pivots=a.num_pivots,
            layer_number=layer + 1,
            seed=a.pivot_seed,
        )
        for layer in range(model.num_layers)
    ]


def losses_of(oracle: Oracle, step: int, size: int) -> list[torch.Tensor]:
    """Total, text and image loss of a global batch."""
    b = global_batch(step, size)
    losses_BS = oracle.token_losses(
        b.tokens_BS, b.positions_BS, b.labels_BS, pivot_masks(oracle.config, b.pivot_key_B2)
    )
    is_image = (b.labels_BS < VOCAB.num_image_codes).double()
    is_padding = b.labels_BS == VOCAB.command_id("[PAD]")
    is_text = (1 - is_image).masked_fill(is_padding, 0.0)
    both = TEXT_WEIGHT * is_text + IMAGE_WEIGHT * is_image
    return [weighted_mean(losses_BS, weights) for weights in (both, is_text, is_image)]


def oracle_run(
    model: ModelConfig, weights: Weights, size: int = GLOBAL_BATCH, epsilon: float = 1e-8
) -> dict[str, Any]:
    """Five AdamW steps in fp64; decay off norms and biases.

    Args:
        model: shape and numerics.
        weights: where it starts.
        size: sequences per step.
        epsilon: Adam's.

    Returns:
        ``steps``: losses and gradient norm of each, and the loss after the last; ``gradients`` of
        the first step; ``weights``, ``exp_avg`` and ``exp_avg_sq`` after the last.
    """
    weights = {name: w.clone().requires_grad_() for name, w in weights.items()}
    decayed = [w for w in weights.values() if w.dim() > 1]
    exempt = [w for w in weights.values() if w.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.04}, {"params": exempt, "weight_decay": 0.0}],
        lr=LR,
        betas=(0.9, 0.95),
        eps=epsilon,
    )
    oracle = Oracle(model, weights)
    steps, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = losses_of(oracle, step, size)
        losses[0].backward()
        grads = {name: w.grad.clone() for name, w in weights.items() if w.grad is not None}
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        steps.append([*(float(loss.detach()) for loss in losses), norm])
        if step == 0:
            gradients = grads
        optimizer.step()
    with torch.no_grad():
        steps.append([float(losses_of(oracle, STEPS, size)[0])])
    return {
        "steps": steps,
        "gradients": gradients,
        "weights": {name: w.detach() for name, w in weights.items()},
        **{
            moment: {name: optimizer.state[w][moment] for name, w in weights.items()}
            for moment in ("exp_avg", "exp_avg_sq")
        },
    }
