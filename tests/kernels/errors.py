"""The error figures of the kernels' READMEs, as Markdown:

    python -m tests.kernels.errors

Largest difference from fp64 over the largest value of a tensor, beside PyTorch's in the same type.
Without a GPU the kernels run in Triton's interpreter, which cuts fp32 to bf16 where a GPU rounds.
"""

import os

import torch

if not torch.cuda.is_available():
    # Before a kernel is imported, see tests/conftest.py.
    os.environ["TRITON_INTERPRET"] = "1"

from tests.kernels import test_pivot_attention, test_sandwich_junction, test_scaled_layer_norm
from tests.kernels.pivot_attention_cases import (
    NAMES,
    Case,
    by_pytorch,
    by_triton,
    errors,
    exact,
    score_scale,
)
from tests.kernels.row_cases import error

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHORT = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}
SHAPES = ((3, 5, 160), (13, 257), (2, 2560))


def attention() -> None:
    """One case in each type, the worst of the fp32 cases, and one where gradients cancel."""
    print("| dtype, D | " + " | ".join(NAMES) + " |\n|---|" + "---|" * len(NAMES))
    for dtype in SHORT:
        case = Case(head_dim=64)
        tensors = case.tensors(dtype)
        expected = exact(case, tensors)
        ours, peer = (errors(by(case, tensors), expected) for by in (by_triton, by_pytorch))
        cells = (f"{ours[name]:.1e} ({peer[name]:.1e})" for name in NAMES)
        print(f"| {SHORT[dtype]}, 64 | " + " | ".join(cells) + " |")
    worst = 0.0
    for case in test_pivot_attention.CASES.values():
        tensors = case.tensors()
        worst = max(worst, *errors(by_triton(case, tensors), exact(case, tensors)).values())
    print(f"\nworst of the fp32 cases: {worst:.1e}")
    case = test_pivot_attention.CANCELLING
    tensors = case.tensors()
    expected, found = exact(case, tensors), by_triton(case, tensors)
    scale = score_scale(case, tensors)
    ours, peer = errors(found, expected), errors(by_pytorch(case, tensors), expected)
    for name in ("q", "k"):
        absolute = float((found[name].double() - expected[name]).abs().max())
        print(
            f"cancelling, d{name}: {ours[name]:.1e} of itself ({peer[name]:.1e}), "
            f"{absolute / scale[name]:.1e} of what cancels"
        )


def rows() -> None:
    """The worst tensor of norm and junction over shapes and rules."""
    print("\n| type | norm | PyTorch |\n|---|---:|---:|")
    norm = test_scaled_layer_norm
    for dtype in SHORT:
        ours, peer = [], []
        for shape in SHAPES:
            for rule in norm.RULES:
                given = norm.case(*shape, dtype=dtype)
                wanted = norm.exact(given, 1e-2, rule)
                functions = (norm.fused, norm.reference.scaled_layer_norm)
                for found, function in zip((ours, peer), functions, strict=True):
                    made = norm.with_gradients(function, given, 1e-2, rule)
                    found += [error(made[name], wanted[name]) for name in made]
        print(f"| {SHORT[dtype]} | {max(ours):.1e} | {max(peer):.1e} |")
    print("\n| branch and residual | junction | PyTorch |\n|---|---:|---:|")
    junction = test_sandwich_junction
    types = ((FP32, FP32), (FP16, FP16), (FP16, FP32), (BF16, BF16), (BF16, FP32))
    for dtype, residual in types:
        ours, peer = [], []
        for shape in SHAPES:
            for relaxed in (junction.RELAXED, {"epsilon": 1e-2}):
                settings = {**relaxed, "dropout": 0.1, "seed": 3}
                given = junction.case(*shape, dtype=dtype, residual=residual)
                wanted = junction.exact(given, **settings)
                for found, function in ((ours, junction.fused), (peer, junction.plain)):
                    made = junction.with_gradients(function, given, **settings)
                    found += [error(made[name], wanted[name]) for name in made]
        names = f"{SHORT[dtype]} and {SHORT[residual]}"
        print(f"| {names} | {max(ours):.1e} | {max(peer):.1e} |")


if __name__ == "__main__":
    attention()
    rows()
