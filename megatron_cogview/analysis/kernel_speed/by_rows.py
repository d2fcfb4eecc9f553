"""Peers of operations that look at one row at a time: the junction, the norm, the nearest code.

Shapes: M tokens, H hidden; N vectors of width D and K codes.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor

from megatron_cogview.analysis.kernel_speed.peers import (
    Case,
    Peer,
    Tensors,
    share_that_differs,
    with_gradients,
)
from megatron_cogview.analysis.kernel_speed.sizes import Sizes
from megatron_cogview.kernels.codebook_lookup.operator import nearest_code
from megatron_cogview.kernels.dispatch import Implementation, Wanted, choose
from megatron_cogview.kernels.sandwich_junction import operator as junction
from megatron_cogview.kernels.sandwich_junction import reference as written_junction
from megatron_cogview.kernels.sandwich_junction.reference import JunctionRule
from megatron_cogview.kernels.scaled_layer_norm import operator as norm
from megatron_cogview.kernels.scaled_layer_norm import reference as written_norm

OURS, EAGER, COMPILED, COPY = "ours", "eager", "torch.compile", "copy"
OURS_RELAXED, OURS_DROPOUT = "ours, PB-relax", "ours, dropout 0.1"
OURS_PLAIN, PLAIN = "ours, plain", "PyTorch, plain"
BLOCKS, MATRIX = "by blocks, written out", "whole distance matrix"

_EPSILON, _DROPOUT, _SEED = 1e-5, 0.1, 7
_ROUNDED, _SAME_CODES = 0.03, 1e-3
"""Largest error of chains of norms in bf16; largest part of codes that near-ties may decide."""

_OPTIONAL = {
    "Liger, plain": ("liger_kernel", "liger_kernel.ops.layer_norm"),
    "apex, plain": ("fused_layer_norm_cuda", "apex.normalization.fused_layer_norm"),
}
"""Peers that are asked only if their first module is installed, and the module with the norm."""


def _ours(operation: str, device: torch.device) -> Implementation:
    wanted: Wanted = "triton" if device.type == "cuda" else "auto"
    return choose(operation, wanted, device)


def junction_case(
    sizes: Sizes, tokens: int, mode: Literal["forward", "backward"], estimate_s: float
) -> Case:
    """``z = x + LN(h + bias)``, ``n = LN(z)``; the backward pass alone, on a graph that is kept."""
    facts = {
        "operation": "junction",
        "mode": mode,
        "tokens": tokens,
        "hidden": sizes.hidden,
        "dtype": "bf16",
    }
    return Case(
        name=f"junction, {tokens:,} tokens: {mode}",
        estimate_s=estimate_s,
        facts=facts,
        peers=lambda device: list(_junction_peers(sizes, tokens, mode == "backward", device)),
    )


def _junction_peers(
    sizes: Sizes, tokens: int, backward: bool, device: torch.device
) -> Iterator[Peer]:
    torch.manual_seed(tokens)
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    h_MH, x_MH = (make(tokens, sizes.hidden, requires_grad=backward) for _ in range(2))
    parameters = [make(sizes.hidden, requires_grad=backward) for _ in range(5)]
    gradients = tuple(make(tokens, sizes.hidden) for _ in range(2))
    inputs = (h_MH, x_MH, *parameters)

    def prepared(function: Callable[..., Any]) -> Callable[[], Tensors]:
        def forward() -> Tensors:
            bias_H, *affine = parameters
            z_MH, n_MH = function(h_MH, bias_H, x_MH, *affine)
            return z_MH, n_MH

        return _backward_alone(forward, inputs, gradients) if backward else forward

    def ours(**more: Any) -> Callable[[], Tensors]:
        implementation = _ours("sandwich_junction", device)
        function = partial(junction.sandwich_junction, implementation=implementation, **more)
        return prepared(partial(function, epsilon=_EPSILON))

    def written(
        rule: JunctionRule, dropout: float, compiled: bool = False
    ) -> Callable[[], Tensors]:
        settings = (_EPSILON, rule, rule, dropout, _SEED)

        def chain(*tensors: Tensor) -> Any:
            written_out: Any = written_junction.sandwich_junction
            return written_out(*tensors, *settings)

        return prepared(_compiled(chain) if compiled else chain)

    peer = partial(
        Peer,
        tolerance=_ROUNDED,
        # Reads h and x and writes z and n; backward reads dz, dn, h and z and writes dx and dh.
        least_bytes=tokens * sizes.hidden * (12 if backward else 8),
    )
    yield peer(name=OURS, prepare=ours)
    yield peer(name=EAGER, prepare=lambda: written("none", 0.0), like=OURS)
    yield peer(name=COMPILED, prepare=lambda: written("none", 0.0, True), like=OURS)
    relaxed = {"end_rule": "token_max", "next_rule": "token_max"}
    dropped = {"dropout": _DROPOUT, "seed": _SEED}
    yield peer(
        name=OURS_RELAXED,
        prepare=lambda: ours(**relaxed),
        expected=lambda: written("token_max", 0.0)(),
    )
    yield peer(
        name=OURS_DROPOUT,
        prepare=lambda: ours(**dropped),
        expected=lambda: written("none", _DROPOUT)(),
    )
    yield copy_peer(sizes, device)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """In one piece and for one shape, as a training runs it."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def _backward_alone(
    forward: Callable[[], Tensors], inputs: tuple[Tensor, ...], gradients: Tensors
) -> Callable[[], Tensors]:
    """The backward pass of one forward pass, as often as it is called."""
    # A compiled graph may hand its saved tensors on as scratch memory, and could then run once.
    with functorch_config.patch(donated_buffer=False):
        outputs = forward()
        # Compiled backward passes are compiled when they first run.
        torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)
    return lambda: torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)


