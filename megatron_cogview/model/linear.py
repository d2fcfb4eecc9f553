"""Linear layers of a rank that holds whole matrices: one product with its bias, and no more.

megatron-core adds a bias in a pass of its own and takes the backward pass through Python, which it
needs for what ranks of a tensor axis tell each other.  Alone there is nothing to tell.  Parameters
and their names are the same.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig

Output = tuple[torch.Tensor, torch.Tensor | None]
"""A product, and the bias that the caller still has to add: none."""


class WholeColumnLinear(ColumnParallelLinear):
    """Stands for a matrix split by its outputs, of which this rank holds all."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Output:
        """Multiply; ``weight`` in place of its own, if given."""
        return F.linear(input_, self.weight if weight is None else weight, self.bias), None


class WholeRowLinear(RowParallelLinear):
    """Stands for a matrix split by its inputs, of which this rank holds all."""

    def forward(self, input_: torch.Tensor) -> Output:
        """Multiply."""
        return F.linear(input_, self.weight, self.bias), None


def linear_layers(
    config: TransformerConfig,
) -> tuple[type[ColumnParallelLinear], type[RowParallelLinear]]:
    """The two kinds for this layout."""
    # With apex a weight's gradient is added up where it is computed, which these do not do.
    if config.tensor_model_parallel_size == 1 and not config.gradient_accumulation_fusion:
        return WholeColumnLinear, WholeRowLinear
    return ColumnParallelLinear, RowParallelLinear
