"""Checks on the columns of a COCO json: ids, references between them, classes and boxes. No file is read here."""

from __future__ import annotations

import numpy as np

from .coco_columns import Columns
from .findings import MAX_EXAMPLES, Finding, error, fatal, note, shown, warning

_EMPTY_SIDE = 1e-5  # pixels; Detectron2's filter_empty_instances drops what is not wider and higher
_SLACK = 1.0  # pixels that a box may leave the image by without a word: rounding
_XYXY_MIN_LEAVING, _XYXY_MIN_VALID = 0.10, 0.99  # shares of the boxes that make XYXY a suspicion
_CROWD_SHARE = 0.10  # of the annotations, from which it is worth a warning


def check_ids(columns: Columns, allow_duplicates: bool = False) -> list[Finding]:
    """Empty lists, duplicate ids (of annotations only a warning with ``allow_duplicates``), and ids of nothing."""
    found = [fatal(f"no_{what}", f'"{what}" is empty') for what in ("images", "categories") if not columns.counts[what]]
    if not columns.counts["annotations"]:
        found.append(error("no_annotations", '"annotations" is empty: there is nothing to train on'))
    for what, ids in (
        ("image", columns.image_ids),
        ("annotation", columns.annotation_ids),
        ("category", columns.category_ids),
    ):
        make = warning if allow_duplicates and what == "annotation" else fatal
        found += _check_duplicates(what, ids, make)
    found += _check_references("image", columns.box_image_ids, columns.image_ids, columns)
    found += _check_references("category", columns.box_category_ids, columns.category_ids, columns)
    if (columns.annotation_ids == 0).any():
        message = (
            "an annotation has the id 0: in pycocotools a match with 0 counts as none, so its detection is "
            "counted as wrong and its object as missed; number from 1"
        )
        found.append(warning("annotation_id_zero", message))
    return found


def check_classes(columns: Columns) -> list[Finding]:
    """Classes without boxes, or with the same name."""
    found = []
    used = set(np.unique(columns.box_category_ids[~columns.crowd]).tolist())
    names = dict(zip(columns.category_ids.tolist(), columns.category_names))
    empty = [f"{shown(name)} (id {key})" for key, name in names.items() if key not in used]
    if empty and len(columns.boxes):
        found.append(
            warning("empty_classes", f"classes without boxes: {len(empty):,} of {len(names):,}", len(empty), empty)
        )
    seen, twice = set(), []
    for name in columns.category_names:
        (twice.append if name in seen else seen.add)(name)
    if twice:
        message = "class names that an earlier class has (they are trained as different classes)"
        found.append(warning("duplicate_class_names", f"{message}: {len(twice):,}", len(twice), map(shown, twice)))
    return found


def check_objects(columns: Columns, filter_empty: bool | None) -> list[Finding]:
    """Images without objects, and the share of crowds.

    Args:
        filter_empty: DATALOADER.FILTER_EMPTY_ANNOTATIONS, or None if there is no config.
    """
    found = []
    num_empty = len(columns.image_ids) - int(np.isin(columns.image_ids, object_image_ids(columns)).sum())
    if num_empty:
        use = {
            None: "DATALOADER.FILTER_EMPTY_ANNOTATIONS says whether training uses them",
            True: "training leaves them out; DATALOADER.FILTER_EMPTY_ANNOTATIONS False would use them as background",
            False: "training uses them as background (DATALOADER.FILTER_EMPTY_ANNOTATIONS is False)",
        }[filter_empty]
        message = f"images without objects: {num_empty:,} of {len(columns.image_ids):,}; {use}"
        found.append(note("images_without_objects", message, num_empty))
    num_crowd = int(columns.crowd.sum())
    if num_crowd:
        share = num_crowd / len(columns.crowd)
        message = f"annotations with iscrowd 1 (training leaves them out): {num_crowd:,}, {share:.1%} of all"
        make = note if share < _CROWD_SHARE else warning
        found.append(make("crowds", message, num_crowd))
        if num_crowd == len(columns.crowd):
            found.append(error("only_crowds", "all annotations are crowds: there is nothing to train on"))
    return found


def object_image_ids(columns: Columns) -> np.ndarray:
    """Ids of the images with an object that is no crowd, as Detectron2 counts them; int64, sorted."""
    return np.unique(columns.box_image_ids[~columns.crowd])


