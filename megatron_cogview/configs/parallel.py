"""How a run is spread over processes."""

from dataclasses import dataclass
from typing import Literal

from megatron_cogview.configs.errors import refuse
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
        self._check_partners()

    def _check_partners(self) -> None:
        """Refuse a field that works only beside another one."""
        sharded, buckets = self.distributed_optimizer, self.overlap_gradients
        # The field, whether it is set, its value that is always legal, and what it needs.
        for name, is_set, off, is_met, partner, needed, why in (
            ("sequence", self.sequence, False, self.tensor > 1, "tensor", 2, "of at least 2"),
            (
                "virtual_pipeline",
                self.virtual_pipeline > 1,
                1,
                self.pipeline > 1,
                "pipeline",
                2,
                "of at least 2",
            ),
            (
                "overlap_parameters",
                self.overlap_parameters,
                False,
                sharded,
                "distributed_optimizer",
                True,
                "which spreads their update",
            ),
            (
                "overlap_parameters",
                self.overlap_parameters,
                False,
                buckets,
                "overlap_gradients",
                True,
                "which cuts them into buckets",
            ),
        ):
            if is_set and not is_met:
                field = f"parallel.{partner}"
                rest = advice([off], {field: [needed]})
                raise refuse(
                    f"parallel.{name}", getattr(self, name), f"needs {field} {why}; {rest}"
                )

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
