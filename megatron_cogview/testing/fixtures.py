"""Put known weights into a sharded engine, and read its tensors back whole."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_cogview.engines.megatron import MegatronEngine
from megatron_cogview.testing.oracle import Weights

TIED = "embedding.word_embeddings.weight"


def named_parameters(engine: MegatronEngine) -> Iterator[tuple[str, Any]]:
    """This rank's parameters under the whole model's names."""
    for chunk in engine.chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if name.startswith("decoder.layers."):
                # Layers are numbered within a stage; the layer itself knows its global number.
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            whole = ".".join(parts)
            # The last stage of a pipeline holds its own copy of the tied table.
            yield TIED if whole == "output_layer.weight" else whole, parameter


def load_weights(engine: MegatronEngine, weights: Weights) -> None:
    """Copy each parameter's slice of ``weights``, and refresh the optimizer's master copies."""
    for name, parameter in named_parameters(engine):
        whole = weights[name]
        if getattr(parameter, "tensor_model_parallel", False):
            t = engine.topology
            whole = whole.chunk(t.tensor_size, parameter.partition_dim)[t.tensor_rank]
        parameter.data.copy_(whole)
    engine.optimizer.reload_model_params()


def gather(engine: MegatronEngine, read: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors of all stages, on every rank, in fp64 on the CPU.

    Both copies of the tied table must agree, and so must all replicas of unsharded parameters.
    """
    mine: dict[str, torch.Tensor] = {}
    t = engine.topology
    for name, parameter in named_parameters(engine):
        local = read(parameter).detach().contiguous()
        parts = [torch.empty_like(local) for _ in range(t.tensor_size)]
        dist.all_gather(parts, local, group=t.tensor_group)
        if getattr(parameter, "tensor_model_parallel", False):
            mine[name] = torch.cat(parts, parameter.partition_dim).double().cpu()
        else:
            for part in parts:
                torch.testing.assert_close(part, parts[0], rtol=0, atol=0)
            mine[name] = local.double().cpu()
    everyone: list[dict[str, torch.Tensor]] = [{} for _ in range(t.world_size)]
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for tensors in everyone:
        for name, value in tensors.items():
            if name in whole:
                torch.testing.assert_close(value, whole[name], rtol=0, atol=0)
            whole[name] = value
    return whole


def gradients(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Gradients of the last step; clipping must be off, for it scales them in place."""
    return gather(engine, lambda parameter: parameter.main_grad)


def weights(engine: MegatronEngine) -> dict[str, torch.Tensor]:
    """Current weights."""
    return gather(engine, lambda parameter: parameter)