def norm_case(sizes: Sizes, tokens: int, backward: bool, estimate_s: float) -> Case:
    """PB-relax LayerNorm by the token's maximum, and the plain norm."""
    mode = "forward + backward" if backward else "forward"
    facts = {
        "operation": "norm",
        "mode": mode,
        "tokens": tokens,
        "hidden": sizes.hidden,
        "dtype": "bf16",
    }
    return Case(
        name=f"norm, {tokens:,} tokens: {mode}",
        estimate_s=estimate_s,
        facts=facts,
        peers=lambda device: list(_norm_peers(sizes, tokens, backward, device)),
    )


def _norm_peers(sizes: Sizes, tokens: int, backward: bool, device: torch.device) -> Iterator[Peer]:
    torch.manual_seed(tokens)
    make = partial(torch.randn, device=device, dtype=torch.bfloat16)
    x_MH = make(tokens, sizes.hidden, requires_grad=backward)
    weight_H, bias_H = (make(sizes.hidden, requires_grad=backward) for _ in range(2))
    inputs, gradient_MH = (x_MH, weight_H, bias_H), make(tokens, sizes.hidden)

    def prepared(function: Callable[..., Any]) -> Callable[[], Tensors]:
        def forward() -> Tensors:
            return (function(*inputs),)

        return with_gradients(forward, inputs, (gradient_MH,)) if backward else forward

    def ours(rule: norm.RelaxRule) -> Callable[[], Tensors]:
        implementation = _ours("scaled_layer_norm", device)
        function = partial(norm.scaled_layer_norm, rule=rule, implementation=implementation)
        return prepared(partial(function, epsilon=_EPSILON))

    relaxed = partial(written_norm.scaled_layer_norm, epsilon=_EPSILON, rule="token_max")
    # Reads x and writes y; backward reads x and dy and writes dx.
    least_bytes = tokens * sizes.hidden * 2 * (5 if backward else 2)
    peer = partial(Peer, tolerance=_ROUNDED, least_bytes=least_bytes)
    yield peer(name=OURS, prepare=lambda: ours("token_max"))
    yield peer(name=EAGER, prepare=lambda: prepared(relaxed), like=OURS)

    yield peer(name=COMPILED, prepare=lambda: prepared(_compiled(relaxed)), like=OURS)
    yield peer(name=OURS_PLAIN, prepare=lambda: ours("none"))
    yield peer(name=PLAIN, prepare=lambda: prepared(_layer_norm), like=OURS_PLAIN)
    for name, (needed, module) in _OPTIONAL.items():
        if importlib.util.find_spec(needed) is not None:
            prepare = partial(_other_norm, module, prepared)
            yield peer(name=name, prepare=prepare, like=OURS_PLAIN)
    yield copy_peer(sizes, device)


