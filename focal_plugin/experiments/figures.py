"""The pictures of a report: a method has the same colour and line style in all, and the focal loss comes first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from ..eval.drawing import COLORS, Method, draw_mosaic, save_svg
from .results import AP, Comparison, Study, compare, lines_of, reference

KIND_COLORS = dict(zip(("FL", "OHEM", "CE", "SSD", "FL*"), (*COLORS[:3], COLORS[4], COLORS[6])))
LINE_STYLES = ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1)))
_CURVES, _COLUMNS, _IMAGES = 7, 5, 6  # curves that can be told apart; columns and rows of the mosaic
_SHORT, _POINTS = 24, 300  # letters of a label that fits beside another; of a curve, of which trainings leave thousands
_DOTS = {"marker": "o", "linestyle": "", "ms": 4, "mfc": "white", "mec": "black", "mew": 0.8, "zorder": 3}  # of seeds

Styles = Mapping[str, Mapping[str, Any]]


def draw(study: Study, runs: pd.DataFrame, folder: Path) -> list[str]:
    """Draw what the runs have left something of, in `folder`; return the files' names."""
    done, anchor, figures = runs[runs.status == "done"], reference(runs), {}
    if not len(done):
        return []
    means, styles = done.groupby("method", sort=False)[AP].mean().fillna(0), method_styles(runs, anchor)
    methods = sorted(means.index, key=lambda method: method != anchor)
    # To keep curves apart: the reference, the best of each kind, then the next best.
    best = {own.idxmax() for _, own in means.groupby(lines_of(done).kind)}
    ranked = sorted(methods, key=lambda method: (method != anchor, method not in best, -means[method]))
    few = [method for method in methods if method in ranked[:_COLUMNS]]
    curves = few if len(methods) > _CURVES else methods
    figures["ap.svg"] = draw_ap(done, methods, styles, study.is_coco)
    rivals = methods[1:] if methods[0] == anchor else []
    if compared := [found for rival in rivals if (found := compare(runs, rival, anchor)).difference_by_seed]:
        figures["differences.svg"] = draw_differences(done, compared, styles)
    figures["precision_recall_50.svg"] = draw_precision_recall(done, curves, styles)
    if "loss_cls" in done and any(done.loss_cls):
        figures["loss_cls.svg"] = draw_loss(done[done.loss_cls.map(bool)], curves, styles)
    for name, figure in figures.items():
        save_svg(figure, folder / name)
    if not study.data:
        return [*figures]
    shown = lines_of(done.sort_values("seed")).loc[few]
    titles = shown.title + "\nseed " + shown.seed.astype(str) + shown[AP].map(", AP {:.1f}".format)
    columns, picture = list(map(Method, titles, shown.detections)), folder / "detections.jpg"
    draw_mosaic(study.data.val_json, study.data.val_images, columns, picture, num_images=_IMAGES)
    return [*figures, picture.name]


def method_styles(runs: pd.DataFrame, first: str | None) -> Styles:
    """Return colour and line style by method: a kind's ``first`` method has its colour, the others shades of it."""
    styles = {}  # of all methods, drawn or not: what one looks like does not depend on what stands beside it
    for kind, methods in runs.groupby("kind", sort=False)["method"].unique().items():
        base = np.array(to_rgb(KIND_COLORS[kind]))
        shades = [0, *np.linspace(-0.5, 0.55, len(methods) - 1)]  # to black, to white
        for i, method in enumerate(sorted(methods, key=lambda method: method != first)):
            color = tuple((1 - abs(shades[i])) * base + max(shades[i], 0))
            styles[method] = {"color": color, "linestyle": LINE_STYLES[i % len(LINE_STYLES)], "linewidth": 1.8}
    return styles


def draw_ap(runs: pd.DataFrame, methods: Sequence[str], styles: Styles, paper: bool = False) -> Figure:
    """Draw a bar for each method, from the top: mean, one standard deviation, a dot a seed, and the ``paper``'s AP."""
    figure, axis = _panel(runs, methods)
    right = 0.0
    for place, method in enumerate(methods):
        own = runs[runs.method == method]
        mean, deviation = own[AP].mean(), own[AP].std()
        axis.barh(place, mean, color=styles[method]["color"], height=0.66, alpha=0.85)
        if deviation > 0:
            axis.errorbar(mean, place, xerr=deviation, fmt="none", ecolor="black", capsize=3)
        axis.plot(own[AP], [place] * len(own), **_DOTS)
        end = np.nanmax([0.0, *own[AP], mean + deviation])
        axis.annotate(f"{mean:.1f}", (end, place), (7, 0), textcoords="offset points", va="center", fontsize=9)
        if paper:
            axis.plot(own["paper/AP"], [place] * len(own), "D", ms=6, mfc="none", mec="#A0006D", mew=1.6, zorder=4)
        right = max(right, end)
    axis.set(xlabel="AP, percent", xlim=(0, 1.22 * right or 1))
    return figure


