"""One optimizer step of the image tokenizer, and of its discriminator.

Losses are sums over the global batch divided by its size, the codebook learns from sums over all
processes, and draws follow from (seed, step): a step does not depend on the number of processes.
Knows nothing of data sets, files or logs.

Shapes: B pictures of this process, S side in pixels, K codes.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from megatron_cogview.configs.errors import refuse
from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.tokenizer_training import TokenizerTrainingConfig
from megatron_cogview.tokenization.discriminator import (
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from megatron_cogview.tokenization.perceptual import load_perceptual_loss
from megatron_cogview.tokenization.quantizer import Place, flatten_latents
from megatron_cogview.tokenization.vq_model import VQModel, VQModelOutput, use_channels_last
from megatron_cogview.training.picture_stream import part_of_batch
from megatron_cogview.training.schedule import learning_rate
from megatron_cogview.training.tokenizer_state import Part
from megatron_cogview.training.world import World

# The discriminator forgets fast, as is usual for adversarial training.
_DISCRIMINATOR_BETAS = (0.5, 0.9)
# Encoder outputs per code from which a data-derived codebook is drawn, and a bound on the batches.
_VECTORS_PER_CODE = 4
_MOST_START_BATCHES = 16


class TokenizerUpdate:
    """Networks, optimizers and losses of one training."""

    def __init__(self, config: RunConfig, world: World) -> None:
        """Networks from the seed, the same on every process.

        Raises:
            ConfigError: bf16 is asked for on a GPU without it.
            DataError: the perceptual loss's weights cannot be used.
        """
        self.config, self.world = config, world
        self.tokenizer, self.training = config.image_tokenizer, config.tokenizer_training
        self.bf16 = uses_bf16(self.training, world.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            self.model = VQModel(self.tokenizer, seed=self.training.seed).to(world.device)
            self.discriminator = None
            adversarial = self.training.adversarial
            if adversarial.weight > 0:
                critic = PatchDiscriminator(adversarial.channels, adversarial.layers)
                use_channels_last(critic)
                self.discriminator = critic.to(world.device)
        self.perceptual = None
        if self.training.perceptual_weight > 0:
            weights = Path(self.training.perceptual_weights)
            self.perceptual = load_perceptual_loss(weights).to(world.device)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.training.lr)
        self.parts = {"model": Part(self.model, optimizer)}
        if self.discriminator is not None:
            critic_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=self.training.lr, betas=_DISCRIMINATOR_BETAS
            )
            self.parts["discriminator"] = Part(self.discriminator, critic_optimizer)

    @torch.no_grad()
    def draw_codebook(self, step: int, batch: Callable[[int, tuple[int, int]], Tensor]) -> None:
        """Codebook from the encoder outputs of the batches from ``step`` on.

        Args:
            step: the one that is about to be done.
            batch: pictures of (step, (rank, number of processes)).
        """
        per_batch = self.training.batch_size * self.tokenizer.codes_per_side**2
        batches = math.ceil(_VECTORS_PER_CODE * self.tokenizer.num_codes / per_batch)
        # Every process goes through whole batches, part by part: the draw is over positions, so the
        # vectors must stand in the order that a single process has.
        size = self.world.size
        vectors = [
            flatten_latents(self.model.enc_b(batch(step + i, (rank, size))))
            for i in range(min(batches, _MOST_START_BATCHES))
            for rank in range(size)
        ]
        quantizer = self.model.quantize_t
        quantizer.initialise_from(torch.cat(vectors))
        if self.world.group is not None:
            for tensor in quantizer.state_dict().values():
                dist.broadcast(tensor, src=0, group=self.world.group)

    def __call__(self, step: int, pictures_BCSS: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Update everything once.

        Args:
            step: 0 for the first.
            pictures_BCSS: this process's part of the batch, in [-1, 1].

        Returns:
            this process's shares of the global losses, by name; and its codes, none before there
            is a codebook.
        """
        rate = self.rate(step)
        first, _ = part_of_batch(self.training.batch_size, (self.world.rank, self.world.size))
        place = Place(step, step / self.training.steps, first)
        warm = step >= self.training.codebook_warmup_steps
        result = self.model(pictures_BCSS, place, bf16=self.bf16, through_codes=warm)
        losses = self._reconstruction_losses(result, pictures_BCSS)
        total = losses["reconstruction_loss"] + losses["codebook_loss"]
        total = total + self.tokenizer.commitment * losses["commitment_loss"]
        if "perceptual_loss" in losses:
            total = total + self.training.perceptual_weight * losses["perceptual_loss"]
        active = self.discriminator is not None and step >= self.training.adversarial.start_step
        if active:
            losses |= self._adversarial_losses(result, losses)
            total = total + losses["adversarial_weight"] * losses["adversarial_loss"]
        losses["loss"] = total
        self._descend("model", total, rate)
        codes_N = result.codes_BHW.flatten() if warm else result.codes_BHW.new_empty(0)
        if warm:
            self.model.quantize_t.update(
                flatten_latents(result.latents_BDHW.detach()),
                codes_N,
                step=step - self.training.codebook_warmup_steps,
                group=self.world.group,
            )
        if active:
            copy_BCSS = result.reconstruction_BCSS.detach()
            losses["discriminator_loss"] = self._teach_discriminator(pictures_BCSS, copy_BCSS, rate)
            # The same on every process, so each gives its share of one.
            losses["adversarial_weight"] = losses["adversarial_weight"] * self._share(pictures_BCSS)
        return {name: value.detach() for name, value in losses.items()}, codes_N

    def rate(self, step: int) -> float:
        """Learning rate at this step."""
        training = self.training
        fraction = min(training.warmup_steps, training.steps) / training.steps
        schedule = OptimizerConfig(lr=training.lr, warmup_fraction=fraction, min_lr_ratio=0.1)
        return learning_rate(schedule, step, training.steps)

    def _share(self, pictures_BCSS: Tensor) -> float:
        return len(pictures_BCSS) / self.training.batch_size

    def _reconstruction_losses(
        self, result: VQModelOutput, pictures_BCSS: Tensor
    ) -> dict[str, Tensor]:
        """Errors of pixels and features, and the quantiser's losses; unweighted."""
        share = self._share(pictures_BCSS)
        copy_BCSS = result.reconstruction_BCSS
        l1 = functional.l1_loss(copy_BCSS, pictures_BCSS) * share
        l2 = functional.mse_loss(copy_BCSS, pictures_BCSS) * share
        losses = {
            "reconstruction_loss": l1 if self.training.reconstruction == "l1" else l2,
            "commitment_loss": result.commitment * share,
            "codebook_loss": result.codebook_loss * share,
            # The commitment loss over this is the share of the latents that the codes miss.
            "latent_power": result.latents_BDHW.detach().square().mean() * share,
            # In units of pixels in [0, 1], as at validation.
            "l1": l1.detach() / 2.0,
            "l2": l2.detach() / 4.0,
        }
        if self.perceptual is not None:
            with torch.autocast(copy_BCSS.device.type, torch.bfloat16, enabled=self.bf16):
                losses["perceptual_loss"] = self.perceptual(copy_BCSS, pictures_BCSS) * share
        return losses

    def _adversarial_losses(
        self, result: VQModelOutput, losses: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The generator's adversarial loss and its weight, which is one for all processes."""
        settings = self.training.adversarial
        copy_BCSS = result.reconstruction_BCSS
        adversarial = generator_loss(self._scores(copy_BCSS)) * self._share(copy_BCSS)
        pixels = losses["reconstruction_loss"]
        if "perceptual_loss" in losses:
            pixels = pixels + self.training.perceptual_weight * losses["perceptual_loss"]
        last = self.model.last_layer
        (of_pixels,) = torch.autograd.grad(pixels, last, retain_graph=True)
        (of_critic,) = torch.autograd.grad(adversarial, last, retain_graph=True)
        self.world.sum([of_pixels, of_critic])
        weight = settings.weight * adaptive_weight(of_pixels, of_critic, settings.largest_weight)
        return {"adversarial_loss": adversarial, "adversarial_weight": weight}

    def _teach_discriminator(self, real_BCSS: Tensor, copy_BCSS: Tensor, rate: float) -> Tensor:
        loss = discriminator_loss(self._scores(real_BCSS), self._scores(copy_BCSS))
        loss = loss * self._share(real_BCSS)
        self._descend("discriminator", loss, rate * self.training.adversarial.lr_ratio)
        return loss

    def _scores(self, pictures_BCSS: Tensor) -> Tensor:
        assert self.discriminator is not None
        pictures_BCSS = pictures_BCSS.contiguous(memory_format=torch.channels_last)
        with torch.autocast(pictures_BCSS.device.type, torch.bfloat16, enabled=self.bf16):
            scores: Tensor = self.discriminator(pictures_BCSS)
        return scores.float()

    def _descend(self, name: str, loss: Tensor, rate: float) -> None:
        """Gradient over all processes, and one step of Adam."""
        module, optimizer = self.parts[name]
        optimizer.zero_grad(set_to_none=True)
        # Not for the other network, whose loss is another.
        parameters = [p for p in module.parameters() if p.requires_grad]
        torch.autograd.backward(loss, inputs=parameters)
        self.world.sum([p.grad for p in parameters if p.grad is not None])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def uses_bf16(training: TokenizerTrainingConfig, device: torch.device) -> bool:
    """Whether the networks run in bf16 on this device.

    Raises:
        ConfigError: it is asked for, and the GPU cannot.
    """
    able = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if training.precision == "bf16" and not able:
        raise refuse("tokenizer_training.precision", "bf16", "this GPU has no bf16; use fp32")
    return training.precision == "bf16" or (
        training.precision == "auto" and device.type == "cuda" and able
    )
