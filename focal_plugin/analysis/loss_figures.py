"""Count the loss of a model's windows, and of those that OHEM would keep; draw Figures 1 and 4 of the paper."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.evaluation import inference_context
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.data import DataLoader

from ..eval.drawing import COLORS
from ..files import atomic_write
from ..heads import AnchorTargets, OHEMHead, per_level_views
from ..losses.formulas import Focal
from ..retinanet import FocalRetinaNet
from .loss_distribution import GAMMAS, GROUPS, WINDOW, LossDistribution

FIGURE1_GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
FRACTIONS = (0.01, 0.1, 0.2)  # of the hardest windows, whose share of the loss is told
_COLORS = [color for color in COLORS if color != "#000000"]  # which OHEM's line has
_OHEM = (
    "OHEM is applied to the same logits: anchors scored by their cross entropy, then NMS, batch size and ratio of "
    "`MODEL.OHEM`. Its rows above give every window that it drops a loss of 0. *hardest* are as many anchors of "
    "each image as OHEM keeps there, but the ones of the highest cross entropy, without NMS and ratio."
)


@dataclass
class Counted:
    """What :func:`collect` counted."""

    losses: LossDistribution  # of all windows
    ohem: dict[str, LossDistribution]  # of what "OHEM" keeps, and of as many anchors an image, the "hardest"; or empty
    images: int = 0
    empty_images: int = 0  # without an object


def build_loader(cfg: CfgNode, num_images: int | None = None) -> DataLoader:
    """Load the annotated images of ``DATASETS.TEST``, or a random choice of so many, resized as for a test.

    A batch is one image; with ``MODEL.OHEM.SCOPE batch``, which mines a whole batch, it is that of training. No data
    set, or none with an object, is a ValueError.
    """
    names = list(cfg.DATASETS.TEST)
    if not names:
        raise ValueError("DATASETS.TEST is empty: name a data set with --dataset")
    images = [d for d in get_detection_dataset_dicts(names, filter_empty=False) if "annotations" in d]
    if not any(d["annotations"] for d in images):
        raise ValueError(f"{', '.join(names)}: no image has an annotation, so there is nothing to compare with")
    if num_images is not None and num_images < len(images):
        images = random.Random(0).sample(images, num_images)
    resize = build_augmentation(cfg, is_train=False)
    mapper = DatasetMapper(is_train=True, augmentations=resize, image_format=cfg.INPUT.FORMAT)  # keeps annotations
    size = cfg.SOLVER.IMS_PER_BATCH if cfg.MODEL.OHEM.SCOPE == "batch" else 1
    return build_detection_test_loader(images, mapper=mapper, batch_size=size, num_workers=cfg.DATALOADER.NUM_WORKERS)


def build_ohem_head(cfg: CfgNode) -> OHEMHead:
    """Build a head that samples as ``MODEL.OHEM`` says, by cross entropy, whatever loss the model was trained with."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FOCAL.LOSS, cfg.MODEL.FOCAL.CLASS_ALPHA = "focal", []
    cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA, cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA = -1.0, 0.0
    # Its convolutions are never run.
    return OHEMHead(cfg, [ShapeSpec(channels=64, stride=8)] * len(cfg.MODEL.RETINANET.IN_FEATURES))


@torch.no_grad()
def collect(
    model: FocalRetinaNet,
    data_loader: Iterable[list[dict]],
    gammas: Iterable[float] = GAMMAS,
    ohem: OHEMHead | None = None,
) -> Counted:
    """Count the loss of every window of the images that a loader gives, and of those that OHEM would keep.

    Args:
        model: it is run in the mode of inference, and given back in its own.
        data_loader: batches of Detectron2's input dicts, with "instances" (:func:`build_loader`).
        gammas: see LossDistribution; with ``ohem``, cross entropy (0), by which it ranks, is added.
        ohem: the head that samples, from :func:`build_ohem_head`.

    Raises:
        ValueError: a model with a softmax, or what LossDistribution raises.
    """
    if getattr(model.head, "num_outputs", model.num_classes) != model.num_classes:
        raise ValueError(
            f"MODEL.FOCAL.HEAD {type(model.head).__name__} is a softmax; a window is one sigmoid: it has none"
        )
    gammas = sorted({0.0, *map(float, gammas)}) if ohem else list(gammas)
    names = ("OHEM", "hardest") if ohem else ()
    counted = Counted(LossDistribution(gammas), {name: LossDistribution(gammas) for name in names})
    with inference_context(model):
        for batch in data_loader:
            logits, targets = _predict(model, batch)
            counted.images += len(batch)
            counted.empty_images += sum(len(image["instances"]) == 0 for image in batch)
            for x, y in per_level_views(logits, targets.labels, model.num_classes):
                counted.losses.update(x, y)
            if ohem:
                scores, kept = ohem.to(model.device).sample(logits, targets)
                # Ignored anchors have no loss: they come last.
                hardest = scores.argsort(dim=1, descending=True).argsort(dim=1) < kept.sum(dim=1, keepdim=True)
                for name, mask in (("OHEM", kept), ("hardest", hardest)):
                    counted.ohem[name].update(*ohem.gather_anchors(logits, targets.labels, mask))
    return counted


