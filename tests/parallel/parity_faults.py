"""Bugs put in on purpose: a comparison that lets one of them through proves nothing."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from megatron_cogview.data.batch import Batch

Change = Callable[[Batch], Batch]
_changes: list[Change] = []
"""What :func:`spoil` does to the last micro-batch now."""


def spoil(batches: Sequence[Batch]) -> Sequence[Batch]:
    """The micro-batches as the fault that is on leaves them."""
    for change in _changes:
        batches = [*batches[:-1], change(batches[-1])]
    return batches


@contextlib.contextmanager
def _batch_fault(change: Change) -> Iterator[None]:
    _changes.append(change)
    try:
        yield
    finally:
        _changes.remove(change)


def _positions(batch: Batch) -> Batch:
    """Positions that do not start again."""
    count = torch.arange(batch.positions_BS.shape[1])
    return replace(batch, positions_BS=count.expand_as(batch.positions_BS).contiguous())


def _modalities(batch: Batch) -> Batch:
    """Text and image labels weigh the same."""
    weights = (batch.loss_weights_BS > 0).float()
    return replace(batch, loss_weights_BS=weights)


def _padding(batch: Batch) -> Batch:
    """Padding counts like text."""
    weights = torch.where(batch.loss_weights_BS == 0, 0.7, batch.loss_weights_BS)
    return replace(batch, loss_weights_BS=weights)


def _pivots(batch: Batch) -> Batch:
    """Pivots of other samples."""
    shift = torch.tensor([1, 0])
    return replace(batch, pivot_key_B2=batch.pivot_key_B2 + shift)


def _nothing(module: str, name: str) -> AbstractContextManager[Any]:
    """A function of megatron-core that does nothing."""
    owner: Any = importlib.import_module(f"megatron.core.distributed.{module}")
    *classes, function = name.split(".")
    for each in classes:
        owner = getattr(owner, each)
    return mock.patch.object(owner, function, lambda *args, **kwargs: None)


FAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "positions": lambda: _batch_fault(_positions),
    "modalities": lambda: _batch_fault(_modalities),
    "padding": lambda: _batch_fault(_padding),
    "pivots": lambda: _batch_fault(_pivots),
    "norms": lambda: _nothing("finalize_model_grads", "_allreduce_non_tensor_model_parallel_grads"),
    "tied table": lambda: _nothing("finalize_model_grads", "_allreduce_word_embedding_grads"),
    "replicas": lambda: _nothing(
        "distributed_data_parallel", "DistributedDataParallel.finish_grad_sync"
    ),
    "collected weights": lambda: _nothing(
        "distributed_data_parallel", "DistributedDataParallel.start_param_sync"
    ),
}
"""By name: what is forgotten or mistaken.  Batch faults spoil one micro-batch of the global batch's
several."""
