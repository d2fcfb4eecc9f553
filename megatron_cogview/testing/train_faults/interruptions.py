"""Interrupt a training at a random moment, start it again, and compare it with one left alone.

Killed, asked to stop, or with a rank that hangs: the run must come back from its last checkpoint
and end with the same weights, optimizer state, loop memory and numbers, byte for byte.
"""

import errno
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cogview.checkpoint import commit
from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.testing.toy_run import toy_config, with_survival, write_tokens
from megatron_cogview.testing.train_faults.runs import (
    LAYOUTS,
    LONGEST_RUN_S,
    Blackboard,
    Run,
    committed,
    outcome,
    placed,
)
from megatron_cogview.training.checkpoints import CHECKPOINTS
from megatron_cogview.training.signals import REQUEUE_EXIT_CODE
from megatron_cogview.training.trainer import PATIENCE_FACTOR
from megatron_cogview.training.watchdog import HANG_EXIT_CODE

STEPS, SAVE_EVERY = 24, 4
MOST_KILLS = 3
GRACE_S = 20.0
"""Seconds in which a run that is asked to stop must have saved and ended (torchrun gives 30)."""
HANG_TIMEOUT_S = 3.0


class _Campaign:
    """Data, and what runs that are left alone end with."""

    steps = STEPS

    def __init__(self, folder: Path, survival: dict[str, Any] | None = None) -> None:
        self.folder = folder
        write_tokens(folder / "tokens")
        self._survival = survival or {}
        self._expected: dict[int, dict[str, Any]] = {}

    def config(self, number: int) -> RunConfig:
        """The run of trial ``number``; trials take layouts by turns, and odd ones save inline."""
        _, layout = LAYOUTS[number % len(LAYOUTS)]
        config = toy_config(
            self.folder / "tokens",
            self.folder / f"trial-{number}",
            ParallelConfig(**layout),
            steps=self.steps,
            save_every=SAVE_EVERY,
            async_save=number // len(LAYOUTS) % 4 != 3,
        )
        return with_survival(config, **self._survival)

    def expected(self, number: int) -> dict[str, Any]:
        """The outcome of the same run when nothing is done to it."""
        which = number % len(LAYOUTS)
        if which not in self._expected:
            config = placed(self.config(which), self.folder / f"alone-{which}")
            with Run(config, LAYOUTS[which][0]) as run:
                run.to_the_end()
            self._expected[which] = outcome(run.folder)
        return self._expected[which]

    def finish(self, number: int, config: RunConfig) -> dict[str, Any]:
        """Start the run again, leave it alone, and say what became of it."""
        newest = committed(Path(config.training.output))
        with Run(config, LAYOUTS[number % len(LAYOUTS)][0]) as run:
            # Whatever is there must be what is gone on from.
            run.wait_for(0, 1, "data")
            first, _ = run.board.read(0)
            run.to_the_end()
        found = outcome(run.folder)
        expected = self.expected(number)
        shutil.rmtree(run.folder)
        return {
            "resumed_after": first - 1,
            "nothing_lost": newest == self.steps or first - 1 == newest,
            "differs": [key for key in expected if found[key] != expected[key]],
        }


