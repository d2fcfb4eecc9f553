"""The codebook of the image tokenizer and the four ways it learns (P-TOK-6..9).

A quantiser maps vectors to codes and gives the straight-through output for the decoder.  What it
learns by gradient is in its losses; what it learns otherwise, in ``update``, which is apart from
the forward pass so that looking never changes the codebook.  Knows nothing of pictures or of the
optimizer.

Shapes: B pictures, D code width, H x W grid, N = B H W vectors, K codes.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_cogview.configs.image_tokenizer import GumbelConfig, ImageTokenizerConfig
from megatron_cogview.kernels.codebook_lookup.operator import nearest_code
from megatron_cogview.tokenization import draws

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
# Keeps the square root of a distance away from its infinite slope at 0.
_SMALLEST_SQUARE = 1e-12


class Place(NamedTuple):
    """Where in a training a pass stands; all that random draws depend on, besides the seed."""

    step: int
    """0 for the first."""
    progress: float
    """Share of the training that is done, in [0, 1]."""
    first_picture: int = 0
    """Index in the whole batch of this process's first picture."""


class Quantized(NamedTuple):
    """What a quantiser makes of latents."""

    latents_BDHW: Tensor
    """Code vectors; their gradient passes straight through to the encoder."""
    codes_BHW: Tensor
    """int64 indices in [0, K)."""
    commitment: Tensor
    """Scalar, mean over all elements, not yet weighted: pulls the encoder to the codes."""
    codebook_loss: Tensor
    """Scalar, mean over all elements, of weight 1: pulls the codes to the encoder's outputs."""


