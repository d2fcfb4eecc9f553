"""One row of the benchmark: peers that compute the same are compared, then timed taking turns.

Knows nothing of what they compute.
"""

import gc
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_cogview.analysis.timing import Operation, extra_bytes, median_ms, nvidia_smi

Tensors = tuple[Tensor, ...]
Row = dict[str, Any]
"""JSON values: ``row``, the case's facts, ``peers``, ``problems``, ``seconds``."""

OUT_OF_MEMORY = "out of memory"
ALONE_ABOVE = 0.4
"""Share of the device's memory above which a peer takes no turns with the others: freeing memory
for it would fall into their time."""

_Result = TypeVar("_Result")


class NotAvailable(Exception):
    """Raised by a peer that cannot run here; its text is the reason."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to compute a case."""

    name: str
    """Unique in its case; ours begin with ``ours``."""
    prepare: Callable[[], Callable[[], Any]]
    """Compiles or captures what need not be timed, and gives the operation."""
    like: str | None = None
    """The earlier peer whose results the operation must repeat."""
    expected: Callable[[], Tensors] | None = None
    """What it must give where no other peer computes it."""
    tolerance: float = 0.0
    """Largest error of its results, see :func:`relative_error`."""
    error: Callable[[Tensors, Tensors], float] | None = None
    """In the place of :func:`relative_error`."""
    least_bytes: int | None = None
    """Memory traffic that nothing can compute this without."""
    flops: int | None = None

    @property
    def is_ours(self) -> bool:
        """Whether its failure is a defect and not a fact about another library."""
        return self.name.startswith("ours")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row."""

    name: str
    """Unique in a benchmark."""
    estimate_s: float
    """Time it should need at most on a GPU, compiling included."""
    facts: Mapping[str, Any]
    """``operation``, ``mode`` and the shape, in JSON values."""
    peers: Callable[[torch.device], Sequence[Peer]]
    """Makes the inputs; ours first."""


@dataclass
class _Trial:
    """Peers of one case under measurement."""

    device: torch.device
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    operations: dict[str, Operation] = field(default_factory=dict)
    results: dict[str, Tensors] = field(default_factory=dict)


def measure(case: Case, device: torch.device, rounds: int) -> Row:
    """Run a case.

    A peer that cannot run has its reason in ``absent``; ours that cannot, and whoever computes
    something else, are among the ``problems``.

    Args:
        case: what to run.
        device: where.
        rounds: timed runs of each peer.
    """
    started = time.perf_counter()
    # Compiled functions keep a few versions, beyond which they run uncompiled without a word.
    torch.compiler.reset()
    peers = case.peers(device)
    trial = _Trial(device)
    referred = {peer.like for peer in peers}
    for peer in peers:
        entry = _attempted(partial(_checked, trial, peer, peer.name in referred))
        trial.entries[peer.name] = entry
        if "absent" in entry:
            trial.operations.pop(peer.name, None)
            _free(device)
    trial.results.clear()
    _time(trial, rounds)
    return {
        "row": case.name,
        **case.facts,
        "peers": trial.entries,
        "problems": _problems(peers, trial.entries),
        "rounds": rounds,
        "clocks": nvidia_smi() if device.type == "cuda" else None,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _attempted(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` finds, or why it found nothing.  Tensors of a failed run are let go of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return run()
        except torch.OutOfMemoryError:
            return {"absent": OUT_OF_MEMORY}
        except NotAvailable as reason:
            return {"absent": f"not available: {reason}"}
        except Exception as error:
            if "can't allocate memory" in str(error):
                # The CPU's allocator has no error of its own.
                return {"absent": OUT_OF_MEMORY}
            # PyTorch tells in warnings why it refused a kernel.
            words = [f"{type(error).__name__}: {error}", *(str(each.message) for each in said)]
            return {"absent": f"not available: {_short(words)}"}


def _short(sentences: Iterable[str]) -> str:
    """First lines, each once."""
    first = [sentence.strip().split("\n", 1)[0] for sentence in sentences]
    text = "; ".join(dict.fromkeys(line for line in first if line))
    return text if len(text) <= 400 else text[:397] + "..."


def _checked(trial: _Trial, peer: Peer, is_referred: bool) -> dict[str, Any]:
    """Results compared and memory measured; the operation is then among those to be timed."""
    operation = peer.prepare()
    found = _tensors(operation())
    entry: dict[str, Any] = {}
    wanted = trial.results.get(peer.like or "")
    if peer.expected is not None:
        wanted = peer.expected()
    if wanted is not None:
        error = (peer.error or relative_error)(found, wanted)
        entry["relative_error"] = error if math.isfinite(error) else None
        entry["agrees"] = error <= peer.tolerance
    elif peer.like is not None:
        entry["agrees"] = None
    if is_referred:
        trial.results[peer.name] = tuple(each.detach().clone() for each in found)
    # A second run: the first may have compiled, and allocated for that.
    del found, wanted
    entry["extra_bytes"] = extra_bytes(operation, trial.device)
    for name in ("least_bytes", "flops"):
        if getattr(peer, name) is not None:
            entry[name] = getattr(peer, name)
    trial.operations[peer.name] = operation
    return entry


def _tensors(result: Any) -> Tensors:
    return result if isinstance(result, tuple) else (result,)


def relative_error(found: Tensors, wanted: Tensors) -> float:
    """The largest ``|found - wanted| / |wanted|`` of corresponding tensors, in Euclidean norms."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return math.inf
    errors = []
    for one, other in zip(found, wanted, strict=True):
        one, other = one.detach().float(), other.detach().float()
        errors.append(float((one - other).norm() / other.norm()))
    # max() may pass over a NaN.
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def share_that_differs(found: Tensors, wanted: Tensors) -> float:
    """For whole numbers: the part of them that are not the same."""
    return float((found[0] != wanted[0]).double().mean())


