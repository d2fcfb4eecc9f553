"""Run megatron-core 0.16.1 on a machine without CUDA.  With CUDA present nothing is done here.

megatron-core spells ``torch.cuda`` and ``device="cuda"`` in its layers, schedules and optimizers.
The patches change what it sees, and as little else as possible:

* every ``megatron.core`` module sees a proxy in place of ``torch`` whose CUDA calls mean the CPU;
* its CUDA random-state tracker keeps CPU states instead;
* ``Tensor.cuda()`` returns the tensor, for the whole process;
* ``Tensor.type()`` answers ``torch.cuda.*``, but only while three optimizer functions run.

:func:`install` must run before the program imports anything else of ``megatron.core``.  The
contract test ``tests/parallel/test_cpu_backend.py`` watches every name that is patched here.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

MEGATRON_VERSION = "0.16.1"
"""The release whose lines were read; another one needs the contract test to be read again."""

FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "empty_strided",
    "full",
    "ones",
    "ones_like",
    "tensor",
    "zeros",
    "zeros_like",
)
"""Functions of torch that megatron-core calls with ``device="cuda"`` or with pinned memory."""

_CPU = torch.device("cpu")


class _Overlay(types.ModuleType):
    """A module that answers from its own dictionary first, then from ``target``."""

    def __init__(self, name: str, target: types.ModuleType) -> None:
        super().__init__(name)
        self.__dict__["_target"] = target

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_target"], name)


def _means_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def redirected(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _means_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return redirected


def _make_proxy() -> types.ModuleType:
    """``torch`` as megatron-core shall see it."""
    cuda: Any = _Overlay("torch.cuda", torch.cuda)
    cuda.current_device = lambda: _CPU
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.empty_cache = lambda: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    proxy: Any = _Overlay("torch", torch)
    proxy.cuda = cuda
    for name in FACTORIES:
        setattr(proxy, name, _on_cpu(getattr(torch, name)))
    return proxy


PROXY = _make_proxy()


def _give_proxy(module: types.ModuleType) -> None:
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = PROXY


class _LateImports(importlib.abc.MetaPathFinder):
    """Gives the proxy to modules that megatron-core imports later, inside its functions."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            _give_proxy(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Let ``param.type() in ["torch.cuda.FloatTensor", ...]`` accept CPU tensors."""
    original = torch.Tensor.type

    def answer(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = answer  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapped


def install() -> bool:
    """Patch megatron-core's forward, backward and optimizer paths.  Safe to call again.

    Returns:
        True when the patches are in place, False when CUDA makes them unnecessary.

    Raises:
        RuntimeError: another release of megatron-core, or one that was imported too far already.
    """
    if torch.cuda.is_available():
        return False
    if any(isinstance(finder, _LateImports) for finder in sys.meta_path):
        return True
    release = importlib.metadata.version("megatron-core")
    if release != MEGATRON_VERSION:
        raise RuntimeError(
            f"megatron-core {release}: the CPU backend was written for {MEGATRON_VERSION}; install "
            f"megatron-core=={MEGATRON_VERSION}"
        )
    if "megatron.core.transformer" in sys.modules:
        raise RuntimeError(
            "cpu_backend.install() came too late: megatron.core.transformer is imported already, "
            "with its fusions set to be compiled"
        )
    from megatron.core import jit

    jit.disable_jit_fuser()
    sys.meta_path.insert(0, _LateImports())
    import megatron.core.tensor_parallel.random as random_states

    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and module is not None:
            _give_proxy(module)
    _patch_random_states(random_states)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    _patch_optimizers()
    return True


def _patch_random_states(random_states: Any) -> None:
    """Make the random-state tracker keep states of the CPU generator."""
    random_states._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random_states._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    default_name = random_states._MODEL_PARALLEL_RNG_TRACKER_NAME

    class CpuRngStatesTracker(random_states.CudaRNGStatesTracker):
        """The original ``fork`` warns whenever the CPU generator moves; here it always does."""

        _current_state_name: str

        @contextlib.contextmanager
        def fork(self, name: str = default_name) -> Iterator[None]:
            if name not in self.states_:
                raise KeyError(f"random state {name!r} was never added")
            outer_state, outer_name = torch.get_rng_state(), self._current_state_name
            torch.set_rng_state(self.states_[name])
            self._current_state_name = name
            if outer_name != "default-rng":
                self.states_[outer_name] = outer_state
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer_state)
                self._current_state_name = outer_name

    random_states.CudaRNGStatesTracker = CpuRngStatesTracker


def _patch_optimizers() -> None:
    """Accept CPU tensors where optimizers and gradient clipping ask for ``torch.cuda.*`` types."""
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.distrib_optimizer as distributed
    import megatron.core.optimizer.optimizer as plain

    half = plain.Float16OptimizerWithFloat16Params
    half.__init__ = _with_cuda_type_names(half.__init__)
    build = distributed.DistributedOptimizer.__dict__["_build_model_and_main_param_groups"]
    distributed.DistributedOptimizer._build_model_and_main_param_groups = classmethod(
        _with_cuda_type_names(build.__func__)
    )
    original = clip_grads.clip_grad_by_total_norm_fp32
    patched = _with_cuda_type_names(original)
    # It is imported by name, so every module that holds it gets the wrapper.
    for name, module in list(sys.modules.items()):
        held = getattr(module, "__dict__", {}).get("clip_grad_by_total_norm_fp32")
        if name.startswith("megatron.core") and held is original:
            module.clip_grad_by_total_norm_fp32 = patched  # type: ignore[attr-defined]
