"""How well a config's anchors fit the boxes of a data set: the best IoU that any anchor of the grid has with a box."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator

MATCH_IOU = 0.5  # of a box with its best anchor, below which the box counts as unmatched
FACTORS = (0.125, 0.177, 0.25, 0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)  # of all sizes, tried for the hint
_MAX_TRIED = 20_000  # boxes that the hint is made from
_CHUNK = 1 << 15  # boxes at a time
_DIVISIBILITY = 32  # an FPN over res3-res5 pads its input to multiples of this
_MIN_GAIN = 0.02  # share of all boxes by which other sizes must help to be worth a hint,
_MAX_LEFT = 0.7  # and the part of the unmatched boxes that they may leave
_ASPECT_MATTERS = 0.1  # part of the unmatched boxes, from which the aspect ratio is worth a word


@dataclass
class AnchorGrid:
    """The anchors of a config; all lengths in pixels of the resized image.

    Attributes:
        cells: per level, float64 (S, 4): the XYXY anchors of one cell, around its reference point.
        strides: per level.
        offset: of the first reference point from the image's corner, in strides.
    """

    cells: list[np.ndarray]
    strides: list[int]
    offset: float

    def scaled(self, factor: float) -> AnchorGrid:
        """The same grid with anchors ``factor`` times as wide and high."""
        return AnchorGrid([cells * factor for cells in self.cells], self.strides, self.offset)


def anchor_grid(cfg: CfgNode) -> AnchorGrid:
    """The anchors of a config, from Detectron2's own generator.

    Raises:
        ValueError: they are not of the kind that this can compare: rotated, or on levels other than p3, p4, ...
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
    """Image sizes after Detectron2's ResizeShortestEdge with the median of INPUT.MIN_SIZE_TRAIN.

    Args:
        widths, heights: (N,), in pixels, > 0.

    Returns:
        The same, resized and rounded as upstream does; float64.

    Raises:
        ValueError: INPUT.MIN_SIZE_TRAIN is empty.
    """
    if not np.size(cfg.INPUT.MIN_SIZE_TRAIN):
        raise ValueError("INPUT.MIN_SIZE_TRAIN is empty")
    min_size, max_size = float(np.median(cfg.INPUT.MIN_SIZE_TRAIN)), cfg.INPUT.MAX_SIZE_TRAIN
    widths, heights = np.asarray(widths, np.float64), np.asarray(heights, np.float64)
    if min_size <= 0:  # upstream: no resizing
        return widths, heights
    # In upstream's order, for the same rounding.
    scale = min_size / np.minimum(widths, heights)
    new_widths = np.where(heights < widths, scale * widths, min_size)
    new_heights = np.where(heights < widths, min_size, scale * heights)
    longest = np.maximum(new_widths, new_heights)
    shrink = np.where(longest > max_size, max_size / longest, 1.0)
    return tuple(np.maximum(np.floor(side * shrink + 0.5), 1) for side in (new_widths, new_heights))


def best_ious(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, grid: AnchorGrid) -> np.ndarray:
    """Each box's IoU with its best anchor, over all levels, shapes and positions.

    Args:
        boxes: float64, (N, 4), XYXY inside their images.
        widths, heights: (N,), of the box's image before padding.
        grid: the anchors.

    Returns:
        float64, (N,), in [0, 1].
    """
    best = np.zeros(len(boxes))
    for start in range(0, len(boxes), _CHUNK):
        part = slice(start, start + _CHUNK)
        best[part] = _best_ious(boxes[part].T, widths[part], heights[part], grid)
    return best


def _best_ious(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, grid: AnchorGrid) -> np.ndarray:
    x1, y1, x2, y2 = boxes
    areas = (x2 - x1) * (y2 - y1)
    best = np.zeros(boxes.shape[1])
    for cells, stride in zip(grid.cells, grid.strides):
        for left, top, right, bottom in cells:
            # The IoU with one shape grows with the overlap in x and in y, and each is largest where the centres are
            # nearest: so the best of all its positions is found without trying them.
            x = _nearest((x1 + x2 - left - right) / 2, widths, stride, grid.offset)
            y = _nearest((y1 + y2 - top - bottom) / 2, heights, stride, grid.offset)
            overlap = (np.minimum(x2, x + right) - np.maximum(x1, x + left)).clip(min=0)
            overlap *= (np.minimum(y2, y + bottom) - np.maximum(y1, y + top)).clip(min=0)
            union = areas + (right - left) * (bottom - top) - overlap
            np.maximum(best, overlap / np.maximum(union, np.finfo(np.float64).tiny), out=best)
    return best


def _nearest(centers: np.ndarray, sides: np.ndarray, stride: int, offset: float) -> np.ndarray:
    """The reference points of a level, along one axis, that are nearest to ``centers``."""
    padded = np.ceil(sides / _DIVISIBILITY) * _DIVISIBILITY
    last = np.ceil(padded / stride) - 1
    return (np.rint(centers / stride - offset).clip(min=0).clip(max=last) + offset) * stride


