"""SIGTERM, SIGUSR1 and SIGINT ask a run to finish its step, to save and to end.

What a launcher does with these signals, and with the exit code of a run that was stopped
(torchrun of torch 2.13):

- SIGTERM or SIGINT to torchrun: it sends the same signal to the process group of each worker, waits
  30 s (``--shutdown-timeout``), then kills.  It ends with 1 and restarts nothing, whatever code its
  workers have.  The signal reaches the workers again when torchrun gets it again.
- SIGUSR1 kills torchrun at once and leaves its workers behind, unless it is started with
  ``--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1``; then it is passed on as above.
  Slurm's ``--signal=USR1@300`` reaches torchrun too, so with Slurm that option is needed, and a
  ``--shutdown-timeout`` as long as a step and a checkpoint take.
- A worker that alone was asked: a code other than 0 makes torchrun start all of them again while it
  has restarts left, so the only code that ends the run is 0.
"""

import logging
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
TIME_LIMIT_SIGNAL = "SIGUSR1"
"""What Slurm is asked to send before the time limit; it is no default of Slurm's."""
REQUEUE_EXIT_CODE = 85
"""Asked to stop, saved, not finished: start it again.  HTCondor's custom for the same; different
from what Python and shells use."""
SCONTROL_TIMEOUT_S = 20.0


class StopRequest:
    """Remembers that this process was asked to stop, instead of stopping it.

    A context manager: its handlers stand inside the block, the former ones come back behind it.
    They only set a flag, so a signal breaks nothing that is under way, however often it comes; only
    a second SIGINT (Ctrl-C) is a ``KeyboardInterrupt``, for someone who will not wait.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._interrupts = 0
        self._told = False
        self._agreed = 0.0
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came; logged when it is seen for the first time."""
        if self._first is None:
            return False
        if not self._told:
            # Not in the handler, which may have interrupted the very logging.
            self._told = True
            logger.warning(
                "%s: the step is finished and saved, then the run ends", self.signal_name
            )
        return True

    @property
    def urgency(self) -> float:
        """0: nobody asked; 1: somebody did; 2: it was the time limit.  The largest of all ranks'
        counts, for a signal may come late to some."""
        if not self.requested:
            return 0.0
        return 2.0 if self.signal_name == TIME_LIMIT_SIGNAL else 1.0

    def agreed(self, urgency: float) -> None:
        """What all ranks found together."""
        self._agreed = urgency

    @property
    def is_time_limit(self) -> bool:
        """Whether the time limit asked any of the ranks."""
        return max(self._agreed, self.urgency) >= 2.0

    @property
    def signal_name(self) -> str | None:
        """The first signal that came."""
        return None if self._first is None else signal.Signals(self._first).name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first = number
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("signals do not save this run: it is not in the main thread")
            return self
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, self._handle)
            if number != signal.SIGINT:
                # System calls of libraries go on behind the handler instead of failing with EINTR.
                signal.siginterrupt(number, False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, former in self._former.items():
            # None: a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if former is None else former)
        self._former.clear()


def requeue(environment: Mapping[str, str] = os.environ) -> None:
    """Ask Slurm to queue this job again; logs how that went and never raises.

    Slurm ends the job when it does so: only a run that has saved may call it, on one rank.
    """
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return
    program = shutil.which("scontrol", path=environment.get("PATH"))
    if program is None:
        logger.error("job %s is not queued again: there is no scontrol here", job)
        return
    try:
        done = subprocess.run(
            [program, "requeue", job],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SCONTROL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        logger.error("job %s is not queued again: %s", job, error)
        return
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        logger.error("job %s is not queued again: scontrol says %s", job, said)
    else:
        logger.warning("job %s is queued again", job)


def stopped(
    request: StopRequest, is_main: bool, environment: Mapping[str, str] = os.environ
) -> int:
    """The exit code of a run that was asked to stop and has saved.

    The main process also queues the job again when it was the time limit that asked.  Others are
    not: who sends SIGTERM to preempt a job queues it himself, and who cancels it does not want it.
    """
    if is_main and request.is_time_limit:
        requeue(environment)
    # torchrun would take any other code for a failure and start the run again.
    return 0 if "TORCHELASTIC_RUN_ID" in environment else REQUEUE_EXIT_CODE
