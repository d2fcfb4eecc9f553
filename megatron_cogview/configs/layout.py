"""Which parallel layouts a model, a batch and a number of processes allow.

A layout that is refused comes with the nearest legal values of the field that is at fault.
"Legal" is the whole layout where one field can mend it; where several are at fault, what passes the
check that failed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.configs.nearest import advice, nearest

if TYPE_CHECKING:
    from megatron_cogview.configs.run import RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The numbers of a run that decide whether its layout is legal."""

    processes: int
    """Size of the world."""
    tensor: int
    """As in :class:`ParallelConfig`."""
    pipeline: int
    """As in :class:`ParallelConfig`."""
    virtual_pipeline: int
    """As in :class:`ParallelConfig`."""
    sequence: bool
    """As in :class:`ParallelConfig`."""
    num_layers: int
    """Layers of the model."""
    num_heads: int
    """Its attention heads."""
    hidden_size: int
    """Its width."""
    padded_vocab: int
    """Rows of its token table."""
    model_length: int
    """Inputs of a sequence."""
    global_batch_size: int
    """Sequences per step."""
    micro_batch_size: int
    """Sequences per forward pass."""

    @classmethod
    def of(cls, config: "RunConfig", processes: int) -> "Layout":
        """Of a run on so many processes."""
        p, m, t = config.parallel, config.model, config.training
        return cls(
            processes=processes,
            tensor=p.tensor,
            pipeline=p.pipeline,
            virtual_pipeline=p.virtual_pipeline,
            sequence=p.sequence,
            num_layers=m.num_layers,
            num_heads=m.num_heads,
            hidden_size=m.hidden_size,
            padded_vocab=m.vocab.padded_size,
            model_length=config.sequence.model_length,
            global_batch_size=t.global_batch_size,
            micro_batch_size=t.micro_batch_size,
        )

    @property
    def model_ranks(self) -> int:
        """Processes that hold one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def per_pass(self) -> int:
        """Sequences in one forward pass of all data-parallel ranks."""
        return self.micro_batch_size * (self.processes // self.model_ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that a layout must satisfy."""

    field: str
    """The setting that is named when it does not."""
    others: tuple[str, ...] = ()
    """Settings that could be changed instead."""
    why: Callable[[Layout], str | None]
    """The reason of a refusal, None where there is none."""


def _tensor_divides(layout: Layout) -> str | None:
    for what, value in (
        ("model.num_heads", layout.num_heads),
        ("model.hidden_size", layout.hidden_size),
        ("model.vocab.padded_size", layout.padded_vocab),
    ):
        if value % layout.tensor:
            return f"does not divide {what} = {value}"
    return None


def _pipeline_divides(layout: Layout) -> str | None:
    if layout.num_layers % layout.pipeline:
        return f"does not divide model.num_layers = {layout.num_layers}"
    return None


def _chunks_divide(layout: Layout) -> str | None:
    chunks = layout.pipeline * layout.virtual_pipeline
    if layout.num_layers % chunks:
        return (
            f"parallel.pipeline * parallel.virtual_pipeline = {chunks} does not divide "
            f"model.num_layers = {layout.num_layers}"
        )
    return None


def _sequence_divides(layout: Layout) -> str | None:
    if layout.sequence and layout.model_length % layout.tensor:
        return (
            f"parallel.tensor = {layout.tensor} does not divide the model length "
            f"{layout.model_length}"
        )
    return None


def _whole_copies(layout: Layout) -> str | None:
    if layout.processes % layout.model_ranks:
        return (
            "must be a multiple of parallel.tensor * parallel.pipeline = "
            f"{layout.model_ranks}, the processes of one copy of the model"
        )
    return None


def _whole_batches(layout: Layout) -> str | None:
    if layout.global_batch_size % layout.per_pass:
        data = layout.processes // layout.model_ranks
        return (
            "must be a multiple of training.micro_batch_size x data-parallel size = "
            f"{layout.micro_batch_size} x {data} = {layout.per_pass}"
        )
    return None


