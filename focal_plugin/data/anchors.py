"""How well a config's anchors fit the boxes of a data set: the best IoU that any anchor of the grid has with a box."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator

MATCH_IOU = 0.5  # of a box with its best anchor, below which the box counts as unmatched
FACTORS = (0.125, 0.177, 0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)  # of all sizes, tried for the hint
_MAX_TRIED = 20_000  # boxes that the hint is made from
_DIVISIBILITY = 32  # an FPN over res3-res5 pads its input to multiples of this
_MIN_GAIN = 0.02  # share of all boxes by which other sizes must help to be worth a hint,
_MAX_LEFT = 0.7  # and the part of the unmatched boxes that they may leave


@dataclass
class AnchorGrid:
    """The anchors of a config; all lengths in pixels of the resized image.

    Attributes:
        cells: for each level, float64 (S, 4): the XYXY anchors of one cell, around its reference point.
        strides: for each level.
        offset: of the first reference point from the image's corner, in strides.
    """

    cells: list[np.ndarray]
    strides: list[int]
    offset: float


def anchor_grid(cfg: CfgNode) -> AnchorGrid:
    """Return the anchors of a config, from Detectron2's own generator.

    Raises:
        ValueError: the anchors cannot be compared: they are rotated, or on levels other than p3, p4, ...
    """
    levels = [re.fullmatch(r"p(\d)", name) for name in cfg.MODEL.RETINANET.IN_FEATURES]
    if not levels or not all(levels):
        raise ValueError(f"MODEL.RETINANET.IN_FEATURES {list(cfg.MODEL.RETINANET.IN_FEATURES)} are no FPN levels")
    strides = [2 ** int(level[1]) for level in levels]
    try:
        generator = build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in strides])
    except (AssertionError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"MODEL.ANCHOR_GENERATOR: {error}") from error
    if generator.box_dim != 4:
        raise ValueError(f"MODEL.ANCHOR_GENERATOR.NAME {cfg.MODEL.ANCHOR_GENERATOR.NAME}: the boxes are not upright")
    cells = [np.asarray(cells.tolist(), dtype=np.float64) for cells in generator.cell_anchors]
    return AnchorGrid(cells, strides, float(generator.offset))


def resized_sizes(widths: np.ndarray, heights: np.ndarray, cfg: CfgNode) -> tuple[np.ndarray, np.ndarray]:
    """Return image sizes after Detectron2's ResizeShortestEdge with the median of INPUT.MIN_SIZE_TRAIN.

    Args:
        widths, heights: (N,), in pixels, > 0.

    Returns:
        The same, resized; float64, at least 1.

    Raises:
        ValueError: INPUT.MIN_SIZE_TRAIN is empty.
    """
    if not np.size(cfg.INPUT.MIN_SIZE_TRAIN):
        raise ValueError("INPUT.MIN_SIZE_TRAIN is empty")
    min_size, sizes = float(np.median(cfg.INPUT.MIN_SIZE_TRAIN)), np.stack([heights, widths], axis=1)
    if min_size > 0:  # to Detectron2, 0 means no resizing
        different, rows = np.unique(sizes, axis=0, return_inverse=True)
        resize = ResizeShortestEdge.get_output_shape
        resized = [resize(height, width, min_size, cfg.INPUT.MAX_SIZE_TRAIN) for height, width in different.tolist()]
        sizes = np.reshape(resized, (-1, 2))[rows.ravel()].clip(min=1)
    new_heights, new_widths = sizes.astype(np.float64).T
    return new_widths, new_heights


def best_ious(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, grid: AnchorGrid) -> np.ndarray:
    """Return each box's IoU with its best anchor, over all levels, shapes and positions.

    Args:
        boxes: float64, (N, 4), XYXY inside their images.
        widths, heights: (N,), of the box's image before padding.
        grid: the anchors.

    Returns:
        float64, (N,), in [0, 1].
    """
    x1, y1, x2, y2 = boxes.T
    areas = (x2 - x1) * (y2 - y1)
    best = np.zeros(len(boxes))
    for cells, stride in zip(grid.cells, grid.strides):
        for left, top, right, bottom in cells:
            # The IoU with one shape grows with the overlap in x and in y, and each is largest where the centers are
            # nearest: so the best of all positions is found without trying them.
            x = _nearest((x1 + x2 - left - right) / 2, widths, stride, grid.offset)
            y = _nearest((y1 + y2 - top - bottom) / 2, heights, stride, grid.offset)
            overlap = (np.minimum(x2, x + right) - np.maximum(x1, x + left)).clip(min=0)
            overlap *= (np.minimum(y2, y + bottom) - np.maximum(y1, y + top)).clip(min=0)
            union = areas + (right - left) * (bottom - top) - overlap
            np.maximum(best, overlap / np.maximum(union, np.finfo(np.float64).tiny), out=best)
    return best


def _nearest(centers: np.ndarray, sides: np.ndarray, stride: int, offset: float) -> np.ndarray:
    """Return the reference points of a level, along one axis, that are nearest to ``centers``."""
    padded = np.ceil(sides / _DIVISIBILITY) * _DIVISIBILITY
    last = np.ceil(padded / stride) - 1
    return (np.rint(centers / stride - offset).clip(min=0).clip(max=last) + offset) * stride


def check_coverage(
    boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, cfg: CfgNode, max_boxes: int | None
) -> dict:
    """Compute what share of the boxes no anchor of a config matches, and what would help.

    Args:
        boxes: float64, (N, 4), XYWH in pixels of the images as they are on disk; finite, with w, h > 0.
        widths, heights: (N,), of the box's image.
        cfg: a Detectron2 config: its anchors, INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN.
        max_boxes: look at that many evenly spaced boxes only; None for all.

    Returns:
        A dict of numbers, strings and lists: ``boxes`` looked at, ``unmatched`` of them, their ``share``,
        ``mean_best_iou``, ``unmatched_sizes`` (10 %, 50 % and 90 % quantiles of sqrt(w * h), pixels of the resized
        image), ``hints`` in words, and ``sizes`` to set MODEL.ANCHOR_GENERATOR.SIZES to, or None.

    Raises:
        ValueError: see :func:`anchor_grid` and :func:`resized_sizes`.
    """
    grid = anchor_grid(cfg)
    boxes, widths, heights = _resize(*_thin_out(max_boxes, boxes, widths, heights), cfg)
    if not len(boxes):
        return {"boxes": 0}
    ious = best_ious(boxes, widths, heights, grid)
    unmatched = boxes[ious < MATCH_IOU]
    result = {
        "boxes": len(boxes),
        "unmatched": len(unmatched),
        "share": len(unmatched) / len(boxes),
        "mean_best_iou": float(ious.mean()),
        "unmatched_sizes": None,
        "hints": [],
        "sizes": None,
    }
    if len(unmatched):
        sides = np.sqrt((unmatched[:, 2:] - unmatched[:, :2]).prod(axis=1))
        result["unmatched_sizes"] = np.quantile(sides, (0.1, 0.5, 0.9)).tolist()
        result.update(_suggest_sizes(*_thin_out(_MAX_TRIED, boxes, widths, heights), grid, cfg))
    return result


def _thin_out(count: int | None, *columns: np.ndarray) -> list[np.ndarray]:
    """Return ``count`` evenly spaced rows of each column."""
    if count is None or len(columns[0]) <= count:
        return list(columns)
    rows = np.linspace(0, len(columns[0]) - 1, count).astype(int)
    return [column[rows] for column in columns]


def _resize(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, cfg: CfgNode) -> tuple:
    """Return XYXY boxes cut to the resized image, and its sizes; boxes of which nothing is left are dropped."""
    new_widths, new_heights = resized_sizes(widths, heights, cfg)
    scale_x, scale_y = new_widths / widths, new_heights / heights
    with np.errstate(over="ignore", invalid="ignore"):  # a box may be 1e308 pixels wide
        x1, y1 = boxes[:, 0] * scale_x, boxes[:, 1] * scale_y
        x2, y2 = x1 + boxes[:, 2] * scale_x, y1 + boxes[:, 3] * scale_y
    corners = x1.clip(min=0), y1.clip(min=0), np.minimum(x2, new_widths), np.minimum(y2, new_heights)
    boxes = np.stack(corners, axis=1)
    left = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[left], new_widths[left], new_heights[left]


def _suggest_sizes(
    boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, grid: AnchorGrid, cfg: CfgNode
) -> dict[str, list]:
    """Return ``sizes`` and a hint about them, or nothing if no factor of all sizes helps enough."""
    shares = {}
    for factor in FACTORS:
        scaled = AnchorGrid([cells * factor for cells in grid.cells], grid.strides, grid.offset)
        shares[factor] = float((best_ious(boxes, widths, heights, scaled) < MATCH_IOU).mean())
    best, now = min(FACTORS, key=lambda factor: (shares[factor], abs(np.log(factor)))), shares[1.0]
    if shares[best] > now - _MIN_GAIN or shares[best] > now * _MAX_LEFT:
        return {}
    levels = list(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    levels = levels if isinstance(levels[0], (list, tuple)) else [levels]
    sizes = [[round(float(size) * best, 2) for size in level] for level in levels]
    hint = (
        f"anchors {best:g} times the size would leave {shares[best]:.1%} unmatched instead of {now:.1%}: "
        f'MODEL.ANCHOR_GENERATOR.SIZES "{sizes}"'
    )
    return {"sizes": sizes, "hints": [hint]}
