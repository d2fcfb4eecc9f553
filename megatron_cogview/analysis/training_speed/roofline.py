"""The least time of a step's matrix products: each one alone, at its best.

The sum over the whole time of a step says how near the step is to a machine that does nothing but
these products (attention's are not among them: a fused kernel does more than multiply).

Shapes: T tokens of a micro-batch.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_cogview.configs.run import RunConfig


class Linear(NamedTuple):
    """A matrix that tokens are multiplied with."""

    tokens: int
    inputs: int
    outputs: int
    has_bias: bool


def linears(config: RunConfig) -> Counter[Linear]:
    """The matrices of one step and how often tokens pass through each, on one process."""
    m, tokens = config.model, config.training.micro_batch_size * config.sequence.model_length
    h, micro_batches = m.hidden_size, config.training.num_micro_batches(1)
    count: Counter[Linear] = Counter()
    for inputs, outputs in ((h, 3 * h), (h, h), (h, 4 * h), (4 * h, h)):
        count[Linear(tokens, inputs, outputs, True)] += m.num_layers * micro_batches
    count[Linear(tokens, h, m.vocab.padded_size, False)] += micro_batches
    return count


def gemm_flops(config: RunConfig) -> int:
    """Operations of these products, forward, for the inputs' and for the weights' gradients."""
    return sum(
        6 * one.tokens * one.inputs * one.outputs * number
        for one, number in linears(config).items()
    )


def best_seconds(config: RunConfig, device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """Sum over a step's products of the best time of each."""
    total = 0.0
    for one, number in linears(config).items():
        x = torch.randn(one.tokens, one.inputs, device=device, dtype=dtype)
        weight = torch.randn(one.outputs, one.inputs, device=device, dtype=dtype)
        bias = torch.randn(one.outputs, device=device, dtype=dtype) if one.has_bias else None
        grad = torch.randn(one.tokens, one.outputs, device=device, dtype=dtype)
        for product in _products(x, weight, bias, grad):
            total += number * _best(product, device, rounds)
    return total


def _products(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, grad: torch.Tensor
) -> list[Callable[[], object]]:
    """Output, gradient of the input, gradient of the weight; written where they were before."""
    input_grad, weight_grad = torch.empty_like(x), torch.empty_like(weight)
    return [
        lambda: F.linear(x, weight, bias),
        lambda: torch.mm(grad, weight, out=input_grad),
        lambda: torch.mm(grad.t(), x, out=weight_grad),
    ]


def square_tflops(side: int, device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """Rate of a large square product: what the fraction of a step's arithmetic is taken of."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / _best(lambda: torch.mm(a, b, out=out), device, rounds) / 1e12


def _best(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Seconds of the fastest of ``rounds`` runs, after one that is not counted."""
    run()
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return min(times)
    # Three in a row between two events, so that the launch of one hides behind another.
    pairs = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize(device)
    return float(min(start.elapsed_time(end) for start, end in pairs)) / 3e3