class Quantizer(nn.Module):
    """A codebook ``embed [D, K]`` (layout of the released checkpoint) that never changes (P-TOK-9).

    The base of the methods that do learn.
    """

    embed: Tensor

    def __init__(
        self, code_dim: int, num_codes: int, *, by_gradient: bool = False, seed: int = 0
    ) -> None:
        """Xavier-uniform codebook (P-TOK-5) from torch's current generator.

        Args:
            code_dim, num_codes: D and K.
            by_gradient: make ``embed`` a parameter instead of a buffer.
            seed: keys all draws made later.
        """
        super().__init__()
        self.seed = seed
        embed_DK = nn.init.xavier_uniform_(torch.empty(code_dim, num_codes))
        if by_gradient:
            self.embed = nn.Parameter(embed_DK)
        else:
            self.register_buffer("embed", embed_DK)

    def quantize(self, latents_BDHW: Tensor, place: Place | None = None) -> Quantized:
        """Nearest codes and straight-through output; does not change the codebook.

        Args:
            latents_BDHW: encoder outputs.
            place: where in the training this pass stands; None outside training.  Only methods
                that draw at random look at it.
        """
        batch, _, height, width = latents_BDHW.shape
        codes_N = nearest_code(flatten_latents(latents_BDHW.detach()), self.embed.detach().t())
        codes_BHW = codes_N.view(batch, height, width)
        chosen_BDHW = self.lookup(codes_BHW).to(latents_BDHW.dtype)
        commitment = functional.mse_loss(latents_BDHW, chosen_BDHW.detach())
        through_BDHW = latents_BDHW + (chosen_BDHW - latents_BDHW).detach()
        codebook_loss = self._codebook_loss(latents_BDHW, chosen_BDHW)
        return Quantized(through_BDHW, codes_BHW, commitment, codebook_loss)

    def lookup(self, codes_BHW: Tensor) -> Tensor:
        """Code vectors ``[B, D, H, W]`` of int64 codes in [0, K)."""
        return functional.embedding(codes_BHW, self.embed.t()).permute(0, 3, 1, 2)

    def update(
        self,
        latents_ND: Tensor,
        codes_N: Tensor,
        *,
        step: int,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Learn from one step's vectors other than by gradient; here: nothing.

        Args:
            latents_ND: this process's encoder outputs.
            codes_N: their codes.
            step: 0 for the first.
            group: processes that hold the rest of the batch; None if this one holds it all.
        """

    @torch.no_grad()
    def initialise_from(
        self, latents_ND: Tensor, *, group: dist.ProcessGroup | None = None
    ) -> None:
        """Set every code to an encoder output drawn from all processes' vectors."""
        self.embed.copy_(self._draw(latents_ND, self.embed.shape[1], 0, group).t())

    def _codebook_loss(self, latents_BDHW: Tensor, chosen_BDHW: Tensor) -> Tensor:
        """Codes do not learn by gradient."""
        return latents_BDHW.new_zeros(())

    def _draw(
        self, latents_ND: Tensor, number: int, key: int, group: dist.ProcessGroup | None
    ) -> Tensor:
        """``number`` vectors of the whole batch, the same on every process, fp32 ``[number, D]``.

        The draw is over positions in the batch in rank order, keyed by (seed, key).  A tiny jitter
        keeps apart codes that were drawn from equal vectors (flat areas of pictures).
        """
        first, total = _place_in_batch(latents_ND, group)
        generator = draws.generator(torch.device("cpu"), self.seed, key)
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


class StraightThroughQuantizer(Quantizer):
    """Nearest code; the codes follow their vectors by gradient (P-TOK-6, the original VQ-VAE)."""

    def __init__(self, code_dim: int, num_codes: int, *, seed: int = 0) -> None:
        """See :class:`Quantizer`; ``embed`` is a parameter."""
        super().__init__(code_dim, num_codes, by_gradient=True, seed=seed)

    def _codebook_loss(self, latents_BDHW: Tensor, chosen_BDHW: Tensor) -> Tensor:
        return functional.mse_loss(chosen_BDHW, latents_BDHW.detach())


class GumbelQuantizer(Quantizer):
    """Codes drawn with a probability that falls with their distance (P-TOK-7).

    ``argmax_k (g_k - dist_k / tau)``, ``g_k`` from Gumbel(0, 1); the backward pass sees the softmax
    of the same scores in place of the one-hot.  Codebook and encoder learn through it alone, so
    there is no loss of its own.  Outside training the nearest code is taken, the limit of tau = 0.
    """

    # Pictures whose [H W, K] scores are in memory at once; each is made again on the way back.
    _PICTURES_PER_PASS = 4

    def __init__(
        self, code_dim: int, num_codes: int, temperature: GumbelConfig, *, seed: int = 0
    ) -> None:
        """See :class:`Quantizer`; ``embed`` is a parameter."""
        super().__init__(code_dim, num_codes, by_gradient=True, seed=seed)
        self.temperature = temperature

    def temperature_at(self, progress: float) -> float:
        """tau at this share of the training: geometric from ``start`` to ``end``."""
        t = self.temperature
        return float(t.start * (t.end / t.start) ** min(1.0, progress / t.anneal_fraction))

    def quantize(self, latents_BDHW: Tensor, place: Place | None = None) -> Quantized:
        """Drawn codes in training, nearest codes outside it."""
        if place is None:
            return super().quantize(latents_BDHW)
        tau = self.temperature_at(place.progress)
        parts, codes = [], []
        for start in range(0, len(latents_BDHW), self._PICTURES_PER_PASS):
            part_BDHW = latents_BDHW[start : start + self._PICTURES_PER_PASS]
            first = place.first_picture + start
            # Neither noise nor scores are kept for the backward pass: both are made again.
            through, drawn = checkpoint(
                self._draw_codes, part_BDHW, tau, place.step, first, use_reentrant=False
            )
            parts.append(through)
            codes.append(drawn)
        nothing = latents_BDHW.new_zeros(())
        return Quantized(torch.cat(parts), torch.cat(codes), nothing, nothing)

    def _draw_codes(
        self, latents_BDHW: Tensor, tau: float, step: int, first: int
    ) -> tuple[Tensor, Tensor]:
        batch, dim, height, width = latents_BDHW.shape
        vectors_ND = flatten_latents(latents_BDHW).float()
        squares_NK = torch.addmm(
            self.embed.square().sum(0) + vectors_ND.square().sum(1, keepdim=True),
            vectors_ND,
            self.embed,
            alpha=-2.0,
        ).clamp_min(_SMALLEST_SQUARE)
        distances_NK = squares_NK if self.temperature.squared else squares_NK.sqrt()
        noise_NK = self._gumbel(latents_BDHW, step, first)
        if self.temperature.scale_noise:
            noise_NK = noise_NK / tau
        scores_NK = noise_NK - distances_NK / tau
        codes_N = scores_NK.detach().argmax(1)
        soft_ND = scores_NK.softmax(1) @ self.embed.t()
        hard_ND = functional.embedding(codes_N, self.embed.detach().t())
        through_ND = soft_ND + (hard_ND - soft_ND).detach()
        through_BHWD = through_ND.view(batch, height, width, dim)
        return through_BHWD.permute(0, 3, 1, 2), codes_N.view(batch, height, width)

    def _gumbel(self, latents_BDHW: Tensor, step: int, first: int) -> Tensor:
        """``[N, K]``; a picture's noise follows from (seed, step, its index in the whole batch)."""
        device = latents_BDHW.device
        cells = latents_BDHW.shape[2] * latents_BDHW.shape[3]
        noise = []
        for index in range(first, first + len(latents_BDHW)):
            generator = draws.generator(device, self.seed, step, index)
            uniform = torch.empty(cells, self.embed.shape[1], device=device)
            # An exponential variable's negative logarithm is Gumbel(0, 1).
            noise.append(uniform.exponential_(generator=generator).clamp_min_(1e-30).log_().neg_())
        return torch.cat(noise)


class MovingAverageQuantizer(Quantizer):
    """Nearest code; each follows the moving average of the vectors mapped to it (P-TOK-8).

    Buffers (names and layout of the released checkpoint): ``embed [D, K]``, ``cluster_size [K]``,
    ``embed_avg [D, K]``.  Every change is computed from sums over all processes of the group, so
    the codebook is the same on each of them and does not depend on their number.
    """

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
        """See :class:`Quantizer`.

        Args:
            code_dim, num_codes: D and K.
            decay: share of the old averages kept at each step.
            revive_dead_codes: put codes without use back among the vectors.
            seed: keys all draws made later.
        """
        super().__init__(code_dim, num_codes, seed=seed)
        self.decay = decay
        self.revive_dead_codes = revive_dead_codes
        # The released code starts at count 0, which divides codes without hits by almost nothing
        # and throws them out of reach; one imagined hit each keeps the start where it was drawn.
        self.register_buffer("cluster_size", torch.ones(num_codes))
        self.register_buffer("embed_avg", self.embed.clone())

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
        """Set every code to an encoder output, as if seen once."""
        super().initialise_from(latents_ND, group=group)
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


def build_quantizer(config: ImageTokenizerConfig, *, seed: int = 0) -> Quantizer:
    """The codebook that ``config.codebook`` names; ``seed`` keys its own draws."""
    sizes = (config.code_dim, config.num_codes)
    match config.codebook:
        case "straight_through":
            return StraightThroughQuantizer(*sizes, seed=seed)
        case "gumbel":
            return GumbelQuantizer(*sizes, config.gumbel, seed=seed)
        case "moving_average":
            return MovingAverageQuantizer(
                *sizes,
                decay=config.ema_decay,
                revive_dead_codes=config.revive_dead_codes,
                seed=seed,
            )
        case "fixed":
            return Quantizer(*sizes, seed=seed)


def pass_by(latents_BDHW: Tensor) -> Quantized:
    """The latents themselves, without codes: what is trained before there is a codebook."""
    batch, _, height, width = latents_BDHW.shape
    no_codes_BHW = latents_BDHW.new_zeros((batch, height, width), dtype=torch.int64)
    nothing = latents_BDHW.new_zeros(())
    return Quantized(latents_BDHW, no_codes_BHW, nothing, nothing)


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