def draw_differences(runs: pd.DataFrame, comparisons: Sequence[Comparison], styles: Styles) -> Figure:
    """Draw AP minus the rival's of each comparison: the seeds as dots, the mean, and its 95 % interval."""
    figure, axis = _panel(runs, [comparison.focal for comparison in comparisons])
    ends = [0.0]
    for place, comparison in enumerate(comparisons):
        if comparison.interval_95:
            color = styles[comparison.focal]["color"]
            axis.plot(comparison.interval_95, [place] * 2, color=color, linewidth=5, alpha=0.45)
        axis.plot([comparison.mean], [place], "|", color="black", ms=13, mew=2)
        seeds = list(comparison.difference_by_seed.values())
        axis.plot(seeds, [place] * len(seeds), **_DOTS)
        ends += seeds
    axis.axvline(0, color="black", linewidth=1)
    # Two seeds make intervals that would leave no room for the rest: those run off the chart.
    room = max(1.0, 0.5 * (max(ends) - min(ends)))
    axis.set(xlabel="difference in AP, same seed", xlim=(min(ends) - room, max(ends) + room))
    return figure


def draw_precision_recall(runs: pd.DataFrame, methods: Sequence[str], styles: Styles) -> Figure:
    """Draw the mean curve over classes and seeds of each method at IoU .5; the legend has the AP there."""
    figure, axis = _panel(runs)
    for method in methods:
        own = runs[runs.method == method]
        precision = np.mean([np.array(curves["0.5"], dtype=float) for curves in own.precision_at_recall], axis=0)
        label = f"{own.title.iloc[0]}: {100 * precision.mean():.1f}"
        axis.plot(np.linspace(0, 1, len(precision)), precision, label=label, **styles[method])
    axis.set(xlabel="recall", ylabel="precision, mean over classes", xlim=(0, 1), ylim=(0, 1.02))
    _add_legend(figure, axis)
    return figure


def draw_loss(runs: pd.DataFrame, methods: Sequence[str], styles: Styles) -> Figure:
    """Draw the classification loss over the steps that all runs of a method have, smoothed by a moving mean."""
    figure, axis = _panel(runs)
    for method in [method for method in methods if method in set(runs.method)]:
        own = runs[runs.method == method]
        curve = pd.DataFrame(own.loss_cls.tolist()).dropna(axis=1).mean().sort_index()
        curve = curve.rolling(max(3, len(curve) // 40), center=True, min_periods=1).mean()[:: len(curve) // _POINTS + 1]
        marker = "o" if len(curve) == 1 else None  # one point makes no line
        axis.plot(curve.index, curve, marker=marker, label=own.title.iloc[0], **styles[method])
    axis.set(xlabel="training step", ylabel="classification loss", yscale="log")
    axis.yaxis.set_major_formatter(_Plain())
    axis.yaxis.set_minor_formatter(_Plain())
    _add_legend(figure, axis)
    return figure


class _Plain(LogFormatter):
    def __call__(self, x, pos=None):  # 0.3 and not 3e-01
        return f"{x:,g}" if super().__call__(x, pos) else ""


def _panel(runs: pd.DataFrame, rows: Sequence[str] = ()):
    """A figure and its axis: for curves, or with the titles of methods beside their rows."""
    # At the width of a phone the letters are as large as the text around them.
    figure = Figure(figsize=(4.6, 1.3 + 0.36 * len(rows) if rows else 3.4), layout="constrained")
    axis = figure.subplots()
    if rows:
        axis.set_yticks(range(len(rows)), lines_of(runs).title[rows])
        axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x" if rows else "both", which="major" if rows else "both", alpha=0.3)
    axis.set_axisbelow(True)
    return figure, axis


def _add_legend(figure: Figure, axis) -> None:
    """Below the panel, where it hides nothing."""
    handles, labels = axis.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= _SHORT else 1
    figure.set_figheight(figure.get_figheight() + 0.24 * -(-len(labels) // columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handlelength=3)
