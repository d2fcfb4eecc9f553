"""The codebook of the image tokenizer and how it learns: moving averages (P-TOK-8).

A quantiser maps vectors to codes, gives the straight-through output for the decoder, and learns in
``update``, which is apart from the forward pass so that looking never changes the codebook.  Knows
nothing of pictures or of the optimizer.

Shapes: B pictures, D code width, H x W grid, N = B H W vectors, K codes.
"""

from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from megatron_cogview.kernels.codebook_lookup.reference import nearest_code

LAPLACE_EPSILON = 1e-5
"""Smoothing of the counts (P-TOK-8, released value)."""

# Below this count the smoothing would pull a code nobody uses towards zero, so it stays put.
_SMALLEST_COUNT = 100 * LAPLACE_EPSILON
# Shares of the mean use per code: below the first a code is dead; it comes back with the second.
_DEAD_SHARE = 0.1
_REVIVED_SHARE = 0.3
_JITTER = 1e-3
# The decay rises as (1 + step) / (10 + step) to its set value, or the codes would lag behind an
# encoder that changes fast in its first hundred steps.
_DECAY_DELAY = 10


class Quantized(NamedTuple):
    """What a quantiser makes of latents."""

    latents_BDHW: Tensor
    """Code vectors; their gradient passes straight through to the encoder."""
    codes_BHW: Tensor
    """int64 indices in [0, K)."""
    loss: Tensor
    """Scalar, mean over all elements: the quantiser's part of the loss, not yet weighted."""


