"""One step of the tokenizer's training against plain autograd and plain Adam."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_cogview.configs.tokenizer_training import AdversarialConfig
from megatron_cogview.tokenization.exactness import exact, repeatable
from megatron_cogview.tokenization.perceptual import load_perceptual_loss
from megatron_cogview.tokenization.quantizer import GumbelQuantizer
from megatron_cogview.training.tokenizer_update import TokenizerUpdate
from tests.unit.test_perceptual import synthetic, write
from tests.unit.tokenizer_cases import CPU, config

LR_RATIO = 0.25


def pictures() -> Tensor:
    return torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def update_of(folder: Path, variant: str, **training: Any) -> TokenizerUpdate:
    """The networks of the first step; of a VQGAN with the adversarial phase begun."""
    critic = AdversarialConfig(weight=0.8, channels=8, layers=1, lr_ratio=LR_RATIO)
    if variant == "vqgan":
        training = {"adversarial": critic, **training}
    return TokenizerUpdate(config(folder, folder, variant, **training), CPU)


@pytest.mark.parametrize("perceptual", [0.0, 2.0])
@pytest.mark.parametrize("reconstruction", ["l1", "l2"])
@pytest.mark.parametrize("variant", ["moving_average", "straight_through", "vqgan"])
def test_the_loss_is_the_sum_of_its_parts(
    variant: str, reconstruction: str, perceptual: float, tmp_path: Path
) -> None:
    """Total and gradients that Adam gets, adaptive weight included."""
    vgg = write(tmp_path / "vgg.pt", synthetic())
    training: dict[str, Any] = {"reconstruction": reconstruction}
    if perceptual:
        training |= {"perceptual_weight": perceptual, "perceptual_weights": str(vgg)}
    update, other = (update_of(tmp_path, variant, **training) for _ in range(2))
    losses, codes = update(0, pictures())

    result = other.model(pictures())
    copy = result.reconstruction_BCSS
    error = copy - pictures()
    pixels = error.abs().mean() if reconstruction == "l1" else error.square().mean()
    if perceptual:
        pixels = pixels + perceptual * load_perceptual_loss(vgg)(copy, pictures())
    whole = pixels + 0.25 * result.commitment + result.codebook_loss
    if variant == "vqgan":
        assert other.discriminator is not None
        scores = -other.discriminator(copy).mean()
        last = other.model.dec[-1].weight
        norms = [
            torch.autograd.grad(v, last, retain_graph=True)[0].norm() for v in (pixels, scores)
        ]
        expected = 0.8 * norms[0] / (norms[1] + 1e-4)
        torch.testing.assert_close(losses["adversarial_weight"], expected, rtol=1e-4, atol=0.0)
        whole = whole + expected * scores
    torch.testing.assert_close(losses["loss"], whole.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(codes, result.codes_BHW.flatten())
    whole.backward()
    for (name, one), two in zip(
        update.model.named_parameters(), other.model.parameters(), strict=True
    ):
        assert one.grad is not None and two.grad is not None
        bound = 1e-4 * float(two.grad.abs().max())
        torch.testing.assert_close(one.grad, two.grad, rtol=0.0, atol=bound, msg=name)


def test_the_discriminator_has_a_rate_of_its_own(tmp_path: Path) -> None:
    """Plain Adam on the hinge loss, with the ratio and betas written out."""
    update, other = (update_of(tmp_path, "vqgan") for _ in range(2))
    critic = other.discriminator
    assert critic is not None
    assert update.discriminator is not None
    copy = other.model(pictures()).reconstruction_BCSS.detach()
    # Warm-up: the first of two steps has half the rate.
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.5e-3 * LR_RATIO, betas=(0.5, 0.9))
    real, drawn = (1 - critic(pictures())).relu(), (1 + critic(copy)).relu()
    (0.5 * (real.mean() + drawn.mean())).backward()
    optimizer.step()
    update(0, pictures())
    for one, two in zip(update.discriminator.parameters(), critic.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_temperature_falls_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tau of the first step and of the sixth of twelve; annealed over three quarters."""
    seen: list[float] = []
    plain = GumbelQuantizer._draw_codes

    def spy(self: GumbelQuantizer, latents: Tensor, tau: float, *place: int) -> Any:
        seen.append(tau)
        return plain(self, latents, tau, *place)

    monkeypatch.setattr(GumbelQuantizer, "_draw_codes", spy)
    update = update_of(tmp_path, "gumbel")
    for step, tau in ((0, 1.0), (6, 0.0625 ** (0.5 / 0.75)), (11, 0.0625)):
        seen.clear()
        update(step, pictures())
        assert seen == pytest.approx([tau] * len(seen))
        assert seen


def flags() -> dict[str, bool]:
    """How torch chooses kernels now."""
    return {
        "tf32": torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32,
        "benchmark": torch.backends.cudnn.benchmark,
        "any order": not torch.backends.cudnn.deterministic,
        "fused attention": torch.backends.cuda.flash_sdp_enabled()
        or torch.backends.cuda.mem_efficient_sdp_enabled()
        or torch.backends.cuda.cudnn_sdp_enabled(),
        "scattered": not torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture
def tf32() -> Iterator[None]:
    """Matrix products in TF32, as a caller may have set."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    yield
    matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_contexts_choose_exact_kernels_and_put_all_back() -> None:
    """As on a GPU; the switches are torch's own, so that no GPU is needed to see them."""
    gpu = torch.device("cuda")
    before = flags()
    assert before["tf32"]
    nothing = dict.fromkeys(("tf32", "benchmark", "any order", "fused attention"), False)
    for context, scattered in ((exact, True), (repeatable, False)):
        with pytest.raises(KeyboardInterrupt), context(gpu):
            assert {name: flags()[name] for name in nothing} == nothing
            assert flags()["scattered"] == scattered
            raise KeyboardInterrupt
        assert flags() == before


def test_encoders_begin_and_end_without_tf32(tmp_path: Path) -> None:
    """The bf16 one, too: its first and last convolution are fp32."""
    update = update_of(tmp_path, "vqgan")
    seen: list[bool] = []

    def note(*_: Any) -> None:
        seen.append(torch.backends.cudnn.allow_tf32)

    layers = [m for m in update.model.enc_b.modules() if isinstance(m, nn.Conv2d)]
    for layer in (layers[0], layers[-1]):
        layer.register_forward_pre_hook(note)
    for encode in (update.model.encode, update.model.encode_bf16):
        encode(pictures())
    assert seen == [False] * 4
