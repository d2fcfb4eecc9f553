"""The micro demo as its tests start it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "examples/demo/run.py", "--size", "micro"]
TIMEOUT_SECONDS = 420
"""Several times what two idle cores need."""


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end; the caller looks at the exit code."""
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, "TQDM_MININTERVAL": "5"},
    )