def _time(trial: _Trial, rounds: int) -> None:
    """Add ``ms``: those that fit beside each other take turns, the others run by themselves."""
    large = [name for name in trial.operations if _is_large(trial.entries[name], trial.device)]
    groups = [[name for name in trial.operations if name not in large], *([name] for name in large)]
    for names in groups:
        _free(trial.device)
        while names:
            turns = {name: _named(name, trial.operations[name]) for name in names}
            try:
                times = median_ms(turns, trial.device, rounds)
            except _OutOfMemoryOf as error:
                failed = error.args[0]
            else:
                for name, ms in times.items():
                    trial.entries[name] |= {"ms": ms, "alone": name in large}
                break
            # Outside of the handler, where the error still holds tensors.
            trial.entries[failed] = {"absent": OUT_OF_MEMORY}
            names.remove(failed)
            _free(trial.device)


def _is_large(entry: Mapping[str, Any], device: torch.device) -> bool:
    if entry["extra_bytes"] is None:
        return False
    total = torch.cuda.get_device_properties(device).total_memory
    return bool(entry["extra_bytes"] > ALONE_ABOVE * total)


class _OutOfMemoryOf(Exception):
    """Memory ran out in the operation of the given name."""


def _named(name: str, operation: Operation) -> Operation:
    def run() -> object:
        try:
            return operation()
        except torch.OutOfMemoryError:
            raise _OutOfMemoryOf(name) from None

    return run


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _problems(peers: Sequence[Peer], entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What must not go unseen."""
    found = []
    for peer in peers:
        entry = entries[peer.name]
        if "absent" in entry:
            if peer.is_ours:
                found.append(f"{peer.name}: {entry['absent']}")
        elif entry.get("agrees") is False:
            error = entry["relative_error"]
            by = "is not finite" if error is None else f"{error:.2g} > {peer.tolerance:.2g}"
            found.append(f"{peer.name} computes something else: relative error {by}")
    return found


def with_gradients(
    operation: Callable[[], Tensors], inputs: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Callable[[], Tensors]:
    """The operation and its backward pass: results, then gradients of the inputs."""

    def run() -> Tensors:
        outputs = operation()
        return outputs + torch.autograd.grad(outputs, inputs, gradients)

    return run
