"""The moving-average codebook against its formulas, and one process against two."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.tokenization.quantizer import (
    LAPLACE_EPSILON,
    MovingAverageQuantizer,
    flatten_latents,
)

WIDTH, CODES, ROWS = 6, 24, 64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(**settings: Any) -> MovingAverageQuantizer:
    torch.manual_seed(5)
    return MovingAverageQuantizer(WIDTH, CODES, seed=3, **settings)


def test_xavier_uniform_start() -> None:
    torch.manual_seed(0)
    embed = MovingAverageQuantizer(64, 512).embed
    bound = (6 / (64 + 512)) ** 0.5
    assert embed.abs().max() <= bound
    assert abs(float(embed.std()) - bound / 3**0.5) < 0.01 * bound


def test_update_follows_the_formulas() -> None:
    """P-TOK-8 with decay and Laplace smoothing, recomputed code by code in fp64."""
    q = quantizer(decay=0.9)
    counts, sums = q.cluster_size.double().clone(), q.embed_avg.double().clone()
    # The last step is beyond the rise of the decay.
    for step in (0, 1, 200):
        latents = normal(ROWS, WIDTH, seed=step)
        codes = torch.randint(CODES - 4, (ROWS,), generator=torch.Generator().manual_seed(step))
        q.update(latents, codes, step=step)
        decay = min(0.9, (1 + step) / (10 + step))
        for k in range(CODES):
            mine = latents[codes == k].double()
            counts[k] = decay * counts[k] + (1 - decay) * len(mine)
            sums[:, k] = decay * sums[:, k] + (1 - decay) * mine.sum(0)
    total = counts.sum()
    smoothed = (counts + LAPLACE_EPSILON) / (total + CODES * LAPLACE_EPSILON) * total
    torch.testing.assert_close(q.cluster_size.double(), counts, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(q.embed.double(), sums / smoothed, rtol=1e-5, atol=1e-6)


def test_an_unused_code_stays_where_it_is() -> None:
    q = quantizer(decay=0.5)
    before = q.embed[:, -1].clone()
    for step in range(200):
        q.update(normal(ROWS, WIDTH, seed=step), torch.zeros(ROWS, dtype=torch.int64), step=step)
    assert torch.isfinite(q.embed).all()
    torch.testing.assert_close(q.embed[:, -1], before, rtol=0.02, atol=0)


def test_straight_through_and_commitment() -> None:
    q = quantizer()
    latents = normal(2, WIDTH, 3, 4).requires_grad_()
    out = q.quantize(latents)
    codes = out.codes_BHW
    distances = torch.cdist(flatten_latents(latents.detach()).double(), q.embed.t().double())
    assert torch.equal(codes.flatten(), distances.argmin(1))
    torch.testing.assert_close(out.latents_BDHW, q.lookup(codes))
    weight = normal(2, WIDTH, 3, 4, seed=1)
    (through,) = torch.autograd.grad((out.latents_BDHW * weight).sum(), latents, retain_graph=True)
    assert torch.equal(through, weight)
    (pull,) = torch.autograd.grad(out.loss, latents)
    torch.testing.assert_close(pull, 2 * (latents - q.lookup(codes)).detach() / latents.numel())


def test_looking_does_not_change_the_codebook() -> None:
    q = quantizer()
    before = {name: value.clone() for name, value in q.state_dict().items()}
    q.train().quantize(normal(2, WIDTH, 3, 4))
    assert all(torch.equal(before[name], value) for name, value in q.state_dict().items())


def test_data_start_takes_encoder_outputs_and_keeps_equal_ones_apart() -> None:
    q = quantizer()
    latents = normal(CODES, WIDTH)
    q.initialise_from(latents)
    nearest = torch.cdist(q.embed.t(), latents)
    assert nearest.amin(1).max() < 0.02
    assert sorted(nearest.argmin(1).tolist()) == list(range(CODES))
    q.initialise_from(torch.cat([normal(1, WIDTH).expand(500, -1), normal(8, WIDTH, seed=1)]))
    assert len(torch.unique(q.embed.t(), dim=0)) == CODES


def test_dead_codes_come_back_among_the_latents() -> None:
    latents = normal(ROWS, WIDTH) + 10.0
    used = []
    for revive in (False, True):
        q = quantizer(decay=0.8, revive_dead_codes=revive)
        for step in range(60):
            codes = q.quantize(latents.t()[None, :, :, None]).codes_BHW.flatten()
            q.update(latents, codes, step=step)
        used.append(len(codes.unique()))
    assert used[0] < CODES // 2 < CODES - 2 <= used[1]


def steps(rows: slice, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    """Data start, then updates with revival, on a part of each batch."""
    q = quantizer(decay=0.8, revive_dead_codes=True)
    q.initialise_from(normal(ROWS, WIDTH, seed=99)[rows], group=group)
    for step in range(30):
        # The spread shrinks, so that codes at the rim die and are revived.
        latents = normal(ROWS, WIDTH, seed=step)[rows] * 0.9**step
        codes = q.quantize(latents.t()[None, :, :, None]).codes_BHW.flatten()
        q.update(latents, codes, step=step, group=group)
    return dict(q.state_dict())


def two_process_case(arguments: dict[str, Any]) -> dict[str, list[float]]:
    # Unequal parts: the order of the whole batch must still be rank order.
    rows = slice(0, 24) if dist.get_rank() == 0 else slice(24, ROWS)
    return {k: v.flatten().tolist() for k, v in steps(rows, dist.group.WORLD).items()}


def test_two_processes_give_the_codebook_of_one() -> None:
    one = steps(slice(None), None)
    ranks = run_distributed(f"{__name__}:two_process_case", 2, timeout_s=60.0)
    assert ranks[0] == ranks[1]
    for name, value in one.items():
        torch.testing.assert_close(torch.tensor(ranks[0][name]), value.flatten())
