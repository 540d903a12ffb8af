"""Trains one run in its folder, or goes on with it: what an executor runs, on this machine or on a cluster's."""

from __future__ import annotations

import contextlib
import ctypes
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

from ..engine.trainer import DIVERGED
from ..files import TEMPORARY
from .results import CONSOLE, RESULT, RunResult, write_whole

_RUN = "run.json"  # says that the folder is ours, and for which fingerprint
_LOCK = "lock"
JOB = "slurm_job"  # its number, for the next call
# The training dies with whoever waits for it, even by kill -9, and never trains on unseen beside the next attempt.
# (PR_SET_PDEATHSIG is 1; it lasts through exec. Elsewhere than on Linux the lock, which it holds, keeps others out.)
# Its own workers die with it by SIGINT, as torch has it, which a job in the background would ignore.
_TIED = """\
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
_PR_SET_PDEATHSIG = 1
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


def train(run: Run, threads: int = 1, parallel: int = 1, fresh: bool = False) -> str:
    """Trains ``run`` in a process of its own, from its last checkpoint if there is one; returns its status.

    Nothing is trained that has ended before with the same fingerprint, unless ``fresh``. What a run with another one
    left is moved aside. If another process trains in the folder, its end is waited for.

    Raises:
        FileExistsError: the folder holds what no run has written, or a run.json that cannot be read.
        KeyboardInterrupt: this process is stopping (:func:`stop_all`).
    """
    with _locked(run.folder) as lock:
        if fresh:
            forget(run.folder)
        earlier = run.result()
        if earlier.load() and earlier.ended:
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
    if _left_in(folder) and not (folder / _RUN).is_file():
        raise FileExistsError(f"{folder} is not empty and no earlier run; choose another output folder")


def known_fingerprint(folder: Path) -> str:
    """Of the run that has trained in the folder; empty if none has.

    Raises:
        FileExistsError: one has, but what it left cannot be read. Nothing is deleted on suspicion.
    """
    path = folder / _RUN
    try:
        return json.loads(path.read_text(encoding="utf-8"))["fingerprint"]
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileExistsError(f"{path} cannot be read ({error}): move {folder} away, or see what is wrong") from error


def superseded(run: Run) -> Path | None:
    """Where what another run has left in the folder will be moved to; None if there is nothing worth keeping."""
    known = known_fingerprint(run.folder)
    if known in ("", run.fingerprint):
        return None
    if not (run.folder / RESULT).is_file() and not any(run.folder.glob("*.pth")):
        return None
    return run.folder.with_name(f"{run.folder.name}.{known[:8]}")


def forget(folder: Path) -> None:
    """Empties the folder of a run, for metrics.json is appended to."""
    check_folder(folder)
    for path in _left_in(folder):
        if path.name != _RUN:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / _RUN).unlink(missing_ok=True)  # last: until then the folder is ours


def stop_all(grace: float = 5.0) -> None:
    """Ends the trainings that this process has started, and all that they have started; none starts any more."""
    with _lock:
        _stopping.set()
        processes = list(_processes)
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + grace
    for process in processes:
        while not _has_ended(process) and time.monotonic() < deadline:
            time.sleep(0.05)
        _signal_group(process, signal.SIGKILL)


def start_again() -> None:
    """After :func:`stop_all`."""
    _stopping.clear()


def die_with_parent() -> None:
    """Ends this process when the one that started it ends, by kill -9 too; on Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def shown(path: Path) -> str:
    """The path as a person in this folder would type it; the child starts here too."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


_processes: set[subprocess.Popen] = set()
_stopping = threading.Event()
_lock = threading.RLock()  # a signal handler may stop what its own thread is starting


def _left_in(folder: Path) -> list[Path]:
    """What lies in a folder, but for what is not a run's."""
    if not folder.is_dir():
        return []
    ours = {_LOCK, JOB, _RUN + TEMPORARY, JOB + TEMPORARY}
    return [path for path in folder.iterdir() if path.name not in ours]


def _prepare(run: Run) -> int:
    """Makes the folder ready to start in or to go on; returns which attempt this is."""
    check_folder(run.folder)
    if known_fingerprint(run.folder) not in ("", run.fingerprint):
        _move_aside(run)
    attempt = 1
    with contextlib.suppress(FileNotFoundError):
        attempt += json.loads((run.folder / _RUN).read_text(encoding="utf-8"))["attempts"]
    write_whole(run.folder / _RUN, json.dumps({"fingerprint": run.fingerprint, "attempts": attempt}) + "\n")
    for left_by_earlier in (RESULT, DIVERGED):
        (run.folder / left_by_earlier).unlink(missing_ok=True)
    if (run.folder / CONSOLE).exists():
        (run.folder / CONSOLE).rename(run.folder / f"console.{attempt - 1}.txt")
    _end_last_line(run.folder / "metrics.json")
    return attempt


def _move_aside(run: Run) -> None:
    target = superseded(run)
    if target is not None:
        shutil.rmtree(target, ignore_errors=True)  # of the same fingerprint, so of the same run
        target.mkdir()
        for path in _left_in(run.folder):
            if path.name != _RUN:
                path.rename(target / path.name)
        shutil.copy(run.folder / _RUN, target / _RUN)
    forget(run.folder)


def _end_last_line(path: Path) -> None:
    """A line that was being written would swallow the next record."""
    if path.is_file() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _call(run: Run, threads: int, lock: int) -> tuple[int, int]:
    """Runs the training process to its end: its exit code, and the most memory it held, in bytes."""
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    if not run.on_gpu:
        env.update({f"{name}_NUM_THREADS": str(threads) for name in _LIBRARIES})
    with (run.folder / CONSOLE).open("wb") as console, _lock:
        if _stopping.is_set():
            raise KeyboardInterrupt
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
        _processes.add(process)
    try:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    except BaseException:
        _signal_group(process, signal.SIGKILL)
        raise
    finally:
        with _lock:
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
    """Waits until no other process trains in the folder, and keeps others out until this one and its children end."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        while not _take(file.fileno()):
            if _stopping.wait(0.5):
                raise KeyboardInterrupt
        yield file.fileno()


def _take(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network file systems have no locks: then it is up to the person
        return True
    return True


def _has_ended(process: subprocess.Popen) -> bool:
    """Without taking its exit code from the thread that waits for it."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
