"""What one training leaves in its folder, read back."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..engine.trainer import DIVERGED
from ..files import atomic_write, machine, now

CONSOLE = "console.txt"
RESULT = "result.json"


@dataclass
class RunResult:
    """How one training ended.

    Attributes:
        method: key of the paper's method, such as "ohem_128_nms0.5".
        title: the method by what its configuration does, such as "OHEM 32/.5".
        seed: of weights and data order.
        folder: where all of the run is.
        command: what trained it, as a person would type it.
        fingerprint: of everything that decides the outcome.
        status: "done", "diverged", "failed", or "missing" for a run that has not ended.
        step: of a diverged run, the step whose loss was no number.
        error: of a diverged or failed run, what it said.
        exit_code: of the process; None: it was not started.
        metrics: of the last evaluation, in percent: "bbox/AP", "bbox/AP50", "bbox/APs", "bbox/AP-dog", ...
        seconds: wall clock of the process, start-up and evaluation included; of the last attempt.
        attempts: 1, or more for a run that was stopped and went on.
        peak_memory: bytes; of the GPU, or resident in the process on a CPU. 0: unknown.
        peak_memory_of: "GPU" or "process".
        machine: where it was trained.
        date: when it ended, UTC.
        threads: of the process.
        parallel: how many runs shared the machine.
        reused: an earlier call trained it.
    """

    method: str
    title: str
    seed: int
    folder: Path
    command: list[str]
    fingerprint: str = ""
    status: str = "missing"
    step: int | None = None
    error: str = ""
    exit_code: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    attempts: int = 1
    peak_memory: int = 0
    peak_memory_of: str = "process"
    machine: str = ""
    date: str = ""
    threads: int = 1
    parallel: int = 1
    reused: bool = False

    @property
    def ok(self) -> bool:
        return self.status == "done"

    @property
    def ended(self) -> bool:
        """Whether there is an outcome, so that it need not be trained again."""
        return self.status in ("done", "diverged")

    @property
    def ap(self) -> float:
        return self.metrics.get("bbox/AP", math.nan)

    @property
    def detections(self) -> Path:
        return self.folder / "inference" / "coco_instances_results.json"

    def history(self) -> list[dict[str, Any]]:
        """The records of Detectron2's metrics.json in the order of their steps.

        A run that was stopped and went on from a checkpoint has done some steps twice: the later record counts.
        """
        path = self.folder / "metrics.json"
        records = _parse(path.read_text(encoding="utf-8")) if path.is_file() else []
        by_step = {record["iteration"]: record for record in records if "iteration" in record}
        return [by_step[step] for step in sorted(by_step)]

    def config(self) -> dict[str, Any]:
        """The full configuration the run was trained with; empty if it failed before writing one."""
        path = self.folder / "config.yaml"
        return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}

    def last_step(self, tail: int = 16384) -> dict[str, Any] | None:
        """The newest training record; reads only the end of the file, for long runs write long files."""
        path = self.folder / "metrics.json"
        if not path.is_file():
            return None
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - tail))
            records = _parse(file.read().decode("utf-8", errors="replace"))
        return next((r for r in reversed(records) if "total_loss" in r and "iteration" in r), None)

    def finish(self, exit_code: int, seconds: float) -> None:
        """Takes in what the ended process has left, and writes it down."""
        self.exit_code, self.seconds, self.metrics = exit_code, seconds, self._final_metrics()
        self.machine, self.date = machine(), now()
        self._find_gpu_memory()
        if exit_code:
            self.error = _last_error(self.folder / CONSOLE, exit_code)
            self.step = self._diverged_at()
            self.status = "failed" if self.step is None else "diverged"
        elif "bbox/AP" not in self.metrics or not self.detections.is_file():
            self.status, self.error = "failed", "ended well, but left no AP in metrics.json or no detections"
        else:
            self.status, self.error = "done", ""
        self._save()

    def load(self) -> bool:
        """Takes over how an earlier attempt in this folder ended, if it has this fingerprint."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
            if saved["fingerprint"] == self.fingerprint and (saved["status"] != "done" or self.detections.is_file()):
                known = {name: saved[name] for name in _SAVED if name in saved}
                known["metrics"] = {k: math.nan if v is None else v for k, v in saved["metrics"].items()}
                vars(self).update(known)
                return True
        return False

    def _save(self) -> None:
        saved = {key: value for key, value in asdict(self).items() if key in _SAVED}
        # A class without an object has no AP; JSON has no NaN.
        saved["metrics"] = {k: None if math.isnan(v) else v for k, v in self.metrics.items()}
        text = json.dumps(saved, indent=1, allow_nan=False)
        write_whole(self.folder / RESULT, text + "\n")

    def _diverged_at(self) -> int | None:
        """Return the step that the trainer's guard has left in the folder; None if the loss did not break."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return int(json.loads((self.folder / DIVERGED).read_text(encoding="utf-8"))["iteration"])
        return None

    def _final_metrics(self) -> dict[str, float]:
        metrics = {k: v for record in self.history() for k, v in record.items() if k.startswith("bbox/")}
        # Upstream gives NaN to a model that detects nothing at all. Its AP is 0.
        with contextlib.suppress(OSError, ValueError):
            if json.loads(self.detections.read_text(encoding="utf-8")) == []:
                metrics = {k: 0.0 if math.isnan(v) else v for k, v in metrics.items()}
        return metrics

    def _find_gpu_memory(self) -> None:
        """Upstream's printer ends its lines with PyTorch's peak on the GPU, such as `max_mem: 4012M`."""
        with contextlib.suppress(OSError):
            peaks = re.findall(
                r"max_mem: (\d+)M", (self.folder / CONSOLE).read_text(encoding="utf-8", errors="replace")
            )
            if peaks:
                self.peak_memory, self.peak_memory_of = max(map(int, peaks)) * 2**20, "GPU"


# Where a run lies and how it is called are the asker's to say.
_SAVED = [f.name for f in fields(RunResult) if f.name not in ("method", "title", "folder", "reused")]


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that, stopped at any moment (power included), it is there whole or as it was."""
    with atomic_write(path) as file:
        file.write(text)


def of_method(results: Sequence[RunResult], method: str) -> list[RunResult]:
    return [result for result in results if result.method == method]


def _parse(text: str) -> list[dict[str, Any]]:
    records = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def _last_error(console: Path, exit_code: int) -> str:
    """The exception a process died of, or the end of its console."""
    text = console.read_text(encoding="utf-8", errors="replace") if console.is_file() else ""
    lines = [line.rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    exception = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")
    raised = [i for i, line in enumerate(lines) if exception.match(line)]
    text = "\n".join(lines[raised[-1] :][:4] if raised else lines[-3:]) or "nothing on the console"
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        text = f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; {text}"
    return text
