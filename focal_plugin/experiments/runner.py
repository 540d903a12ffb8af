"""Trains several configurations as separate processes, a few at a time, and remembers what has finished."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import yaml

from .progress import Bars, Lines, RowState, format_duration, make_progress, seconds_left
from .results import CONSOLE, RunResult

_PACKAGE = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.25


@dataclass(frozen=True)
class Row:
    """One training: a row of the comparison. Its own overrides win over those given to all rows."""

    key: str
    title: str
    config_file: Path
    overrides: tuple[str, ...] = ()


def run_rows(
    rows: Sequence[Row],
    output_dir: Path,
    *,
    train_net: Path,
    parallel: int | None = None,
    threads: int | None = None,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    stream: TextIO | None = None,
) -> list[RunResult]:
    """Trains every row in `output_dir/<key>` and returns their results in the order of `rows`.

    A row that fails does not stop the others. A finished row is reused as long as its overrides, its
    configuration and the code it runs are the same. Ctrl-C ends the processes and raises KeyboardInterrupt.

    Args:
        rows: what to train.
        output_dir: the rows' folders are made here.
        train_net: the script that trains one row: `--config-file FILE KEY VALUE ... OUTPUT_DIR DIR`.
        parallel: rows trained at the same time; default: as many as there are rows and cores for them.
        threads: threads of each row; default: the cores shared out evenly.
        overrides: config overrides for all rows.
        fresh: train again what has finished before.
        stream: where progress goes; default: stderr.
    """
    if len({row.key for row in rows}) != len(rows):
        raise ValueError(f"the rows' keys are not unique: {[row.key for row in rows]}")
    cores = _available_cores()
    parallel = parallel or max(1, min(len(rows), cores))
    threads = threads or max(1, cores // parallel)
    jobs = [_Job(row, Path(output_dir), train_net, overrides, threads, parallel) for row in rows]
    for job in jobs:  # before one is started that this would end
        _check_folder(job.result.folder)
    progress = make_progress([job.state for job in jobs], stream or sys.stderr)
    try:
        with _signals_interrupt():
            _work_off(jobs, parallel, fresh, progress)
    except KeyboardInterrupt:
        kept = ", ".join(job.row.title for job in jobs if job.state.status == "done") or "nothing"
        progress.event(f"Interrupted. Kept, and reused next time: {kept}. The other rows start over.")
        raise
    finally:
        _stop([job for job in jobs if job.process and job.process.returncode is None])
        progress.close()
    return [job.result for job in jobs]


def fingerprint(row: Row, train_net: Path, overrides: Sequence[str]) -> str:
    """A hash of all that decides the outcome of a row: overrides, configuration, training code."""
    # What trains never imports these two rooms, so editing a report does not cost a training.
    sources = [p for p in sorted(_PACKAGE.rglob("*.py")) if p.parent.name not in ("experiments", "analysis")]
    digest = hashlib.sha256(json.dumps([*overrides, *row.overrides]).encode())
    for path in [train_net, *_config_chain(row.config_file), *sources]:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class _Job:
    """A row together with its process."""

    def __init__(self, row, output_dir, train_net, overrides, threads, parallel):
        self.row = row
        self.state = RowState(row.title)
        self.process: subprocess.Popen | None = None
        folder = output_dir / row.key
        command = [_shown(train_net), "--config-file", _shown(row.config_file), *overrides, *row.overrides]
        self.result = RunResult(
            key=row.key,
            title=row.title,
            folder=folder,
            command=["python", *command, "OUTPUT_DIR", _shown(folder)],
            fingerprint=fingerprint(row, train_net, overrides),
            threads=threads,
            parallel=parallel,
        )

    def reuse(self) -> bool:
        """Takes over the result of an earlier call if it would be the same."""
        saved = self.result.saved()
        if saved:
            self.result, self.state.status = saved, "done"
        return bool(saved)

    def start(self) -> None:
        folder = self.result.folder
        _clear(folder)
        libraries = ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "VECLIB_MAXIMUM")
        env = dict(os.environ, PYTHONUNBUFFERED="1")
        env.update({f"{name}_NUM_THREADS": str(self.result.threads) for name in libraries})
        with (folder / CONSOLE).open("wb") as console:
            # A session of its own: Ctrl-C reaches only us, and we end the child with its data workers.
            self.process = subprocess.Popen(
                [sys.executable, *self.result.command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        self.state.status, self.state.started = "running", time.monotonic()

    def ended(self) -> bool:
        """Brings the state up to date; True when the process has ended and the result is complete."""
        code = self.process.poll()
        self._look()
        if code is None:
            return False
        self.state.ended = time.monotonic()
        self.result.finish(code, self.state.ended - self.state.started)
        self.state.status = "done" if self.result.ok else "failed"
        return True

    def _look(self) -> None:
        state = self.state
        if state.total is None:
            # The child may be in the middle of writing it.
            with contextlib.suppress(yaml.YAMLError, KeyError, TypeError):
                state.total = self.result.config()["SOLVER"]["MAX_ITER"]
        record = self.result.last_step()
        if record:
            state.step, state.loss = record["iteration"] + 1, record["total_loss"]
            state.step_seconds = record.get("time", state.step_seconds)
        if state.step and state.step == state.total and not state.evaluating:
            state.trained = time.monotonic()


def _work_off(jobs: Sequence[_Job], parallel: int, fresh: bool, progress: Bars | Lines) -> None:
    for job in jobs:
        if not fresh and job.reuse():
            progress.event(f"{job.row.title}: reused, AP {job.result.ap:.1f} (--fresh trains it again)")
    queue = [job for job in jobs if job.state.status == "queued"]
    running: list[_Job] = []
    while queue or running:
        while queue and len(running) < parallel:
            job = queue.pop(0)
            job.start()
            running.append(job)
            progress.event(f"{job.row.title}: started, console in {_shown(job.result.folder / CONSOLE)}")
        time.sleep(_POLL_SECONDS)
        for job in [job for job in running if job.ended()]:
            running.remove(job)
            progress.event(f"{job.row.title}: {_outcome(job.result)}")
        progress.show(seconds_left([job.state for job in jobs], parallel, time.monotonic()))


def _outcome(result: RunResult) -> str:
    if result.ok:
        return f"done in {format_duration(result.seconds)}, AP {result.ap:.1f}"
    return f"FAILED after {format_duration(result.seconds)} (exit code {result.exit_code}): {result.error}"


def _stop(jobs: Sequence[_Job], grace: float = 5.0) -> None:
    """Ends the processes and everything they have started."""
    for job in jobs:
        _signal_group(job, signal.SIGTERM)
    deadline = time.monotonic() + grace
    for job in jobs:
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.process.wait(max(0.0, deadline - time.monotonic()))
        _signal_group(job, signal.SIGKILL)
        job.process.wait()


def _signal_group(job: _Job, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, number)


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


def _clear(folder: Path) -> None:
    """Empties a row's folder, for metrics.json is appended to; refuses to delete what no run has written."""
    _check_folder(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _check_folder(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CONSOLE).is_file():
        raise FileExistsError(f"{folder} is not empty and no earlier run; choose another output folder")


def _config_chain(path: Path) -> list[Path]:
    """A config file and the files it is based on."""
    bases = (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    return [path] + [p for base in bases for p in _config_chain(path.parent / os.path.expanduser(base))]


def _shown(path: Path) -> str:
    """The path as a person in this folder would type it; the child starts here too."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
