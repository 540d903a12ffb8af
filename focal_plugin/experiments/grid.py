"""When does the focal loss beat OHEM? Table 1d's methods over background anchors per object and training budget."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from ..eval.drawing import COLORS
from ..files import atomic_write, origin
from .paper import BEST_OHEM, CE, FL, PaperRow
from .plan import Profile, choose_rows, describe_plan, load_profile, make_runs, prepare_data
from .report import make_table, number, spread, to_markdown
from .results import AP, Run, Study, compare, tabulate_runs, write_json
from .runner import InlineExecutor, available_cores, run_all


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    command = shlex.join(["tools/grid.py", *(argv or sys.argv[1:])])
    try:
        cells = [make_cell(cell, [FL.method, CE.method, args.ohem], args.seeds, args.output) for cell in args.cells]
        # Seed by seed, so that a grid that is stopped is whole for the seeds it has.
        runs = sorted((run for _, _, own in cells for run in own), key=lambda run: args.seeds.index(run.seed))
        parallel = 1 if runs[0].on_gpu else args.parallel or available_cores()
        if args.dry_run:
            print(describe_plan(runs, parallel))
            return 0
        args.report.mkdir(parents=True, exist_ok=True)  # what cannot be written is said now, not after hours
        data = [prepare_data(profile) for profile, _, _ in cells]
        executor = InlineExecutor(parallel, max(1, available_cores() // parallel))
        results = {result.folder: result for result in run_all(runs, executor)}
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    tables = []
    for (profile, rows, own), files in zip(cells, data):
        study = Study("1d", profile.name, profile.is_coco, rows, args.seeds, files, command)
        tables.append(tabulate_cell(study, [results[run.folder] for run in own], own[0].max_iter))
    print(write_grid(pd.concat(tables), args.ohem, args.report, command))
    return 0 if all(result.ok for result in results.values()) else 1


def make_cell(cell: str, rows: list[str], seeds: list[int], output: Path) -> tuple[Profile, list[PaperRow], list[Run]]:
    """Return what there is to train for "PROFILE:STEPS"; a profile's own steps share their runs with reproduce.py.

    Raises:
        ValueError, FileNotFoundError: the cell, its profile or a row cannot be.
    """
    name, _, steps = cell.rpartition(":")
    if not name or not steps.isdigit() or not int(steps):
        raise ValueError(f"--cells {cell}: not of the form PROFILE:STEPS, such as digits:500")
    profile = load_profile(name)
    folder = output / profile.name
    if int(steps) != profile.base.SOLVER.MAX_ITER:
        profile = load_profile(name, overrides=["SOLVER.MAX_ITER", steps])
        folder = output / f"{profile.name}_{steps}steps"
    chosen = choose_rows("1d", profile, rows)
    return profile, chosen, make_runs(chosen, profile, seeds, folder)


def tabulate_cell(study: Study, results: Sequence, steps: int) -> pd.DataFrame:
    """Return the table of runs with what places them: "profile", "steps", and "background", anchors per object."""
    truth = json.loads(study.data.train_json.read_text(encoding="utf-8"))
    runs = tabulate_runs(study, results)
    background = runs.background_per_image * len(truth["images"]) / len(truth["annotations"])
    return runs.assign(profile=study.profile, steps=steps, background=background.where(runs.status == "done"))


def write_grid(grid: pd.DataFrame, ohem: str, folder: Path, command: str) -> str:
    """Write grid.md, grid.json and grid.png from the tables of all cells; return the text of grid.md."""
    methods, rows, cells = {"FL": FL.method, "CE": CE.method, "OHEM": ohem}, [], []
    for (profile, steps), runs in grid.groupby(["profile", "steps"], sort=False):
        background = runs.background.mean()
        aps = {method: own.set_index("seed")[AP].dropna() for method, own in runs.groupby("method")}
        row = {"profile": profile, "steps": f"{steps:,}", "background / object": number(background, ",.0f")}
        row |= {name: spread(aps[method]) for name, method in methods.items()}
        for name in ("OHEM", "CE"):
            lead = compare(runs, FL.method, methods[name]).difference_by_seed
            row[f"FL − {name}"] = spread(pd.Series(lead, dtype=float), "+.1f")
        rows.append({("", name): cell for name, cell in row.items()})
        cell = {"name": profile, "steps": int(steps), "negatives_per_object": background}
        cells.append(cell | {"ap": {m: ap.to_dict() for m, ap in aps.items()}, "seconds": runs.seconds.sum()})
    hours, picture = grid.seconds.sum() / 3600, "![lead of the focal loss over background anchors per object](grid.png)"
    about = f"AP, mean ± standard deviation over the seeds; leads are paired by seed. OHEM: {ohem} of Table 1d. "
    about += f"{grid.seed.nunique()} seeds, {hours:.1f} hours of processes in all. `{command}`"
    text = "\n\n".join(["# When does the focal loss beat OHEM?", to_markdown(make_table("", rows)), about, picture])
    record = {**origin(command), "ohem": ohem, "process_hours": round(hours, 2), "cells": cells}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "grid.md") as file:
        file.write(text + "\n")
    write_json(folder / "grid.json", record, indent=1, ensure_ascii=False)
    draw_grid(grid, ohem).savefig(folder / "grid.png", dpi=130)
    return text


def draw_grid(grid: pd.DataFrame, ohem: str) -> Figure:
    """Draw the lead of the focal loss over each rival: one line per budget, one dot per seed."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    for axis, (rival, name) in zip(figure.subplots(1, 2, sharey=True), [(ohem, "OHEM"), (CE.method, "CE")]):
        for (steps, cells), color in zip(grid.groupby("steps"), COLORS):
            leads = {runs.background.mean(): compare(runs, FL.method, rival) for _, runs in cells.groupby("profile")}
            leads = {x: leads[x] for x in sorted(leads) if leads[x].difference_by_seed}
            axis.plot(list(leads), [lead.mean for lead in leads.values()], "-o", color=color, label=f"{steps:,} steps")
            for x, lead in leads.items():
                seeds = list(lead.difference_by_seed.values())
                axis.plot([x] * len(seeds), seeds, ".", color=color, alpha=0.45, markersize=5)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(xscale="log", xlabel="background anchors per object", title=f"FL against {name}")
        axis.set_ylabel("lead of FL, AP (dots: single seeds)")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
    return figure


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="grid.py", description=__doc__)
    add = parser.add_argument
    add("--cells", nargs="+", required=True, metavar="PROFILE:STEPS", help="as in reproduce.py, such as digits:500")
    add("--ohem", default=BEST_OHEM.method, metavar="ROW", help="of Table 1d, to compare with (default: %(default)s)")
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="(default: 1)")
    add("--output", type=Path, default=Path("output/reproduce"), help="folder for the runs (default: %(default)s)")
    add("--report", type=Path, default=Path("report/grid"), help="folder for the result (default: %(default)s)")
    add("--parallel", type=int, metavar="N", help="runs at the same time (default: one per core)")
    add("--dry-run", action="store_true", help="print what there is to train, and how long that may take")
    return parser.parse_args(argv)