def check_boxes(columns: Columns) -> list[Finding]:
    """Boxes that are no numbers, have no size, or are not where their image is."""
    boxes = columns.boxes
    finite = np.isfinite(boxes).all(axis=1)
    has_size = finite & (boxes[:, 2:] > _EMPTY_SIDE).all(axis=1)
    negative = finite & (boxes[:, 2:] < 0).any(axis=1)
    widths, heights = box_image_sizes(columns)
    with np.errstate(invalid="ignore", over="ignore"):
        outside, leaving = _outside(boxes, widths, heights)
        is_xyxy = _looks_like_xyxy(boxes[finite], widths[finite], heights[finite])
    found = [
        _box_finding(fatal, "nonfinite_boxes", "boxes that are not finite (the loss becomes NaN)", ~finite, columns),
        _box_finding(
            error,
            "negative_boxes",
            "boxes of negative width or height (Detectron2 trains on the box turned over, beside its corner)",
            negative,
            columns,
        ),
        _box_finding(
            error,
            "zero_boxes",
            "boxes without width or height (Detectron2 drops them without a word)",
            finite & ~has_size & ~negative,
            columns,
        ),
        _box_finding(
            error,
            "boxes_outside",
            "boxes entirely outside their image (Detectron2 drops them without a word)",
            has_size & outside,
            columns,
        ),
        _box_finding(
            warning,
            "boxes_leave_image",
            "boxes that leave their image by more than a pixel (Detectron2 cuts them off)",
            has_size & leaving & ~outside,
            columns,
        ),
    ]
    if is_xyxy:
        message = (
            "the boxes look like [x1, y1, x2, y2], while COCO's are [x, y, width, height]: "
            f"{leaving[finite].mean():.0%} leave their image as they are, and as corners nearly all would fit. "
            "Write [x1, y1, x2 - x1, y2 - y1]"
        )
        found.append(error("xyxy_suspected", message, int(finite.sum())))
    return [finding for finding in found if finding]


def box_image_sizes(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Width and height of each box's image: float64, (A,), in pixels; NaN where there is no such image."""
    rows, known = rows_of(columns.box_image_ids, columns.image_ids)
    sizes = []
    for side in (columns.widths, columns.heights):
        size = np.full(len(rows), np.nan)
        size[known] = side[rows[known]]
        sizes.append(size)
    return sizes[0], sizes[1]


def rows_of(ids: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in ``table`` each of ``ids`` is: (rows, known); a row means something only where known is True."""
    if not len(table):
        return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    order = np.argsort(table, kind="stable")
    rows = order[np.searchsorted(table, ids, sorter=order).clip(max=len(table) - 1)]
    return rows, table[rows] == ids


def _outside(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which XYWH boxes share nothing with their image, and which leave it by more than the slack: bool, (A,) each."""
    x, y, w, h = boxes.T
    outside = (x >= widths) | (y >= heights) | (x + w <= 0) | (y + h <= 0)
    leaving = (x < -_SLACK) | (y < -_SLACK) | (x + w > widths + _SLACK) | (y + h > heights + _SLACK)
    return outside, leaving


def _looks_like_xyxy(boxes: np.ndarray, widths: np.ndarray, heights: np.ndarray) -> bool:
    if not len(boxes):
        return False
    x1, y1, x2, y2 = boxes.T
    valid = (x1 >= -_SLACK) & (y1 >= -_SLACK) & (x2 > x1) & (y2 > y1)
    valid &= (x2 <= widths + _SLACK) & (y2 <= heights + _SLACK)
    _, leaving = _outside(boxes, widths, heights)
    return bool(leaving.mean() >= _XYXY_MIN_LEAVING and valid.mean() >= _XYXY_MIN_VALID)


def _box_finding(make, code: str, what: str, mask: np.ndarray, columns: Columns) -> Finding | None:
    rows = np.flatnonzero(mask)
    if not len(rows):
        return None
    examples = [
        f"annotation {columns.annotation_ids[row]} (image {columns.box_image_ids[row]}): "
        f"[{', '.join(f'{x:g}' for x in columns.boxes[row])}]"
        for row in rows[:MAX_EXAMPLES]
    ]
    return make(code, f"{what}: {len(rows):,} of {len(mask):,}", len(rows), examples)


def _check_duplicates(what: str, ids: np.ndarray, make) -> list[Finding]:
    values, counts = np.unique(ids, return_counts=True)
    twice = values[counts > 1]
    if not len(twice):
        return []
    message = f"{what} ids given more than once (one hides the other): {len(twice):,}"
    return [make(f"duplicate_{what}_ids", message, len(twice), map(str, twice[:MAX_EXAMPLES]))]


def _check_references(what: str, used: np.ndarray, table: np.ndarray, columns: Columns) -> list[Finding]:
    section = {"image": "images", "category": "categories"}[what]
    if not len(table) or len(table) < columns.counts[section]:
        return []  # an empty list and rows that could not be read are findings themselves, not what refers to them
    unknown = np.flatnonzero(~rows_of(used, table)[1])
    if not len(unknown):
        return []
    examples = [f"annotation {columns.annotation_ids[i]}: {what} {used[i]}" for i in unknown[:MAX_EXAMPLES]]
    message = f'annotations with a {what} id that is not in "{section}": {len(unknown):,} of {len(used):,}'
    return [fatal(f"unknown_{what}_ids", message, len(unknown), examples)]
