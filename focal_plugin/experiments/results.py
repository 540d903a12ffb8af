"""What there is to train, and what one training leaves in its folder, read back."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..engine.trainer import DIVERGED
from ..files import atomic_write, machine, now
from .paper import PaperRow

CONSOLE, RESULT = "console.txt", "result.json"


@dataclass(frozen=True)
class Run:
    """One training: a row of a table with one seed."""

    method: str  # see RunResult
    title: str
    seed: int
    folder: Path  # everything it leaves goes there
    command: tuple[str, ...]  # what trains it, as a person in this folder would type it; it begins with "python"
    fingerprint: str  # of everything that decides the outcome
    max_iter: int  # SOLVER.MAX_ITER
    images_per_step: int = 0  # SOLVER.IMS_PER_BATCH
    on_gpu: bool = False  # whether it computes there
    row: PaperRow | None = None

    def result(self) -> RunResult:
        """Return how it ended, if it has ended with this fingerprint; else a result that is "missing"."""
        result = RunResult(self.method, self.title, self.seed, self.folder, list(self.command), self.fingerprint)
        with suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
            if saved["fingerprint"] == self.fingerprint and (saved["status"] != "done" or result.detections.is_file()):
                saved["metrics"] = {k: math.nan if v is None else v for k, v in saved["metrics"].items()}
                vars(result).update({key: saved[key] for key in vars(result).keys() & saved.keys()})
        return result


@dataclass
class RunResult:
    """How one training ended."""

    method: str  # key of the paper's method, such as "ohem_128_nms0.5", or on COCO of its recipe
    title: str  # the method by what its configuration does, such as "OHEM 32/.5"
    seed: int  # of weights and data order
    folder: Path  # where all of the run is
    command: list[str]  # what trained it, as a person would type it
    fingerprint: str = ""  # of everything that decides the outcome
    status: str = "missing"  # has not ended; or "done", "diverged", "failed"
    step: int | None = None  # of a diverged run, the step whose loss was no number
    error: str = ""  # of a diverged or failed run, what it said
    exit_code: int | None = None  # of the process; None: it was not started
    metrics: dict[str, float] = field(default_factory=dict)  # in percent: "bbox/AP", "bbox/AP50", "bbox/AP-dog", ...
    seconds: float = 0.0  # wall clock of the last attempt's process, start-up and evaluation included
    attempts: int = 1  # more for a run that was stopped and went on
    peak_memory: int = 0  # bytes; of the GPU, or resident in the process on a CPU. 0: unknown
    peak_memory_of: str = "process"  # or "GPU"
    machine: str = ""  # where it was trained
    date: str = ""  # when it ended, UTC
    threads: int = 1  # of the process
    parallel: int = 1  # how many runs shared the machine
    reused: bool = False  # an earlier call trained it

    @property
    def ok(self) -> bool:
        return self.status == "done"

    @property
    def ended(self) -> bool:
        """Return whether there is an outcome, so that it need not be trained again."""
        return self.status in ("done", "diverged")

    @property
    def ap(self) -> float:
        return self.metrics.get("bbox/AP", math.nan)

    @property
    def detections(self) -> Path:
        return self.folder / "inference" / "coco_instances_results.json"

    def history(self) -> list[dict[str, Any]]:
        """Return the records of Detectron2's metrics.json in the order of their steps.

        A run that was stopped and went on from a checkpoint has done some steps twice: the later record counts.
        """
        by_step = {record["iteration"]: record for record in self._records()}
        return [by_step[step] for step in sorted(by_step)]

    def last_step(self) -> dict[str, Any] | None:
        """Return the newest training record; only the end of the file is read, for long runs write long files."""
        return next((record for record in reversed(self._records(tail=16384)) if "total_loss" in record), None)

    def _records(self, tail: int = sys.maxsize) -> list[dict[str, Any]]:
        records = []
        with suppress(OSError), (self.folder / "metrics.json").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - tail))
            for line in file.read().decode("utf-8", errors="replace").splitlines():
                with suppress(ValueError):  # a stop leaves half a line, which has the next record behind it
                    records.append(json.loads(line[line.rindex("{") :]))
        return [record for record in records if "iteration" in record]

    def config(self) -> dict[str, Any]:
        """Return the full configuration the run was trained with; empty if it failed before writing one."""
        path = self.folder / "config.yaml"
        return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}

    def finish(self, exit_code: int, seconds: float) -> None:
        """Take in what the ended process has left, and write it down."""
        self.exit_code, self.seconds, self.machine, self.date = exit_code, seconds, machine(), now()
        self.metrics = {k: v for record in self.history() for k, v in record.items() if k.startswith("bbox/")}
        with suppress(OSError, ValueError):  # Detectron2 gives NaN to a model that detects nothing; its AP is 0
            if json.loads(self.detections.read_text(encoding="utf-8")) == []:
                self.metrics = {k: 0.0 if math.isnan(v) else v for k, v in self.metrics.items()}
        console = ""
        with suppress(OSError):
            console = (self.folder / CONSOLE).read_text(encoding="utf-8", errors="replace")
        gpu = re.findall(r"max_mem: (\d+)M", console)  # how Detectron2's printer ends its lines
        self.peak_memory_of = "GPU" if gpu else "process"
        self.peak_memory = max(map(int, gpu)) * 2**20 if gpu else self.peak_memory
        self.status, self.error, self.step = "done", "", None
        if exit_code:
            self.status, self.error = "failed", _last_error(console, exit_code)
            with suppress(OSError, ValueError, KeyError, TypeError):  # as the trainer's guard has left it
                self.step = int(json.loads((self.folder / DIVERGED).read_text(encoding="utf-8"))["iteration"])
                self.status = "diverged"
        elif "bbox/AP" not in self.metrics or not self.detections.is_file():
            self.status, self.error = "failed", "ended well, but left no AP in metrics.json or no detections"
        # How it is called and where it lies are the asker's to say. A class without an object has no AP; JSON no NaN.
        saved = {k: v for k, v in asdict(self).items() if k not in ("method", "title", "folder", "reused")}
        saved["metrics"] = {k: None if math.isnan(v) else v for k, v in self.metrics.items()}
        with atomic_write(self.folder / RESULT) as file:
            file.write(json.dumps(saved, indent=1, allow_nan=False) + "\n")


def typed(path: Path) -> str:
    """Return the path as a person in this folder would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def of_method(results: Sequence[RunResult], method: str) -> list[RunResult]:
    return [result for result in results if result.method == method]


def _last_error(console: str, exit_code: int) -> str:
    """Return the exception a process died of, or the end of its console."""
    lines = [line.rstrip() for line in console.splitlines() if line.strip()]
    raised = [i for i, line in enumerate(lines) if re.match(r"[\w.]+(Error|Exception|Exit|Interrupt)\b", line)]
    text = "\n".join(lines[raised[-1] :][:4] if raised else lines[-3:]) or "nothing on the console"
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        text = f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; {text}"
    return text
