"""Run rows one by one under a time budget, each recorded before the next begins.

Knows nothing of what a row measures.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

Figures = Mapping[str, Any]
"""Named results of a row: JSON values, with the unit in the name."""


class Skip(Exception):
    """Raised by a row that cannot run here; its text is the reason."""


class Failed(Exception):
    """Raised by a row that failed and has figures to show none the less.

    Args:
        message: what is wrong.
        figures: as :class:`Row` gives them.
    """

    def __init__(self, message: str, figures: Figures) -> None:
        super().__init__(message)
        self.figures = figures


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the result table."""

    name: str
    """Unique within a part."""
    estimate_s: float
    """Time it is expected to need at most; it does not start with less budget left."""
    run: Callable[[float], Figures]
    """Takes the seconds left; the row's figures.  It may raise anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a row."""

    row: str
    status: Literal["ok", "failed", "skipped"]
    seconds: float
    figures: Figures
    message: str = ""
    """Why it failed or was skipped."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def run_rows(
    rows: Sequence[Row],
    budget_s: float,
    record: Callable[[Outcome], None],
    clean_up: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Run ``rows`` in order.

    Args:
        rows: most valuable first.
        budget_s: seconds for all of them; a cheaper row may run after a dearer one was skipped.
        record: called with each outcome as soon as the row ended.
        clean_up: called after each row that ran, for example to free device memory.
        clock: seconds, monotonic.

    Returns:
        One outcome per row.  An interruption (Ctrl-C, SIGTERM turned into ``SystemExit``) is
        recorded as the failure of its row and raised again.
    """
    deadline = clock() + budget_s
    outcomes = []
    for row in rows:
        remaining = deadline - clock()
        if remaining < row.estimate_s:
            message = f"budget: {row.estimate_s:.0f} s needed, {max(remaining, 0.0):.0f} s left"
            outcome = Outcome(
                row=row.name, status="skipped", seconds=0.0, figures={}, message=message
            )
        else:
            logger.info("%s ... (%.0f s left)", row.name, remaining)
            outcome = _run_one(row, remaining, record, clock)
            clean_up()
        logger.info("%s: %s %s", row.name, outcome.status, outcome.message)
        record(outcome)
        outcomes.append(outcome)
    return outcomes


def _run_one(
    row: Row, remaining: float, record: Callable[[Outcome], None], clock: Callable[[], float]
) -> Outcome:
    started = clock()

    def outcome(status: Any, figures: Figures, message: str = "") -> Outcome:
        return Outcome(
            row=row.name,
            status=status,
            seconds=round(clock() - started, 3),
            figures=figures,
            message=message,
        )

    try:
        return outcome("ok", dict(row.run(remaining)))
    except Skip as reason:
        return outcome("skipped", {}, str(reason))
    except Failed as error:
        return outcome("failed", dict(error.figures), str(error))
    except Exception as error:
        # Whatever a row does wrong must not cost the rows after it.
        logger.exception("%s failed", row.name)
        return outcome("failed", {}, f"{type(error).__name__}: {error}")
    except BaseException as error:
        record(outcome("failed", {}, f"interrupted: {type(error).__name__}"))
        raise


def exit_code(outcomes: Sequence[Outcome]) -> int:
    """1 if a row failed, or if none ran: a table of skips has shown nothing."""
    statuses = [outcome.status for outcome in outcomes]
    return int("failed" in statuses or "ok" not in statuses)
