"""Trains one run in its folder, or goes on with it: what an executor runs, on this machine or on a cluster's."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .results import CONSOLE, RESULT, RunResult, write_whole

_RUN = "run.json"  # says that the folder is ours, and for which fingerprint
_LOCK = "lock"
JOB = "slurm_job"  # its number, for the next call
# The training dies with whoever waits for it, even by kill -9, and never trains on unseen beside the next attempt.
# (PR_SET_PDEATHSIG is 1; it lasts through exec. Elsewhere than on Linux the lock, which it holds, keeps others out.)
_TIED = """\
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
_LIBRARIES = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")


@dataclass(frozen=True)
class Run:
    """One training: a row of a table with one seed.

    Attributes:
        method, title, seed: see RunResult.
        folder: everything it leaves goes there.
        train_net: the script that trains: `--config-file FILE --resume FLAGS KEY VALUE ... OUTPUT_DIR DIR`.
        config_file: of the run.
        flags: of train_net, before the overrides.
        overrides: config keys and values, in turn.
        fingerprint: of everything that decides the outcome.
        max_iter: SOLVER.MAX_ITER.
        images_per_step: SOLVER.IMS_PER_BATCH.
        on_gpu: whether it computes there.
    """

    method: str
    title: str
    seed: int
    folder: Path
    train_net: Path
    config_file: Path
    flags: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    fingerprint: str = ""
    max_iter: int = 0
    images_per_step: int = 0
    on_gpu: bool = False

    @property
    def command(self) -> list[str]:
        """As a person in this folder would type it."""
        words = ["python", shown(self.train_net), "--config-file", shown(self.config_file), "--resume", *self.flags]
        return [*words, *self.overrides, "OUTPUT_DIR", shown(self.folder)]

    def result(self, threads: int = 1, parallel: int = 1) -> RunResult:
        """An empty result for this run."""
        return RunResult(
            self.method,
            self.title,
            self.seed,
            self.folder,
            self.command,
            fingerprint=self.fingerprint,
            threads=threads,
            parallel=parallel,
        )


def train(run: Run, threads: int = 1, parallel: int = 1) -> str:
    """Trains ``run`` in a process of its own, from its last checkpoint if there is one; returns its status.

    Nothing is trained that has ended before with the same fingerprint. What a run with another one left is removed.
    Raises FileExistsError for a folder that no run has written, BlockingIOError if another process trains in it.
    """
    with _locked(run.folder) as lock:
        earlier = run.result()
        if earlier.load() and earlier.status in ("done", "diverged"):
            return earlier.status
        result = run.result(threads, parallel)
        result.attempts = _prepare(run)
        begun = time.monotonic()
        exit_code, result.peak_memory = _call(run, threads, lock)
        result.finish(exit_code, time.monotonic() - begun)
        if result.status != "failed":
            _remove_checkpoints_between(run.folder)
        return result.status


def check_folder(folder: Path) -> None:
    """Refuses to train where something lies that no run has written."""
    if folder.is_dir() and {p.name for p in folder.iterdir()} - {_LOCK, JOB} and not (folder / _RUN).is_file():
        raise FileExistsError(f"{folder} is not empty and no earlier run; choose another output folder")


def forget(folder: Path) -> None:
    """Empties the folder of a run, for metrics.json is appended to."""
    check_folder(folder)
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in (_LOCK, JOB, _RUN):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (folder / _RUN).unlink(missing_ok=True)  # last: until then the folder is ours


def stop_all(grace: float = 5.0) -> None:
    """Ends the trainings that this process has started, and all that they have started."""
    with _processes_lock:
        processes = list(_processes)
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + grace
    for process in processes:
        while process in _processes and time.monotonic() < deadline:
            time.sleep(0.05)
        _signal_group(process, signal.SIGKILL)


def shown(path: Path) -> str:
    """The path as a person in this folder would type it; the child starts here too."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


_processes: set[subprocess.Popen] = set()
_processes_lock = threading.Lock()


def _prepare(run: Run) -> int:
    """Makes the folder ready to start in or to go on; returns which attempt this is."""
    check_folder(run.folder)
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads((run.folder / _RUN).read_text(encoding="utf-8"))
    if known.get("fingerprint") != run.fingerprint:
        forget(run.folder)
        known = {}
    attempt = known.get("attempts", 0) + 1
    write_whole(run.folder / _RUN, json.dumps({"fingerprint": run.fingerprint, "attempts": attempt}) + "\n")
    (run.folder / RESULT).unlink(missing_ok=True)
    if (run.folder / CONSOLE).exists():
        (run.folder / CONSOLE).rename(run.folder / f"console.{attempt - 1}.txt")
    _mend_checkpoint(run.folder)
    return attempt


def _mend_checkpoint(folder: Path) -> None:
    """Forgets a last_checkpoint that was being written: upstream would take its empty name for "from scratch"."""
    last = folder / "last_checkpoint"
    if last.is_file() and not (folder / (last.read_text(errors="replace").strip() or "?")).is_file():
        last.unlink()


def _call(run: Run, threads: int, lock: int) -> tuple[int, int]:
    """Runs the training process to its end: its exit code, and the most memory it held, in bytes."""
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    if not run.on_gpu:
        env.update({f"{name}_NUM_THREADS": str(threads) for name in _LIBRARIES})
    with (run.folder / CONSOLE).open("wb") as console:
        # A session of its own: Ctrl-C reaches only us, and we end the child with its data workers.
        process = subprocess.Popen(
            [sys.executable, "-c", _TIED, *run.command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            pass_fds=(lock,),
        )
    with _processes_lock:
        _processes.add(process)
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        _signal_group(process, signal.SIGKILL)
        raise
    finally:
        with _processes_lock:
            _processes.discard(process)
        _signal_group(process, signal.SIGKILL)  # data workers that it has left behind
    return process.returncode, _bytes(usage)


def _bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _remove_checkpoints_between(folder: Path) -> None:
    """A run that has ended keeps its last model only: those in between were for going on."""
    for path in folder.glob("model_[0-9]*.pth"):
        path.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Keeps a second process out of the folder until this one and all that inherited the descriptor have ended."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BlockingIOError(f"{folder}: another process is training there") from error
        yield file.fileno()


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
