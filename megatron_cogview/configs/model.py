"""Shape and numerics of the GPT (paper 2.3-2.4; clause ids in docs/architecture.md)."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_cogview.configs.errors import refuse
from megatron_cogview.configs.vocab import VocabConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class NormConfig:
    """Where LayerNorm stands and how PB-relax protects it."""

    placement: Literal["sandwich", "pre"] = "sandwich"
    """``sandwich``: LayerNorm at both ends of each branch (P-STAB-8); ``pre``: at its start."""
    relax_rule: Literal["none", "token_max", "tensor_max_over_8"] = "token_max"
    """Divide by max|x| first (P-STAB-3): per token, or over the tensor as the released code."""
    relax_scope: Literal["final", "all"] = "final"
    """Which norms PB-relax: the final one (the paper's letter) or all of them (released code)."""
    epsilon: float = 1e-5
    """Added to the variance."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """``reference``: PyTorch; ``triton``: our kernels, which join the end of a branch with the norm
    of the next; ``auto``: the kernels on a GPU."""


LEAST_SAVING = 1.2
"""Dense pairs of query and key for each that three regions compute; with fewer the gathered keys
and the seven products of the backward pass, in the place of five, cost more than is saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Dense or three-region attention, and PB-relax attention (Eq. 4)."""

    kind: Literal["dense", "pivot"] = "dense"
    """``dense`` causal, or ``pivot``: the three-region sparse attention of appendix B."""
    backend: Literal["auto", "reference", "triton"] = "auto"
    """``reference``: Eq. 4 written out.  ``triton``: our kernel.  ``auto``: for dense attention
    PyTorch's fused kernels where they are as safe; for three regions our kernel on a GPU, and dense
    attention at lengths where three regions save nothing."""
    relax_alpha: float = 32.0
    """alpha of Eq. 4; 1 turns the division off (released code)."""
    relax_max: Literal["row", "head"] = "row"
    """Over what the maximum of Eq. 4 is taken: the visible keys of a row, or a whole head."""
    window_block: int = 128
    """W, tokens per block of the window (P-ATT-3)."""
    window_blocks: int = 6
    """T, blocks a token sees, its own included."""
    num_pivots: int = 768
    """P, text tokens and pivots together (P-ATT-4)."""
    pivot_seed: int = 1234
    """Key of the stateless pivot sampler."""
    pivot_bias: float = 0.0
    """Added to the scores of text and pivots before the window; 0 as in the paper.  The logarithm
    of (keys before the window / pivots among them) lets pivots stand for what was not drawn."""

    def mean_keys(self, length: int) -> float:
        """Keys that a query of a sequence sees, on average over queries and pivots; no text."""
        if self.kind == "dense":
            return (length + 1) / 2
        own = range(length)
        first = [max(0, q // self.window_block - self.window_blocks + 1) for q in own]
        before = self.window_block * sum(first)
        in_window = length * (length + 1) / 2 - before
        return (in_window + before * min(1.0, self.num_pivots / length)) / length

    def saves(self, length: int) -> bool:
        """Whether three regions compute clearly less than dense causal attention."""
        return (length + 1) / 2 >= LEAST_SAVING * self.mean_keys(length)

    @property
    def is_written_out(self) -> bool:
        """Whether scores are materialised on every device: no kernel computes these settings."""
        return self.backend == "reference" or self.relax_max == "head"

    def __post_init__(self) -> None:
        if self.relax_alpha < 1.0:
            raise refuse("model.attention.relax_alpha", self.relax_alpha, "must be at least 1")
        for name in ("window_block", "window_blocks"):
            if getattr(self, name) < 1:
                raise refuse(f"model.attention.{name}", getattr(self, name), "must be at least 1")
        if self.backend == "triton" and self.relax_max == "head":
            raise refuse(
                "model.attention.relax_max",
                "head",
                "is not known to model.attention.backend triton, whose maximum is a row's; choose "
                "row or backend reference",
            )
        if self.num_pivots < 0:
            raise refuse("model.attention.num_pivots", self.num_pivots, "must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The transformer."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_heads: int
    """Attention heads."""
    max_positions: int = 1088
    """Rows of the position table = longest input (P-SEQ-2)."""
    vocab: VocabConfig = field(default_factory=VocabConfig)
    """Id ranges."""
    norm: NormConfig = field(default_factory=NormConfig)
    """LayerNorm."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Attention."""
    embedding_gradient_scale: float = 0.1
    """a of P-STAB-11: the token embedding's gradient is multiplied by it; 1 turns it off."""
    hidden_dropout: float = 0.1
    """After the embedding and at the end of each branch."""
    attention_dropout: float = 0.1
    """On attention probabilities."""
    init_std: float = 0.02
    """Normal initialisation; the last matrix of a branch is scaled by 1/sqrt(2 * num_layers)."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise refuse(f"model.{name}", getattr(self, name), "must be at least 1")
        if self.hidden_size % self.num_heads:
            raise refuse(
                "model.hidden_size",
                self.hidden_size,
                f"must be a multiple of model.num_heads = {self.num_heads}",
            )
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise refuse(f"model.{name}", getattr(self, name), "must be in [0, 1)")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    def num_params(self) -> int:
        """Parameters, the tied head counted once (P-GPT-1)."""
        h = self.hidden_size
        matrices = 12 * h * h + 9 * h  # qkv, projection, fc1, fc2 and their biases
        norms = (4 if self.norm.placement == "sandwich" else 2) * 2 * h
        tables = (self.vocab.padded_size + self.max_positions) * h
        return self.num_layers * (matrices + norms) + tables + 2 * h
