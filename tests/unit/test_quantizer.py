"""The four codebooks against their formulas, and one process against two."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.configs.image_tokenizer import GumbelConfig, ImageTokenizerConfig
from megatron_cogview.testing.distributed import run_distributed
from megatron_cogview.tokenization.quantizer import (
    LAPLACE_EPSILON,
    GumbelQuantizer,
    MovingAverageQuantizer,
    Place,
    Quantizer,
    StraightThroughQuantizer,
    build_quantizer,
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
    (pull,) = torch.autograd.grad(out.commitment, latents)
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


def test_draws_follow_from_all_of_seed_and_step() -> None:
    """On a CPU torch's generators take 32 bits of a seed; 2**40 used to overflow 64."""
    latents = normal(3 * CODES, WIDTH)
    starts, noises = [], []
    for seed in (3, 4, (1 << 32) + 3, 1 << 40, 1 << 63):
        torch.manual_seed(5)
        q = MovingAverageQuantizer(WIDTH, CODES, seed=seed)
        q.initialise_from(latents)
        starts.append(q.embed.clone())
        torch.manual_seed(5)
        drawn = GumbelQuantizer(WIDTH, CODES, GumbelConfig(), seed=seed)
        for step in (0, 1 << 12, 1 << 32):
            noises.append(drawn._gumbel(latents.t()[None, :, :, None], step, 0))
    for values in (starts, noises):
        for index, value in enumerate(values):
            assert not any(torch.equal(value, other) for other in values[:index])


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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("moving_average", MovingAverageQuantizer),
        ("straight_through", StraightThroughQuantizer),
        ("gumbel", GumbelQuantizer),
        ("fixed", Quantizer),
    ],
)
def test_methods_are_chosen_by_name_and_start_alike(name: Any, kind: type[Quantizer]) -> None:
    """Same seed, same codebook; only gradient methods offer it to the optimizer."""
    config = ImageTokenizerConfig(code_dim=WIDTH, num_codes=CODES, codebook=name)
    torch.manual_seed(5)
    q = build_quantizer(config, seed=3)
    assert type(q) is kind
    torch.manual_seed(5)
    assert torch.equal(q.embed, Quantizer(WIDTH, CODES).embed)
    by_gradient = name in ("straight_through", "gumbel")
    assert [n for n, _ in q.named_parameters()] == (["embed"] if by_gradient else [])
    latents = normal(2, WIDTH, 3, 4)
    distances = torch.cdist(flatten_latents(latents), q.embed.detach().t())
    assert torch.equal(q.quantize(latents).codes_BHW.flatten(), distances.argmin(1))


def test_straight_through_codebook_learns_by_gradient() -> None:
    """P-TOK-6: the loss |sg(z) - e|^2 moves the codes, the decoder's gradient does not."""
    torch.manual_seed(5)
    q = StraightThroughQuantizer(WIDTH, CODES)
    latents = normal(2, WIDTH, 3, 4).requires_grad_()
    out = q.quantize(latents)
    vectors, codes = flatten_latents(latents.detach()).double(), out.codes_BHW.flatten()
    embed = q.embed.detach().double()
    expected = (embed.t()[codes] - vectors).square().mean()
    torch.testing.assert_close(out.codebook_loss.double(), expected)
    gradient = torch.zeros_like(embed)
    for vector, code in zip(vectors, codes.tolist(), strict=True):
        gradient[:, code] += 2 * (embed[:, code] - vector) / vectors.numel()
    (got,) = torch.autograd.grad(out.codebook_loss, q.embed, retain_graph=True)
    torch.testing.assert_close(got.double(), gradient, rtol=1e-5, atol=1e-8)
    through = out.latents_BDHW.square().sum()
    of_embed, of_latents = torch.autograd.grad(
        through, (q.embed, latents), retain_graph=True, allow_unused=True
    )
    assert of_embed is None or not of_embed.any()
    torch.testing.assert_close(of_latents, 2 * out.latents_BDHW.detach())
    (pull,) = torch.autograd.grad(out.commitment + 0 * out.codebook_loss, latents)
    torch.testing.assert_close(pull, 2 * (latents - q.lookup(out.codes_BHW)).detach() / 144)


def test_fixed_codebook_never_changes() -> None:
    q = Quantizer(WIDTH, CODES)
    before = q.embed.clone()
    latents = normal(2, WIDTH, 3, 4).requires_grad_()
    out = q.quantize(latents)
    assert out.codebook_loss.item() == 0.0
    (out.latents_BDHW.sum() + out.commitment).backward()
    for step in range(5):
        q.update(normal(ROWS, WIDTH), torch.zeros(ROWS, dtype=torch.int64), step=step)
    assert torch.equal(q.embed, before)
    assert not q.embed.requires_grad


def gumbel(**settings: Any) -> GumbelQuantizer:
    torch.manual_seed(5)
    q = GumbelQuantizer(WIDTH, CODES, GumbelConfig(**settings), seed=3)
    # Codes as far apart as latents are.
    q.embed.data.mul_(4.0)
    return q


