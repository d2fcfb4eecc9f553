"""The unsharded CogView in plain PyTorch, written from the paper: what parallel runs are held to.

It shares no code with ``model`` and ``kernels`` and runs in any float type; its parameters carry
the names of the real model, so that one checkpoint serves both.

Shapes: B batch, S sequence, H hidden, N heads, D head dim, V padded vocabulary.
"""

import math

import torch
import torch.nn.functional as F

from megatron_cogview.configs.model import ModelConfig

Weights = dict[str, torch.Tensor]


def random_weights(config: ModelConfig, seed: int, std: float = 0.1) -> Weights:
    """Weights with every parameter away from its trivial value, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * std

    h = config.hidden_size
    weights = {
        "embedding.word_embeddings.weight": normal(config.vocab.padded_size, h),
        "embedding.position_embeddings.weight": normal(config.max_positions, h),
        "decoder.final_layernorm.weight": 1 + normal(h),
        "decoder.final_layernorm.bias": normal(h),
    }
    norms = ["input_layernorm", "pre_mlp_layernorm"]
    if config.norm.placement == "sandwich":
        norms += ["self_attn_bda.norm", "mlp_bda.norm"]
    matrices = {
        "self_attention.linear_qkv": (3 * h, h),
        "self_attention.linear_proj": (h, h),
        "mlp.linear_fc1": (4 * h, h),
        "mlp.linear_fc2": (h, 4 * h),
    }
    for layer in range(config.num_layers):
        prefix = f"decoder.layers.{layer}."
        for name in norms:
            weights[f"{prefix}{name}.weight"] = 1 + normal(h)
            weights[f"{prefix}{name}.bias"] = normal(h)
        for name, (rows, columns) in matrices.items():
            weights[f"{prefix}{name}.weight"] = normal(rows, columns)
            weights[f"{prefix}{name}.bias"] = normal(rows)
    return weights


class Oracle:
    """The model as a function of its weights.

    Args:
        config: shape and numerics; dropout is not applied.
        weights: named as in :func:`random_weights`; gradients flow into them.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self.weights = weights

    def _norm(self, x: torch.Tensor, name: str, is_final: bool = False) -> torch.Tensor:
        norm = self.config.norm
        if norm.relax_rule != "none" and (is_final or norm.relax_scope == "all"):
            size = x.detach().abs()
            per_token = norm.relax_rule == "token_max"
            x = x / (size.max(-1, keepdim=True).values if per_token else size.max() / 8)
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + norm.epsilon)
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _attention(self, x_BSH: torch.Tensor, name: str, visible: torch.Tensor) -> torch.Tensor:
        batch, length, hidden = x_BSH.shape
        heads, dim = self.config.num_heads, self.config.head_dim
        # megatron-core's order of rows: q, k and v of head 0, then of head 1, ...
        qkv = self._linear(x_BSH, f"{name}.linear_qkv").view(batch, length, heads, 3, dim)
        q, k, v = (qkv[..., i, :].transpose(1, 2) for i in range(3))
        scores_BNSS = q @ k.transpose(-1, -2) / math.sqrt(dim)
        weights_BNSS = torch.softmax(scores_BNSS.masked_fill(~visible, float("-inf")), -1)
        out_BSH = (weights_BNSS @ v).transpose(1, 2).reshape(batch, length, hidden)
        return self._linear(out_BSH, f"{name}.linear_proj")

    def logits(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        visible_per_layer: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Logits ``[B, S, V]``; attention is causal unless masks ``[B, 1, S, S]`` are given."""
        table = self.weights["embedding.word_embeddings.weight"]
        a = self.config.embedding_gradient_scale
        embedded = table[tokens_BS]
        embedded = embedded * a + embedded.detach() * (1 - a)
        x = embedded + self.weights["embedding.position_embeddings.weight"][positions_BS]
        length = tokens_BS.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        sandwich = self.config.norm.placement == "sandwich"
        for i in range(self.config.num_layers):
            prefix = f"decoder.layers.{i}."
            visible = causal if visible_per_layer is None else visible_per_layer[i]
            branch = self._attention(
                self._norm(x, f"{prefix}input_layernorm"), f"{prefix}self_attention", visible
            )
            x = x + (self._norm(branch, f"{prefix}self_attn_bda.norm") if sandwich else branch)
            branch = self._linear(
                self._norm(x, f"{prefix}pre_mlp_layernorm"), f"{prefix}mlp.linear_fc1"
            )
            branch = self._linear(F.gelu(branch, approximate="tanh"), f"{prefix}mlp.linear_fc2")
            x = x + (self._norm(branch, f"{prefix}mlp_bda.norm") if sandwich else branch)
        return self._norm(x, "decoder.final_layernorm", is_final=True) @ table.T

    def token_losses(
        self,
        tokens_BS: torch.Tensor,
        positions_BS: torch.Tensor,
        labels_BS: torch.Tensor,
        visible_per_layer: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Cross-entropy of each label, ``[B, S]``."""
        logits_BSV = self.logits(tokens_BS, positions_BS, visible_per_layer)
        return F.cross_entropy(logits_BSV.transpose(1, 2), labels_BS, reduction="none")


def weighted_mean(losses_BS: torch.Tensor, weights_BS: torch.Tensor) -> torch.Tensor:
    """Mean over the whole batch (P-LOSS-1)."""
    return (losses_BS * weights_BS).sum() / weights_BS.sum()
