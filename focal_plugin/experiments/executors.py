"""Where runs are trained: in this process's children, or by submitit here or on a SLURM cluster."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from . import worker
from .results import write_whole
from .worker import Run

EXECUTORS = ("inline", "local", "slurm")


class Job(Protocol):
    """What concurrent.futures and submitit have in common."""

    def done(self) -> bool: ...

    def exception(self) -> BaseException | None: ...


class InlineExecutor:
    """Children of this process, a few at a time; they end with it."""

    survives_us = False

    def __init__(self, parallel: int, threads: int, fresh: bool = False):
        self.fresh = fresh
        self.slots, self._parallel, self._threads = parallel, parallel, threads
        self._pool = ThreadPoolExecutor(parallel)

    def submit(self, runs: Sequence[Run]) -> list[Future]:
        return [self._pool.submit(worker.train, run, self._threads, self._parallel, self.fresh) for run in runs]

    def cancel(self, jobs: Sequence[Job]) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        worker.stop_all()
        self._pool.shutdown(wait=True)
        worker.start_again()


class SubmititExecutor:
    """submitit's jobs: processes on this machine ("local") or in a SLURM queue ("slurm")."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        parallel: int,
        threads: int,
        num_gpus: int,
        options: dict[str, Any] | None = None,
        fresh: bool = False,
    ):
        """
        Args:
            kind: "local" or "slurm".
            folder: for submitit's own files.
            parallel: jobs at a time.
            threads: of each job on a CPU.
            num_gpus: of each job; 0: it computes on the CPU.
            options: more of submitit's parameters, such as slurm_partition or timeout_min.
            fresh: train again what has ended before.

        Raises:
            ValueError: submitit knows no such option, or there is no SLURM here.
        """
        try:
            import submitit
        except ImportError as error:
            raise ValueError(f"--executor {kind} needs submitit: pip install submitit") from error
        self.survives_us = kind == "slurm"
        self.slots = sys.maxsize if kind == "slurm" else parallel  # SLURM has a queue, submitit's local jobs have none
        self._parallel, self._threads, self._kind, self._folder = parallel, threads, kind, folder
        self.fresh = fresh
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=kind)
            # One task that starts its own workers, as train_net.py --num-gpus does.
            self._executor.update_parameters(
                name="focal_plugin",
                timeout_min=7 * 24 * 60,
                tasks_per_node=1,
                gpus_per_node=num_gpus,
                cpus_per_task=threads,
                **({"slurm_array_parallelism": parallel} if kind == "slurm" else {}),
            )
            self._executor.update_parameters(**(options or {}))
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"--executor {kind}: {error}") from error

    def submit(self, runs: Sequence[Run]) -> list[Job]:
        from submitit.core.utils import FailedJobError

        try:
            return self._submit_all(runs, _Task(self._threads, self._parallel, self.fresh))
        except FailedJobError as error:  # sbatch has refused
            raise ValueError(f"--executor {self._kind}: {error}") from error

    def _submit_all(self, runs: Sequence[Run], task: _Task) -> list[Job]:
        if self._kind == "local":
            return [self._executor.submit(task, run) for run in runs]
        jobs = {run.folder: job for run in runs if (job := self._queued(run))}
        new = [run for run in runs if run.folder not in jobs]
        if new:  # one array, of which the queue runs as many at a time as asked for
            for run, job in zip(new, self._executor.map_array(task, new)):
                jobs[run.folder] = job
                run.folder.mkdir(parents=True, exist_ok=True)
                write_whole(run.folder / worker.JOB, json.dumps([job.job_id, run.fingerprint]) + "\n")
        return [jobs[run.folder] for run in runs]

    def _queued(self, run: Run) -> Job | None:
        """The job of an earlier call for the same training, if it has not ended."""
        import submitit

        try:
            job_id, fingerprint = json.loads((run.folder / worker.JOB).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        job = submitit.SlurmJob(self._folder, job_id)
        return None if fingerprint != run.fingerprint or job.done(force_check=True) else job

    def cancel(self, jobs: Sequence[Job], grace: float = 10.0) -> None:
        """Only of local jobs: those in a queue survive us."""
        for job in jobs:
            if not job.done():
                job.cancel(check=False)
        deadline = time.monotonic() + grace
        for job in jobs:
            while not job.done() and time.monotonic() < deadline:
                time.sleep(0.1)
            if not job.done():  # it was told by SIGINT, which a job in the background ignores
                os.kill(int(job.job_id), signal.SIGKILL)


@dataclass(frozen=True)
class _Task:
    """worker.train as a job, which goes on where it was after a preemption or the end of its time."""

    threads: int
    parallel: int
    fresh: bool

    def __call__(self, run: Run) -> str:
        worker.die_with_parent()
        try:
            return worker.train(run, self.threads, self.parallel, self.fresh)
        except KeyboardInterrupt:  # cancelled
            worker.stop_all()
            raise

    def checkpoint(self, run: Run) -> Any:
        from submitit.helpers import DelayedSubmission

        worker.stop_all()
        return DelayedSubmission(replace(self, fresh=False), run)
