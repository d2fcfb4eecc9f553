"""Token-by-token decoding of one batch with a key-value cache.

Shapes: B samples, P prompt ids, T ids to generate.
"""

from collections.abc import Callable

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

Choose = Callable[[Tensor, int], Tensor]
"""``choose(logits_BV, step) -> ids_B``."""


@torch.inference_mode()
def decode(
    model: torch.nn.Module,
    prompt_BP: Tensor,
    positions_BP: Tensor,
    pivot_key_B2: Tensor,
    num_tokens: int,
    choose: Choose,
) -> Tensor:
    """Generate ``num_tokens`` ids after prompts of equal length.

    The prompt goes through the model once and fills the cache; then each step feeds one id.

    Args:
        model: the whole transformer (one pipeline stage), in evaluation mode.
        prompt_BP: global ids.
        positions_BP: their positions; generated ids count on from the last one.
        pivot_key_B2: keys of the pivot sampler.
        num_tokens: T.
        choose: picks the next ids from the logits over the padded vocabulary.

    Returns:
        Global ids ``[B, T]``.
    """
    batch, prompt_length = prompt_BP.shape
    context = StaticInferenceContext(batch, prompt_length + num_tokens)
    tokens_BS, positions_BS = prompt_BP, positions_BP
    generated = []
    for step in range(num_tokens):
        logits_B1V = model(
            tokens_BS, positions_BS, pivot_key_B2=pivot_key_B2, inference_context=context
        )
        next_B = choose(logits_B1V[:, -1], step)
        generated.append(next_B)
        context.sequence_len_offset += tokens_BS.shape[1]
        context.enable_decode_mode()
        tokens_BS, positions_BS = next_B[:, None], positions_BS[:, -1:] + 1
    return torch.stack(generated, 1)
