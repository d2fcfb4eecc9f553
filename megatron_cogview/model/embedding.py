"""Token and position embeddings with embedding-gradient shrink (P-STAB-11).

Shapes: B batch, S sequence, H hidden.
"""

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding


class _ScaledGradient(torch.autograd.Function):
    """Identity forwards; the gradient is multiplied by a constant backwards.

    Equal to ``x * a + x.detach() * (1 - a)`` of the paper without its rounding in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor, a: float
    ) -> torch.Tensor:
        ctx.scale = a  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        return grad * ctx.scale, None  # type: ignore[attr-defined]


def scale_gradient(x: torch.Tensor, a: float) -> torch.Tensor:
    """``x`` with its gradient multiplied by ``a``."""
    return x if a == 1.0 else _ScaledGradient.apply(x, a)


class ShrunkGradientEmbedding(LanguageModelEmbedding):
    """The shrink touches the token table's input side only (OP-8).

    Positions and the tied output head keep their whole gradient, as in the paper's formula.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        lookup = self.word_embeddings
        scale = self.config.embedding_gradient_scale
        # A hook on the lookup leaves the parent's forward pass, and the parameter's name, alone.
        lookup.register_forward_hook(lambda module, args, out_BSH: scale_gradient(out_BSH, scale))