class Quantizer(Protocol):
    """What training needs of a codebook, whichever method it learns by."""

    def quantize(self, latents_BDHW: Tensor) -> Quantized:
        """Map latents to codes; does not change the codebook."""

    def update(
        self,
        latents_ND: Tensor,
        codes_N: Tensor,
        *,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Learn from one step's vectors, over all processes of ``group``."""

    def lookup(self, codes_BHW: Tensor) -> Tensor:
        """Code vectors ``[B, D, H, W]``."""


class MovingAverageQuantizer(nn.Module):
    """Nearest code; each code follows the moving average of the vectors mapped to it.

    Buffers (names and layout of the released checkpoint): ``embed [D, K]``, ``cluster_size [K]``,
    ``embed_avg [D, K]``.  Every change is computed from sums over all processes of the group, so
    the codebook is the same on each of them and does not depend on their number.
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(
        self,
        code_dim: int,
        num_codes: int,
        *,
        decay: float = 0.99,
        revive_dead_codes: bool = False,
        seed: int = 0,
    ) -> None:
        """Xavier-uniform codebook (P-TOK-5) from torch's current generator.

        ``seed`` keys the draws of :meth:`initialise_from` and of the revival of dead codes.
        """
        super().__init__()
        self.decay = decay
        self.revive_dead_codes = revive_dead_codes
        self.seed = seed
        embed_DK = nn.init.xavier_uniform_(torch.empty(code_dim, num_codes))
        self.register_buffer("embed", embed_DK)
        # The released code starts at count 0, which divides codes without hits by almost nothing
        # and throws them out of reach; one imagined hit each keeps the start where it was drawn.
        self.register_buffer("cluster_size", torch.ones(num_codes))
        self.register_buffer("embed_avg", embed_DK.clone())

    def quantize(self, latents_BDHW: Tensor) -> Quantized:
        """Nearest codes, straight-through output and commitment loss."""
        batch, _, height, width = latents_BDHW.shape
        codes_N = nearest_code(flatten_latents(latents_BDHW.detach()), self.embed.t())
        codes_BHW = codes_N.view(batch, height, width)
        chosen_BDHW = self.lookup(codes_BHW).to(latents_BDHW.dtype)
        loss = functional.mse_loss(latents_BDHW, chosen_BDHW)
        return Quantized(latents_BDHW + (chosen_BDHW - latents_BDHW).detach(), codes_BHW, loss)

    def lookup(self, codes_BHW: Tensor) -> Tensor:
        """Code vectors ``[B, D, H, W]`` of int64 codes in [0, K)."""
        return functional.embedding(codes_BHW, self.embed.t()).permute(0, 3, 1, 2)

    @torch.no_grad()
    def update(
        self,
        latents_ND: Tensor,
        codes_N: Tensor,
        *,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Move the codes towards the means of their vectors.

        Args:
            latents_ND: this process's encoder outputs.
            codes_N: their codes.
            step: 0 for the first; the decay starts low, and draws for dead codes are keyed by it.
            group: processes that hold the rest of the batch; None if this one holds it all.
        """
        code_dim, num_codes = self.embed.shape
        # fp64 sums: their rounding vanishes in the fp32 averages, so neither the order of addition
        # (atomics on a GPU) nor the number of processes can be seen in the codebook.
        sums_KE = latents_ND.new_zeros((num_codes, code_dim + 1), dtype=torch.float64)
        ones_N1 = latents_ND.new_ones((latents_ND.shape[0], 1), dtype=torch.float64)
        sums_KE.index_add_(0, codes_N, torch.cat([latents_ND.double(), ones_N1], dim=1))
        if group is not None:
            dist.all_reduce(sums_KE, group=group)
        counts_K = sums_KE[:, -1]
        decay = min(self.decay, (1 + step) / (_DECAY_DELAY + step))
        self.cluster_size.copy_(_blend(self.cluster_size, counts_K, decay))
        self.embed_avg.copy_(_blend(self.embed_avg, sums_KE[:, :-1].t(), decay))
        self._set_codes_to_means()
        if self.revive_dead_codes:
            self._revive(latents_ND, counts_K.sum(), step, group)

    def _set_codes_to_means(self) -> None:
        """``embed = embed_avg / counts`` with Laplace-smoothed counts."""
        total = self.cluster_size.sum()
        share_K = (self.cluster_size + LAPLACE_EPSILON) / (
            total + self.cluster_size.numel() * LAPLACE_EPSILON
        )
        means_DK = self.embed_avg / (share_K * total)
        self.embed.copy_(torch.where(self.cluster_size >= _SMALLEST_COUNT, means_DK, self.embed))

    @torch.no_grad()
    def initialise_from(
        self, latents_ND: Tensor, *, group: dist.ProcessGroup | None = None
    ) -> None:
        """Set every code to an encoder output drawn from all processes' vectors."""
        self.embed.copy_(self._draw(latents_ND, self.embed.shape[1], 0, group).t())
        self.embed_avg.copy_(self.embed)
        self.cluster_size.fill_(1.0)

    def _revive(
        self, latents_ND: Tensor, num_vectors: Tensor, step: int, group: dist.ProcessGroup | None
    ) -> None:
        """Put codes with next to no use on encoder outputs of this step."""
        mean_use = float(num_vectors) / self.cluster_size.numel()
        dead_K = self.cluster_size < _DEAD_SHARE * mean_use
        num_dead = int(dead_K.sum())
        if num_dead == 0:
            return
        drawn_KD = self._draw(latents_ND, num_dead, step + 1, group)
        count = _REVIVED_SHARE * mean_use
        self.embed[:, dead_K] = drawn_KD.t()
        self.embed_avg[:, dead_K] = drawn_KD.t() * count
        self.cluster_size[dead_K] = count

    def _draw(
        self, latents_ND: Tensor, number: int, key: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        """``number`` vectors of the whole batch, the same on every process, fp32 ``[number, D]``.

        The draw is over positions in the batch in rank order, keyed by (seed, key).  A tiny jitter
        keeps apart codes that were drawn from equal vectors (flat areas of pictures).
        """
        first, total = _place_in_batch(latents_ND, group)
        generator = torch.Generator().manual_seed((self.seed << 32) ^ key)
        if total >= number:
            position_K = torch.randperm(total, generator=generator)[:number]
        else:
            position_K = torch.randint(total, (number,), generator=generator)
        noise_KD = torch.randn(number, latents_ND.shape[1], generator=generator)
        position_K = position_K.to(latents_ND.device) - first
        mine_K = (position_K >= 0) & (position_K < latents_ND.shape[0])
        drawn_KD = latents_ND.new_zeros((number, latents_ND.shape[1]), dtype=torch.float32)
        drawn_KD[mine_K] = latents_ND[position_K[mine_K]].float()
        if group is not None:
            dist.all_reduce(drawn_KD, group=group)
        spread = drawn_KD.std(correction=0)
        return drawn_KD + _JITTER * spread * noise_KD.to(drawn_KD.device)


def flatten_latents(latents_BDHW: Tensor) -> Tensor:
    """``[B, D, H, W]`` -> ``[B H W, D]``, row-major over picture, row, column."""
    return latents_BDHW.permute(0, 2, 3, 1).reshape(-1, latents_BDHW.shape[1])


def _blend(old: Tensor, new: Tensor, decay: float) -> Tensor:
    return (old.double() * decay + new * (1.0 - decay)).to(old.dtype)


def _place_in_batch(latents_ND: Tensor, group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Index of this process's first vector in the whole batch, and the batch's length."""
    if group is None:
        return 0, latents_ND.shape[0]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    lengths = torch.zeros(size, dtype=torch.int64, device=latents_ND.device)
    lengths[rank] = latents_ND.shape[0]
    dist.all_reduce(lengths, group=group)
    values = lengths.tolist()
    return sum(values[:rank]), sum(values)
