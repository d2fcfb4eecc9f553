"""The perceptual loss of VQGAN training, on weights that the user brings.

Distance of VGG-16 features at five depths; with LPIPS's linear heads in the file it is LPIPS,
without them a plain mean over channels.  Never downloads anything.

Shapes: B pictures, S side, C channels of a layer.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_cogview.configs.errors import DataError
from megatron_cogview.tokenization.state_dict_file import read_state_dict

# Convolutions of torchvision's VGG-16 under ``features``, by the resolution they work at.  The last
# one of each group, after its ReLU, is compared.
_GROUPS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
# LPIPS's scaling of pictures in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


class PerceptualLoss(nn.Module):
    """Weighted squared difference of unit-length features, summed over five layers.

    Holds buffers only, so that no optimizer finds them.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """``weights``: checked, under the names that :func:`load_perceptual_loss` documents."""
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name.replace(".", "_"), value.float())
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1))
        self.has_heads = _head(0) in weights

    def forward(self, copy_BCSS: Tensor, original_BCSS: Tensor) -> Tensor:
        """Mean over pictures and positions; scalar.

        Args:
            copy_BCSS, original_BCSS: in [-1, 1]; gradients flow to either.
        """
        copy, original = (
            (pictures - self.shift) / self.scale for pictures in (copy_BCSS, original_BCSS)
        )
        total = copy.new_zeros(())
        for depth, group in enumerate(_GROUPS):
            if depth > 0:
                copy, original = functional.max_pool2d(copy, 2), functional.max_pool2d(original, 2)
            copy, original = self._convolve(copy, group), self._convolve(original, group)
            difference_BCSS = (_unit(copy) - _unit(original)).square()
            if self.has_heads:
                head_C = self.get_buffer(_head(depth).replace(".", "_"))
                total = total + functional.conv2d(difference_BCSS, head_C).mean()
            else:
                total = total + difference_BCSS.mean()
        return total

    def _convolve(self, hidden_BCSS: Tensor, group: tuple[int, ...]) -> Tensor:
        for index in group:
            weight = self.get_buffer(f"features_{index}_weight")
            bias = self.get_buffer(f"features_{index}_bias")
            hidden_BCSS = functional.relu(functional.conv2d(hidden_BCSS, weight, bias, padding=1))
        return hidden_BCSS


def load_perceptual_loss(path: Path) -> PerceptualLoss:
    """Read weights for the loss.

    Args:
        path: ``.safetensors``, or a file for ``torch.load(weights_only=True)``, with torchvision's
            names ``features.{0,2,5,7,10,12,14,17,19,21,24,26,28}.{weight,bias}`` and, for LPIPS,
            ``lin{0..4}.model.1.weight`` of shape ``[1, C, 1, 1]``, none negative.  Other names are
            left out, and any widths will do that follow from layer to layer.

    Raises:
        DataError: no such file, not readable, or tensors missing, of wrong shape, not finite, or
            heads with negative values.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; tokenizer_training.perceptual_weights needs VGG-16 weights, "
            "for example torchvision's vgg16 state dict"
        )
    found = read_state_dict(path)
    names = [f"features.{i}.{kind}" for g in _GROUPS for i in g for kind in ("weight", "bias")]
    heads = [_head(depth) for depth in range(len(_GROUPS))]
    if any(name in found for name in heads):
        names += heads
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"{path}: lacks {missing}; bring all convolutions of VGG-16 under torchvision's names, "
            "with all five heads of LPIPS or none"
        )
    weights = {name: found[name] for name in names}
    _check(path, weights)
    return PerceptualLoss(weights).requires_grad_(False).eval()


def _check(path: Path, weights: dict[str, Any]) -> None:
    """Shapes must follow from layer to layer, and all values be finite."""
    channels = 3
    for depth, group in enumerate(_GROUPS):
        for index in group:
            name = f"features.{index}.weight"
            _expect(path, name, weights[name], (None, channels, 3, 3))
            channels = weights[name].shape[0]
            name = f"features.{index}.bias"
            _expect(path, name, weights[name], (channels,))
        if _head(depth) in weights:
            name = _head(depth)
            _expect(path, name, weights[name], (1, channels, 1, 1))
            # A loss with negative weights has no lower bound: training would run away.
            if bool((weights[name] < 0).any()):
                raise DataError(f"{path}: {name} holds negative values; heads of LPIPS have none")


def _expect(path: Path, name: str, value: Any, shape: tuple[int | None, ...]) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise DataError(f"{path}: {name} is not a floating-point tensor")
    fits = value.dim() == len(shape) and all(
        wanted in (None, size) for size, wanted in zip(value.shape, shape, strict=True)
    )
    if not fits:
        wanted = ["any" if size is None else size for size in shape]
        raise DataError(f"{path}: {name} has shape {list(value.shape)}, expected {wanted}")
    if not bool(torch.isfinite(value).all()):
        raise DataError(f"{path}: {name} holds values that are not finite")


def _head(depth: int) -> str:
    return f"lin{depth}.model.1.weight"


def _unit(hidden_BCSS: Tensor) -> Tensor:
    """Length 1 over channels at each position."""
    # Under the root: at a position without any feature the root's own slope would be infinite.
    length = (hidden_BCSS.square().sum(1, keepdim=True) + _EPSILON).sqrt()
    return hidden_BCSS / length
