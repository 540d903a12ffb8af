"""Train runs, a few at a time, in this process's children or by submitit; go on with what was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..engine.trainer import DIVERGED
from ..files import TEMPORARY
from .results import CONSOLE, RESULT, Run, RunResult, typed, write_json

_RUN, _LOCK, _JOB = "run.json", "lock", "slurm_job"  # run.json says that a folder is ours, and for which fingerprint
_POLL, _LOG, _GRACE = 0.25, 10.0, 5.0  # seconds between looks, between lines, and for a stopped run to save itself
# The training dies with the thread that waits for it, even by kill -9, and never trains on unseen beside the next
# attempt: PR_SET_PDEATHSIG is 1, and lasts through exec. Linux alone has it.
_TIED = """\
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def run_all(runs: Sequence[Run], executor: InlineExecutor | SubmititExecutor, fresh: bool = False) -> list[RunResult]:
    """Train runs, each in a folder of its own, and return their results in this order; say on stderr how far they are.

    A run that fails does not stop the others. What has ended before (trained, or diverged) is not trained again as
    long as its configuration, its data and the code are the same; what was stopped goes on from its last checkpoint;
    what failed is tried again. ``fresh`` empties the folder of each run as it begins. Ctrl-C, SIGTERM and SIGHUP end
    the processes and raise KeyboardInterrupt.

    Raises:
        OSError: a folder cannot be made, or holds something else; see :func:`check_folder`.
    """
    if len({run.folder for run in runs}) != len(runs):
        raise ValueError(f"two runs share a folder: {[str(run.folder) for run in runs]}")
    for run in runs:  # before one is started that this would end
        check_folder(run, fresh)
    begun, jobs, executor.fresh = time.monotonic(), {}, fresh

    def say(text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - begun), 60)
        with suppress(OSError):  # the runs are worth more than a terminal that is gone
            print(f"[{minutes:02d}:{seconds:02d}] {text}", file=sys.stderr, flush=True)

    try:
        with _stopped_by_signals():
            for run in runs:
                run.folder.mkdir(parents=True, exist_ok=True)
            return _work_off(runs, executor, jobs, say)
    except KeyboardInterrupt:
        kept = f"{sum(run.result().ended for run in runs)} of {len(runs)} runs have ended and are kept"
        go_on = f"the same command{', without --fresh,' if fresh else ''} goes on with the others"
        say(f"Interrupted. {kept}; {go_on}{', which stay in the queue' if executor.outlives_driver else ''}.")
        raise
    finally:
        if not executor.outlives_driver:
            executor.cancel(list(jobs.values()))


def _work_off(runs: Sequence[Run], executor: Any, jobs: dict[Run, Any], say: Callable[[str], None]) -> list[RunResult]:
    """Fill the executor's slots until all has ended; ``jobs`` are those that run."""
    results = {run: result for run in runs if (result := run.result()).ended and not executor.fresh}
    for run, result in results.items():
        result.reused = True
        say(f"{run}: reused, {_outcome(result)} (--fresh trains it again)")
    waiting, shown = [run for run in runs if run not in results], time.monotonic()
    while waiting or jobs:
        free = executor.slots - len(jobs)
        batch, waiting = waiting[:free], waiting[free:]
        for run, job in zip(batch, executor.submit(batch) if batch else ()):
            jobs[run] = job
            say(f"{run}: started, console in {typed(run.folder / CONSOLE)}")
        time.sleep(_POLL)
        for run in [run for run, job in jobs.items() if job.done()]:
            job = jobs.pop(run)
            error = job.exception()
            results[run] = result = run.result() if error else job.result()
            if error:
                result.status, result.error = "failed", f"{type(error).__name__}: {error}"
            say(f"{run}: {_outcome(result)}")
        if jobs and time.monotonic() - shown >= _LOG:
            shown = time.monotonic()
            say(_progress(runs, results, jobs, executor))
    return [results[run] for run in runs]


def _progress(runs: Sequence[Run], results: Mapping[Run, RunResult], jobs: Mapping[Run, Any], executor: Any) -> str:
    """Return a line such as `FL seed 1 120/400 loss 0.41; 3 done, 1 running, 6 waiting; about 9.0 min left`."""
    words, times, steps_left = [], [], 0
    for run in runs:
        is_to_be_emptied = executor.fresh and run not in jobs and run not in results
        record = {} if is_to_be_emptied else run.result().last_step()
        step = record.get("iteration", -1) + 1
        times += [record["time"]] if "time" in record else []
        steps_left += 0 if run in results else run.max_iter - step
        if run in jobs:
            state = f"{step:,}/{run.max_iter:,} loss {record['total_loss']:.3g}" if record else "starting"
            words.append(f"{run} {'evaluating' if step >= run.max_iter else state}")
    states = ["running" if run in jobs else results[run].status if run in results else "waiting" for run in runs]
    counts = ", ".join(f"{count} {state}" for state, count in Counter(states).items())
    seconds = steps_left * statistics.median(times or [0]) / min(executor.parallel, len(runs) - len(results))
    return f"{', '.join(words)}; {counts}" + (f"; about {format_duration(seconds)} left" if seconds else "")


