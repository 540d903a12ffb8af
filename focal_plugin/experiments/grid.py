"""When does the focal loss beat OHEM? Table 1d's methods over background anchors per object and training budget."""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from ..files import origin
from .figures import COLORS
from .paper import BEST_OHEM, CE, FL
from .plan import Profile, choose_rows, describe_plan, load_profile, make_runs, prepare_data
from .results import Run, RunResult, of_method
from .runner import InlineExecutor, available_cores, run_all


@dataclass(frozen=True)
class Cell:
    """A profile trained for a number of steps."""

    profile: Profile
    steps: int
    runs: Sequence[Run]


@dataclass(frozen=True)
class Outcome:
    """What came out of a cell.

    Attributes:
        name: of the profile.
        steps: of each run.
        negatives_per_object: background anchors per annotated object, mean over the training; None: no run is done.
        ap: method key -> AP of each seed that is done, in percent.
        seconds: of all its runs.
    """

    name: str
    steps: int
    negatives_per_object: float | None
    ap: dict[str, dict[int, float]]
    seconds: float

    def lead(self, rival: str) -> list[float]:
        """AP of the focal loss less that of the rival, for each seed that both have."""
        ours, theirs = self.ap.get(FL.key, {}), self.ap.get(rival, {})
        return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    try:
        cells = make_cells(args.cells, [FL.key, CE.key, args.ohem], args.seeds, args.output)
        # Seed by seed, so that a grid that is stopped is whole for the seeds it has.
        runs = sorted((run for cell in cells for run in cell.runs), key=lambda run: args.seeds.index(run.seed))
        parallel = 1 if runs[0].on_gpu else args.parallel or available_cores()
        if args.dry_run:
            print(describe_plan(runs, parallel))
            return 0
        objects = {cell.profile.name: _objects_per_image(prepare_data(cell.profile).train_json) for cell in cells}
        executor = InlineExecutor(parallel, max(1, available_cores() // parallel))
        results = {result.folder: result for result in run_all(runs, executor)}
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    outcomes = [outcome_of(c, [results[run.folder] for run in c.runs], objects[c.profile.name]) for c in cells]
    command = shlex.join(["tools/grid.py", *(argv or sys.argv[1:])])
    print(write_grid(outcomes, args.ohem, len(args.seeds), args.report, command))
    return 0 if all(result.ok for result in results.values()) else 1


def make_cells(cells: Sequence[str], rows: Sequence[str], seeds: Sequence[int], output: Path) -> list[Cell]:
    """From "PROFILE:STEPS"; a profile's own number of steps shares its runs with reproduce.py.

    Raises:
        ValueError, FileNotFoundError: a cell, profile or row cannot be.
    """
    return [_make_cell(cell, rows, seeds, output) for cell in cells]


def _make_cell(cell: str, rows: Sequence[str], seeds: Sequence[int], output: Path) -> Cell:
    name, _, steps = cell.rpartition(":")
    if not name or not steps.isdigit() or not int(steps):
        raise ValueError(f"--cells {cell}: not of the form PROFILE:STEPS, such as digits:500")
    profile = load_profile(name)
    folder = output / profile.name
    if int(steps) != profile.config().SOLVER.MAX_ITER:
        profile = load_profile(name, overrides=["SOLVER.MAX_ITER", steps])
        folder = output / f"{profile.name}_{steps}steps"
    chosen = choose_rows("1d", profile, rows)
    return Cell(profile, int(steps), make_runs(chosen, profile, seeds, folder))


def outcome_of(cell: Cell, results: Sequence[RunResult], objects_per_image: float) -> Outcome:
    done = [result for result in results if result.ok]
    negatives = [r["num_neg_anchors"] for result in done for r in result.history() if "num_neg_anchors" in r]
    return Outcome(
        cell.profile.name,
        cell.steps,
        statistics.fmean(negatives) / objects_per_image if negatives else None,
        {m: {r.seed: r.ap for r in of_method(done, m)} for m in {run.method for run in cell.runs}},
        sum(result.seconds for result in results),
    )


def write_grid(outcomes: Sequence[Outcome], ohem: str, num_seeds: int, folder: Path, command: str) -> str:
    """Writes grid.md, grid.json and grid.png; returns the text of grid.md."""
    folder.mkdir(parents=True, exist_ok=True)
    draw_grid(outcomes, ohem, folder / "grid.png")
    hours = sum(outcome.seconds for outcome in outcomes) / 3600
    text = "\n\n".join(
        [
            "# When does the focal loss beat OHEM?",
            _grid_table(outcomes, ohem),
            f"AP, mean ± standard deviation over the seeds; leads are paired by seed. OHEM: {ohem} of Table 1d. "
            f"{num_seeds} seeds, {hours:.1f} hours of processes in all. `{command}`",
            "![lead of the focal loss over background anchors per object](grid.png)",
        ]
    )
    (folder / "grid.md").write_text(text + "\n", encoding="utf-8")
    record = {**origin(command), "ohem": ohem, "process_hours": round(hours, 2), "cells": [vars(o) for o in outcomes]}
    (folder / "grid.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    return text


def _grid_table(outcomes: Sequence[Outcome], ohem: str) -> str:
    lines = [
        [
            o.name,
            f"{o.steps:,}",
            "-" if o.negatives_per_object is None else f"{o.negatives_per_object:,.0f}",
            *(_mean(list(o.ap.get(method, {}).values())) for method in (FL.key, CE.key, ohem)),
            *(_mean(o.lead(rival), "+") for rival in (ohem, CE.key)),
        ]
        for o in outcomes
    ]
    headers = ["profile", "steps", "background / object", "FL", "CE", "OHEM", "FL - OHEM", "FL - CE"]
    return tabulate(lines, headers, tablefmt="pipe", disable_numparse=True, colalign=["left"] + ["right"] * 7)


def draw_grid(outcomes: Sequence[Outcome], ohem: str, path: Path) -> None:
    """The lead of the focal loss over each rival: one line per budget, one dot per seed."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    budgets = sorted({o.steps for o in outcomes})
    for axis, (rival, name) in zip(figure.subplots(1, 2, sharey=True), [(ohem, "OHEM"), (CE.key, "CE")]):
        for steps, color in zip(budgets, COLORS):
            cells = [o for o in outcomes if o.steps == steps and o.lead(rival)]
            cells.sort(key=lambda o: o.negatives_per_object)
            x = [o.negatives_per_object for o in cells]
            axis.plot(x, [np.mean(o.lead(rival)) for o in cells], "-o", color=color, label=f"{steps:,} steps")
            for o in cells:
                seeds = o.lead(rival)
                axis.plot([o.negatives_per_object] * len(seeds), seeds, ".", color=color, alpha=0.45, markersize=5)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="background anchors per object", title=f"FL against {name}")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
        axis.set_ylabel("lead of FL, AP (dots: single seeds)")
    figure.savefig(path, dpi=130)


def _objects_per_image(train_json: Path) -> float:
    truth = json.loads(train_json.read_text(encoding="utf-8"))
    return len(truth["annotations"]) / len(truth["images"])


def _mean(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.1f}{spread}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="grid.py", description=__doc__)
    add = parser.add_argument
    add(
        "--cells",
        nargs="+",
        required=True,
        metavar="PROFILE:STEPS",
        help="profiles as in reproduce.py, each with a training budget, such as digits:500",
    )
    add(
        "--ohem",
        default=BEST_OHEM.key,
        metavar="ROW",
        help="the row of Table 1d to compare with (default: %(default)s)",
    )
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="(default: 1)")
    add("--output", type=Path, default=Path("output/reproduce"), help="folder for the runs (default: %(default)s)")
    add("--report", type=Path, default=Path("report/grid"), help="folder for the result (default: %(default)s)")
    add("--parallel", type=int, metavar="N", help="runs at the same time (default: one per core)")
    add("--dry-run", action="store_true", help="print what there is to train, and how long that may take")
    return parser.parse_args(argv)