def check_coverage(
    boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, cfg: CfgNode, max_boxes: int | None
) -> dict:
    """What share of the boxes no anchor of a config matches, and what would help.

    Args:
        boxes: float64, (N, 4), XYWH in pixels of the images as they are on disk; finite, with w, h > 0.
        widths, heights: (N,), of the box's image.
        cfg: a Detectron2 config; anchors, and INPUT.MIN_SIZE_TRAIN and MAX_SIZE_TRAIN, are its.
        max_boxes: look at that many evenly spaced boxes only; None for all.

    Returns:
        A dict of numbers, strings and lists: ``boxes`` looked at, ``unmatched`` of them, their ``share``,
        ``mean_best_iou``, ``unmatched_sizes`` (10 %, 50 % and 90 % quantiles of sqrt(w * h), pixels of the resized
        image), ``aspect_share`` (part of the unmatched that no size would match), ``hints`` in words, and ``sizes``
        to set MODEL.ANCHOR_GENERATOR.SIZES to, or None.

    Raises:
        ValueError: see :func:`anchor_grid` and :func:`resized_sizes`.
    """
    grid = anchor_grid(cfg)
    boxes, widths, heights = _thin_out(max_boxes, boxes, widths, heights)
    ious, unmatched = [], []
    for start in range(0, len(boxes), _CHUNK):  # so that the resized boxes are never all there
        part = slice(start, start + _CHUNK)
        resized = _resize(boxes[part], widths[part], heights[part], cfg)
        ious.append(best_ious(*resized, grid))
        unmatched.append(resized[0][ious[-1] < MATCH_IOU])
    ious = np.concatenate(ious or [np.zeros(0)])
    if not len(ious):
        return {"boxes": 0}
    unmatched = np.concatenate(unmatched)
    result = {
        "boxes": len(ious),
        "unmatched": len(unmatched),
        "share": len(unmatched) / len(ious),
        "mean_best_iou": float(ious.mean()),
        "unmatched_sizes": None,
        "aspect_share": 0.0,
        "hints": [],
        "sizes": None,
    }
    if len(unmatched):
        tried = _thin_out(_MAX_TRIED, boxes, widths, heights)
        result.update(_describe_unmatched(unmatched, grid))
        result.update(_suggest_sizes(*_resize(*tried, cfg), grid, cfg))
        result["hints"] += result.pop("aspect_hints")
    return result


def _thin_out(count: int | None, *columns: np.ndarray) -> list[np.ndarray]:
    """``count`` evenly spaced rows of each column."""
    if count is None or len(columns[0]) <= count:
        return list(columns)
    rows = np.linspace(0, len(columns[0]) - 1, count).astype(int)
    return [column[rows] for column in columns]


def _resize(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, cfg: CfgNode) -> tuple:
    """XYXY boxes cut to the resized image, and its sizes; boxes of which nothing is left are dropped."""
    new_widths, new_heights = resized_sizes(widths, heights, cfg)
    scale_x, scale_y = new_widths / widths, new_heights / heights
    with np.errstate(over="ignore", invalid="ignore"):  # a box may be 1e308 pixels wide
        x1, y1 = boxes[:, 0] * scale_x, boxes[:, 1] * scale_y
        x2, y2 = x1 + boxes[:, 2] * scale_x, y1 + boxes[:, 3] * scale_y
    corners = x1.clip(min=0), y1.clip(min=0), np.minimum(x2, new_widths), np.minimum(y2, new_heights)
    boxes = np.stack(corners, axis=1)
    left = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return boxes[left], new_widths[left], new_heights[left]


def _describe_unmatched(boxes: np.ndarray, grid: AnchorGrid) -> dict:
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    quantiles = np.quantile(np.sqrt(width * height), (0.1, 0.5, 0.9))
    cells = np.concatenate(grid.cells)
    ratios = np.unique(((cells[:, 3] - cells[:, 1]) / (cells[:, 2] - cells[:, 0])).round(4))
    # A concentric anchor whose aspect ratio is t times the box's has an IoU of at most 1 / (2 sqrt(t) - 1), whatever
    # its size.
    aspect = np.log(height / width)
    t = np.exp(np.abs(aspect[:, None] - np.log(ratios)).min(axis=1))
    hopeless = 1 / (2 * np.sqrt(t) - 1) < MATCH_IOU
    share = float(hopeless.mean())
    hints = []
    if share >= _ASPECT_MATTERS:
        long = np.exp(np.abs(aspect[hopeless]))
        shapes = [
            f"{name} boxes" for name, some in (("flat", aspect < 0), ("tall", aspect > 0)) if some[hopeless].any()
        ]
        hints.append(
            f"{share:.0%} of the unmatched boxes are too long for MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS (height / "
            f"width {', '.join(f'{ratio:g}' for ratio in ratios)}) at any size: {' and '.join(shapes)}, median "
            f"{np.median(long):.1f} : 1"
        )
    return {"unmatched_sizes": quantiles.tolist(), "aspect_share": share, "aspect_hints": hints}


def _suggest_sizes(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray, grid: AnchorGrid, cfg) -> dict:
    shares = {
        factor: float((best_ious(boxes, widths, heights, grid.scaled(factor)) < MATCH_IOU).mean()) for factor in FACTORS
    }
    best, now = min(FACTORS, key=lambda factor: (shares[factor], abs(np.log(factor)))), shares[1.0]
    if shares[best] > now - _MIN_GAIN or shares[best] > now * _MAX_LEFT:
        return {}
    sizes = [[round(size * best, 2) for size in _as_list(level)] for level in _as_levels(cfg)]
    hint = (
        f"anchors {best:g} times the size would leave {shares[best]:.1%} unmatched instead of {now:.1%}: "
        f'MODEL.ANCHOR_GENERATOR.SIZES "{sizes}"'
    )
    return {"sizes": sizes, "hints": [hint]}


def _as_levels(cfg) -> list:
    sizes = list(cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    return sizes if isinstance(sizes[0], (list, tuple)) else [sizes]


def _as_list(level) -> list[float]:
    return [float(size) for size in level]
