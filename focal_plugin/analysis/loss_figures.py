"""Figures 1 and 4 of the focal loss paper."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..losses.formulas import Focal
from .loss_collect import Collected

FIGURE1_GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)

# Okabe and Ito's palette for colour-blind readers, without its yellow, and without black, which OHEM's line has.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_TITLES = {"positive": "foreground", "negative": "background"}
_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:g} %")
_EASY = 0.6  # where the paper's Figure 1 has examples well classified


def draw_figure1(gammas: Iterable[float], folder: Path) -> list[Path]:
    """The loss of a window against p_t, the probability of its true class; returns figure1.png and figure1.svg."""
    p = torch.linspace(0.001, 1 - 1e-6, 2000, dtype=torch.float64)
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis = figure.subplots()
    for i, gamma in enumerate(gammas):
        loss = Focal(gamma).value(-p.logit())
        axis.plot(p, loss, color=_color(i), linewidth=1.8, label=_label(gamma))
    axis.set(xlim=(0, 1), ylim=(0, 5), xlabel="probability of the true class, $p_t$", ylabel="loss")
    axis.axvspan(_EASY, 1, color="#999999", alpha=0.15, linewidth=0)
    axis.text((_EASY + 1) / 2, 1.7, "well-classified\nexamples", ha="center", fontsize=10)
    axis.set_title("CE$(p_t) = -\\log p_t$,   FL$(p_t) = -(1 - p_t)^\\gamma \\log p_t$", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return _save(figure, folder / "figure1")


def draw_figure4(counted: Collected, folder: Path, title: str = "") -> list[Path]:
    """Which share of the loss which part of the windows carries; returns figure4.png and figure4.svg.

    The upper panels are the paper's: the cumulative distribution of the loss, windows sorted from easy to hard. The
    lower panels show their right ends, the hardest windows, on a logarithmic scale.
    """
    figure = Figure(figsize=(10.4, 8.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # between the tick labels of neighbours
    axes = figure.subplots(2, 2, sharey="row")
    for (upper, lower), (group, name) in zip(axes.T, _TITLES.items()):
        number = counted.losses.count(group)
        for fraction, share, style in _curves(counted, group):
            upper.plot(fraction, share, **style)
            lower.plot(1 - fraction, 1 - share, **style)
        upper.set(title=f"{name}: {number:,} windows", xlim=(0, 1), ylim=(0, 1))
        upper.set_xlabel(f"fraction of {name} windows, from easy to hard")
        lower.set(xscale="log", xlim=(_smallest(number), 1), ylim=(0, 1))
        lower.set_xlabel(f"hardest {name} windows (log scale)")
        lower.xaxis.set_major_formatter(_PERCENT)
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
            axis.yaxis.set_major_formatter(_PERCENT)
    axes[0, 0].set_ylabel("cumulative share of the loss")
    axes[1, 0].set_ylabel("share of the loss in the hardest windows")
    # The lines of the background, of which there always is some.
    axes[0, 0].legend(handles=axes[0, 1].get_legend_handles_labels()[0], fontsize=9, loc="upper left")
    figure.suptitle(title, fontsize=11)
    return _save(figure, folder / "figure4")


def _curves(counted: Collected, group: str):
    """(fraction, share, style) of each line of a panel; none for a group without windows."""
    number = counted.losses.count(group)
    if not number:
        return
    for i, gamma in enumerate(counted.losses.gammas):
        yield *counted.losses.cdf(group, gamma), {"color": _color(i), "linewidth": 1.8, "label": _label(gamma)}
    if counted.ohem is not None:
        dashed = {"color": "black", "linestyle": "--", "linewidth": 1.5, "label": "OHEM: CE of what it keeps, else 0"}
        yield *counted.ohem.kept.cdf(group, 0.0, out_of=number), dashed


def _smallest(number: int) -> float:
    """The left end of the logarithmic scale: one window, down to a millionth."""
    return float(np.clip(1 / max(number, 1), 1e-6, 0.1))


def _label(gamma: float) -> str:
    return "CE (γ = 0)" if gamma == 0 else f"FL, γ = {gamma:g}"


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths
