"""How well a config's anchors fit the boxes of a data set: the best IoU that any anchor of the grid has with a box."""

from __future__ import annotations

import re

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

MATCH_IOU = 0.5  # of a box with its best anchor, below which the box counts as unmatched
FACTORS = (0.125, 0.177, 0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)  # of all sizes, tried for the hint
_MAX_TRIED = 20_000  # boxes that the hint is made from
_DIVISIBILITY = 32  # an FPN over res3-res5 pads its input to multiples of this
_MIN_GAIN = 0.02  # share of all boxes that other sizes must match beyond the present ones to be worth a hint
_MAX_LEFT = 0.7  # part of the unmatched boxes that they may leave


def anchor_generator(cfg: CfgNode) -> DefaultAnchorGenerator:
    """Return Detectron2's generator of a config's anchors; a ValueError refuses rotated ones and levels but p3-p9."""
    levels = [re.fullmatch(r"p(\d)", name) for name in cfg.MODEL.RETINANET.IN_FEATURES]
    if not levels or not all(levels):
        raise ValueError(f"MODEL.RETINANET.IN_FEATURES {list(cfg.MODEL.RETINANET.IN_FEATURES)} are no FPN levels")
    try:
        generator = build_anchor_generator(cfg, [ShapeSpec(stride=2 ** int(level[1])) for level in levels])
    except (AssertionError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"MODEL.ANCHOR_GENERATOR: {error}") from error
    if generator.box_dim != 4:
        raise ValueError(f"MODEL.ANCHOR_GENERATOR.NAME {cfg.MODEL.ANCHOR_GENERATOR.NAME}: the boxes are not upright")
    return generator


def resized_sizes(sizes: np.ndarray, cfg: CfgNode) -> np.ndarray:
    """Return (N, 2) widths and heights in pixels, float64, as training's resizing to its median size makes them, and
    raise a ValueError if INPUT.MIN_SIZE_TRAIN is empty.
    """
    if not np.size(cfg.INPUT.MIN_SIZE_TRAIN):
        raise ValueError("INPUT.MIN_SIZE_TRAIN is empty")
    min_size = float(np.median(cfg.INPUT.MIN_SIZE_TRAIN))
    if min_size > 0:  # to Detectron2, 0 means no resizing
        different, rows = np.unique(sizes, axis=0, return_inverse=True)
        resize = ResizeShortestEdge.get_output_shape
        resized = [resize(height, width, min_size, cfg.INPUT.MAX_SIZE_TRAIN) for width, height in different.tolist()]
        sizes = np.reshape(resized, (-1, 2))[rows.ravel(), ::-1].clip(min=1)
    return sizes.astype(np.float64)


def best_ious(boxes: np.ndarray, sizes: np.ndarray, generator: DefaultAnchorGenerator, factor: float = 1) -> np.ndarray:
    """Return each box's IoU with its best anchor, over all levels, shapes and positions: float64, (N,).

    ``boxes`` are float64, (N, 4), XYXY inside their images, whose widths and heights before padding are the (N, 2)
    ``sizes``; all anchors are ``factor`` times as large as the generator's.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    areas = (high - low).prod(axis=1)
    padded = np.ceil(sizes / _DIVISIBILITY) * _DIVISIBILITY
    best = np.zeros(len(boxes))
    for cells, stride in zip(generator.cell_anchors, generator.strides):
        last = np.ceil(padded / stride) - 1  # reference point, in x and in y
        for cell_low, cell_high in np.reshape(cells.tolist(), (-1, 2, 2)) * factor:  # XYXY around a reference point
            # The IoU with one shape grows with the overlap in x and in y, and each is largest where the centers are
            # nearest: so the best of all positions is found without trying them.
            centers = (low + high - cell_low - cell_high) / 2
            points = np.rint(centers / stride - generator.offset).clip(min=0, max=last) + generator.offset
            overlaps = np.minimum(high, points * stride + cell_high) - np.maximum(low, points * stride + cell_low)
            overlap = overlaps.clip(min=0).prod(axis=1)
            union = areas + (cell_high - cell_low).prod() - overlap
            np.maximum(best, overlap / np.maximum(union, np.finfo(np.float64).tiny), out=best)
    return best


def check_coverage(boxes: np.ndarray, sizes: np.ndarray, cfg: CfgNode, max_boxes: int | None) -> dict:
    """Compute what share of the boxes no anchor of a config matches, and what would help.

    Args:
        boxes: float64, (N, 4), XYWH in pixels of the images as they are on disk; finite, with w, h > 0.
        sizes: (N, 2), width and height of the box's image.
        max_boxes: look at that many evenly spaced boxes only; None for all.

    Returns:
        What json can hold: ``boxes`` looked at, ``unmatched`` of them, their ``share``, ``mean_best_iou``,
        ``unmatched_sizes`` (10 %, 50 % and 90 % quantiles of sqrt(w * h), pixels of the resized image), ``hints`` in
        words, and ``sizes`` to set MODEL.ANCHOR_GENERATOR.SIZES to, or None. A ValueError says why the anchors or
        sizes of the config cannot be compared.
    """
    generator = anchor_generator(cfg)
    rows = _evenly_spaced(len(boxes), max_boxes or len(boxes))
    boxes, sizes = boxes[rows], sizes[rows]
    new_sizes = resized_sizes(sizes, cfg)
    with np.errstate(over="ignore", invalid="ignore"):  # a box may be 1e308 pixels wide
        low, size = np.split(boxes * np.tile(new_sizes / sizes, 2), 2, axis=1)
        high = np.minimum(low + size, new_sizes)
    low = low.clip(min=0)
    inside = (high > low).all(axis=1)
    boxes, sizes = np.hstack([low, high])[inside], new_sizes[inside]
    if not len(boxes):
        return {"boxes": 0}
    ious = best_ious(boxes, sizes, generator)
    unmatched = boxes[ious < MATCH_IOU]
    result = {"boxes": len(boxes), "unmatched": len(unmatched), "share": len(unmatched) / len(boxes)}
    result |= {"mean_best_iou": float(ious.mean()), "unmatched_sizes": None, "hints": [], "sizes": None}
    if len(unmatched):
        sides = np.sqrt((unmatched[:, 2:] - unmatched[:, :2]).prod(axis=1))
        result["unmatched_sizes"] = np.quantile(sides, (0.1, 0.5, 0.9)).tolist()
        rows = _evenly_spaced(len(boxes), _MAX_TRIED)
        result |= _suggest_sizes(boxes[rows], sizes[rows], generator, cfg)
    return result


def _evenly_spaced(num_rows: int, max_rows: int) -> np.ndarray:
    return np.linspace(0, num_rows - 1, min(num_rows, max_rows)).astype(int)


def _suggest_sizes(boxes: np.ndarray, sizes: np.ndarray, generator: DefaultAnchorGenerator, cfg: CfgNode) -> dict:
    """Return ``sizes`` and a hint about them, or nothing if no factor of all sizes helps enough."""
    shares = {factor: (best_ious(boxes, sizes, generator, factor) < MATCH_IOU).mean() for factor in FACTORS}
    best, now = min(FACTORS, key=lambda factor: (shares[factor], abs(np.log(factor)))), shares[1.0]
    if shares[best] > min(now - _MIN_GAIN, now * _MAX_LEFT):
        return {}
    levels = list(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    levels = levels if isinstance(levels[0], (list, tuple)) else [levels]
    sizes = [[round(float(size) * best, 2) for size in level] for level in levels]
    gain = f"anchors {best:g} times the size would leave {shares[best]:.1%} unmatched instead of {now:.1%}"
    return {"sizes": sizes, "hints": [f'{gain}: MODEL.ANCHOR_GENERATOR.SIZES "{sizes}"']}