def _rounds_of_the_pipeline(layout: Layout) -> str | None:
    count = layout.global_batch_size // layout.per_pass
    if layout.virtual_pipeline > 1 and count % layout.pipeline:
        return (
            f"the interleaved schedule needs micro-batches per step ({count}) to be a multiple of "
            f"parallel.pipeline = {layout.pipeline}"
        )
    return None


BATCH = ("training.global_batch_size", "training.micro_batch_size")
DIVISION = (
    Check(field="parallel.tensor", why=_tensor_divides),
    Check(field="parallel.pipeline", why=_pipeline_divides),
    Check(field="parallel.virtual_pipeline", others=("parallel.pipeline",), why=_chunks_divide),
)
"""What does not depend on batch and processes.  Later checks rely on earlier ones."""
CHECKS = (
    *DIVISION,
    Check(field="parallel.sequence", others=("parallel.tensor",), why=_sequence_divides),
    Check(field="processes", others=("parallel.tensor", "parallel.pipeline"), why=_whole_copies),
    Check(field=BATCH[0], others=BATCH[1:], why=_whole_batches),
    Check(field="parallel.virtual_pipeline", others=BATCH, why=_rounds_of_the_pipeline),
)


def failure(layout: Layout, checks: tuple[Check, ...] = CHECKS) -> Check | None:
    """The first check that a layout does not pass."""
    return next((check for check in checks if check.why(layout)), None)


def require_legal(layout: Layout, checks: tuple[Check, ...] = CHECKS) -> None:
    """Refuse a layout that fails one of ``checks``.

    Raises:
        ConfigError: naming field, value, reason and nearest legal values.
    """
    check = failure(layout, checks)
    if check is not None:
        raise _refusal(layout, check, checks)


def _refusal(layout: Layout, check: Check, checks: tuple[Check, ...]) -> ConfigError:
    def mends(changed: Layout) -> bool:
        return failure(changed, checks) is None

    def passes(changed: Layout) -> bool:
        return check.why(changed) is None

    own = _nearest(layout, check.field, mends) or _nearest(layout, check.field, passes)
    others = {field: _nearest(layout, field, mends) for field in check.others}
    rest = advice(own, {field: values for field, values in others.items() if values})
    return refuse(check.field, _value(layout, check.field), f"{check.why(layout)}; {rest}")


def _value(layout: Layout, field: str) -> int:
    number: int = getattr(layout, field.rpartition(".")[2])
    return number


def _nearest(layout: Layout, field: str, is_legal: Callable[[Layout], bool]) -> list[str]:
    """The nearest legal values of one field, with what must be changed beside them."""
    if field == "parallel.sequence":
        return ["False"] if is_legal(replace(layout, sequence=False)) else []
    values = nearest(
        _value(layout, field),
        lambda n: is_legal(_changed(layout, field, n)),
        _highest(layout, field),
    )
    return [" with ".join([str(n), *_beside(layout, field, n)]) for n in values]


def _changed(layout: Layout, field: str, value: int) -> Layout:
    """With another value of a field; what works only beside it is turned off with it."""
    if field == "parallel.tensor":
        return replace(layout, tensor=value, sequence=layout.sequence and value > 1)
    if field == "parallel.pipeline" and value == 1:
        return replace(layout, pipeline=1, virtual_pipeline=1)
    changes: dict[str, Any] = {field.rpartition(".")[2]: value}
    return replace(layout, **changes)


def _beside(layout: Layout, field: str, value: int) -> Iterator[str]:
    """What :func:`_changed` changed beside the field."""
    changed = _changed(layout, field, value)
    for name in ("sequence", "virtual_pipeline"):
        other = f"parallel.{name}"
        if other != field and getattr(changed, name) != getattr(layout, name):
            yield f"{other} = {getattr(changed, name)}"


def _highest(layout: Layout, field: str) -> int:
    """Above it no value of the field is legal, or one is below it already."""
    return {
        "parallel.tensor": layout.num_heads,
        "parallel.pipeline": layout.num_layers,
        "parallel.virtual_pipeline": layout.num_layers,
        "processes": max(
            layout.processes + layout.model_ranks, layout.model_ranks * layout.global_batch_size
        ),
        "training.global_batch_size": layout.global_batch_size + layout.per_pass * layout.pipeline,
        "training.micro_batch_size": layout.global_batch_size,
    }[field]
