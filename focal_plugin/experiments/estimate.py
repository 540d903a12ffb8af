"""What there is to train, and how long that may take: `tools/reproduce.py --dry-run`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from ..config import load_config
from .plan import Profile
from .progress import format_duration
from .worker import Run, known_fingerprint

# Seconds per step on 8 V100, batch 16, by backbone depth: Detectron2's MODEL_ZOO.md, RetinaNet R50 and R101 (800 px).
_ZOO_SECONDS = {50: 0.205, 101: 0.291}


def describe_plan(runs: Sequence[Run], profile: Profile, parallel: int) -> str:
    """The runs with their number of steps and state, and an estimate of the time left with its source."""
    lines = [[_folder(run), run.title, run.seed, f"{run.max_iter:,}", run.images_per_step, _state(run)] for run in runs]
    table = tabulate(lines, ["row", "method", "seed", "steps", "images / step", "state"], tablefmt="simple")
    return f"{table}\n\n{_total(runs, profile, parallel)}"


def _total(runs: Sequence[Run], profile: Profile, parallel: int) -> str:
    open_runs = [run for run in runs if _state(run) != "done"]
    steps = sum(run.max_iter - _steps_done(run) for run in open_runs)
    text = f"{len(open_runs)} of {len(runs)} runs to train, {steps:,} steps, {parallel} at a time."
    if not open_runs:
        return text
    seconds, source = _seconds_per_step(runs, profile)
    if seconds is None:
        return f"{text} No estimate of the time: {source}."
    return f"{text} About {format_duration(steps * seconds / parallel)}, at {seconds:.3g} s per step ({source})."


def _seconds_per_step(runs: Sequence[Run], profile: Profile) -> tuple[float | None, str]:
    measured = [_measured(run) for run in runs]
    measured = [seconds for seconds in measured if seconds]
    if measured:
        return statistics.median(measured), f"the median of {len(measured)} runs in this output folder"
    if profile.is_coco:
        depths = [load_config(run.config_file).MODEL.RESNETS.DEPTH for run in runs]
        return statistics.fmean(_ZOO_SECONDS[depth] for depth in depths), "8 V100 at 800 px in Detectron2's model zoo"
    return None, "no run of this profile has left the time of a step here; train some steps and ask again"


def _measured(run: Run) -> float | None:
    if known_fingerprint(run.folder) != run.fingerprint:
        return None
    times = [record["time"] for record in run.result().history() if "time" in record]
    return statistics.median(times) if times else None


def _steps_done(run: Run) -> int:
    """Up to the last checkpoint, from which it would go on."""
    if known_fingerprint(run.folder) != run.fingerprint:
        return 0
    steps = [int(path.stem.removeprefix("model_")) + 1 for path in run.folder.glob("model_[0-9]*.pth")]
    return max(steps, default=0)


def _state(run: Run) -> str:
    result = run.result()
    if result.load() and result.ended:
        return "done"
    steps = _steps_done(run)
    return f"goes on at {steps:,}" if steps else "to train"


def _folder(run: Run) -> str:
    return str(Path(run.method) / f"seed{run.seed}")
