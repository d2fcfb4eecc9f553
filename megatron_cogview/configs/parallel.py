"""How a run is spread over processes."""

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.configs.nearest import advice, nearest

Recompute = Literal["none", "selective", "full"]
"""From the most memory and the least arithmetic to the opposite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Sizes of the tensor, pipeline and (derived) data axes."""

    tensor: int = 1
    """Processes that share each layer."""
    pipeline: int = 1
    """Consecutive groups of layers on different processes."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline stage; above 1 the interleaved schedule runs."""
    sequence: bool = False
    """Split norms and dropout over the tensor axis along the sequence."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over the data axis (ZeRO-1)."""
    overlap_gradients: bool = False
    """Add up gradients over the data axis while the backward pass still runs."""
    overlap_parameters: bool = False
    """Collect the weights that the distributed optimizer updated during the next forward pass."""
    recompute: Recompute = "none"
    """What the backward pass computes again instead of keeping it: nothing; attention, where its
    scores would be kept (a fused kernel keeps none); every layer, for a third more arithmetic."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline"):
            if getattr(self, name) < 1:
                why = f"must be at least 1; {advice([1])}"
                raise refuse(f"parallel.{name}", getattr(self, name), why)
        if self.recompute not in get_args(Recompute):
            choices = ", ".join(get_args(Recompute))
            raise refuse("parallel.recompute", self.recompute, f"must be one of {choices}")
        self._check_partners()

    def _check_partners(self) -> None:
        """Refuse a field that works only beside another one."""
        if self.sequence and self.tensor == 1:
            raise self._needs("sequence", False, "tensor", 2, " of at least 2")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise self._needs("virtual_pipeline", 1, "pipeline", 2, " of at least 2")
        if self.overlap_parameters and not self.distributed_optimizer:
            # Otherwise every rank updates all weights, and there is nothing to collect.
            raise self._needs("overlap_parameters", False, "distributed_optimizer", True)
        if self.overlap_parameters and not self.overlap_gradients:
            # Only then are weights in buckets, and a later one can travel while one is used.
            raise self._needs("overlap_parameters", False, "overlap_gradients", True)

    def _needs(
        self, name: str, off: object, partner: str, needed: object, how: str = ""
    ) -> ConfigError:
        rest = advice([off], {f"parallel.{partner}": [needed]})
        value = getattr(self, name)
        return refuse(f"parallel.{name}", value, f"needs parallel.{partner}{how}; {rest}")

    @property
    def model_ranks(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline

    def data(self, world_size: int) -> int:
        """Size of the data axis in a world of ``world_size`` processes.

        Raises:
            ConfigError: the world does not hold a whole number of model copies.
        """
        ranks = self.model_ranks
        if world_size % ranks:
            counts = nearest(world_size, lambda n: n % ranks == 0, world_size + ranks)
            raise refuse(
                "processes",
                world_size,
                f"must be a multiple of parallel.tensor * parallel.pipeline = {ranks}; "
                f"{advice(counts)}",
            )
        return world_size // ranks
