"""Kernels in the sizes of the presets compile for sm_80 and sm_90 without spilling."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

CAPABILITIES = (80, 90)
HGMMA_ROWS = 64
"""Of Hopper's own tensor-core instructions; smaller products take those of its predecessor."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What came out; in a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [
        sys.executable,
        "-m",
        "megatron_cogview.testing.ahead_of_time",
        *map(str, CAPABILITIES),
    ]
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines: list[dict[str, Any]] = json.loads(done.stdout)
    return lines


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    for line in compiled:
        assert line["stack"] == line["LDL"] == line["STL"] == 0, line


def test_registers_and_shared_memory_are_as_stated(compiled: list[dict[str, Any]]) -> None:
    for line in compiled:
        assert line["registers"] <= line["most_registers"], line
        assert line["shared"] <= line["most_shared_bytes"], line


def test_strides_are_numbers_of_the_call(compiled: list[dict[str, Any]]) -> None:
    strided = [line for line in compiled if "q_s" in line["divisible"]]
    assert {line["kernel"] for line in strided} == {
        *("forward_kernel", "query_gradient_kernel", "slot_gradient_kernel"),
        "key_gradient_kernel",
    }
    for line in strided:
        assert {line["types"][name] for name in line["divisible"]} == {"i32"}, line


def test_products_of_halves_use_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    products = [line for line in compiled if line["product_rows"]]
    for line in products:
        is_hopper = line["capability"] == 90 and line["product_rows"] >= HGMMA_ROWS
        assert line["HGMMA" if is_hopper else "HMMA"] > 0, line
    assert {line["capability"] for line in products} == set(CAPABILITIES)
    assert any(line["product_rows"] >= HGMMA_ROWS for line in products)
