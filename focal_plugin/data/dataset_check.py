"""Check a data set in COCO format before it costs a training: its json, its images, and the anchors that it needs.

The json is read as training reads it, its rows become NumPy tables, and each check is a mask over them.
"""

from __future__ import annotations

import logging
import os
from collections import Counter

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.datasets import load_coco_json

from ..files import printable
from .anchors import check_coverage
from .coco_json import SECTIONS, Tables, read_lists, read_tables
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
        lists, missing = read_lists(json_file)
        report.add("no_coco", len(missing), sections=" and of ".join(missing))
    except (OSError, ValueError) as problem:
        report.add("not_json", problem=problem)
    is_coco = not report.findings
    counts = {section: len(elements) for section, elements in lists.items()}
    coco = read_tables(report, lists)
    del lists  # takes several times the file's size, and load_coco_json as much again
    objects = coco.annotations[~coco.annotations["iscrowd"]]  # as Detectron2 counts them
    report.summary = {
        "json_file": json_file,
        "image_root": image_root,
        **counts,
        "images_with_objects": int(np.isin(coco.images["id"], objects["image_id"]).sum()),
        "crowds": len(coco.annotations) - len(objects),
        "images_checked": images,
        "images_looked_at": 0,
        "sample_size": SAMPLE_SIZE,
        "classes": _count_classes(coco),
        "box_sizes": None,
        "anchors": None,
    }
    if is_coco:
        # Detectron2 allows duplicates in a file of such a name, because some of COCO 2014's own have them.
        _check_ids(report, coco, counts, "warning" if "minival" in json_file else "fatal")
        _check_boxes(report, coco)
        _check_objects(report, coco, objects, cfg)
        if not report.fatal:
            _ask_detectron2(report, coco, json_file, image_root)
        workers = max_workers or min(8, os.cpu_count() or 1)
        report.summary["images_looked_at"] = check_images(report, coco.images, image_root, images, workers)
        _check_sizes(report, coco, cfg, None if images == "all" else _MAX_BOXES_FAST)
    report.findings.sort(key=lambda finding: (not finding.fatal, SEVERITIES.index(finding.severity)))
    return report


def _ask_detectron2(report: DatasetReport, coco: Tables, json_file: str, image_root: str) -> None:
    """Let Detectron2 load the file, without a name to register it under, and report what it refuses or drops."""
    logger = logging.getLogger(load_coco_json.__module__)
    was_disabled, logger.disabled = logger.disabled, True  # it would log what the report says
    try:
        records = load_coco_json(json_file, image_root, extra_annotation_keys=["id"])
    except Exception as problem:  # any, depending on what it stumbles over
        report.add("not_loadable", problem=f"{type(problem).__name__}: {printable(str(problem), 200)}")
        return
    finally:
        logger.disabled = was_disabled
    kept = [annotation["id"] for record in records for annotation in record["annotations"]]
    dropped = np.flatnonzero(~np.isin(coco.annotations["id"], kept))
    report.add("dropped_by_polygons", len(dropped), (f"annotations[{row}]" for row in dropped))


def _count_classes(coco: Tables) -> list[dict]:
    """Return id, name, number of boxes and number of images of each class."""
    annotations = coco.annotations
    boxes = Counter(annotations["category_id"].tolist())
    known = annotations[np.isin(annotations["image_id"], coco.images["id"])]
    pairs = np.unique(np.stack([known["category_id"], known["image_id"]], axis=1), axis=0)
    images = Counter(pairs[:, 0].tolist())
    return [
        {"id": key, "name": name, "boxes": boxes[key], "images": images[key]} for key, name in coco.categories.tolist()
    ]


def _check_ids(report: DatasetReport, coco: Tables, counts: dict[str, int], duplicates_level: str) -> None:
    """Report empty lists, duplicate ids, and ids of nothing."""
    for section in SECTIONS:
        report.add(f"no_{section}", not counts[section])
    for what, table in zip(("image", "annotation", "category"), coco):
        values, times = np.unique(table["id"], return_counts=True)
        twice = values[times > 1]
        level = duplicates_level if what == "annotation" else "fatal"
        report.add(f"duplicate_{what}_ids", len(twice), map(str, twice), level=level)
    annotations = coco.annotations
    for what, section, table in (("image", "images", coco.images), ("category", "categories", coco.categories)):
        if not counts[section] or len(table) < counts[section]:
            continue  # an empty list and rows that could not be read are findings themselves, not what refers to them
        used = annotations[f"{what}_id"]
        unknown = annotations[~np.isin(used, table["id"])]
        examples = (f"annotation {row['id']}: {what} {row[f'{what}_id']}" for row in unknown)
        report.add(f"unknown_{what}_ids", len(unknown), examples, total=len(used))
    report.add("annotation_id_zero", (annotations["id"] == 0).any())