def format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.1f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(result: RunResult) -> str:
    if result.ok:
        return f"done in {format_duration(result.seconds)}, AP {result.ap:.1f}"
    if result.status == "diverged":
        return f"DIVERGED at step {result.step}: the loss was no number"
    return f"FAILED after {format_duration(result.seconds)} (exit code {result.exit_code}): {result.error}"


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a batch system, a closed terminal) end the runs as cleanly as Ctrl-C does, inside.

    What is ignored stays so (nohup has SIGHUP ignored, a shell the SIGINT of a job in the background). But torch ends
    the workers of a dead training by SIGINT, and submitit its jobs: a handler that does nothing is not inherited.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with ExitStack() as stack:
        for number in numbers if threading.current_thread() is threading.main_thread() else ():
            is_ignored = signal.getsignal(number) is signal.SIG_IGN
            if not is_ignored or number != signal.SIGHUP:
                handler = (lambda *_: None) if is_ignored else signal.default_int_handler
                stack.callback(signal.signal, number, signal.signal(number, handler))
        yield


def check_folder(run: Run, fresh: bool = False) -> int:
    """Return how often this run has been started in its folder.

    Raises:
        FileExistsError: the folder holds what no run has written, a run.json that cannot be read, or, unless ``fresh``,
            a model of another configuration, data or code. Nothing is deleted on suspicion.
    """
    path = run.folder / _RUN
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["fingerprint"] == run.fingerprint:
            return known["attempts"]
    except FileNotFoundError:
        if _left_in(run.folder):
            problem = "is not empty and no earlier run; choose another output folder"
            raise FileExistsError(f"{run.folder} {problem}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{path} cannot be read ({error}): move its folder away, or see what is wrong") from error
    if not fresh and (any(run.folder.glob("*.pth")) or (run.folder / "inference").is_dir()):
        way_out = "--fresh trains it again there and deletes the earlier one; another --output keeps it"
        raise FileExistsError(f"{run.folder} holds a run of another config, data or code: {way_out}")
    return 0


def _left_in(folder: Path) -> list[Path]:
    ours = {_LOCK, _JOB, _RUN, _RUN + TEMPORARY, _JOB + TEMPORARY}
    return [path for path in folder.glob("*") if path.name not in ours]


def _forget(folder: Path) -> None:
    """Empty the folder of a run, for metrics.json is appended to; run.json last, as until then the folder is ours."""
    for path in _left_in(folder):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / _RUN).unlink(missing_ok=True)


def _take(lock: FileLock, timeout: float) -> bool:
    """Return whether a lock could be had in time. Some network file systems have none: then it is up to the person."""
    try:
        lock.acquire(timeout)
    except Timeout:
        return False
    except (OSError, NotImplementedError):
        pass
    return True


class InlineExecutor:
    """Children of this process, ``parallel`` at a time, with so many threads each on a CPU; they end with it."""

    outlives_driver = fresh = False

    def __init__(self, parallel: int, threads: int):
        self.slots = self.parallel = parallel
        self._threads, self._groups, self._is_stopped = threads, set(), False

    def submit(self, runs: Sequence[Run]) -> list[Future]:
        pool = ThreadPoolExecutor(len(runs))
        jobs = [pool.submit(self._train, run) for run in runs]
        pool.shutdown(wait=False)
        return jobs

    def cancel(self, jobs: Sequence[Future]) -> None:
        """End trainings: by SIGTERM, at which they write a checkpoint, and SIGKILL; what waits never begins."""
        self._is_stopped = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            for group in list(self._groups):
                _signal(group, number)
            wait(jobs, _GRACE)

    def _train(self, run: Run) -> RunResult:
        """Train once no other process trains in the folder, unless one has done it by then."""
        lock = FileLock(run.folder / _LOCK)
        while not (_take(lock, _POLL) or self._is_stopped):
            pass
        try:
            if self.fresh and not self._is_stopped:
                _forget(run.folder)
            result = run.result()
            if not (self._is_stopped or result.ended):
                self._train_here(run, result)
            return result
        finally:
            lock.release()

    def _train_here(self, run: Run, result: RunResult) -> None:
        folder = run.folder
        result.parallel, result.threads, result.attempts = self.parallel, self._threads, check_folder(run) + 1
        if result.attempts == 1:
            _forget(folder)
        write_json(folder / _RUN, {"fingerprint": run.fingerprint, "attempts": result.attempts})
        for left_by_earlier in (RESULT, DIVERGED):
            (folder / left_by_earlier).unlink(missing_ok=True)
        if (folder / CONSOLE).exists():
            (folder / CONSOLE).rename(folder / f"console.{result.attempts - 1}.txt")
        libraries = () if run.on_gpu else ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
        threads = {f"{name}_NUM_THREADS": str(self._threads) for name in libraries}
        begun, words = time.monotonic(), [sys.executable, "-c", _TIED, *run.command[1:]]
        with (folder / CONSOLE).open("wb") as console:
            # A session of its own: Ctrl-C reaches only us, and we end the child with its data workers.
            options = {"env": {**os.environ, "PYTHONUNBUFFERED": "1", **threads}, "start_new_session": True}
            child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=console, stderr=console, **options)
        self._groups.add(child.pid)
        _, status, usage = os.wait4(child.pid, 0)
        _signal(child.pid, signal.SIGKILL)  # to data workers that it has left behind
        self._groups.remove(child.pid)
        child.returncode = os.waitstatus_to_exitcode(status)
        result.peak_memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        result.finish(child.returncode, time.monotonic() - begun)
        for path in folder.glob("model_[0-9]*.pth") if result.ended else ():
            path.unlink()  # those were for going on


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