class KillCampaign(_Campaign):
    """SIGKILL to every rank, or to one of them, up to three times in a run."""

    WAYS = ("load", "forward", "gradients", "update", "save", "validate", "saving", "data")

    def trial(self, number: int) -> dict[str, Any]:
        """One trial; the same number draws the same moments."""
        rng = np.random.default_rng([number, 23])
        config, size = self.config(number), LAYOUTS[number % len(LAYOUTS)][0]
        way, kills, lost = self.WAYS[number % len(self.WAYS)], [], False
        slow = _slow_disk if way == "saving" else None
        for _ in range(int(rng.integers(1, MOST_KILLS + 1))):
            with Run(config, size, slow) as run:
                step, phase = self._moment(way, committed(run.folder), rng)
                reached = run.wait_for(0, step, phase)
                time.sleep(float(rng.exponential(0.004)))
                alive, found = run.world.codes().count(None), run.board.read(0)
                one = size > 1 and rng.random() < 0.3
                run.world.signal(signal.SIGKILL, *([int(rng.integers(size))] if one else []))
                # What the others do without it is seen, but not waited for.
                run.world.wait(0.2)
                at, _ = run.board.read(0)
                told, there = run.board.committed(), committed(run.folder)
                # What a rank was told is saved must be there, and saves must come to an end: the
                # one before the last was finished, at the latest, when the last one began.
                due = (at - 1) // SAVE_EVERY * SAVE_EVERY - SAVE_EVERY
                lost = lost or there < told or there < due
                busy = any(run.folder.rglob("*.incomplete"))
                kill = {"step": step, "phase": phase, "hit": bool(reached and alive), "in": found}
                kills.append({**kill, "told": told, "there": there, "in_a_save": busy})
        line = {"trial": number, "kind": "kill", "way": way, "kills": kills}
        line |= self.finish(number, config)
        line["nothing_lost"] = line["nothing_lost"] and not lost
        hit = any(kill["hit"] for kill in kills)
        return {**line, "ok": hit and line["nothing_lost"] and not line["differs"]}

    @staticmethod
    def _moment(way: str, done: int, rng: np.random.Generator) -> tuple[int, str]:
        """Step and phase to wait for, in a run that goes on behind step ``done``."""
        if way == "load":
            return 0, "load"
        step = int(rng.integers(done + 1, max(done + 2, STEPS)))
        if way in ("save", "saving"):
            # A checkpoint that is written in the background is so during the next step.
            step = min(step + -step % SAVE_EVERY, STEPS)
            # The last one is waited for.
            return (step, "save") if way == "save" or step == STEPS else (step + 1, "forward")
        if way == "validate":
            return (10 if done < 10 else 20), "validate"
        return step, way


class StopCampaign(_Campaign):
    """SIGTERM or SIGUSR1 at a random moment, to every rank or to one."""

    def trial(self, number: int) -> dict[str, Any]:
        """One trial."""
        rng = np.random.default_rng([number, 29])
        config, size = self.config(number), LAYOUTS[number % len(LAYOUTS)][0]
        asked = signal.SIGUSR1 if number % 3 == 2 else signal.SIGTERM
        phases = ("data", "forward", "gradients", "update", "save", "validate", "load")
        phase = phases[int(rng.integers(len(phases)))]
        step = 0 if phase == "load" else int(rng.integers(1, STEPS))
        with Run(config, size) as run:
            run.wait_for(0, step, phase)
            # Loading begins before the handlers are there.
            time.sleep(float(rng.exponential(0.004)) + (0.05 if phase == "load" else 0.0))
            at, phase = run.board.read(0)
            everyone = size == 1 or rng.random() < 0.7
            run.world.signal(asked, *([] if everyone else [int(rng.integers(size))]))
            begin = time.monotonic()
            ended = run.world.wait(GRACE_S)
            seconds = time.monotonic() - begin
            codes, saved, said = run.world.codes(), committed(run.folder), run.tail()
        # A step that was begun is finished and saved, and perhaps the next; the last ends the run.
        complete = saved in (at, at + 1)
        right = {0} if saved == STEPS else {REQUEUE_EXIT_CODE}
        well = ended and (set(codes) == right or saved == STEPS) and complete
        line = {"trial": number, "kind": asked.name, "phase": phase, "step": at, "saved": saved}
        line |= {"codes": codes, "seconds": round(seconds, 2), "everyone": everyone}
        line |= self.finish(number, config)
        ok = well and line["nothing_lost"] and not line["differs"]
        return {**line, "ok": ok, **({} if ok else {"said": said})}


