"""The same CogView in plain PyTorch, as one would write it for one process: the rival.

Its layers, norms, loss, clipping and update are ours; the first losses of both are compared before
anything is timed.  It shares no code with ``model``, ``kernels`` and ``engines``, and takes what
PyTorch does best: one matrix product with its bias, fused attention, the fused AdamW.

Shapes: B batch, S sequence, H hidden.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_cogview.configs.model import ModelConfig
from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.data.batch import Batch

_TINY = torch.finfo(torch.float32).tiny


class _Layer(nn.Module):
    """Pre-LN or Sandwich-LN around causal attention and MLP."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        h, epsilon = config.hidden_size, config.norm.epsilon
        self.heads, self.config = config.num_heads, config
        self.before_attention, self.before_mlp = nn.LayerNorm(h, epsilon), nn.LayerNorm(h, epsilon)
        sandwich = config.norm.placement == "sandwich"
        self.after_attention = nn.LayerNorm(h, epsilon) if sandwich else nn.Identity()
        self.after_mlp = nn.LayerNorm(h, epsilon) if sandwich else nn.Identity()
        self.qkv, self.projection = nn.Linear(h, 3 * h), nn.Linear(h, h)
        self.fc1, self.fc2 = nn.Linear(h, 4 * h), nn.Linear(4 * h, h)

    def forward(self, x_BSH: Tensor) -> Tensor:
        batch, length, _ = x_BSH.shape
        qkv = self.qkv(self.before_attention(x_BSH)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.config.attention_dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        branch = self.projection(seen.transpose(1, 2).reshape(x_BSH.shape))
        x_BSH = x_BSH + self.after_attention(self._dropout(branch))
        branch = self.fc2(F.gelu(self.fc1(self.before_mlp(x_BSH)), approximate="tanh"))
        return x_BSH + self.after_mlp(self._dropout(branch))

    def _dropout(self, x_BSH: Tensor) -> Tensor:
        return F.dropout(x_BSH, self.config.hidden_dropout, self.training)


class PlainModel(nn.Module):
    """Losses ``[B, S]`` of a batch.

    Args:
        config: dense attention, and PB-relax by the token's maximum at the final norm or nowhere:
            what a preset for one process asks for.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = config.norm
        if config.attention.kind != "dense" or not (
            norm.relax_rule == "none"
            or (norm.relax_rule, norm.relax_scope) == ("token_max", "final")
        ):
            raise ValueError("the plain model knows dense attention and the paper's norms only")
        h = config.hidden_size
        self.config = config
        self.tokens = nn.Embedding(config.vocab.padded_size, h)
        self.positions = nn.Embedding(config.max_positions, h)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(h, norm.epsilon)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, labels_BS: Tensor) -> Tensor:
        c = self.config
        embedded, a = self.tokens(tokens_BS), c.embedding_gradient_scale
        if a != 1.0:
            # The paper's formula (P-STAB-11).
            embedded = embedded * a + embedded.detach() * (1 - a)
        x_BSH = F.dropout(embedded + self.positions(positions_BS), c.hidden_dropout, self.training)
        for layer in self.layers:
            x_BSH = layer(x_BSH)
        if c.norm.relax_rule == "token_max":
            x_BSH = x_BSH / x_BSH.detach().abs().amax(-1, keepdim=True).clamp_min(_TINY)
        logits = F.linear(self.final_norm(x_BSH), self.tokens.weight).flatten(0, 1)
        return F.cross_entropy(logits, labels_BS.flatten(), reduction="none").view_as(labels_BS)

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of the real model, by its names."""
        for name, parameter in self.named_parameters():
            value = weights[_their_name(name)]
            if ".qkv." in name:
                # megatron-core: q, k and v of head 0, then of head 1; here all q, all k, all v.
                grouped = value.unflatten(0, (self.config.num_heads, 3, -1))
                value = grouped.transpose(0, 1).flatten(0, 2)
            parameter.copy_(value)


_NAMES = {
    "tokens.": "embedding.word_embeddings.",
    "positions.": "embedding.position_embeddings.",
    "final_norm.": "decoder.final_layernorm.",
    "layers.": "decoder.layers.",
    ".before_attention.": ".input_layernorm.",
    ".before_mlp.": ".pre_mlp_layernorm.",
    ".after_attention.": ".self_attn_bda.norm.",
    ".after_mlp.": ".mlp_bda.norm.",
    ".qkv.": ".self_attention.linear_qkv.",
    ".projection.": ".self_attention.linear_proj.",
    ".fc1.": ".mlp.linear_fc1.",
    ".fc2.": ".mlp.linear_fc2.",
}


def _their_name(name: str) -> str:
    """The real model's name of one of our parameters."""
    for ours, theirs in _NAMES.items():
        if ours[0] == "." or name.startswith(ours):
            name = name.replace(ours, theirs, 1)
    return name


class PlainTrainer:
    """Loss, backward pass, clipping and AdamW (P-OPT-2) in fp32."""

    def __init__(self, model: PlainModel, settings: OptimizerConfig) -> None:
        self.model, self.clip = model.train(), settings.clip_grad
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            fused=True,
        )

    def step(self, micro_batches: Sequence[Batch], lr: float) -> float:
        """One step; the weighted mean loss (P-LOSS-1)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = sum(float(batch.loss_weights_BS.sum()) for batch in micro_batches)
        loss_sum = 0.0
        for batch in micro_batches:
            losses_BS = self.model(batch.tokens_BS, batch.positions_BS, batch.labels_BS)
            loss = (losses_BS * batch.loss_weights_BS).sum() / total
            loss.backward()
            loss_sum += float(loss.detach())
        if self.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_sum
