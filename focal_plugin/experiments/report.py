"""Write a comparison down: a page to read, Markdown, and the numbers for machines."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import yaml
from tabulate import tabulate

from ..config_yaml import lookup
from ..eval.coco import precision_recall_curves
from ..eval.page import NONE, markdown_text, render_html, render_markdown
from ..files import atomic_write, origin
from .figures import draw
from .paper import CAPTIONS, LEADS
from .results import AP, OF_LINE, Comparison, RunResult, Study, compare, lines_of, reference, tabulate_runs, write_json

_APS = ("AP", "AP50", "AP75")
_LEARNED = 5.0  # percent AP; below, the order says nothing
_PAPER_IMAGES = 90_000 * 16


def write_report(study: Study, results: Sequence[RunResult], report_dir: Path) -> Path:
    """Write index.html, report.md, results.json and the pictures of runs, done or not; return index.html's path."""
    runs, truth, ious = tabulate_runs(study, results), study.data.val_json, (0.5, 0.75)
    found = zip(runs.detections, runs.status == "done")
    curves = [precision_recall_curves(truth, path, ious) if is_done else [] for path, is_done in found]
    runs["precision_at_recall"] = [{f"{c.iou:g}": c.precision.tolist() for c in own} for own in curves]
    return write_table(study, runs, study.data.count_objects(), origin(study.command), Path(report_dir))


def write_table(study: Study, runs: pd.DataFrame, objects: pd.DataFrame, made: Mapping, folder: Path) -> Path:
    """Write what :func:`write_report` does, from a table of runs, the objects of each class and their origin."""
    folder.mkdir(parents=True, exist_ok=True)
    remarks, (name, _, what) = notes(study, runs), CAPTIONS[study.table].partition(": ")
    not_of_run = [*OF_LINE, "console", "detections", "loss_cls", *(name for name in runs if "/" in name)]
    record = {
        **made,
        "notes": [" ".join(filter(None, note.values())) for note in remarks],
        "verdict": verdict(study, runs),
        **{name: getattr(study, name) for name in ("table", "profile", "is_coco", "seeds", "left_out")},
        "caption": CAPTIONS[study.table],
        "objects": objects.to_dict("index"),
        "lines": [_line_record(own) for _, own in runs.groupby("method", sort=False)],
        "comparisons": [asdict(comparison) for comparison in compare_focal(runs)],
        "runs": runs.assign(seconds=runs.seconds.round(1)).drop(columns=not_of_run, errors="ignore").to_dict("records"),
    }
    with matplotlib.rc_context({"text.parse_math": False}):  # a dollar sign in a title is a dollar sign
        pictures = draw(study, runs, folder)
    context = {
        **record,
        "study": study,
        # With the paper's network and size only where they are ours.
        "headline": f"{name}: {what}" if study.is_coco else f"{name} on “{study.profile}”: {what.partition(';')[0]}",
        "notes": remarks,
        "pictures": pictures,
        "table": comparison_table(study, runs),
        "reference": next(iter(runs.title[runs.method == reference(runs)]), ""),
        "parts": [table for table in (size_table(runs), class_table(runs, objects)) if table],
        "cost": cost_table(runs),
        "settings": sorted({(run.parallel, run.threads) for run in runs[runs.status == "done"].itertuples()}),
        "configs": [yaml.safe_dump(line["config"]) if line["config"] else "" for line in record["lines"]],
        "markdown": to_markdown,
    }
    write_json(folder / "results.json", record, ensure_ascii=False)
    with atomic_write(folder / "report.md") as markdown, atomic_write(folder / "index.html") as page:
        markdown.write(render_markdown(context))
        page.write(render_html(context, folder, "report.html"))
    return folder / "index.html"


def format_table(study: Study, results: Sequence[RunResult]) -> str:
    """Return the comparison, one method per line, as Markdown."""
    return to_markdown(comparison_table(study, tabulate_runs(study, results)))


def _line_record(own: pd.DataFrame) -> dict[str, Any]:
    done, first = own[own.status == "done"], own.iloc[0]
    stats = done[sorted({name for run in done.metrics for name in run})].agg(["count", "mean", "std"])
    return {
        "method": first.method,
        **first[OF_LINE],
        "config_file": "".join(re.findall(r"--config-file (\S+)", first.command)),
        "config": next(filter(None, own.config), {}),
        "metrics": {n: {"count": int(s["count"]), "mean": s["mean"], "deviation": s["std"]} for n, s in stats.items()},
    }