class SubmititExecutor:
    """submitit's jobs: processes on this machine ("local") or in a SLURM queue ("slurm").

    Args:
        folder: for submitit's own files.
        num_gpus: of each job; 0: it computes on the CPU, with so many ``threads``.
        options: more of submitit's parameters, such as slurm_partition or timeout_min.

    Raises:
        ValueError: submitit is not installed or knows no such option, or there is no SLURM here.
    """

    fresh = False

    def __init__(self, kind: str, folder: Path, parallel: int, threads: int, num_gpus: int, options: Mapping = {}):
        try:
            import submitit
        except ImportError as error:
            raise ValueError(f"--executor {kind} needs submitit: pip install submitit") from error
        self.outlives_driver = kind == "slurm"
        self.slots = sys.maxsize if kind == "slurm" else parallel  # SLURM has a queue, submitit's local jobs have none
        self.parallel, self._threads, self._kind, self._folder = parallel, threads, kind, folder
        array = {"slurm_array_parallelism": parallel} if kind == "slurm" else {}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=kind)
            # One task that starts its own workers, as train_net.py --num-gpus does.
            self._executor.update_parameters(name="focal_plugin", tasks_per_node=1, gpus_per_node=num_gpus, **array)
            self._executor.update_parameters(**{"timeout_min": 7 * 24 * 60, "cpus_per_task": threads, **options})
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"--executor {kind}: {error}") from error

    def submit(self, runs: Sequence[Run]) -> list[Any]:
        """Hand runs in as one array, but for those that an earlier call has left in the queue."""
        from submitit.core.utils import FailedJobError

        jobs = {run: job for run in runs if self._kind == "slurm" and (job := self._queued(run))}
        if new := [run for run in runs if run not in jobs]:
            task = _Task(self.parallel, self._threads)
            task.fresh = self.fresh
            try:
                jobs.update(zip(new, self._executor.map_array(task, new)))
            except FailedJobError as error:  # sbatch has refused
                raise ValueError(f"--executor {self._kind}: {error}") from error
        for run in new:
            write_json(run.folder / _JOB, [jobs[run].job_id, run.fingerprint])
        return [jobs[run] for run in runs]

    def _queued(self, run: Run) -> Any:
        """Return the SLURM job of an earlier call for the same training, if it has not ended."""
        from submitit import SlurmJob

        with suppress(OSError, ValueError):
            job_id, fingerprint = json.loads((run.folder / _JOB).read_text(encoding="utf-8"))
            job = SlurmJob(self._folder, job_id)
            return job if fingerprint == run.fingerprint and not job.done(force_check=True) else None

    def cancel(self, jobs: Sequence[Any]) -> None:
        """End local jobs; those in a queue survive us."""
        for job in jobs:
            job.cancel(check=False)
        for job in jobs:
            job.wait()


class _Task(InlineExecutor):
    """A training as submitit's job, which goes on where it was after a preemption or the end of its time."""

    def __call__(self, run: Run) -> RunResult:
        self._jobs = self.submit([run])
        try:
            wait(self._jobs)
        finally:
            self.cancel(self._jobs)
        return self._jobs[0].result()

    def checkpoint(self, run: Run) -> Any:
        from submitit.helpers import DelayedSubmission

        self.cancel(self._jobs)
        return DelayedSubmission(_Task(self.parallel, self._threads), run)  # which goes on, and is not fresh