def score_of(q: GumbelQuantizer, vectors: torch.Tensor, tau: float) -> torch.Tensor:
    """-dist / tau as printed, in fp64."""
    distance = torch.cdist(vectors.double(), q.embed.detach().double().t())
    return -(distance.square() if q.temperature.squared else distance) / tau


@pytest.mark.parametrize(("squared", "tau"), [(False, 0.7), (True, 8.0)])
def test_gumbel_draws_follow_the_softmax_of_the_distances(squared: bool, tau: float) -> None:
    """P-TOK-7: frequencies of 30,000 draws of one vector; a chi-square beyond 1 in 10^4 fails."""
    q = gumbel(start=tau, squared=squared)
    vector = normal(1, WIDTH)
    share = score_of(q, vector, tau).softmax(1)[0]
    latents = vector.view(1, WIDTH, 1, 1).expand(30, WIDTH, 10, 10)
    counts = torch.zeros(CODES, dtype=torch.int64)
    for step in range(10):
        codes = q.quantize(latents, Place(step, 0.0)).codes_BHW.flatten()
        counts += torch.bincount(codes, minlength=CODES)
    expected = 30_000 * share
    assert expected.min() > 5, "too rare for the chi-square"
    chi = ((counts - expected) ** 2 / expected).sum()
    # 23 degrees of freedom.
    assert chi < 55.0


def test_released_noise_is_divided_by_the_temperature_too() -> None:
    """Draws then do not sharpen as tau falls: argmax (g - dist) / tau is argmax (g - dist)."""
    latents = normal(3, WIDTH, 4, 4)
    drawn = [
        gumbel(start=tau, end=0.01, scale_noise=True).quantize(latents, Place(0, 0.0)).codes_BHW
        for tau in (1.0, 0.05)
    ]
    assert torch.equal(*drawn)
    plain = [
        gumbel(start=tau, end=0.01).quantize(latents, Place(0, 0.0)).codes_BHW
        for tau in (1.0, 0.01)
    ]
    assert torch.equal(plain[0], drawn[0])
    nearest = gumbel().quantize(latents).codes_BHW
    assert (plain[1] == nearest).float().mean() > 0.9 > (plain[0] == nearest).float().mean()


def test_gumbel_gradients_are_those_of_the_softmax_in_place_of_the_one_hot() -> None:
    """Against fp64 autograd of the soft output, with the same noise, for vectors and codebook."""
    q = gumbel(start=0.7)
    latents = normal(6, WIDTH, 2, 3).requires_grad_()
    weight = normal(6, WIDTH, 2, 3, seed=1)
    out = q.quantize(latents, Place(4, 0.0, first_picture=2))
    got = torch.autograd.grad((out.latents_BDHW * weight).sum(), (latents, q.embed))
    exact = latents.detach().double().requires_grad_()
    embed = q.embed.detach().double().requires_grad_()
    difference = flatten_latents(exact)[:, None] - embed.t()[None]
    scores = q._gumbel(latents, 4, 2).double() - difference.norm(dim=2) / 0.7
    assert torch.equal(out.codes_BHW.flatten(), scores.argmax(1))
    torch.testing.assert_close(out.latents_BDHW, q.lookup(out.codes_BHW))
    soft = scores.softmax(1) @ embed.t()
    want = torch.autograd.grad((soft * flatten_latents(weight).double()).sum(), (exact, embed))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_gumbel_noise_belongs_to_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the number of processes nor the size of a pass changes a draw; the step does."""
    q = gumbel()
    latents = normal(10, WIDTH, 3, 3)
    whole = q.quantize(latents, Place(7, 0.0)).codes_BHW
    parts = [
        q.quantize(latents[:3], Place(7, 0.0)).codes_BHW,
        q.quantize(latents[3:], Place(7, 0.0, first_picture=3)).codes_BHW,
    ]
    assert torch.equal(whole, torch.cat(parts))
    monkeypatch.setattr(GumbelQuantizer, "_PICTURES_PER_PASS", 3)
    assert torch.equal(whole, q.quantize(latents, Place(7, 0.0)).codes_BHW)
    assert not torch.equal(whole, q.quantize(latents, Place(8, 0.0)).codes_BHW)


def test_gumbel_temperature_falls_geometrically() -> None:
    q = gumbel(start=2.0, end=0.125, anneal_fraction=0.5)
    values = [q.temperature_at(progress) for progress in (0.0, 0.125, 0.25, 0.5, 0.9, 1.0)]
    assert values == pytest.approx([2.0, 1.0, 0.5, 0.125, 0.125, 0.125])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: GumbelConfig(end=0.0), r"image_tokenizer\.gumbel\.end"),
        (lambda: GumbelConfig(start=0.01), r"image_tokenizer\.gumbel\.end"),
        (lambda: GumbelConfig(anneal_fraction=0.0), r"image_tokenizer\.gumbel\.anneal_fraction"),
        (
            lambda: ImageTokenizerConfig(codebook="fixed", revive_dead_codes=True),
            r"image_tokenizer\.revive_dead_codes",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(make: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make()


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
