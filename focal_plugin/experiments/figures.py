"""The charts of a report, one panel each, so that a page can set them side by side or one below the other.

A method has the same colour and line style in all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from ..eval.coco import PrecisionRecall
from ..eval.drawing import COLORS, save_svg  # noqa: F401
from .statistics import Paired
from .study import Outcome

LINE_STYLES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))
KIND_COLORS = {
    "FL": "#0072B2",
    "FL*": "#56B4E9",
    "CE": "#009E73",
    "OHEM": "#E69F00",
    "SSD": "#CC79A7",
    "other": "#999999",
}
_WIDTH = 4.4  # inches; at the width of a phone the letters are then as large as the text around them
_SHORT = 24  # letters of a label that fits beside another
_POINTS = 300  # of a curve; a long training leaves thousands

Curve = tuple[np.ndarray, np.ndarray]


class Styles:
    """Which colour and line style a method has, in curves and bars."""

    def __init__(self, drawn: Sequence[Outcome]):
        """
        Args:
            drawn: as curves, at most seven; the first of each kind has the kind's own colour.
        """
        self._by_title: dict[str, dict[str, Any]] = {}
        free = [color for color in COLORS if color not in {KIND_COLORS[o.kind] for o in drawn}]
        kinds = set()
        for index, outcome in enumerate(drawn):
            first = outcome.kind not in kinds
            kinds.add(outcome.kind)
            color = KIND_COLORS[outcome.kind] if first else free.pop(0)
            style = {"color": color, "linestyle": LINE_STYLES[index % len(LINE_STYLES)], "linewidth": 1.8}
            self._by_title[outcome.title] = style

    def __getitem__(self, title: str) -> dict[str, Any]:
        return self._by_title[title]

    def color(self, outcome: Outcome) -> str:
        """A bar's: of a method without a curve, its kind's."""
        return self._by_title.get(outcome.title, {}).get("color", KIND_COLORS[outcome.kind])


def draw_ap(found: Sequence[Outcome], styles: Styles, paper: bool = False) -> Figure:
    """A bar per line with a run that is done: the mean, one standard deviation, and each seed as a dot.

    Args:
        found: in the order from the top.
        paper: also the paper's AP, where it compares.
    """
    done = [o for o in found if o.ap.count]
    figure, axis = _panel(height=1.3 + 0.36 * len(done))
    places = np.arange(len(done))
    axis.barh(places, [o.ap.mean for o in done], color=[styles.color(o) for o in done], height=0.66, alpha=0.85)
    deviations = [0.0 if np.isnan(o.ap.deviation) else o.ap.deviation for o in done]
    if any(deviations):
        axis.errorbar([o.ap.mean for o in done], places, xerr=deviations, fmt="none", ecolor="black", capsize=3)
    for place, outcome in zip(places, done):
        seeds = list(outcome.ap_by_seed().values())
        axis.plot(seeds, [place] * len(seeds), "o", ms=3.5, mfc="white", mec="black", mew=0.8, zorder=3)
        axis.annotate(
            f"{outcome.ap.mean:.1f}",
            (max(*seeds, outcome.ap.mean + deviations[place]), place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
        if paper and outcome.line.published:
            axis.plot([outcome.line.published.AP], [place], "D", ms=6, mfc="none", mec="#A0006D", mew=1.6, zorder=4)
    axis.set_yticks(places, [o.title for o in done])
    right = max((max(*o.ap_by_seed().values(), o.ap.mean + d) for o, d in zip(done, deviations)), default=0)
    axis.set(xlabel="AP, percent", xlim=(0, 1.22 * right or 1), ylim=(len(done) - 0.5, -0.5))
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)
    return figure


def draw_differences(differences: Mapping[str, tuple[str, Paired]]) -> Figure:
    """Each line's AP minus the reference's: the seeds as dots, the mean, and its 95 % interval.

    Args:
        differences: colour and difference by title, in the order from the top.
    """
    figure, axis = _panel(height=1.3 + 0.36 * len(differences))
    for place, (color, paired) in enumerate(differences.values()):
        if paired.low is not None:
            axis.plot([paired.low, paired.high], [place] * 2, color=color, linewidth=5, alpha=0.45)
        axis.plot([paired.mean], [place], "|", color="black", ms=13, mew=2)
        seeds = list(paired.by_seed.values())
        axis.plot(seeds, [place] * len(seeds), "o", ms=4, mfc="white", mec="black", mew=0.8, zorder=3)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(differences)), list(differences))
    # Two seeds make intervals that would leave no room for the rest: those run off the chart.
    ends = [0.0, *(value for _, paired in differences.values() for value in paired.by_seed.values())]
    room = max(1.0, 0.5 * (max(ends) - min(ends)))
    axis.set_xlim(min(ends) - room, max(ends) + room)
    axis.set(xlabel="difference in AP, same seed", ylim=(len(differences) - 0.5, -0.5))
    axis.grid(axis="x", alpha=0.3)
    return figure


def draw_precision_recall(curves: Mapping[str, PrecisionRecall], styles: Styles) -> Figure:
    """At one IoU, a curve per title."""
    figure, axis = _panel()
    for title, curve in curves.items():
        axis.plot(curve.recall, curve.precision, label=f"{title}: {100 * curve.ap:.1f}", **styles[title])
    axis.set(xlabel="recall", ylabel="precision, mean over classes", xlim=(0, 1), ylim=(0, 1.02))
    _legend(figure, axis)
    return figure


def draw_steps(curves: Mapping[str, Curve], styles: Styles, label: str, scale: str = "linear") -> Figure:
    """Something measured during training over the steps, smoothed by a moving mean."""
    figure, axis = _panel()
    for title, (steps, values) in curves.items():
        stride, window = max(1, len(steps) // _POINTS), max(3, len(steps) // 40)
        marker = "o" if len(steps) == 1 else None  # one point makes no line
        values = _smoothed(values, window)
        axis.plot(steps[::stride], values[::stride], marker=marker, label=title, **styles[title])
    axis.set(xlabel="training step", ylabel=label, yscale=scale)
    if scale == "log":
        axis.yaxis.set_major_formatter(_Plain())
        axis.yaxis.set_minor_formatter(_Plain())
    _legend(figure, axis)
    return figure


def mean_precision_recall(curves: Sequence[PrecisionRecall]) -> PrecisionRecall:
    """Of the same IoU, over the seeds."""
    precision = np.mean([curve.precision for curve in curves], axis=0)
    return PrecisionRecall(curves[0].iou, curves[0].recall, precision, float(precision.mean()))


def mean_over_runs(histories: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]) -> Curve:
    """Mean over the runs at the steps that all of them have; of each run the first of these names that it has."""
    runs = [run for history in histories if (run := _by_step(history, names))]
    steps = sorted(set.intersection(*map(set, runs))) if runs else []
    return np.array(steps), np.array([np.mean([run[step] for run in runs]) for step in steps])


def _by_step(history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[int, float]:
    name = next((name for name in names if any(name in record for record in history)), None)
    values = {record["iteration"] + 1: record[name] for record in history if name in record}
    return {step: value for step, value in values.items() if np.isfinite(value)}


def _panel(height: float = 3.4):
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


class _Plain(LogFormatter):
    """0.3 and not 3e-01."""

    def __call__(self, x, pos=None):
        return f"{x:,g}" if super().__call__(x, pos) else ""


def _legend(figure: Figure, axis) -> None:
    """Below the panel, where it hides nothing."""
    axis.grid(alpha=0.3, which="both")
    handles, labels = axis.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= _SHORT else 1
    rows = -(-len(labels) // columns)
    figure.set_figheight(figure.get_figheight() + 0.24 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False, handlelength=3)


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """A centred moving mean; at the ends, of the values there are."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