def compare_focal(runs: pd.DataFrame) -> list[Comparison]:
    """Compare the reference, if it is a focal loss, with the best OHEM and the best cross entropy that are done."""
    done, focal = runs.dropna(subset=AP), reference(runs)
    means = {kind: own.groupby("method", sort=False)[AP].mean() for kind, own in done.groupby("kind")}
    rivals = [means[kind].idxmax() for kind in LEADS if kind in means and focal in means.get("FL", ())]
    return [compare(runs, focal, rival) for rival in rivals]


def verdict(study: Study, runs: pd.DataFrame) -> list[str]:
    """Say what came out, beside what the paper saw: a sentence, then paragraphs that follow from the numbers."""
    done, title = runs[runs.status == "done"], lines_of(runs).title
    if not len(done):
        return ["No run has finished, so there is nothing to compare."]
    aps = done.groupby("title", sort=False)[AP].mean().sort_values(ascending=False, kind="stable")
    order = ", ".join(f"{name} {ap:.1f}" for name, ap in aps.items())
    order = f"By AP{' (mean over the seeds)' if len(study.seeds) > 1 else ''}: {order}."
    if not aps.iloc[0] >= _LEARNED:
        return ["No run has learned to detect yet, so the order means nothing.", order]
    comparisons, seeds = compare_focal(runs), sorted(done.seed.unique())
    leads = ", and ".join(_lead(c, title[c.rival]) for c in comparisons if c.difference_by_seed)
    first = "" if len(done) == len(runs) else f"Incomplete, {len(done)} of {len(runs)} runs are done: "
    first += f"{title[reference(runs)]} is {leads}" if leads else f"{aps.index[0]} has the highest AP, {aps.max():.1f}"
    is_lost = "FL" in set(runs.kind) - set(done.kind)
    scope = "No run of FL is done, so nothing is compared with it. " if is_lost else ""
    if len(seeds) == 1:
        first += "; one seed says nothing about chance"
        scope += f"One seed ({seeds[0]}): another may order the methods differently."
    else:
        scope += f"{len(seeds)} seeds ({', '.join(map(str, seeds))}). The deviation is over seeds only: another data "
        scope += "set, budget or learning rate may order the methods differently."
    rates = {lookup(config, "SOLVER.BASE_LR") for config in done.config}
    if len(rates) == 1 and None not in rates and len(title) > 1:
        scope += f" All have one learning rate, {rates.pop():g}, which may suit one method better than another."
    return [f"{first}.", order, *(_against(study, c, title[c.rival]) for c in comparisons), scope]


def _lead(c: Comparison, rival: str) -> str:
    size = f"{abs(c.mean):.1f} AP {'ahead of' if c.mean > 0 else 'behind'}" if abs(c.mean) >= 0.05 else "level with"
    zero = "excludes 0" if c.excludes_zero else "includes 0: not settled"
    ends = " to ".join(number(end, "+.1f") for end in c.interval_95 or ())
    interval = f" (95 % t interval {ends}, {zero})" if ends else ""
    return f"{size} {f'the best OHEM, {rival}' if c.kind == 'OHEM' else 'cross entropy'}{interval}"


def _against(study: Study, c: Comparison, rival: str) -> str:
    """What stands behind the lead: each seed, and the paper's."""
    focal, theirs, where = LEADS[c.kind]
    text = f"FL against {'the best OHEM' if c.kind == 'OHEM' else 'cross entropy'}, {rival}"
    if c.picked_of > 1:
        text += f" (the best of {c.picked_of} by its mean AP; picking the best of them favours it)"
    each = ", ".join(f"{number(difference, '+.1f')} (seed {seed})" for seed, difference in c.difference_by_seed.items())
    text += f": {each or 'no seed has both done, so there is no paired difference'}"
    text += ", one pair of runs, which has no interval" if len(c.difference_by_seed) == 1 else ""
    text += f". In the paper it is {c.paper_difference:.1f} AP ahead ({focal} against {theirs}; {where})"
    if abs(c.mean) >= 0.05:  # and not NaN
        text += ": in the mean, " if c.excludes_zero is False else ": "
        text += "the same order" if c.mean > 0 else "the order here differs from the paper's"
    if study.is_coco and c.interval_95 and c.kind == "OHEM":
        text += (
            f". The paper's difference lies {'in' if c.interval_holds_paper_difference else 'out'}side this interval"
        )
    return f"{text}."


