"""The journal of a campaign: one JSON line a trial, so that it goes on where it was stopped."""

import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

import megatron_cogview

Trial = Callable[[int], dict[str, Any]]


def read(journal: Path) -> list[dict[str, Any]]:
    """Lines that are whole; the last one of a killed campaign may not be."""
    if not journal.is_file():
        return []
    lines = journal.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def code_digest() -> str:
    """The first digits of a hash over the package's source: trials of one state add up."""
    whole = hashlib.sha256()
    for path in sorted(Path(megatron_cogview.__path__[0]).rglob("*.py")):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()[:12]


def after_fork() -> None:
    """In a forked process: a progress bar's lock is shared with the parent and all its other
    children, and one that was killed while holding it would block them for ever."""
    tqdm.set_lock(threading.RLock())


def run(journal: Path, trial: Trial, trials: int, minutes: float) -> list[dict[str, Any]]:
    """Go on with the next trial until there are ``trials``, or for ``minutes``; all lines.

    ``trial`` gets its number, which seeds whatever it draws, and gives its line.
    """
    done = read(journal)
    journal.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    with journal.open("a", encoding="utf-8") as file:
        # What is left of a broken line would spoil the next one.
        file.truncate(len("".join(json.dumps(line) + "\n" for line in done).encode()))
        for number in tqdm(range(len(done), trials), initial=len(done), total=trials, unit="trial"):
            if time.monotonic() > deadline:
                break
            line = trial(number)
            file.write(json.dumps(line) + "\n")
            file.flush()
            done.append(line)
    return done
