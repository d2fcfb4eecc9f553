"""How a run is spread over processes."""

from dataclasses import dataclass

from megatron_cogview.configs.errors import refuse


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
    recompute: bool = False
    """Recompute every layer's activations in the backward pass."""

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "virtual_pipeline"):
            if getattr(self, name) < 1:
                raise refuse(f"parallel.{name}", getattr(self, name), "must be at least 1")
        if self.sequence and self.tensor == 1:
            raise refuse("parallel.sequence", True, "needs parallel.tensor of at least 2")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise refuse(
                "parallel.virtual_pipeline",
                self.virtual_pipeline,
                "needs parallel.pipeline of at least 2",
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
        if world_size % self.model_ranks:
            raise refuse(
                "parallel.tensor * parallel.pipeline",
                self.model_ranks,
                f"does not divide the {world_size} processes that were started",
            )
        return world_size // self.model_ranks
