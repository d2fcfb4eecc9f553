"""What a piece of code does to the world outside, told by the interpreter's audit events."""

import sys
from collections.abc import Callable
from typing import Any

Judge = Callable[[str, tuple[Any, ...]], str | None]
"""Gets an event and its arguments and gives a finding, or None when nothing is wrong with it."""


class Audit:
    """Collects findings while a ``with`` block runs.

    A hook cannot be taken back, so a process should make one of these and use it again and again.
    """

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._active = False
        self._seen: list[str] = []
        sys.addaudithook(self._hook)

    def __enter__(self) -> None:
        self._active = True

    def __exit__(self, *_: object) -> None:
        self._active = False

    def take(self) -> list[str]:
        """Findings since the last call."""
        seen, self._seen = self._seen, []
        return seen

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        finding = self._judge(event, arguments)
        if finding is not None:
            self._seen.append(finding)