def _predict(model: FocalRetinaNet, batch: list[dict]) -> tuple[list[Tensor], AnchorTargets]:
    """Return the logits per level, (N, A * K, Hi, Wi), and what the model would tell its head in training."""
    features = model.backbone(model.preprocess_image(batch).tensor)
    features = [features[name] for name in model.head_in_features]
    (logits, deltas), anchors = model.head(features), model.anchor_generator(features)
    labels, boxes = model.label_anchors(anchors, [image["instances"].to(model.device) for image in batch])
    targets = Boxes.cat(anchors).tensor, model.flatten_deltas(deltas), torch.stack(labels), torch.stack(boxes)
    return logits, model.anchor_targets(*targets)


def summarize(counted: Counted, cfg: CfgNode) -> tuple[dict[str, Any], str]:
    """Return what was counted as numbers, NaN where there is no loss to speak of, and in words and tables, Markdown."""
    losses, alpha = counted.losses, cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA
    gammas = {f"γ {gamma:g}": gamma for gamma in losses.gammas}

    def anchors(of: LossDistribution) -> dict[str, int]:
        positive, negative = map(of.count, GROUPS)  # an anchor has K windows, of which one is positive if it is
        return {"positive": positive, "negative": (positive + negative) // cfg.MODEL.RETINANET.NUM_CLASSES - positive}

    def totals(of: LossDistribution) -> pd.DataFrame:
        return pd.DataFrame({f"{group}s": [of.total(group, g) for g in gammas.values()] for group in GROUPS}, gammas)

    rows = [(name, losses, gamma) for name, gamma in gammas.items()]
    rows += [("OHEM", counted.ohem["OHEM"], 0.0)] if counted.ohem else []
    hardest = {
        f"{group}, {name}": np.interp(FRACTIONS, *of.curve(group, gamma, out_of=losses.count(group)))
        for group in GROUPS
        for name, of, gamma in rows
    }
    total = totals(losses)
    ratio = total["negatives"] / total["positives"].replace(0, math.nan)
    weight = math.nan if alpha == 0 or len(cfg.MODEL.FOCAL.CLASS_ALPHA) else 1 if alpha < 0 else (1 - alpha) / alpha
    numbers = {
        "images": counted.images,
        "empty_images": counted.empty_images,
        "anchors": anchors(losses),
        "windows": {group: losses.count(group) for group in GROUPS},
        "hardest_share": pd.DataFrame(hardest, [f"hardest {100 * f:g} %" for f in FRACTIONS]).T,
        "total_loss": total.assign(ratio=ratio, **{"ratio with the config's α": weight * ratio}),
    }
    parts = [
        "{images:,} images, {empty_images:,} of them without an object; {anchors[positive]:,} foreground and "
        "{anchors[negative]:,} background anchors; {windows[positive]:,} positive and {windows[negative]:,} negative "
        "windows.\n\nShare of the loss that the hardest windows carry:".format(**numbers),
        _table("windows", 100 * numbers["hardest_share"], "{:.1f} %"),
        "All of the loss, and negatives for each unit of positives:",
        _table("loss", numbers["total_loss"], "{:,.4g}"),
    ]
    if counted.ohem:
        kept = {group: number / max(counted.images, 1) for group, number in anchors(counted.ohem["OHEM"]).items()}
        shares = {name: totals(of) / total for name, of in counted.ohem.items()}
        shares = pd.DataFrame({f"{g}s, {name}": shares[name][f"{g}s"] for g in GROUPS for name in shares})
        numbers["ohem"] = {"settings": dict(cfg.MODEL.OHEM), "anchors_per_image": kept, "share_of_loss": shares}
        parts += [
            f"OHEM keeps {kept['positive']:.1f} positive and {kept['negative']:.1f} negative anchors of an image. "
            "Share of the whole loss that these carry, and that as many of the hardest anchors would carry:",
            _table("loss", 100 * shares, "{:.1f} %"),
        ]
    return numbers, "\n\n".join(parts)


def _table(header: str, frame: pd.DataFrame, form: str) -> str:
    cells = frame.map(lambda value: "-" if math.isnan(value) else form.format(value)).rename_axis(header)
    return cells.to_markdown(disable_numparse=True, colalign=["left"] + ["right"] * len(frame.columns))


def write_report(
    numbers: dict[str, Any], tables: str, environment: dict[str, Any], figures: list[Path], folder: Path
) -> list[Path]:
    """Write what :func:`summarize` returns to loss_distribution.md and loss_distribution.json; return their paths."""
    explained = [WINDOW, _OHEM] if "ohem" in numbers else [WINDOW]
    pictures = [f"![{p.stem}]({p.name})" for p in figures if p.suffix == ".png"]
    made = {**environment, "versions": ", ".join(map(" ".join, environment.get("versions", {}).items()))}
    made = "\n".join(f"- {name}: {value}" for name, value in made.items())
    text = "\n\n".join(["# Which windows carry the loss", tables, *explained, *pictures, "## How", made])
    frames = {"default": lambda frame: json.loads(frame.to_json(orient="index", double_precision=15))}  # NaN to null
    plain = json.dumps({"environment": environment, **numbers}, **frames, indent=1)
    paths = [folder / "loss_distribution.md", folder / "loss_distribution.json"]
    for path, content in zip(paths, (text, plain)):
        with atomic_write(path) as file:
            file.write(content + "\n")
    return paths


def draw_figure1(gammas: Iterable[float], folder: Path) -> list[Path]:
    """Draw the loss of a window against p_t, the probability of its true class; return figure1.png and figure1.svg."""
    p = torch.linspace(0.001, 1 - 1e-6, 2000, dtype=torch.float64)
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axis = figure.subplots()
    for gamma, style in _styles(gammas):
        axis.plot(p, Focal(gamma).value(-p.logit()), **style)
    axis.set(xlim=(0, 1), ylim=(0, 5), xlabel="probability of the true class, $p_t$", ylabel="loss")
    axis.axvspan(0.6, 1, color="#999999", alpha=0.15, linewidth=0)  # as in the paper
    axis.text(0.8, 1.7, "well-classified\nexamples", ha="center", fontsize=10)
    axis.set_title("CE$(p_t) = -\\log p_t$,   FL$(p_t) = -(1 - p_t)^\\gamma \\log p_t$", fontsize=11)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
    return _save(figure, folder / "figure1")


def draw_figure4(counted: Counted, folder: Path, title: str = "") -> list[Path]:
    """Draw which share of the loss which part of the windows carries; return figure4.png and figure4.svg.

    The upper panels are the paper's, from easy windows to hard ones; the lower show their right ends, logarithmically.
    """
    figure = Figure(figsize=(10.4, 8.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)  # between the tick labels of neighbours
    axes = figure.subplots(2, 2, sharey="row")
    lines = [(counted.losses, gamma, style) for gamma, style in _styles(counted.losses.gammas)]
    dashed = {"color": "black", "linestyle": "--", "linewidth": 1.5, "label": "OHEM: CE of what it keeps, else 0"}
    lines += [(counted.ohem["OHEM"], 0.0, dashed)] if counted.ohem else []
    for (upper, lower), group, name in zip(axes.T, GROUPS, ("foreground", "background")):
        number = counted.losses.count(group)
        for distribution, gamma, style in lines if number else []:
            hardest, share = distribution.curve(group, gamma, out_of=number)
            upper.plot(1 - hardest, 1 - share, **style)
            lower.plot(hardest, share, **style)
        left = max(1e-6, min(0.1, 1 / max(number, 1)))  # one window, or a millionth
        upper.set(title=f"{name}: {number:,} windows", xlabel=f"fraction of {name} windows, from easy to hard")
        upper.set(xlim=(0, 1), ylim=(0, 1))
        lower.set(xlabel=f"hardest {name} windows (log scale)", xscale="log", xlim=(left, 1), ylim=(0, 1))
        for ticks in (upper.yaxis, lower.yaxis, lower.xaxis):
            ticks.set_major_formatter(lambda value, _: f"{100 * value:g} %")
            ticks.axes.grid(alpha=0.3)
    axes[0, 0].set_ylabel("cumulative share of the loss")
    axes[1, 0].set_ylabel("share of the loss in the hardest windows")
    # The lines of the background, of which there always is some.
    axes[0, 0].legend(handles=axes[0, 1].get_legend_handles_labels()[0], fontsize=9, loc="upper left")
    figure.suptitle(title, fontsize=11)
    return _save(figure, folder / "figure4")


def _styles(gammas: Iterable[float]) -> Iterator[tuple[float, dict[str, Any]]]:
    for gamma, color in zip(gammas, cycle(_COLORS)):
        yield gamma, {"color": color, "linewidth": 1.8, "label": f"FL, γ = {gamma:g}" if gamma else "CE (γ = 0)"}


def _save(figure: Figure, stem: Path) -> list[Path]:
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    return paths
