"""The Megatron engine: megatron-core's schedules, DDP, optimizer and sharded checkpoints."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_cogview.checkpoint import sharded
from megatron_cogview.checkpoint.snapshot import ShardedState
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.batch import Batch
from megatron_cogview.engines.base import StepObserver, StepResult
from megatron_cogview.engines.optimizer import apply_settings, build_optimizer, set_lr
from megatron_cogview.engines.update import update_weights
from megatron_cogview.model.cogview import CogViewModel, build_model
from megatron_cogview.model.loss import SUMS, Losses, loss_sums
from megatron_cogview.model.precision import in_precision, resolve_dtype
from megatron_cogview.parallel import agreement
from megatron_cogview.parallel.topology import Topology


class MegatronEngine:
    """Trains one CogView under any parallel layout.

    The loss of a step is the weighted sum over the global batch divided by its sum of weights
    (P-LOSS-1).  That divisor is known before the first forward pass, because an engine receives
    all micro-batches of a step at once; so the result depends on neither ranks nor micro-batches,
    for any weights.

    Args:
        config: the run; its layout has been checked against the world.
        topology: process groups.
    """

    def __init__(self, config: RunConfig, topology: Topology) -> None:
        self.config, self.topology = config, topology
        self.observer = StepObserver()
        self.dtype = resolve_dtype(config.precision)
        self.chunks: list[CogViewModel] = build_model(config)
        self.settings = self.chunks[0].config
        self.model = [self._wrap(chunk) for chunk in self.chunks]
        for chunk in self.model:
            chunk.broadcast_params()
        self._overlap()
        self._pulse = torch.zeros(1, device=topology.device)
        self.optimizer = build_optimizer(config, self.model, self.dtype)
        self.settings.grad_scale_func = self.optimizer.scale_loss
        self.settings.finalize_model_grads_func = self._finalize_gradients

    def _wrap(self, chunk: CogViewModel) -> DistributedDataParallel:
        module = in_precision(self.settings, chunk.to(self.topology.device), self.dtype)
        p, shared = self.config.parallel, self.topology.data_size > 1
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=p.distributed_optimizer,
            overlap_grad_reduce=p.overlap_gradients and shared,
            overlap_param_gather=p.overlap_parameters and shared,
        )
        return DistributedDataParallel(self.settings, settings, module)

    def _overlap(self) -> None:
        """Let gradients wait for the last micro-batch, when buckets are sent as they get full."""
        if self.config.parallel.overlap_gradients and self.topology.data_size > 1:
            hooks = [chunk.no_sync for chunk in self.model]
            self.settings.no_sync_func = hooks[0] if len(hooks) == 1 else hooks

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepResult:
        """See :class:`~megatron_cogview.engines.base.Engine`."""
        self._set_mode(training=True)
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = self._run(micro_batches, forward_only=False)
        self.observer.entered("update")
        set_lr(self.optimizer, lr)
        updated, grad_norm = update_weights(
            self.optimizer, self.config.optimizer.clip_grad, losses.total, self._anyone
        )
        return StepResult(
            losses=losses,
            updated=updated,
            grad_norm=grad_norm,
            # Read only where it changes: reading waits for the device.
            loss_scale=float(self.optimizer.get_loss_scale().item())
            if self.dtype == torch.float16
            else 1.0,
        )

    def _set_mode(self, training: bool) -> None:
        """Switch dropout; walking through all modules takes time, so only when it changes."""
        for wrapped, chunk in zip(self.model, self.chunks, strict=True):
            if chunk.training != training:
                wrapped.train(training)

    def _finalize_gradients(self, model: list[Any], *args: Any, **kwargs: Any) -> None:
        """Add up gradients over replicas, and those of norms and of the tied table."""
        self.observer.entered("gradients")
        if self.topology.data_size > 1:
            # Who comes late to the sum is seen here, before the time that the sum itself takes.
            with self.observer.waiting():
                dist.all_reduce(self._pulse, group=self.topology.data_group)
        if self.topology.world_size > 1:
            finalize_model_grads(model, *args, **kwargs)

    def _anyone(self, mine: bool) -> bool:
        """Whether any rank says yes."""
        with self.observer.waiting():
            return agreement.largest([float(mine)], self.topology)[0] > 0

    def eval_step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """See :class:`~megatron_cogview.engines.base.Engine`."""
        self._set_mode(training=False)
        with torch.no_grad():
            losses = self._run(micro_batches, forward_only=True)
        return StepResult(losses=losses, updated=False, grad_norm=float("nan"), loss_scale=1.0)

    def _run(self, micro_batches: Sequence[Batch], forward_only: bool) -> Losses:
        """All micro-batches through the pipeline schedule; the losses are the global batch's."""
        if not forward_only:
            self.observer.entered("forward")
        batches = [batch.to(self.topology.device) for batch in micro_batches]
        total_weight = sum(
            (batch.loss_weights_BS.double().sum() for batch in batches),
            start=torch.zeros((), dtype=torch.float64, device=self.topology.device),
        )
        # Who made its batches late is seen here.
        with self.observer.waiting():
            self._add_up(total_weight)
            weight = max(float(total_weight), 1e-30)
        # The schedule divides each loss by the number of micro-batches, DDP by the data axis.
        factor = len(batches) * self.topology.data_size / weight
        single = len(self.model) == 1
        iterators = [iter(batches) for _ in self.model]
        outputs: list[dict[str, torch.Tensor]] = get_forward_backward_func()(
            forward_step_func=lambda iterator, model: self._forward(iterator, model, factor),
            data_iterator=iterators[0] if single else iterators,
            model=self.model[0] if single else self.model,
            num_microbatches=len(batches),
            seq_length=batches[0].tokens_BS.shape[1],
            micro_batch_size=batches[0].tokens_BS.shape[0],
            forward_only=forward_only,
        )
        return self._reduce_losses(outputs)

    def _add_up(self, values: torch.Tensor) -> None:
        """Sum over the data axis, in place.  Even of one rank a collective takes its time."""
        if self.topology.data_size > 1:
            dist.all_reduce(values, group=self.topology.data_group)

    def _forward(
        self, iterator: Iterator[Batch], model: DistributedDataParallel, factor: float
    ) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        output = model(batch.tokens_BS, batch.positions_BS, batch.pivot_key_B2, batch.labels_BS)

        def loss_of(losses_BS: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            weighted, sums = loss_sums(
                losses_BS, batch.loss_weights_BS, batch.labels_BS, self.config.model.vocab
            )
            return weighted * factor, {"sums": sums}

        return output, loss_of

    def _reduce_losses(self, outputs: list[dict[str, torch.Tensor]]) -> Losses:
        """Add up micro-batches and data ranks on the last stage, and tell all stages."""
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.topology.device)
        if self.topology.is_last_stage:
            for output in outputs:
                sums += output["sums"]
            self._add_up(sums)
            if self.topology.tensor_size > 1:
                # Sums of different groups may differ in their last bits; all must judge alike.  A
                # maximum would pass over a NaN that one rank alone has.
                sums.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=math.inf)
                dist.all_reduce(sums, op=dist.ReduceOp.MAX, group=self.topology.tensor_group)
        if self.topology.pipeline_size > 1:
            dist.broadcast(sums, self.topology.last_stage_rank, group=self.topology.pipeline_group)
        return Losses.from_sums(sums.tolist())

    def sharded_state(self) -> ShardedState:
        """See :class:`~megatron_cogview.engines.base.Engine`."""
        if self.config.parallel.overlap_parameters and self.topology.data_size > 1:
            # What was updated is collected in the next forward pass, which has not come yet.
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)
        return sharded.sharded_state(self.chunks, self.optimizer, self.topology)

    def load(self, directory: Path) -> None:
        """See :class:`~megatron_cogview.engines.base.Engine`."""
        sharded.load(self.chunks, self.optimizer, self.topology, directory)
        apply_settings(self.optimizer, self.config.optimizer)
