"""The curves of a report. A method has the same colour and line style in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..analysis.detections import PrecisionRecall

# Okabe and Ito's palette for colour-blind readers, without its yellow; line styles work in print too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#000000", "#CC79A7", "#D55E00", "#56B4E9")
LINE_STYLES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))


def draw_precision_recall(curves: Mapping[str, list[PrecisionRecall]], order: Sequence[str], path: Path) -> None:
    """One panel per IoU; `curves` holds one curve per panel for each title, `order` decides the styles."""
    panels = len(next(iter(curves.values())))
    figure = Figure(figsize=(5.2 * panels, 4.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, panels, sharey=True))
    for panel, axis in enumerate(axes):
        for title, by_iou in curves.items():
            curve = by_iou[panel]
            label = f"{title}: AP {100 * curve.ap:.1f}"
            axis.plot(curve.recall, curve.precision, label=label, **_style(order, title))
            axis.set_title(f"IoU {curve.iou:g}")
        axis.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize=8)
    axes[0].set_ylabel("interpolated precision, mean over classes")
    figure.suptitle("Precision against recall on the validation images")
    figure.savefig(path, dpi=130)


def draw_training_curves(
    histories: Mapping[str, list[dict[str, Any]]], order: Sequence[str], path: Path, smooth: int = 3
) -> None:
    """The two losses over the steps, as moving means of `smooth` records of metrics.json."""
    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = (
        ("loss_cls", "classification loss (log scale; normalisers differ)", "log"),
        ("loss_box_reg", "box regression loss", "linear"),
    )
    for axis, (name, title, scale) in zip(axes, panels):
        for method, history in histories.items():
            records = [(r["iteration"] + 1, r[name]) for r in history if name in r]
            if records:
                steps, losses = np.array(records).T
                marker = "o" if len(steps) == 1 else None  # one point makes no line
                axis.plot(steps, _smoothed(losses, smooth), marker=marker, label=method, **_style(order, method))
        axis.set(title=title, xlabel="training step", ylabel=name, yscale=scale)
        axis.grid(alpha=0.3, which="both")
    axes[1].legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=130)


def _style(order: Sequence[str], title: str) -> dict[str, Any]:
    index = order.index(title)
    style = LINE_STYLES[index % len(LINE_STYLES)]
    return {"color": COLORS[index % len(COLORS)], "linestyle": style, "linewidth": 1.8}


def _smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """A centred moving mean; at the ends, of the values there are."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