class HangCampaign(_Campaign):
    """SIGSTOP to one rank: the others must name it and end, and so must it when it wakes up."""

    def __init__(self, folder: Path) -> None:
        """Runs with a watchdog that is in a hurry."""
        super().__init__(folder, {"hang_timeout_seconds": HANG_TIMEOUT_S})

    def trial(self, number: int) -> dict[str, Any]:
        """One trial; a rank alone has nobody who waits for it, so layouts of two are taken."""
        number_of_two = number + number // (len(LAYOUTS) - 1) + 1
        rng = np.random.default_rng([number, 31])
        config, size = self.config(number_of_two), LAYOUTS[number_of_two % len(LAYOUTS)][0]
        victim = int(rng.integers(size))
        with Run(config, size) as run:
            step = int(rng.integers(1, STEPS - 2))
            run.wait_for(victim, step, ("data", "forward", "gradients", "update")[number % 4])
            run.world.signal(signal.SIGSTOP, victim)
            at, phase = run.board.read(victim)
            # While it saves or validates a rank may take longer; just behind that the others may
            # not have heard that it is over.
            patient = phase in ("save", "validate") or (at - 1) % SAVE_EVERY == 0
            limit = HANG_TIMEOUT_S * (PATIENCE_FACTOR if patient else 1)
            begin = time.monotonic()
            others = [rank for rank in range(size) if rank != victim]
            found = run.world.wait(
                2 * limit, lambda: None not in [run.world.codes()[r] for r in others]
            )
            seconds = time.monotonic() - begin
            said = run.tail()
            run.world.signal(signal.SIGCONT, victim)
            woke = run.world.wait(4 * HANG_TIMEOUT_S)
            codes = run.world.codes()
            stacks = sorted(path.name for path in (run.folder / "hang").glob("rank_*.txt"))
        verdicts = " ".join(line for line in said.splitlines() if line.startswith("hang:"))
        named = f"rank {victim} (" in verdicts and not any(
            f"rank {r} (" in verdicts for r in others
        )
        line = {"trial": number, "kind": "SIGSTOP", "rank": victim, "step": at, "phase": phase}
        line |= {"limit": limit}
        line |= {"seconds": round(seconds, 2), "codes": codes, "named": named, "stacks": stacks}
        line |= self.finish(number_of_two, config)
        well = found and woke and named
        well = well and 0 not in codes and codes[others[0]] == HANG_EXIT_CODE and bool(stacks)
        ok = well and line["nothing_lost"] and not line["differs"]
        return {**line, "ok": ok, **({} if ok else {"said": said})}


class CutCampaign(_Campaign):
    """A run of 60 steps killed in each of them, between two micro-batches; epochs end inside."""

    steps = trials = 60

    def trial(self, number: int) -> dict[str, Any]:
        """Killed in step ``number + 1``."""
        layout = number % 2
        config, size = self.config(layout), LAYOUTS[layout][0]
        config = placed(config, self.folder / f"cut-{number}")
        victim = number // 2 % size

        def kill_at(rank: int, board: Blackboard) -> None:
            from megatron_cogview.engines.megatron import MegatronEngine

            forward, seen = MegatronEngine._forward, 0

            def counted(self: Any, *args: Any) -> Any:
                nonlocal seen
                if rank == victim and board.read(rank)[0] == number + 1:
                    seen += 1
                    if seen == 2:
                        os.kill(os.getpid(), signal.SIGKILL)
                return forward(self, *args)

            MegatronEngine._forward = counted  # type: ignore[method-assign, assignment]

        with Run(config, size, kill_at) as run:
            run.world.wait(LONGEST_RUN_S, lambda: run.world.codes()[victim] is not None)
            code, (at, phase) = run.world.codes()[victim], run.board.read(victim)
        line = {"trial": number, "kind": "cut", "step": at, "phase": phase, "rank": victim}
        line |= self.finish(layout, config)
        hit = code == -signal.SIGKILL and at == number + 1
        return {**line, "ok": hit and line["nothing_lost"] and not line["differs"]}


