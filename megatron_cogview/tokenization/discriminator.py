"""The VQGAN's critic: a patch discriminator, its hinge losses and the adaptive weight.

Group normalisation where the common patch discriminator has batch normalisation: a verdict then
does not depend on the rest of the batch, nor training on the number of processes.

Shapes: B pictures, S side in pixels, P x P patches.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

_SLOPE = 0.2
_LARGEST_MULTIPLE = 8
_GROUPS = 8


class PatchDiscriminator(nn.Module):
    """Convolutions that say of each patch how much it looks like a photograph's."""

    def __init__(self, channels: int, layers: int) -> None:
        """``layers`` stride-2 convolutions of kernel 4, then two of stride 1."""
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(_SLOPE)]
        width = channels
        for depth in range(1, layers + 1):
            before, width = width, channels * min(2**depth, _LARGEST_MULTIPLE)
            stride = 2 if depth < layers else 1
            blocks += [
                nn.Conv2d(before, width, 4, stride, 1, bias=False),
                nn.GroupNorm(_GROUPS, width),
                nn.LeakyReLU(_SLOPE),
            ]
        blocks.append(nn.Conv2d(width, 1, 4, 1, 1))
        self.blocks = nn.Sequential(*blocks)
        for layer in self.blocks:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, pictures_BCSS: Tensor) -> Tensor:
        """Scores ``[B, 1, P, P]``; above 0 for photographs."""
        scores: Tensor = self.blocks(pictures_BCSS)
        return scores


def discriminator_loss(real_B1PP: Tensor, copy_B1PP: Tensor) -> Tensor:
    """Hinge loss: photographs above 1, reconstructions below -1."""
    return 0.5 * (functional.relu(1.0 - real_B1PP).mean() + functional.relu(1.0 + copy_B1PP).mean())


def generator_loss(copy_B1PP: Tensor) -> Tensor:
    """What the decoder lowers to raise its pictures' scores."""
    return -copy_B1PP.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, largest: float) -> Tensor:
    """Weight that makes both losses pull equally at the decoder's last layer (VQGAN, eq. 7).

    Args:
        reconstruction, adversarial: gradients of the two losses with respect to that layer's
            weight, over the whole batch.
        largest: upper bound.
    """
    ratio = reconstruction.float().norm() / (adversarial.float().norm() + 1e-4)
    return torch.clamp(ratio, 0.0, largest)