def _check_boxes(report: DatasetReport, coco: Tables) -> None:
    """Report boxes that are no numbers, have no size, or are not where their image is."""
    boxes, (widths, heights) = coco.annotations["bbox"], coco.annotations["image_size"].T
    x, y, w, h = boxes.T
    finite = np.isfinite(boxes).all(axis=1)
    has_size = finite & (boxes[:, 2:] > _EMPTY_SIDE).all(axis=1)
    negative = finite & (boxes[:, 2:] < 0).any(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        outside = (x >= widths) | (y >= heights) | (x + w <= 0) | (y + h <= 0)
        leaving = (x < -_SLACK) | (y < -_SLACK) | (x + w > widths + _SLACK) | (y + h > heights + _SLACK)
    fits_as_xyxy = (x >= -_SLACK) & (y >= -_SLACK) & (w > x) & (h > y)
    fits_as_xyxy &= (w <= widths + _SLACK) & (h <= heights + _SLACK)
    masks = {
        "nonfinite_boxes": ~finite,
        "negative_boxes": negative,
        "zero_boxes": finite & ~has_size & ~negative,
        "boxes_outside": has_size & outside,
        "boxes_leave_image": has_size & leaving & ~outside,
    }
    for code, mask in masks.items():
        rows = coco.annotations[mask]
        form = "annotation {} (image {}): [{:g}, {:g}, {:g}, {:g}]".format
        report.add(code, len(rows), (form(row["id"], row["image_id"], *row["bbox"]) for row in rows), total=len(mask))
    num_finite = max(finite.sum(), 1)
    share = leaving[finite].sum() / num_finite
    if share >= _XYXY_MIN_LEAVING and fits_as_xyxy[finite].sum() / num_finite >= _XYXY_MIN_VALID:
        report.add("xyxy_suspected", num_finite, share=share)


def _check_objects(report: DatasetReport, coco: Tables, objects: np.ndarray, cfg: CfgNode | None) -> None:
    """Report classes without boxes or with the same name, and images without objects."""
    empty = coco.categories[~np.isin(coco.categories["id"], objects["category_id"])]
    if len(coco.annotations):
        examples = (f"{printable(name)} (id {key})" for key, name in empty)
        report.add("empty_classes", len(empty), examples, total=len(coco.categories))
        report.add("only_crowds", not len(objects))
    times = Counter(coco.categories["name"])
    repeated = (printable(name) for name, count in times.items() if count > 1)
    report.add("duplicate_class_names", len(coco.categories) - len(times), repeated)
    use = {
        None: "DATALOADER.FILTER_EMPTY_ANNOTATIONS says whether training uses them",
        True: "training leaves them out; DATALOADER.FILTER_EMPTY_ANNOTATIONS False would use them as background",
        False: "training uses them as background (DATALOADER.FILTER_EMPTY_ANNOTATIONS is False)",
    }[None if cfg is None else bool(cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)]
    num_images = len(coco.images)
    report.add("images_without_objects", num_images - report.summary["images_with_objects"], total=num_images, use=use)


def _check_sizes(report: DatasetReport, coco: Tables, cfg: CfgNode | None, max_boxes: int | None) -> None:
    """Sum up the sizes of the boxes that training would use as they are, and report what no anchor matches."""
    boxes, sizes = coco.annotations["bbox"], coco.annotations["image_size"]
    usable = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    usable &= np.isfinite(sizes[:, 0]) & ~coco.annotations["iscrowd"]
    boxes, sizes = boxes[usable], sizes[usable]
    if len(boxes):
        with np.errstate(over="ignore"):
            sides = np.nan_to_num(np.sqrt(boxes[:, 2]) * np.sqrt(boxes[:, 3]))  # json has no infinity
        quantiles = np.quantile(sides, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)).tolist()
        report.summary["box_sizes"] = dict(zip(("min", "5%", "25%", "50%", "75%", "95%", "max"), quantiles))
    if cfg is None:
        return
    try:
        coverage = check_coverage(boxes, sizes, cfg, max_boxes)
    except ValueError as error:
        report.add("anchors_not_checked", problem=error)
        return
    report.summary["anchors"] = coverage
    if coverage.get("share", 0) >= _UNMATCHED_SHARE:
        hints = "; ".join(coverage["hints"])
        report.add("unmatched_boxes", coverage["unmatched"], share=coverage["share"], hints=hints)
