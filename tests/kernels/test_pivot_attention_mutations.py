"""Small mistakes in three-region attention, each of which the comparison with fp64 must notice."""

import pytest
import torch

pytest.importorskip("triton")

import triton as compiler
import triton.language as tl

from megatron_cogview.kernels.dispatch import is_interpreted
from megatron_cogview.kernels.pivot_attention import operator, plan, triton, triton_backward
from megatron_cogview.kernels.pivot_attention.sampler import chosen
from tests.kernels.pivot_attention_cases import Case, by_triton, errors, exact

# Compiled kernels keep the functions they were compiled with.
pytestmark = pytest.mark.skipif(not is_interpreted(), reason="only the interpreter can be patched")

KERNELS = (triton, triton_backward)


@compiler.jit
def any_earlier_key(position, key, WINDOW: tl.constexpr, BLOCKS: tl.constexpr):
    return key <= position


@compiler.jit
def start_of_one_more_block(position, WINDOW: tl.constexpr, BLOCKS: tl.constexpr):
    return tl.maximum(position // WINDOW - BLOCKS, 0) * WINDOW


@compiler.jit
def start_one_token_late(position, WINDOW: tl.constexpr, BLOCKS: tl.constexpr):
    return tl.maximum(position // WINDOW - (BLOCKS - 1), 0) * WINDOW + 1


@compiler.jit
def start_one_token_early(position, WINDOW: tl.constexpr, BLOCKS: tl.constexpr):
    start = tl.maximum(position // WINDOW - (BLOCKS - 1), 0) * WINDOW
    return tl.maximum(start - 1, 0)


def no_deduplication(monkeypatch):
    """All slots are visited, and keys in the window count twice."""

    def visit_all(*arguments, **given):
        made = plan.make_plan(*arguments, **given)
        every_B1 = made.slots_before_BL[:, 49:50]  # the last of the keys
        return made._replace(slots_before_BL=every_B1.expand_as(made.slots_before_BL).contiguous())

    monkeypatch.setattr(operator, "make_plan", visit_all)
    for module in KERNELS:
        monkeypatch.setattr(module, "before_window", any_earlier_key)


def shifted(start):
    def change(monkeypatch):
        for module in KERNELS:
            monkeypatch.setattr(module, "window_start", start)

    return change


def one_pivot_fewer(monkeypatch):
    """The last pivot before the window of the last query is left out."""

    def without_one(*arguments, **given):
        mask_BL = chosen(*arguments, **given)
        for row in mask_BL:
            row[int(torch.nonzero(row[:40]).max())] = False
        return mask_BL

    monkeypatch.setattr(plan, "chosen", without_one)


@pytest.mark.parametrize(
    "mutate",
    [
        no_deduplication,
        shifted(start_of_one_more_block),
        shifted(start_one_token_late),
        shifted(start_one_token_early),
        one_pivot_fewer,
    ],
    ids=["no deduplication", "a block", "a token late", "a token early", "a pivot fewer"],
)
def test_a_mistake_is_noticed_in_the_output_and_every_gradient(monkeypatch, mutate):
    case = Case(heads=1)
    tensors = case.tensors()
    expected = exact(case, tensors)
    assert max(errors(by_triton(case, tensors), expected).values()) < 1e-6
    mutate(monkeypatch)
    found = errors(by_triton(case, tensors), expected)
    assert min(found.values()) > 1e-3, found
