"""Peers of attention: three regions by ours, FlexAttention and the original, and dense causal ones.

Shapes: B batch, N heads, S sequence, D head dim, H = N D hidden, M = B S tokens.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from megatron_cogview.analysis.kernel_speed.gathered import GatheredPrefix
from megatron_cogview.analysis.kernel_speed.materialised import pivot_positions, sparse_attention
from megatron_cogview.analysis.kernel_speed.peers import (
    Case,
    NotAvailable,
    Peer,
    Tensors,
    with_gradients,
)
from megatron_cogview.analysis.kernel_speed.sizes import Sizes
from megatron_cogview.kernels.pb_relax_attention.reference import causal_mask, pb_relax_attention
from megatron_cogview.kernels.pivot_attention.operator import (
    dense_attention,
    plan_of,
    three_region_attention,
)
from megatron_cogview.kernels.pivot_attention.plan import make_plan as plan_written_out
from megatron_cogview.kernels.pivot_attention.sampler import pivot_mask

if TYPE_CHECKING:
    from megatron_cogview.kernels.dispatch import Wanted

OURS, PLAN, PRODUCTS = "ours, three regions", "ours: the plan alone", "products of a layer"
RELEASED, FLEX = "original sparse, materialised", "FlexAttention, gathered"
FLEX_GIVEN, FLEX_MASK = "FlexAttention, mask given", "FlexAttention: the mask alone"
DENSE = "ours, dense"
FLASH, CUDNN, EFFICIENT = "SDPA flash", "SDPA cuDNN", "SDPA efficient"
EAGER, COMPILED = "PB-relax, materialised", "PB-relax, torch.compile"
FLASH_2, FLASH_3 = "flash_attn 2", "flash_attn 3"

_SDPA = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}
_OPTIONAL = {FLASH_2: "flash_attn", FLASH_3: "flash_attn_interface"}
"""Modules with a ``flash_attn_func``; asked only if they are installed."""

_ALPHA, _LAYER, _SEED = 32.0, 1, 1234
_FUSED, _STORED = 0.01, 0.015
"""Largest errors in bf16, of scores in fp32 accumulators and of stored ones.  One key too few in
every row makes an error of 0.02 or more at the lengths in question."""


@dataclass
class _Inputs:
    """One problem; everything a peer may have ready before its call."""

    device: torch.device
    sizes: Sizes
    length: int
    backward: bool

    def __post_init__(self) -> None:
        torch.manual_seed(self.length)
        # Sequence first in memory, as megatron-core's matrix products make and take them.
        shape = (self.length, self.batch, self.sizes.heads, self.sizes.head_dim)
        q, k, v, gradient = (
            torch.randn(shape, device=self.device, dtype=torch.bfloat16).permute(1, 2, 0, 3)
            for _ in range(4)
        )
        self.qkv = tuple(x.requires_grad_(self.backward) for x in (q, k, v))
        self.gradient = gradient
        texts = [[sample, self.sizes.text_length] for sample in range(self.batch)]
        self.key_B2 = torch.tensor(texts, device=self.device)
        # By name, so that a GPU without Triton is a failure and not a slow result.
        self.wanted: Wanted = "triton" if self.device.type == "cuda" else "auto"

    @property
    def batch(self) -> int:
        return self.sizes.batch_at(self.length)

    @property
    def window(self) -> tuple[int, int]:
        return self.sizes.window_block, self.sizes.window_blocks

    @cached_property
    def chosen_BS(self) -> Tensor:
        return pivot_mask(self.key_B2, self.length, self.sizes.num_pivots, _LAYER, _SEED)

    @cached_property
    def pivot_BP(self) -> Tensor:
        return pivot_positions(self.chosen_BS)

    def operation(self, attend: Callable[..., Tensor]) -> Callable[[], Tensors]:
        """A call of ``attend(q, k, v)``, with its backward pass if that is measured."""

        def run() -> Tensors:
            return (attend(*self.qkv),)

        return with_gradients(run, self.qkv, (self.gradient,)) if self.backward else run

    def flops(self, pairs: int) -> int:
        """Two products a pair of query and key; the backward pass counts twice as much."""
        per_pair = 4 * self.sizes.heads * self.sizes.head_dim
        return pairs * per_pair * (3 if self.backward else 1)

    @cached_property
    def dense_flops(self) -> int:
        return self.flops(self.batch * self.length * (self.length + 1) // 2)

    @cached_property
    def sparse_flops(self) -> int:
        return self.flops(three_region_pairs(self.chosen_BS, *self.window))


def three_region_pairs(chosen_BS: Tensor, window_block: int, window_blocks: int) -> int:
    """Pairs of query and key that are seen, over all samples.

    Args:
        chosen_BS: of ``sampler.pivot_mask``.
        window_block, window_blocks: tokens of a block (W), and blocks seen with the own (T).
    """
    query_S = torch.arange(chosen_BS.shape[1], device=chosen_BS.device)
    first_S = ((query_S // window_block - window_blocks + 1) * window_block).clamp(min=0)
    # Pivots before a window are those counted up to the token before it.
    before_BS = torch.nn.functional.pad(chosen_BS.long().cumsum(-1), (1, 0))[:, first_S]
    return int((before_BS + query_S - first_S + 1).sum())


def attention_case(sizes: Sizes, length: int, backward: bool, estimate_s: float) -> Case:
    """Attention of one length, forward alone or with its backward pass."""
    batch = sizes.batch_at(length)
    mode = "forward + backward" if backward else "forward"
    return Case(
        name=f"attention, {length:,} tokens, batch {batch}: {mode}",
        estimate_s=estimate_s,
        facts={
            "operation": "attention",
            "mode": mode,
            "length": length,
            "batch": batch,
            "heads": sizes.heads,
            "head_dim": sizes.head_dim,
            "window_block": sizes.window_block,
            "window_blocks": sizes.window_blocks,
            "num_pivots": sizes.num_pivots,
            "text_length": sizes.text_length,
            "dtype": "bf16",
        },
        peers=lambda device: _peers(_Inputs(device, sizes, length, backward)),
    )


def _peers(inputs: _Inputs) -> list[Peer]:
    peers = [*_sparse_peers(inputs), *_flex_peers(inputs), *_dense_peers(inputs)]
    if inputs.backward:
        peers.append(Peer(name=PRODUCTS, prepare=lambda: _products(inputs)))
    return peers


def _sparse_peers(inputs: _Inputs) -> Iterator[Peer]:
    sizes, (block, blocks) = inputs.sizes, inputs.window
    drawn: dict[str, Any] = {
        "num_pivots": sizes.num_pivots,
        "layer_number": _LAYER,
        "seed": _SEED,
        "max_text": sizes.text_length,
    }

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return three_region_attention(
            *(q, k, v, inputs.key_B2),
            total_length=inputs.length,
            window_block=block,
            window_blocks=blocks,
            implementation=inputs.wanted,
            **drawn,
        )

    def released(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sparse_attention(q, k, v, inputs.pivot_BP, block, blocks)

    yield Peer(name=OURS, prepare=lambda: inputs.operation(ours), flops=inputs.sparse_flops)
    make_plan = plan_of if inputs.device.type == "cuda" else plan_written_out
    plan = partial(make_plan, inputs.key_B2, inputs.length, **drawn)
    yield Peer(name=PLAN, prepare=lambda: plan)
    yield Peer(
        name=RELEASED,
        prepare=lambda: inputs.operation(released),
        like=OURS,
        tolerance=_STORED,
        flops=inputs.sparse_flops,
    )


def _flex_peers(inputs: _Inputs) -> Iterator[Peer]:
    """The same key sets; with the mask made in the call, as new pivots want it, and without."""

    def given() -> Callable[[], Tensors]:
        prefix, attention = _flex(inputs)
        mask = prefix.mask()
        return inputs.operation(lambda q, k, v: attention(q, k, v, mask))

    def whole() -> Callable[[], Tensors]:
        prefix, attention = _flex(inputs)
        build = torch.compile(create_block_mask, dynamic=False)
        return inputs.operation(lambda q, k, v: attention(q, k, v, prefix.mask(build)))

    def mask_alone() -> Callable[[], Any]:
        build = torch.compile(create_block_mask, dynamic=False)
        return partial(GatheredPrefix(inputs.pivot_BP, inputs.length, *inputs.window).mask, build)

    for name, prepare in ((FLEX, whole), (FLEX_GIVEN, given)):
        yield Peer(
            name=name, prepare=prepare, like=OURS, tolerance=_FUSED, flops=inputs.sparse_flops
        )
    yield Peer(name=FLEX_MASK, prepare=mask_alone)


def _flex(inputs: _Inputs) -> tuple[GatheredPrefix, Any]:
    if inputs.device.type == "cpu" and inputs.backward:
        raise NotAvailable("FlexAttention has no backward pass on a CPU")
    prefix = GatheredPrefix(inputs.pivot_BP, inputs.length, *inputs.window)
    return prefix, torch.compile(prefix.attention, dynamic=False, fullgraph=True)


def _dense_peers(inputs: _Inputs) -> Iterator[Peer]:
    peer = partial(Peer, flops=inputs.dense_flops)
    ours = partial(dense_attention, implementation=inputs.wanted)
    yield peer(name=DENSE, prepare=lambda: inputs.operation(ours))
    for name, backend in _SDPA.items():
        attend = partial(_scaled_dot_product, backend)
        prepare = partial(inputs.operation, attend)
        yield peer(name=name, prepare=prepare, like=DENSE, tolerance=_FUSED)
    for name, module in _OPTIONAL.items():
        if importlib.util.find_spec(module) is not None:
            prepare = partial(_flash_attn, inputs, module)
            yield peer(name=name, prepare=prepare, like=DENSE, tolerance=_FUSED)

    def written_out(compiled: bool) -> Callable[[], Tensors]:
        visible = causal_mask(inputs.length, inputs.length, inputs.device)
        attend: Any = pb_relax_attention
        if compiled:
            attend = torch.compile(attend, dynamic=False, fullgraph=True)
        return inputs.operation(lambda q, k, v: attend(q, k, v, visible, _ALPHA, "row"))

    for name, compiled in ((EAGER, False), (COMPILED, True)):
        prepare = partial(written_out, compiled)
        yield peer(name=name, prepare=prepare, like=DENSE, tolerance=_STORED)


def _scaled_dot_product(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _flash_attn(inputs: _Inputs, module: str) -> Callable[[], Tensors]:
    function = importlib.import_module(module).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
        # Some versions return the logarithm of the sums beside the result.
        out_BSND: Tensor = found[0] if isinstance(found, tuple) else found
        return out_BSND.transpose(1, 2)

    return inputs.operation(attend)


def _products(inputs: _Inputs) -> Callable[[], None]:
    """The matrix products of a layer, forward and backward: its time but attention's and norms'."""
    hidden, tokens = inputs.sizes.hidden, inputs.batch * inputs.length
    make = partial(torch.randn, device=inputs.device, dtype=torch.bfloat16)
    shapes = ((hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden))
    triples = [(make(tokens, i), make(i, o), make(tokens, o)) for i, o in shapes]

    def run() -> None:
        for input_MI, weight_IO, gradient_MO in triples:
            torch.mm(input_MI, weight_IO)
            torch.mm(gradient_MO, weight_IO.t())
            torch.mm(input_MI.t(), gradient_MO)

    return run
