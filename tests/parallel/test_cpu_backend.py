"""The contract with megatron-core 0.16.1: every name the CPU backend and the repairs patch."""

import importlib
import importlib.metadata
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_cogview.parallel import cpu_backend
from megatron_cogview.testing.distributed import run_distributed

PATCHED = {
    "megatron.core.jit": ["disable_jit_fuser"],
    "megatron.core.tensor_parallel.random": [
        "_get_cuda_rng_state",
        "_set_cuda_rng_state",
        "CudaRNGStatesTracker.fork",
        "_MODEL_PARALLEL_RNG_TRACKER_NAME",
    ],
    "megatron.core.optimizer.optimizer": ["Float16OptimizerWithFloat16Params.__init__"],
    "megatron.core.optimizer.distrib_optimizer": [
        "DistributedOptimizer._build_model_and_main_param_groups",
        "DistributedOptimizer._get_model_param_range_map",
    ],
    "megatron.core.optimizer.clip_grads": ["clip_grad_by_total_norm_fp32"],
}
needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is patched")


def test_the_release_is_the_one_that_was_read() -> None:
    assert importlib.metadata.version("megatron-core") == cpu_backend.MEGATRON_VERSION == "0.16.1"


@pytest.mark.parametrize("module", sorted(PATCHED))
def test_every_patched_name_exists(module: str) -> None:
    for path in PATCHED[module]:
        value: Any = importlib.import_module(module)
        for name in path.split("."):
            assert hasattr(value, name), f"{module}.{path} is gone; read its new release"
            value = getattr(value, name)


def test_signatures_the_patches_rely_on() -> None:
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    owner = distrib_optimizer.DistributedOptimizer
    build = inspect.unwrap(owner.__dict__["_build_model_and_main_param_groups"].__func__)
    assert next(iter(inspect.signature(build).parameters)) == "cls"
    owned = inspect.signature(owner._get_model_param_range_map)
    assert list(owned.parameters) == ["self", "param"]
    clip = inspect.unwrap(clip_grads.clip_grad_by_total_norm_fp32)
    assert list(inspect.signature(clip).parameters)[:3] == ["parameters", "max_norm", "total_norm"]


@needs_cpu
def test_every_loaded_module_sees_the_proxy_and_nobody_else_does() -> None:
    import megatron.core.models.gpt  # noqa: F401  a module nobody here has imported yet

    bare = [
        name
        for name, module in sys.modules.items()
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch
    ]
    assert bare == []
    assert importlib.import_module("torch") is torch
    assert torch.cuda.current_device is not cpu_backend.PROXY.cuda.current_device


@needs_cpu
def test_proxy_turns_cuda_into_the_cpu() -> None:
    proxy: Any = cpu_backend.PROXY
    assert proxy.cuda.current_device() == torch.device("cpu")
    for name, arguments in (("zeros", (2,)), ("full", ((2,), 1.0)), ("tensor", ([1, 2],))):
        made = getattr(proxy, name)(*arguments, device="cuda", pin_memory=True)
        assert made.device.type == "cpu", name
    assert proxy.ones_like(torch.zeros(2), device=torch.device("cuda", 0)).sum() == 2
    assert proxy.float32 is torch.float32
    x = torch.ones(2)
    assert x.cuda() is x
    assert x.type() == "torch.FloatTensor"


@needs_cpu
def test_too_late_is_an_error() -> None:
    program = (
        "import megatron.core.transformer\n"
        "from megatron_cogview.parallel import cpu_backend\n"
        "cpu_backend.install()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "came too late" in done.stderr


def tracker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Random states fork and return."""
    from megatron.core import tensor_parallel

    from megatron_cogview.configs.parallel import ParallelConfig
    from megatron_cogview.parallel.seeding import seed_step
    from megatron_cogview.parallel.topology import initialize

    groups = initialize(ParallelConfig(tensor=2))
    seed_step(1, 5, groups)
    before = torch.get_rng_state()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        first = torch.rand(3).tolist()
    assert torch.equal(before, torch.get_rng_state())
    with tensor_parallel.get_cuda_rng_tracker().fork():
        second = torch.rand(3).tolist()
    seed_step(1, 5, groups)
    outside = torch.rand(3).tolist()
    with tensor_parallel.get_cuda_rng_tracker().fork():
        again = torch.rand(3).tolist()
    return {
        "first": first,
        "second": second,
        "again": again,
        "outside": outside,
    }


def test_random_states() -> None:
    target = "tests.parallel.test_cpu_backend:tracker"
    one, two = run_distributed(target, 2, timeout_s=120)
    for rank in (one, two):
        assert rank["again"] == rank["first"] != rank["second"]
    assert one["first"] != two["first"], "tensor-parallel ranks share a dropout stream"
    assert one["outside"] == two["outside"], "streams outside the tracker differ"


def failing(arguments: dict[str, Any]) -> None:
    """One rank fails, hangs or dies, as asked."""
    import os
    import time

    if arguments["how"] == "hang":
        time.sleep(600)
    if int(os.environ["RANK"]) == 1:
        if arguments["how"] == "raise":
            raise ValueError("rank one is unhappy")
        os._exit(7)
    time.sleep(600)


@pytest.mark.parametrize(
    ("how", "message"), [("raise", "rank one is unhappy"), ("die", "7"), ("hang", "Timeout")]
)
def test_the_harness_ends_ranks_that_fail_die_or_hang(how: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        target = "tests.parallel.test_cpu_backend:failing"
        run_distributed(target, 2, {"how": how}, 15 if how == "hang" else 60)
