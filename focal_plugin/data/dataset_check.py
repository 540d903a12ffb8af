"""Check a data set in COCO format before it costs a training: its json, its images, and the anchors that it needs.

The json is read as training reads it, its rows become NumPy columns, and each check is a mask over them.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.datasets import load_coco_json

from ..files import printable
from .anchors import check_coverage
from .coco_json import SECTIONS, Columns, missing_lists, read_columns, read_json, rows_of
from .dataset_report import SEVERITIES, DatasetReport
from .image_check import SAMPLE_SIZE, check_images

MODES = ("all", "sample", "none")
_MAX_BOXES_FAST = 50_000  # whose anchors the fast form looks at
_UNMATCHED_SHARE = 0.05  # of the boxes, from which the anchors are worth a warning
_EMPTY_SIDE = 1e-5  # pixels; Detectron2's filter_empty_instances drops boxes that are not wider and higher
_SLACK = 1.0  # pixels by which rounding may push a box out of its image
_XYXY_MIN_LEAVING, _XYXY_MIN_VALID = 0.10, 0.99  # shares of the boxes that make XYXY a suspicion


def check_coco(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    cfg: CfgNode | None = None,
    *,
    images: str = "all",
    max_workers: int | None = None,
) -> DatasetReport:
    """Check a data set in COCO format. Whatever is wrong with the files becomes a finding, never an exception.

    Without a fatal finding Detectron2's ``load_coco_json`` reads the file.

    Args:
        json_file: the annotations.
        image_root: folder that their file names start from.
        cfg: a Detectron2 config, for the anchors and DATALOADER.FILTER_EMPTY_ANNOTATIONS; None leaves both out.
        images: "all" opens and decodes every image, with a progress bar where stderr is a terminal; "sample" (the
            fast form, for the start of a training) the headers of at most 64, evenly spaced; "none" opens none.
        max_workers: threads that read images; None for one per CPU, at most 8.

    Raises:
        ValueError: ``images`` is none of the three.
    """
    if images not in MODES:
        raise ValueError(f"images={images!r} is none of {', '.join(MODES)}")
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    report, lists = DatasetReport(), {section: [] for section in SECTIONS}
    try:
        content = read_json(json_file)
    except (OSError, ValueError) as problem:
        report.add("fatal", "not_json", f"the file cannot be read as json: {problem}")
    else:
        missing = missing_lists(content)
        message = f"no COCO json: it lacks a list of {' and of '.join(missing)}"
        report.add("fatal", "no_coco", message, len(missing))
        lists.update({section: content[section] for section in SECTIONS if section not in missing})
        del content  # takes several times the file's size, and load_coco_json as much again
    is_coco = not report.findings
    counts = {section: len(elements) for section, elements in lists.items()}
    columns = read_columns(report, lists)
    del lists
    report.summary = {
        "json_file": json_file,
        "image_root": image_root,
        **counts,
        "images_with_objects": int(np.isin(columns.object_image_ids(), columns.image_ids).sum()),
        "crowds": int(columns.crowd.sum()),
        "images_checked": images,
        "images_looked_at": 0,
        "sample_size": SAMPLE_SIZE,
        "classes": _count_classes(columns),
        "box_sizes": None,
        "anchors": None,
    }
    if is_coco:
        # Detectron2 allows duplicates in a file of such a name, because some of COCO 2014's own have them.
        _check_ids(report, columns, counts, allow_duplicates="minival" in json_file)
        _check_boxes(report, columns)
        _check_classes(report, columns)
        if not report.fatal:
            _ask_detectron2(report, columns, json_file, image_root)
        workers = max_workers or min(8, os.cpu_count() or 1)
        looked_at = check_images(report, columns.file_names, columns.sizes, image_root, images, workers)
        report.summary["images_looked_at"] = looked_at
        _check_objects(report, columns, None if cfg is None else bool(cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS))
        _check_sizes(report, columns, cfg, None if images == "all" else _MAX_BOXES_FAST)
    report.findings.sort(key=lambda finding: (not finding.fatal, SEVERITIES.index(finding.severity)))
    return report


def _ask_detectron2(report: DatasetReport, columns: Columns, json_file: str, image_root: str) -> None:
    """Let Detectron2 load the file, without a name to register it under, and report what it refuses or drops."""
    logger = logging.getLogger(load_coco_json.__module__)
    was_disabled, logger.disabled = logger.disabled, True  # it would log what the report says
    try:
        records = load_coco_json(json_file, image_root, extra_annotation_keys=["id"])
    except Exception as problem:  # any, depending on what it stumbles over
        message = (
            f"Detectron2 cannot load the file: {type(problem).__name__}: {printable(str(problem), 200)}. As all else "
            'is in order, look at "segmentation" and "keypoints": training on boxes needs neither, leave them out'
        )
        report.add("fatal", "not_loadable", message)
        return
    finally:
        logger.disabled = was_disabled
    kept = [annotation["id"] for record in records for annotation in record["annotations"]]
    dropped = np.flatnonzero(~np.isin(columns.annotation_ids, kept))
    message = (
        "annotations whose segmentation has no polygon of three points, which Detectron2 drops with their boxes when "
        f"it loads the file (leave the segmentation out instead): {len(dropped):,} times"
    )
    report.add("warning", "dropped_by_polygons", message, len(dropped), (f"annotations[{row}]" for row in dropped))


def _count_classes(columns: Columns) -> list[dict]:
    """Return id, name, number of boxes and number of images of each class."""
    rows, known = rows_of(columns.box_category_ids, columns.category_ids)
    image_rows, in_image = rows_of(columns.box_image_ids, columns.image_ids)
    num_classes, num_images = len(columns.category_ids), len(columns.image_ids)
    boxes = np.bincount(rows[known], minlength=num_classes)
    known &= in_image
    pairs = np.unique(rows[known] * num_images + image_rows[known])  # a class and an image, each pair once
    images = np.bincount(pairs // max(num_images, 1), minlength=num_classes)
    table = zip(columns.category_ids.tolist(), columns.category_names, boxes.tolist(), images.tolist())
    return [dict(zip(("id", "name", "boxes", "images"), row)) for row in table]


def _check_ids(report: DatasetReport, columns: Columns, counts: dict[str, int], allow_duplicates: bool) -> None:
    """Report empty lists, duplicate ids, and ids of nothing."""
    for section in ("images", "categories"):
        report.add("fatal", f"no_{section}", f'"{section}" is empty', not counts[section])
    message = '"annotations" is empty: there is nothing to train on'
    report.add("error", "no_annotations", message, not counts["annotations"])
    for what, ids in (
        ("image", columns.image_ids),
        ("annotation", columns.annotation_ids),
        ("category", columns.category_ids),
    ):
        values, times = np.unique(ids, return_counts=True)
        twice = values[times > 1]
        level = "warning" if allow_duplicates and what == "annotation" else "fatal"
        message = f"{what} ids given more than once (one hides the other): {len(twice):,}"
        report.add(level, f"duplicate_{what}_ids", message, len(twice), map(str, twice))
    for what, section, used, table in (
        ("image", "images", columns.box_image_ids, columns.image_ids),
        ("category", "categories", columns.box_category_ids, columns.category_ids),
    ):
        if not counts[section] or len(table) < counts[section]:
            continue  # an empty list and rows that could not be read are findings themselves, not what refers to them
        unknown = np.flatnonzero(~rows_of(used, table)[1])
        examples = (f"annotation {columns.annotation_ids[row]}: {what} {used[row]}" for row in unknown)
        message = f'annotations with a {what} id that is not in "{section}": {len(unknown):,} of {len(used):,}'
        report.add("fatal", f"unknown_{what}_ids", message, len(unknown), examples)
    message = (
        "an annotation has the id 0: in pycocotools a match with 0 counts as none, so its detection is counted as "
        "wrong and its object as missed; number from 1"
    )
    report.add("warning", "annotation_id_zero", message, (columns.annotation_ids == 0).any())


def _check_boxes(report: DatasetReport, columns: Columns) -> None:
    """Report boxes that are no numbers, have no size, or are not where their image is."""
    boxes, (widths, heights) = columns.boxes, columns.box_image_sizes().T
    x, y, w, h = boxes.T
    finite = np.isfinite(boxes).all(axis=1)
    has_size = finite & (boxes[:, 2:] > _EMPTY_SIDE).all(axis=1)
    negative = finite & (boxes[:, 2:] < 0).any(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        outside = (x >= widths) | (y >= heights) | (x + w <= 0) | (y + h <= 0)
        leaving = (x < -_SLACK) | (y < -_SLACK) | (x + w > widths + _SLACK) | (y + h > heights + _SLACK)
    fits_as_xyxy = (x >= -_SLACK) & (y >= -_SLACK) & (w > x) & (h > y)
    fits_as_xyxy &= (w <= widths + _SLACK) & (h <= heights + _SLACK)

    def add(level: str, code: str, message: str, mask: np.ndarray) -> None:
        rows = np.flatnonzero(mask)
        report.add(level, code, f"{message}: {len(rows):,} of {len(mask):,}", len(rows), examples(rows))

    def examples(rows: np.ndarray) -> Iterator[str]:
        for row in rows:
            numbers = ", ".join(f"{number:g}" for number in boxes[row])
            yield f"annotation {columns.annotation_ids[row]} (image {columns.box_image_ids[row]}): [{numbers}]"

    add("fatal", "nonfinite_boxes", "boxes that are not finite (the loss becomes NaN)", ~finite)
    message = "boxes of negative width or height (Detectron2 trains on the box turned over, beside its corner)"
    add("error", "negative_boxes", message, negative)
    message = "boxes without width or height (Detectron2 drops them without a word)"
    add("error", "zero_boxes", message, finite & ~has_size & ~negative)
    message = "boxes entirely outside their image (Detectron2 drops them without a word)"
    add("error", "boxes_outside", message, has_size & outside)
    message = "boxes that leave their image by more than a pixel (Detectron2 cuts them off)"
    add("warning", "boxes_leave_image", message, has_size & leaving & ~outside)
    num_finite = max(finite.sum(), 1)
    share = leaving[finite].sum() / num_finite
    if share >= _XYXY_MIN_LEAVING and fits_as_xyxy[finite].sum() / num_finite >= _XYXY_MIN_VALID:
        message = (
            "the boxes look like [x1, y1, x2, y2], while COCO's are [x, y, width, height]: "
            f"{share:.0%} leave their image as they are, and as corners nearly all would fit. "
            "Write [x1, y1, x2 - x1, y2 - y1]"
        )
        report.add("error", "xyxy_suspected", message, num_finite)


def _check_classes(report: DatasetReport, columns: Columns) -> None:
    """Report classes without boxes, or with the same name."""
    used = set(columns.box_category_ids[~columns.crowd].tolist())
    names = dict(zip(columns.category_ids.tolist(), columns.category_names))
    empty = [f"{printable(name)} (id {key})" for key, name in names.items() if key not in used]
    if len(columns.boxes):
        message = f"classes without boxes: {len(empty):,} of {len(names):,}"
        report.add("warning", "empty_classes", message, len(empty), empty)
    times = Counter(columns.category_names)
    num_repeated = len(columns.category_names) - len(times)
    message = f"class names that an earlier class has (they are trained as different classes): {num_repeated:,}"
    repeated = (printable(name) for name, count in times.items() if count > 1)
    report.add("warning", "duplicate_class_names", message, num_repeated, repeated)


def _check_objects(report: DatasetReport, columns: Columns, filter_empty: bool | None) -> None:
    """Report images without objects; ``filter_empty`` is DATALOADER.FILTER_EMPTY_ANNOTATIONS, None without a config."""
    num_empty = int((~np.isin(columns.image_ids, columns.object_image_ids())).sum())
    use = {
        None: "DATALOADER.FILTER_EMPTY_ANNOTATIONS says whether training uses them",
        True: "training leaves them out; DATALOADER.FILTER_EMPTY_ANNOTATIONS False would use them as background",
        False: "training uses them as background (DATALOADER.FILTER_EMPTY_ANNOTATIONS is False)",
    }[filter_empty]
    message = f"images without objects: {num_empty:,} of {len(columns.image_ids):,}; {use}"
    report.add("note", "images_without_objects", message, num_empty)
    only_crowds = len(columns.crowd) > 0 and columns.crowd.all()
    report.add("error", "only_crowds", "all annotations are crowds: there is nothing to train on", only_crowds)


def _check_sizes(report: DatasetReport, columns: Columns, cfg: CfgNode | None, max_boxes: int | None) -> None:
    """Sum up the sizes of the boxes that training would use as they are, and report what no anchor matches."""
    sizes = columns.box_image_sizes()
    usable = np.isfinite(columns.boxes).all(axis=1) & (columns.boxes[:, 2:] > 0).all(axis=1)
    usable &= np.isfinite(sizes[:, 0]) & ~columns.crowd
    boxes, (widths, heights) = columns.boxes[usable], sizes[usable].T
    if len(boxes):
        with np.errstate(over="ignore"):
            sides = np.nan_to_num(np.sqrt(boxes[:, 2]) * np.sqrt(boxes[:, 3]))  # json has no infinity
        quantiles = np.quantile(sides, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)).tolist()
        report.summary["box_sizes"] = dict(zip(("min", "5%", "25%", "50%", "75%", "95%", "max"), quantiles))
    if cfg is None:
        return
    try:
        coverage = check_coverage(boxes, widths, heights, cfg, max_boxes)
    except ValueError as error:
        report.add("note", "anchors_not_checked", f"the anchors were not checked: {error}")
        return
    report.summary["anchors"] = coverage
    if coverage.get("share", 0) >= _UNMATCHED_SHARE:
        message = (
            f"{coverage['share']:.1%} of the boxes have an IoU < .5 with every anchor: they are trained through their "
            "one best anchor at most. " + "; ".join(coverage["hints"])
        )
        report.add("warning", "unmatched_boxes", message.strip(), coverage["unmatched"])
