"""Has runs trained by an executor, a few at a time, shows how far they are, and remembers what has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from .executors import InlineExecutor, Job, SubmititExecutor
from .progress import RowState, Unbreakable, format_duration, make_progress, seconds_left
from .results import CONSOLE, RunResult
from .worker import Run, check_folder, shown, superseded

_POLL_SECONDS = 0.25


def run_all(
    runs: Sequence[Run],
    executor: InlineExecutor | SubmititExecutor,
    *,
    parallel: int = 1,
    threads: int = 1,
    stream: TextIO | None = None,
) -> list[RunResult]:
    """Trains every run in its folder and returns their results in the order of `runs`.

    A run that fails does not stop the others. What has ended before (trained, or diverged) is not trained again as
    long as its configuration, its data and the code are the same; what was stopped goes on from its last checkpoint;
    what failed is tried again. Ctrl-C ends the processes and raises KeyboardInterrupt.

    Args:
        runs: what to train, each in a folder of its own.
        executor: where.
        parallel: runs at the same time, for the estimate of the time left.
        threads: of each, for the record.
        stream: where progress goes; default: stderr.
    """
    tracks = [_Track(run, threads, parallel) for run in runs]
    if len({run.folder for run in runs}) != len(runs):
        raise ValueError(f"two runs share a folder: {[str(run.folder) for run in runs]}")
    for run in runs:  # before one is started that this would end
        check_folder(run.folder)
    progress = Unbreakable(make_progress([track.state for track in tracks], stream or sys.stderr))
    try:
        with _signals_interrupt():
            _work_off(tracks, executor, parallel, progress)
    except KeyboardInterrupt:
        _say_what_is_kept(tracks, executor, progress)
        raise
    finally:
        if not executor.survives_us:
            executor.cancel([track.job for track in tracks if track.job and not track.ended])
        progress.close()
    return [track.result for track in tracks]


class _Track:
    """A run and what is known of it from its folder, wherever it is trained."""

    def __init__(self, run: Run, threads: int, parallel: int):
        self.run = run
        self.result = run.result(threads, parallel)
        self.state = RowState(f"{run.title} seed {run.seed}", total=run.max_iter)
        self.job: Job | None = None
        self.ended = False
        self.since = 0.0  # what is older in the folder is not of this attempt

    def reuse(self, fresh: bool) -> bool:
        """Takes over the result of an earlier call if it would be the same."""
        earlier = self.run.result()
        if not fresh and earlier.load() and earlier.ended:
            self.result, self.state.status = earlier, earlier.status
            self.result.reused = self.ended = True
        return self.ended

    def submitted(self, job: Job) -> None:
        self.job, self.since = job, time.time()
        self.state.status = "waiting"

    def look(self) -> bool:
        """Brings the state up to date; True when the job has just ended."""
        done = self.job.done()
        state = self.state
        if state.status == "waiting" and self._is_new("console.txt"):
            state.status, state.started = "running", time.monotonic()
        record = self._last_step()
        if record:
            state.step, state.loss = record["iteration"] + 1, record["total_loss"]
            state.step_seconds = record.get("time", state.step_seconds)
        if state.step < state.total:
            state.trained = None
        elif not state.evaluating:
            state.trained = time.monotonic()
        if done:
            self._end()
        return done

    def _last_step(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError):  # a file system may be away for a moment; the training is not
            return self.result.last_step() if self._is_new("metrics.json") else None
        return None

    def _is_new(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            return (self.run.folder / name).stat().st_mtime > self.since - 1
        return False

    def _end(self) -> None:
        self.ended = True
        self.state.ended = time.monotonic()
        error = self.job.exception()
        if error is not None or not self.result.load():
            self.result.status = "failed"
            self.result.error = self.result.error or f"{type(error).__name__}: {error}" if error else "left no result"
        self.state.status, self.state.ap = self.result.status, self.result.ap


def _work_off(tracks: Sequence[_Track], executor, parallel: int, progress: Unbreakable) -> None:
    for track in tracks:
        if track.reuse(executor.fresh):
            track.state.ap = track.result.ap
            progress.event(f"{track.state.title}: reused, {_outcome(track.result)} (--fresh trains it again)")
        elif not executor.fresh and (aside := superseded(track.run)):
            progress.event(
                f"{track.state.title}: config, data or code have changed; the earlier run moves to {shown(aside)}"
            )
    queue = [track for track in tracks if not track.ended]
    running: list[_Track] = []
    while queue or running:
        free = min(executor.slots - len(running), len(queue))
        if free > 0:
            batch, queue = queue[:free], queue[free:]
            for track, job in zip(batch, executor.submit([track.run for track in batch])):
                track.submitted(job)
                progress.event(f"{track.state.title}: started, console in {shown(track.run.folder / CONSOLE)}")
            running += batch
        time.sleep(_POLL_SECONDS)
        for track in [track for track in running if track.look()]:
            running.remove(track)
            progress.event(f"{track.state.title}: {_outcome(track.result)}")
        progress.show(seconds_left([track.state for track in tracks], parallel, time.monotonic()))


def _outcome(result: RunResult) -> str:
    if result.ok:
        return f"done in {format_duration(result.seconds)}, AP {result.ap:.1f}"
    if result.status == "diverged":
        return f"DIVERGED at step {result.step}: the loss was no number"
    return f"FAILED after {format_duration(result.seconds)} (exit code {result.exit_code}): {result.error}"


def _say_what_is_kept(tracks: Sequence[_Track], executor, progress: Unbreakable) -> None:
    if executor.survives_us:
        progress.event("Interrupted. What is in the queue goes on; the same command shows how far it is.")
        return
    kept = sum(track.ended for track in tracks)
    progress.event(
        f"Interrupted. {kept} of {len(tracks)} runs have ended and are kept; the same command goes on with the others "
        "from their last checkpoints."
    )


@contextlib.contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP (a batch system, a closed terminal) end a run as cleanly as Ctrl-C does."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup wants it ignored
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