class DiskCampaign(_Campaign):
    """The disk is full, broken or takes less than it is given, at every tenth of a save: training
    goes on, the old checkpoint stays, and the run ends as if nothing had been."""

    KINDS = ("ENOSPC", "EIO", "short writes", "fsync", "rename")
    trials = 10 * len(KINDS)

    def trial(self, number: int) -> dict[str, Any]:
        """One kind of fault at one tenth of the second, the third or the last save."""
        rng = np.random.default_rng([number, 37])
        config, size = self.config(number), LAYOUTS[number % len(LAYOUTS)][0]
        kind, tenth = self.KINDS[number % len(self.KINDS)], number // len(self.KINDS) % 10
        which = (2, 3, STEPS // SAVE_EVERY)[int(rng.integers(3))]
        victim = int(rng.integers(size))
        written = self.expected(number)["bytes"]
        if kind == "rename" or f"__{victim}_0.distcp" not in written:
            victim = 0
        step, limit = SAVE_EVERY * which, written[f"__{victim}_0.distcp"] * tenth // 10

        def hurt(rank: int, board: Blackboard) -> None:
            if rank == victim:
                break_disk(kind, limit, step)

        with Run(config, size, hurt) as run:
            # Between the save that fails and the next one the older checkpoint must be whole.
            run.wait_for(0, step + 1, "update")
            older = _whole(run.folder, step - SAVE_EVERY)
            run.to_the_end()
            found, said = outcome(run.folder), run.log.read_text(errors="replace")
        expected = self.expected(number)
        line = {"trial": number, "kind": kind, "tenth": tenth, "save": which, "rank": victim}
        line["older_is_whole"] = older
        # A disk that takes little at a time is slow, and nothing else.
        line["refused"] = "save failed" in said
        line["left_over"] = [p.name for p in run.folder.rglob("*.incomplete")]
        line["differs"] = [key for key in expected if found[key] != expected[key]]
        shutil.rmtree(run.folder)
        well = older and not line["differs"] and not line["left_over"]
        return {**line, "ok": well and line["refused"] == (kind != "short writes")}


def _whole(folder: Path, step: int) -> bool:
    """Whether the checkpoint of ``step`` is there, with all its bytes."""
    try:
        commit.verify(folder / CHECKPOINTS / commit.checkpoint_name(step))
    except CheckpointError:
        return False
    return True


def _slow_disk(rank: int, board: Blackboard) -> None:
    """Let this process's saves last for steps, so that a kill falls into one."""
    from megatron_cogview.checkpoint import blobs

    write = blobs.write_some

    def slowly(file: Any, data: memoryview) -> int:
        time.sleep(0.0005)
        return write(file, data)

    blobs.write_some = slowly


def break_disk(kind: str, limit: int, step: int) -> None:
    """Let this process's save of ``step`` go wrong after ``limit`` bytes, once."""
    from megatron_cogview.checkpoint import blobs

    begin, end = f"{commit.checkpoint_name(step)}.", commit.TEMPORARY
    write, sync, rename = blobs.write_some, blobs.sync, os.rename
    written, hurt = 0, ""

    def concerns(file: Any) -> bool:
        return is_in_save(os.fspath(file.name))

    def is_in_save(path: str) -> bool:
        nonlocal hurt
        parts = [p for p in Path(path).parts if p.startswith(begin) and p.endswith(end)]
        # It is tried again, in a folder of another name.
        hurt = hurt or "".join(parts)
        return bool(parts) and parts[0] == hurt

    def refuse_writing(file: Any, data: memoryview) -> int:
        nonlocal written
        if concerns(file):
            if kind == "short writes":
                return write(file, data[: max(1, len(data) // 3)])
            written += len(data)
            if written > limit:
                number = errno.ENOSPC if kind == "ENOSPC" else errno.EIO
                raise OSError(number, os.strerror(number), file.name)
        return write(file, data)

    def refuse_sync(descriptor: int) -> None:
        if is_in_save(os.readlink(f"/proc/self/fd/{descriptor}")):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(descriptor)

    def refuse_rename(source: Any, target: Any, **more: Any) -> None:
        if is_in_save(os.fspath(source)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), source)
        rename(source, target, **more)

    if kind == "fsync":
        blobs.sync = refuse_sync
    elif kind == "rename":
        os.rename = refuse_rename  # type: ignore[assignment]
    else:
        blobs.write_some = refuse_writing
