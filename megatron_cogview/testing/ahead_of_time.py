"""Compile every shipped kernel for GPUs that are not here, and look at what came out.

    python -m megatron_cogview.testing.ahead_of_time 80 90

prints a JSON list: one entry a kernel and architecture with registers, shared memory, spills and
tensor-core instructions.  It must be a process without TRITON_INTERPRET, under which nothing is
compiled.  Triton's wheel brings ptxas, cuobjdump and nvdisasm.
"""

import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cogview.kernels.dispatch import is_interpreted
from megatron_cogview.kernels.triton_support import Shipped

OPERATIONS = ("sandwich_junction", "scaled_layer_norm", "pivot_attention", "codebook_lookup")
"""Folders of ``kernels/`` whose ``triton.py`` has a function ``shipped()``."""

_PROCESSES = 2
"""That compile.  Each works on one core."""
_INSTRUCTIONS = ("HMMA", "HGMMA", "LDL", "STL", "LDGSTS")


def shipped() -> Iterator[tuple[str, Shipped]]:
    """Every kernel in the sizes that are compiled here, with its operation."""
    for operation in OPERATIONS:
        module = importlib.import_module(f"megatron_cogview.kernels.{operation}.triton")
        for each in module.shipped():
            yield operation, each


@functools.cache
def everything() -> tuple[tuple[str, Shipped], ...]:
    """:func:`shipped`, to be counted through."""
    return tuple(shipped())


def compiled(each: Shipped, capability: int) -> Any:
    """Triton's result for one kernel; ``capability`` is 80 for sm_80."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = each.kernel.arg_names
    types = {name: each.types.get(name, "constexpr") for name in names}
    unknown = {name for name in names if name not in each.types and name not in each.constants}
    if unknown:
        raise ValueError(f"{each.kernel.__name__}: no type for {sorted(unknown)}")
    # What the JIT sees at a start: allocations begin at multiples of 16 bytes, and some numbers are
    # multiples of 16.  Sizes may or may not be, so nothing is promised of them.
    hints = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(names)
        if types[name].startswith("*") or name in each.divisible
    }
    source = ASTSource(
        fn=each.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in each.constants.items()},
        attrs=hints,
    )
    options = {"num_warps": each.num_warps, "num_stages": each.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def inspected(result: Any) -> dict[str, int]:
    """Registers, stack, shared memory and counts of instructions of a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        usage = _said(tools / "cuobjdump", "--dump-resource-usage", str(cubin))
        code = _said(tools / "nvdisasm", "--print-code", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    words = Counter(re.findall(rf"\b(?:{'|'.join(_INSTRUCTIONS)})\b", code))
    counts = {name: words[name] for name in _INSTRUCTIONS}
    shared = int(result.metadata.shared)
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": shared, **counts}


def _said(*words: str | Path) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def described(number: int, capability: int) -> dict[str, Any]:
    """What is printed of a kernel, given by its place in :func:`everything`."""
    operation, each = everything()[number]
    return {
        "operation": operation,
        "kernel": each.kernel.__name__,
        "capability": capability,
        "types": dict(each.types),
        "divisible": each.divisible,
        "constants": {name: str(value) for name, value in each.constants.items()},
        "num_warps": each.num_warps,
        "num_stages": each.num_stages,
        "product_rows": each.product_rows,
        "most_registers": each.most_registers,
        "most_shared_bytes": each.most_shared_bytes,
        **inspected(compiled(each, capability)),
    }


def main(capabilities: list[int]) -> None:
    """Compile everything and print what came out, in the order of :func:`everything`."""
    if is_interpreted() or os.environ.get("TRITON_INTERPRET"):
        sys.exit("unset TRITON_INTERPRET: interpreted functions cannot be compiled")
    wanted = list(itertools.product(range(len(everything())), capabilities))
    # Forked, so that nothing is imported twice: no thread runs yet, and no GPU is in use.
    with multiprocessing.get_context("fork").Pool(_PROCESSES) as pool:
        json.dump(pool.starmap(described, wanted, chunksize=1), sys.stdout)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
