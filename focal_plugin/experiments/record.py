"""A report for machines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..config_yaml import lookup
from .results import RunResult
from .sections import Curves
from .study import Outcome, Study, images_seen
from .tables import examples_per_image, step_seconds
from .verdict import Comparison

_KEY = re.compile(r"SEED|[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+")
_PER_RUN = {"SEED", "OUTPUT_DIR"}


@dataclass(frozen=True)
class Recipe:
    """What a line was trained with.

    Attributes:
        title: of the line.
        config_file: that its command names.
        overrides: keys and values on its command, but for seed and folder.
        seed: of the run whose full configuration this is; the others differ in seed and folder.
        config: its config.yaml; empty if no run has written one.
    """

    title: str
    config_file: str
    overrides: list[tuple[str, str]]
    seed: int | None
    config: str


def recipe_of(outcome: Outcome) -> Recipe:
    command = next((run.command for run in outcome.runs), [])
    named = command.index("--config-file") + 1 if "--config-file" in command[:-1] else None
    config_file = command[named] if named else ""
    for run in outcome.runs:
        path = run.folder / "config.yaml"
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            return Recipe(outcome.title, config_file, _overrides(command), run.seed, text)
    return Recipe(outcome.title, config_file, _overrides(command), None, "")


def _overrides(command: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs at the end of a train_net command."""
    begin = next((i for i, word in enumerate(command) if _KEY.fullmatch(word)), len(command))
    words = command[begin:]
    return [(key, value) for key, value in zip(words[::2], words[1::2]) if key not in _PER_RUN]


def study_record(
    study: Study, found: Sequence[Outcome], comparisons: Sequence[Comparison], curves: Curves
) -> dict[str, Any]:
    """What was asked for and what came out; no number that JSON cannot hold."""
    record = {
        "table": study.table,
        "caption": study.caption,
        "profile": study.profile,
        "is_coco": study.is_coco,
        "seeds": list(study.seeds),
        "left_out": list(study.left_out),
        "lines": [_line_record(outcome) for outcome in found],
        "comparisons": [_comparison_record(comparison) for comparison in comparisons],
        "runs": [_run_record(run, curves.get((run.method, run.seed), ())) for o in found for run in o.runs],
    }
    return storable(record)


def _line_record(outcome: Outcome) -> dict[str, Any]:
    names = sorted({name for run in outcome.done for name in run.metrics})
    line = outcome.line
    return {
        "method": line.method,
        "title": outcome.title,
        "kind": outcome.kind,
        "paper_title": line.paper_title,
        "published": asdict(line.published) if line.published else None,
        "metrics": {name: asdict(outcome.metric(name.removeprefix("bbox/"))) for name in names},
        "overrides": dict(recipe_of(outcome).overrides),
        "config": outcome.config,
    }


def _comparison_record(comparison: Comparison) -> dict[str, Any]:
    paired = comparison.paired
    return {
        "focal": comparison.focal.line.method,
        "rival": comparison.rival.line.method,
        "kind": comparison.kind,
        "picked_of": comparison.picked_of,
        "difference_by_seed": {str(seed): difference for seed, difference in paired.by_seed.items()},
        "mean": paired.mean,
        "interval_95": None if paired.low is None else [paired.low, paired.high],
        "excludes_zero": paired.excludes_zero,
        "paper_difference": comparison.paper.lead,
        "interval_holds_paper_difference": paired.holds(comparison.paper.lead),
    }


def _run_record(run: RunResult, curves: Sequence) -> dict[str, Any]:
    config = run.config()
    positives, negatives = examples_per_image(run)
    return {
        "method": run.method,
        "seed": run.seed,
        "status": run.status,
        "step": run.step,
        "error": run.error,
        "exit_code": run.exit_code,
        "command": " ".join(run.command),
        "folder": str(run.folder),
        "fingerprint": run.fingerprint,
        "reused": run.reused,
        "attempts": run.attempts,
        "seconds": round(run.seconds, 1),
        "step_seconds": step_seconds(run),
        "machine": run.machine,
        "date": run.date,
        "threads": run.threads,
        "parallel": run.parallel,
        "peak_memory": run.peak_memory or None,
        "peak_memory_of": run.peak_memory_of,
        "steps": lookup(config, "SOLVER.MAX_ITER"),
        "images_seen": images_seen(config),
        "positives_per_image": positives,
        "negatives_per_image": negatives,
        "metrics": dict(sorted(run.metrics.items())),
        "precision_at_recall": {f"{c.iou:g}": c.precision.tolist() for c in curves},
    }


def storable(value: Any) -> Any:
    """The same, with None for what is no number, and text for what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): storable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [storable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
