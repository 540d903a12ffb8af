"""Writes down what :func:`focal_plugin.analysis.loss_collect.collect` counted: tables, and numbers for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from tabulate import tabulate

from .loss_collect import Collected
from .loss_distribution import GROUPS

FRACTIONS = (0.01, 0.1, 0.2)
"""Of the hardest windows, whose share of the loss is told."""

_WINDOW = (
    "A window is one entry of the sigmoid output: one anchor and one class. Positives are the entries of foreground "
    "anchors at their matched class, negatives all other entries of anchors that are not ignored; ignored anchors are "
    "left out. (The paper does not say what its windows are.) Labels are the model's own matcher's; images are resized "
    "as for a test. Loss is without alpha, which cancels in every share."
)
_OHEM = (
    "OHEM is applied to the same logits: anchors scored by their cross entropy, then NMS, batch size and ratio of "
    "`MODEL.OHEM`. Its rows above give every window that it drops a loss of 0. *hardest* are as many anchors of "
    "each image as OHEM keeps there, but the ones of the highest cross entropy, without NMS and ratio."
)


def summarize(counted: Collected, cfg: CfgNode) -> dict[str, Any]:
    """Everything that the tables hold, as plain numbers; None where there is no loss to speak of."""
    losses, ohem = counted.losses, counted.ohem
    summary = {
        "images": counted.images,
        "empty_images": counted.empty_images,
        "anchors": {"positive": counted.positives, "negative": counted.negatives},
        "windows": {group: losses.count(group) for group in GROUPS},
        "gammas": list(losses.gammas),
        "hardest_share": {group: _shares(losses, group) for group in GROUPS},
        "total_loss": {f"{gamma:g}": _totals(counted, gamma, cfg) for gamma in losses.gammas},
        "histogram": {group: losses.histogram(group) for group in GROUPS},
    }
    if ohem is not None:
        summary["ohem"] = {
            "settings": dict(cfg.MODEL.OHEM),
            "anchors_per_image": {
                "positive": ohem.positives / max(counted.images, 1),
                "negative": ohem.negatives / max(counted.images, 1),
            },
            "windows": {group: ohem.kept.count(group) for group in GROUPS},
            "hardest_share": {
                group: {
                    f"{f:g}": _finite(ohem.kept.hardest_share(group, 0.0, f, losses.count(group))) for f in FRACTIONS
                }
                for group in GROUPS
            },
            "share_of_loss": {f"{gamma:g}": _kept_shares(counted, gamma) for gamma in losses.gammas},
            "histogram": {group: ohem.kept.histogram(group) for group in GROUPS},
        }
    return summary


def _shares(losses, group: str) -> dict[str, dict[str, float | None]]:
    return {
        f"{gamma:g}": {f"{f:g}": _finite(losses.hardest_share(group, gamma, f)) for f in FRACTIONS}
        for gamma in losses.gammas
    }


def _totals(counted: Collected, gamma: float, cfg: CfgNode) -> dict[str, float | None]:
    """Per group, and negatives for each unit of positives, without and with the config's alpha (if it is one)."""
    positive, negative = (counted.losses.total(group, gamma) for group in GROUPS)
    ratio = negative / positive if positive > 0 else None
    alpha = cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA
    weight = 1.0 if alpha < 0 else (1 - alpha) / alpha if alpha > 0 else None
    if len(cfg.MODEL.FOCAL.CLASS_ALPHA) or ratio is None or weight is None:
        weighted = None
    else:
        weighted = ratio * weight
    return {"positive": positive, "negative": negative, "ratio": ratio, "ratio_with_alpha": weighted}


def _kept_shares(counted: Collected, gamma: float) -> dict[str, dict[str, float | None]]:
    """Of all of the loss, what OHEM's anchors carry, and what as many of the hardest do."""
    return {
        name: {group: _share(chosen.total(group, gamma), counted.losses.total(group, gamma)) for group in GROUPS}
        for name, chosen in (("kept", counted.ohem.kept), ("hardest", counted.ohem.hardest))
    }


def format_tables(summary: dict[str, Any]) -> str:
    """The numbers of :func:`summarize` in Markdown."""
    windows, anchors = summary["windows"], summary["anchors"]
    parts = [
        f"{summary['images']:,} images, {summary['empty_images']:,} of them without an object; "
        f"{anchors['positive']:,} foreground and {anchors['negative']:,} background anchors; "
        f"{windows['positive']:,} positive and {windows['negative']:,} negative windows.",
        "Share of the loss that the hardest windows carry:",
        _hardest_table(summary),
        "All of the loss, and negatives for each unit of positives:",
        _total_table(summary),
    ]
    if "ohem" in summary:
        kept = summary["ohem"]["anchors_per_image"]
        parts += [
            f"OHEM keeps {kept['positive']:.1f} positive and {kept['negative']:.1f} negative anchors of an image. "
            "Share of the whole loss that these carry, and that as many of the hardest anchors would carry:",
            _ohem_table(summary),
        ]
    return "\n\n".join(parts)


def _hardest_table(summary: dict[str, Any]) -> str:
    rows = []
    for group in GROUPS:
        by_gamma = summary["hardest_share"][group]
        rows += [[f"{group}, γ {gamma}", *map(_percent, shares.values())] for gamma, shares in by_gamma.items()]
        if "ohem" in summary:
            rows.append([f"{group}, OHEM", *map(_percent, summary["ohem"]["hardest_share"][group].values())])
    return _markdown(["windows", *(f"hardest {100 * f:g} %" for f in FRACTIONS)], rows)


def _total_table(summary: dict[str, Any]) -> str:
    rows = [[f"γ {gamma}", *map(_number, totals.values())] for gamma, totals in summary["total_loss"].items()]
    return _markdown(["loss", "positives", "negatives", "ratio", "ratio with the config's α"], rows)


def _ohem_table(summary: dict[str, Any]) -> str:
    rows = []
    for gamma, shares in summary["ohem"]["share_of_loss"].items():
        rows.append([f"γ {gamma}", *(_percent(shares[name][g]) for g in GROUPS for name in ("kept", "hardest"))])
    headers = [f"{group}s, {name}" for group in GROUPS for name in ("OHEM", "hardest")]
    return _markdown(["loss", *headers], rows)


def write_report(
    summary: dict[str, Any], environment: dict[str, str], figures: Sequence[Path], folder: Path
) -> tuple[Path, Path]:
    """Writes loss_distribution.md and loss_distribution.json into a folder; returns their paths."""
    pictures = "\n\n".join(f"![{p.stem}]({p.name})" for p in figures if p.suffix == ".png")
    made = "\n".join(f"- {name}: {value}" for name, value in environment.items())
    explained = _WINDOW if "ohem" not in summary else f"{_WINDOW}\n\n{_OHEM}"
    sections = ["# Which windows carry the loss", format_tables(summary), explained, pictures, "## How", made]
    markdown, numbers = folder / "loss_distribution.md", folder / "loss_distribution.json"
    markdown.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    numbers.write_text(json.dumps({"environment": environment, **summary}, allow_nan=False) + "\n", encoding="utf-8")
    return markdown, numbers


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}"


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
