"""What one training leaves in its folder, read back."""

from __future__ import annotations

import contextlib
import json
import math
import re
import signal
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

CONSOLE = "console.txt"
_RESULT = "result.json"
_SAVED = ("fingerprint", "command", "threads", "parallel", "seconds", "exit_code", "metrics")


@dataclass
class RunResult:
    """What is left of one training. `error` is empty if it has gone well."""

    key: str
    title: str
    folder: Path
    command: list[str]
    fingerprint: str
    threads: int
    parallel: int
    seconds: float = 0.0
    exit_code: int | None = None
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    reused: bool = False

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ap(self) -> float:
        return self.metrics.get("bbox/AP", math.nan)

    @property
    def detections(self) -> Path:
        return self.folder / "inference" / "coco_instances_results.json"

    def history(self) -> list[dict[str, Any]]:
        """The records of Detectron2's metrics.json, without a last line that is still being written."""
        path = self.folder / "metrics.json"
        return _parse(path.read_text(encoding="utf-8")) if path.is_file() else []

    def config(self) -> dict[str, Any]:
        """The full configuration the row was trained with; empty if it failed before writing one."""
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
        """Takes in what the ended process has left, and marks the folder as finished if all went well."""
        self.exit_code, self.seconds, self.metrics = exit_code, seconds, self._final_metrics()
        if exit_code:
            self.error = _last_error(self.folder / CONSOLE, exit_code)
        elif "bbox/AP" not in self.metrics or not self.detections.is_file():
            self.error = "ended well, but left no AP in metrics.json or no detections"
        else:
            self._save()

    def saved(self) -> RunResult | None:
        """The finished result of an earlier call in this folder, or None if none has this fingerprint."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            saved = json.loads((self.folder / _RESULT).read_text(encoding="utf-8"))
            if saved["fingerprint"] == self.fingerprint and self.detections.is_file():
                return replace(self, **saved, reused=True)
        return None

    def _save(self) -> None:
        text = json.dumps({key: value for key, value in asdict(self).items() if key in _SAVED}, indent=1)
        temporary = self.folder / (_RESULT + ".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        temporary.replace(self.folder / _RESULT)  # whole or not at all

    def _final_metrics(self) -> dict[str, float]:
        metrics = {k: v for record in self.history() for k, v in record.items() if k.startswith("bbox/")}
        # Upstream gives NaN to a model that detects nothing at all. Its AP is 0.
        with contextlib.suppress(OSError, ValueError):
            if json.loads(self.detections.read_text(encoding="utf-8")) == []:
                metrics = {k: 0.0 if math.isnan(v) else v for k, v in metrics.items()}
        return metrics


def _parse(text: str) -> list[dict[str, Any]]:
    records = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def _last_error(console: Path, exit_code: int) -> str:
    """The exception a process died of, or the end of its console."""
    lines = [line.rstrip() for line in console.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    exception = re.compile(r"[\w.]+(Error|Exception|Exit|Interrupt)\b")
    raised = [i for i, line in enumerate(lines) if exception.match(line)]
    text = "\n".join(lines[raised[-1] :][:4] if raised else lines[-3:]) or "nothing on the console"
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        text = f"ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; {text}"
    return text