def _layer_norm(x_MH: Tensor, weight_H: Tensor, bias_H: Tensor) -> Tensor:
    return F.layer_norm(x_MH, weight_H.shape, weight_H, bias_H, _EPSILON)


def _other_norm(
    module: str, prepared: Callable[[Callable[..., Any]], Callable[[], Tensors]]
) -> Callable[[], Tensors]:
    found: Any = importlib.import_module(module)
    if module.startswith("liger"):
        return prepared(lambda x, w, b: found.LigerLayerNormFunction.apply(x, w, b, _EPSILON))
    return prepared(lambda x, w, b: found.fused_layer_norm_affine(x, w, b, w.shape, _EPSILON))


def copy_peer(sizes: Sizes, device: torch.device) -> Peer:
    """A copy on the device: what traffic is measured by, in the same rounds."""

    def prepare() -> Callable[[], Tensor]:
        source = torch.ones(sizes.copy_bytes // 2, device=device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return Peer(name=COPY, prepare=prepare, least_bytes=2 * sizes.copy_bytes)


def codebook_case(sizes: Sizes, estimate_s: float) -> Case:
    """Nearest of all codes in fp32."""
    facts = {
        "operation": "codebook",
        "mode": "forward",
        "vectors": sizes.vectors,
        "codes": sizes.codes,
        "width": sizes.code_dim,
        "dtype": "fp32",
    }
    return Case(
        name=f"codebook lookup, {sizes.vectors:,} vectors, {sizes.codes:,} codes",
        estimate_s=estimate_s,
        facts=facts,
        peers=lambda device: list(_codebook_peers(sizes, device)),
    )


def _codebook_peers(sizes: Sizes, device: torch.device) -> Iterator[Peer]:
    torch.manual_seed(sizes.vectors)
    vectors_ND = torch.randn(sizes.vectors, sizes.code_dim, device=device)
    codes_KD = torch.randn(sizes.codes, sizes.code_dim, device=device)
    wanted: Wanted = "triton" if device.type == "cuda" else "auto"

    def whole_matrix() -> Tensor:
        distance_NK = (
            vectors_ND.square().sum(1, keepdim=True)
            - 2 * vectors_ND @ codes_KD.t()
            + codes_KD.square().sum(1)
        )
        return distance_NK.argmin(1)

    peer = partial(Peer, error=share_that_differs, like=OURS)
    search = partial(nearest_code, vectors_ND, codes_KD)
    yield Peer(name=OURS, prepare=lambda: partial(search, backend=wanted))
    yield peer(name=BLOCKS, prepare=lambda: partial(search, backend="reference"))
    yield peer(name=MATRIX, prepare=lambda: whole_matrix, tolerance=_SAME_CODES)


def rates_case(sizes: Sizes, estimate_s: float) -> Case:
    """What the device does at best: a copy and a square product."""
    side = sizes.gemm_side

    def peers(device: torch.device) -> list[Peer]:
        def product() -> Callable[[], Tensor]:
            a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
            out = torch.empty_like(a)
            return partial(torch.mm, a, b, out=out)

        square = Peer(name=f"{side:,} x {side:,} product", prepare=product, flops=2 * side**3)
        return [copy_peer(sizes, device), square]

    facts = {"operation": "rates", "mode": "forward", "dtype": "bf16"}
    return Case(name="rates of copy and product", estimate_s=estimate_s, facts=facts, peers=peers)
