"""Comparisons that name what differs and by how much."""

from collections.abc import Mapping

import torch


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, relative to that of ``expected``."""
    difference = (actual.double() - expected.double()).square().mean().sqrt()
    return float(difference / expected.double().square().mean().sqrt().clamp_min(1e-30))


def assert_close_by_name(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], bound: float
) -> None:
    """Every tensor of ``expected`` is in ``actual``, within ``bound`` of relative RMS.

    The key part of a qkv bias is left to its magnitude: its true gradient is zero, because a
    constant added to all keys moves all scores of a row alike, so only rounding is compared there.
    """
    missing = sorted(set(expected) - set(actual))
    assert not missing, f"missing: {missing}"
    failures = []
    for name, value in expected.items():
        error = relative_rms(actual[name], value)
        if not error <= bound:
            failures.append(f"{name}: relative RMS {error:.2e} > {bound:.0e}")
    assert not failures, "\n".join(failures)


def split_qkv_bias(
    tensors: Mapping[str, torch.Tensor], num_heads: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Separate the key parts of all qkv biases from everything else.

    Returns:
        The tensors with the query and value parts of the qkv biases in the biases' place, and the
        key parts under the biases' names.
    """
    rest, keys = {}, {}
    for name, value in tensors.items():
        if name.endswith("linear_qkv.bias"):
            by_head = value.view(num_heads, 3, -1)
            keys[name] = by_head[:, 1]
            rest[name] = by_head[:, [0, 2]]
        else:
            rest[name] = value
    return rest, keys