def notes(study: Study, runs: pd.DataFrame) -> list[dict[str, str]]:
    """Say what is missing, failed, diverged, left out or unequal, and what setting this is.

    A statement has a "lead", a "text", and "code" that is quoted as it is, such as an error.
    """
    found, names = [], runs.title + " seed " + runs.seed.astype(str)

    def note(lead: str, text: str, code: str = "") -> None:
        found.append({"lead": lead, "text": text, "code": code})

    for run in runs[runs.status != "done"].itertuples():
        text = "Not run, or not to its end."
        if run.status == "diverged":
            text = f"The loss was no number at step {run.step}: an outcome of the method with this recipe, not a crash."
            text += " The run has no AP and is in no mean."
        elif run.status == "failed":
            code = "" if run.exit_code is None else f" with exit code {run.exit_code}"
            text = f"It failed{code}; console: {run.console}."
        note(f"{run.title}, seed {run.seed}: {run.status}.", text, run.error if run.status == "failed" else "")
    if not study.is_coco:
        text = f"Trained on “{study.profile}”, not on COCO with the paper's network and schedule: differences between "
        text += "methods can be set beside the paper's, levels of AP cannot. None of this says how the methods "
        note("Not the paper's setting.", f"{text}compare at the scale of COCO.")
    if study.left_out:
        note("Left out.", f"Rows of the table that were not asked for: {', '.join(study.left_out)}.")
    budgets, counts = names.groupby(runs.images_seen).agg(", ".join), runs.images_seen.value_counts()
    if len(budgets) > 1:
        usual = counts.index[0]
        others = "; ".join(f"{images:,} images: {who}" for images, who in budgets.drop(usual).items())
        text = f"{counts[usual]} of {counts.sum()} runs were trained on {usual:,} images; {others}."
        note("Unequal budgets.", f"{text} Their AP does not compare as it is.")
    if study.is_coco and (other := set(budgets.index) - {_PAPER_IMAGES}):
        text = f"Trained on {' and '.join(f'{images:,}' for images in sorted(other))} images"
        note("Not the paper's budget.", f"{text}; the paper's schedule sees {_PAPER_IMAGES:,} (90,000 steps of 16).")
    if who := ", ".join(names[(runs.attempts > 1) & (runs.status != "missing")]):
        text = "Each went on from its last checkpoint, and the time given is that of the last attempt"
        note("Stopped and resumed.", f"{text}: {who}.")
    return found


def comparison_table(study: Study, runs: pd.DataFrame) -> dict[str, Any]:
    """Return our numbers beside the paper's; what compares is the difference, on COCO also to the paper itself."""
    anchor, lines = reference(runs), lines_of(runs)
    alone = anchor and (lines.kind == lines.kind[anchor]).sum() == 1
    to = f"to {lines.kind[anchor] if alone else lines.title[anchor]}" if anchor else "to FL"
    scaled = any(lines["paper/AP"].notna() & (lines.paper_title != lines.title))
    rows = []
    for method, own in runs.groupby("method", sort=False):
        line, rival = lines.loc[method], anchor if method != anchor else None
        others = Counter(own.status[own.status != "done"])
        why_not = ", ".join(f"{count} {status}" for status, count in sorted(others.items()))
        row = {("", "method"): line.title}
        row |= {("here", name): spread(own[f"bbox/{name}"]) for name in _APS}
        if others and not own[AP].count():
            row["here", "AP"] = " / ".join(sorted(others))
        row["here", to] = number(compare(runs, method, rival).mean if rival else None, "+.1f")
        row["paper", "row"] = line.paper_title if scaled and line["paper/AP"] >= 0 else NONE
        row |= {("paper", name): number(line[f"paper/{name}"]) for name in _APS}
        row["paper", to] = number(line["paper/AP"] - lines["paper/AP"][rival] if rival else None, "+.1f")
        for name in _APS if study.is_coco else ():
            row["here − paper", name] = number(own[f"bbox/{name}"].mean() - line[f"paper/{name}"], "+.1f")
        row["", "seeds"] = f"{len(own) - sum(others.values())} of {len(own)} ({why_not})" if why_not else str(len(own))
        rows.append(row)
    marked = [place for place, method in enumerate(lines.index) if method == anchor]
    return make_table(f"Here: {study.profile}. Paper: {CAPTIONS[study.table]}", rows, marked)


def size_table(runs: pd.DataFrame) -> dict[str, Any] | None:
    """Return AP of small, medium and large objects; the paper gives them, and its time per image, in Table 1e only."""
    sizes, rows = {"APs": "small", "APm": "medium", "APl": "large"}, []
    for _, own in runs.groupby("method", sort=False):
        line = own.iloc[0]
        row = {("", "method"): line.title} | {("here", size): spread(own[f"bbox/{n}"]) for n, size in sizes.items()}
        row |= {("paper", size): number(line[f"paper/{n}"]) for n, size in sizes.items()}
        rows.append(row | {("paper", "ms per image"): number(line["paper/ms"], ".0f")})
    return make_table("AP by the size of the object (under 32², under 96², the rest, in pixels)", rows)


def class_table(runs: pd.DataFrame, objects: pd.DataFrame) -> dict[str, Any] | None:
    """Return AP of each class beside the number of its objects."""
    means = runs.groupby("title", sort=False)[[name for name in runs if name.startswith("bbox/AP-")]].mean()
    rows = [
        {("", "class"): name}
        | {("objects in", f"{part} set"): number(count, ",.0f") for part, count in counts.items()}
        | {("AP, mean over the seeds", title): number(aps.get(f"bbox/AP-{name}")) for title, aps in means.iterrows()}
        for name, counts in objects.iterrows()
    ]
    return make_table("AP of each class", rows)


def cost_table(runs: pd.DataFrame) -> dict[str, Any] | None:
    """Return time, memory, and how many examples each method is trained on: means over the runs that are done."""
    done = runs[runs.status == "done"]
    memory = " or ".join(sorted(done.peak_memory_of[done.peak_memory.notna()].unique()))
    rows = []
    for title, own in done.groupby("title", sort=False):
        row = {("", "method"): title, ("", "s/step"): number(own.step_seconds.mean(), ".3f")}
        row["", "run, min"] = number(own.seconds.mean() / 60)
        row["", f"peak, MiB{memory and f' ({memory})'}"] = number(own.peak_memory.dropna().max() / 2**20, ",.0f")
        for name in ("positives", "negatives"):
            count = own[f"{name}_per_image"].mean()
            row["per training image", name] = number(count, ",.0f" if count >= 1000 else ".1f")
        row["", "images seen"] = " or ".join(f"{n:,}" for n in sorted(own.images_seen.dropna().unique())) or NONE
        rows.append(row)
    return make_table("Time, memory, and examples in training", rows)


def to_markdown(table: Mapping[str, Any]) -> str:
    """Return it as Markdown that reads well in a terminal too."""
    groups = [name for name, count in table["groups"] for _ in range(count)] or [""] * len(table["headers"])
    headers = [markdown_text(f"{group} {header}".strip()) for group, header in zip(groups, table["headers"])]
    rows = [[markdown_text(cell) for cell in row] for row in table["rows"]]
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def number(value: float | None, form: str = ".1f") -> str:
    """Format a number, such as −1.4 by "+.1f"; a dash is none."""
    if value is None or math.isnan(value):
        return NONE
    text = f"{value:{form}}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def spread(values: pd.Series, form: str = ".1f") -> str:
    """Format the mean and, of more than one, the sample standard deviation."""
    return number(values.mean(), form) + (f" ± {values.std():.1f}" if values.count() > 1 else "")


def make_table(caption: str, rows: Sequence[Mapping[tuple[str, str], str]], marked: Sequence[int] = ()) -> dict | None:
    """Return a table for the template: rows of cells by group and column, but no columns of dashes; or None."""
    columns = [key for key in (rows[0] if rows else ()) if any(row[key] != NONE for row in rows)]
    if len(columns) < 2:
        return None
    headers, cells = [header for _, header in columns], [[row[key] for key in columns] for row in rows]
    groups = [(name, len(list(keys))) for name, keys in groupby(group for group, _ in columns)]
    groups = groups if {name for name, _ in groups} - {"", "here"} else []
    return {"caption": caption, "headers": headers, "rows": cells, "groups": groups, "marked": marked}
