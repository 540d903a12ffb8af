"""Check a data set in COCO format before it costs a training: its json, its images, and the anchors that it needs.

The json is read as training reads it, its rows become NumPy tables, and each check is a mask over them.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

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
        report.add("fatal", "no_coco", f"no COCO json: it lacks a list of {' and of '.join(missing)}", len(missing))
    except (OSError, ValueError) as problem:
        report.add("fatal", "not_json", f"the file cannot be read as json: {problem}")
    is_coco = not report.findings
    coco = read_tables(report, lists)
    objects = coco.annotations[~coco.annotations["iscrowd"]]  # as Detectron2 counts them
    report.summary = {
        "json_file": json_file,
        "image_root": image_root,
        **{section: len(elements) for section, elements in lists.items()},
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
        _check_ids(report, coco, "warning" if "minival" in json_file else "fatal")
        _check_annotations(report, coco)
        _check_objects(report, coco, objects, cfg)
        if not report.fatal:
            _ask_detectron2(report, lists["annotations"])
        workers = max_workers or min(8, os.cpu_count() or 1)
        report.summary["images_looked_at"] = check_images(report, coco.images, image_root, images, workers)
        _check_sizes(report, coco, cfg, None if images == "all" else _MAX_BOXES_FAST)
    report.findings.sort(key=lambda finding: (not finding.fatal, SEVERITIES.index(finding.severity)))
    return report


def _count_classes(coco: Tables) -> list[dict]:
    """Return id, name, number of boxes and number of images of each class."""
    annotations = coco.annotations
    boxes = Counter(annotations["category_id"].tolist())
    known = annotations[np.isin(annotations["image_id"], coco.images["id"])]
    images = Counter(category for category, _ in set(known[["category_id", "image_id"]].tolist()))
    return [
        {"id": key, "name": name, "boxes": boxes[key], "images": images[key]} for key, name in coco.categories.tolist()
    ]


def _check_ids(report: DatasetReport, coco: Tables, duplicates_level: str) -> None:
    """Report empty lists, duplicate ids, and ids of nothing."""
    counts = report.summary
    report.add("fatal", "no_images", '"images" is empty', not counts["images"])
    report.add(
        "error", "no_annotations", '"annotations" is empty: there is nothing to train on', not counts["annotations"]
    )
    report.add("fatal", "no_categories", '"categories" is empty', not counts["categories"])
    for level, what, table in zip(("fatal", duplicates_level, "fatal"), ("image", "annotation", "category"), coco):
        ids, times = np.unique(table["id"], return_counts=True)
        twice = ids[times > 1]
        text = f"{what} ids given more than once (one hides the other): {len(twice):,}"
        report.add(level, f"duplicate_{what}_ids", text, len(twice), map(str, twice))
    annotations = coco.annotations
    for what, section, table in (("image", "images", coco.images), ("category", "categories", coco.categories)):
        if not counts[section] or len(table) < counts[section]:
            continue  # an empty list and rows that could not be read are findings themselves, not what refers to them
        used = annotations[f"{what}_id"]
        unknown = annotations[~np.isin(used, table["id"])]
        examples = (f"annotation {row['id']}: {what} {row[f'{what}_id']}" for row in unknown)
        text = f'annotations with a {what} id that is not in "{section}": {len(unknown):,} of {len(used):,}'
        report.add("fatal", f"unknown_{what}_ids", text, len(unknown), examples)
    text = (
        "an annotation has the id 0: in pycocotools a match with 0 counts as none, so its detection is counted as "
        "wrong and its object as missed; number from 1"
    )
    report.add("warning", "annotation_id_zero", text, (annotations["id"] == 0).any())


def _check_annotations(report: DatasetReport, coco: Tables) -> None:
    """Report keys that an evaluation misses, and boxes that are no numbers, have no size, or are not in their image."""
    annotations = coco.annotations
    boxes, (widths, heights) = annotations["bbox"], annotations["image_size"].T
    x, y, w, h = boxes.T
    finite = np.isfinite(boxes).all(axis=1)
    has_size = finite & (boxes[:, 2:] > _EMPTY_SIDE).all(axis=1)
    negative = finite & (boxes[:, 2:] < 0).any(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        outside = (x >= widths) | (y >= heights) | (x + w <= 0) | (y + h <= 0)
        leaving = (x < -_SLACK) | (y < -_SLACK) | (x + w > widths + _SLACK) | (y + h > heights + _SLACK)

    def add(level: str, code: str, mask: np.ndarray, text: str) -> None:
        rows = annotations[mask]
        form = "annotation {} (image {}): [{:g}, {:g}, {:g}, {:g}]".format
        examples = (form(row["id"], row["image_id"], *row["bbox"]) for row in rows)
        report.add(level, code, f"{text}: {len(rows):,} of {len(mask):,}", len(rows), examples)

    add("fatal", "nonfinite_boxes", ~finite, "boxes that are not finite (the loss becomes NaN)")
    text = "boxes of negative width or height (Detectron2 trains on the box turned over, beside its corner)"
    add("error", "negative_boxes", negative, text)
    text = "boxes without width or height (Detectron2 drops them without a word)"
    add("error", "zero_boxes", finite & ~has_size & ~negative, text)
    text = "boxes entirely outside their image (Detectron2 drops them without a word)"
    add("error", "boxes_outside", has_size & outside, text)
    text = "boxes that leave their image by more than a pixel (Detectron2 cuts them off)"
    add("warning", "boxes_leave_image", has_size & leaving & ~outside, text)
    text = 'annotations without "area" (pycocotools stops with a KeyError when it evaluates)'
    add("error", "missing_area", annotations["missing_area"], text)
    text = 'annotations whose "area" is no number >= 0, which evaluation compares with'
    add("error", "bad_area", annotations["bad_area"], text)
    text = (
        'annotations without "iscrowd" (pycocotools, which evaluates where Detectron2\'s compiled part is absent, '
        "stops with a KeyError; write 0)"
    )
    add("warning", "missing_iscrowd", annotations["missing_iscrowd"], text)
    fits_as_xyxy = (x >= -_SLACK) & (y >= -_SLACK) & (w > x) & (h > y)
    fits_as_xyxy &= (w <= widths + _SLACK) & (h <= heights + _SLACK)
    num_finite = max(finite.sum(), 1)
    share = leaving[finite].sum() / num_finite
    if share >= _XYXY_MIN_LEAVING and fits_as_xyxy[finite].sum() / num_finite >= _XYXY_MIN_VALID:
        text = (
            f"the boxes look like [x1, y1, x2, y2], while COCO's are [x, y, width, height]: {share:.0%} leave their "
            "image as they are, and as corners nearly all would fit. Write [x1, y1, x2 - x1, y2 - y1]"
        )
        report.add("error", "xyxy_suspected", text, num_finite)


def _check_objects(report: DatasetReport, coco: Tables, objects: np.ndarray, cfg: CfgNode | None) -> None:
    """Report classes without boxes or with the same name, and images without objects."""
    categories, num_images = coco.categories, len(coco.images)
    if len(coco.annotations):
        report.add("error", "only_crowds", "all annotations are crowds: there is nothing to train on", not len(objects))
        empty = categories[~np.isin(categories["id"], objects["category_id"])]
        text = f"classes without boxes: {len(empty):,} of {len(categories):,}"
        examples = (f"{printable(name)} (id {key})" for key, name in empty)
        report.add("warning", "empty_classes", text, len(empty), examples)
    times = Counter(categories["name"])
    repeated, count = (printable(name) for name in times if times[name] > 1), len(categories) - len(times)
    text = f"class names that an earlier class has (they are trained as different classes): {count:,}"
    report.add("warning", "duplicate_class_names", text, count, repeated)
    use = {
        None: "DATALOADER.FILTER_EMPTY_ANNOTATIONS says whether training uses them",
        True: "training leaves them out; DATALOADER.FILTER_EMPTY_ANNOTATIONS False would use them as background",
        False: "training uses them as background (DATALOADER.FILTER_EMPTY_ANNOTATIONS is False)",
    }[None if cfg is None else bool(cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)]
    count = num_images - report.summary["images_with_objects"]
    report.add("note", "images_without_objects", f"images without objects: {count:,} of {num_images:,}; {use}", count)


def _ask_detectron2(report: DatasetReport, annotations: list[dict]) -> None:
    """Let Detectron2 load the masks and keypoints that it might stumble over, and report what it refuses or drops.

    It is not asked about plain polygons, which most masks are: to load a whole file costs more than all other checks.
    """
    asked = {
        index: {key: row[key] for key in ("segmentation", "keypoints") if key in row}
        for index, row in enumerate(annotations)
        if row.get("keypoints") or (row.get("segmentation") and not _are_polygons(row["segmentation"]))
    }
    if not asked:
        return
    image = {"id": 0, "file_name": "", "width": 1, "height": 1}
    rows = [{**row, "id": index, "image_id": 0, "category_id": 0} for index, row in asked.items()]
    logger = logging.getLogger(load_coco_json.__module__)
    was_disabled, logger.disabled = logger.disabled, True  # it would log what the report says
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "asked.json")
            path.write_text(json.dumps({"images": [image], "annotations": rows}))
            (record,) = load_coco_json(str(path), "", extra_annotation_keys=["id"])
    except Exception as problem:  # any, depending on what it stumbles over
        text = (
            f"Detectron2 cannot load the file: {type(problem).__name__}: {printable(str(problem), 200)}. As all else "
            'is in order, look at "segmentation" and "keypoints": training on boxes needs neither, leave them out'
        )
        report.add("fatal", "not_loadable", text)
        return
    finally:
        logger.disabled = was_disabled
    dropped = sorted(asked.keys() - {annotation["id"] for annotation in record["annotations"]})
    text = (
        "annotations whose segmentation has no polygon of three points, which Detectron2 drops with their boxes when "
        f"it loads the file (leave the segmentation out instead): {len(dropped):,} times"
    )
    report.add("warning", "dropped_by_polygons", text, len(dropped), (f"annotations[{index}]" for index in dropped))


def _are_polygons(mask: Any) -> bool:
    is_list = type(mask) is list and all(type(polygon) is list for polygon in mask)
    return is_list and any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask)


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
        report.add("note", "anchors_not_checked", f"the anchors were not checked: {error}")
        return
    report.summary["anchors"] = coverage
    if coverage.get("share", 0) >= _UNMATCHED_SHARE:
        text = (
            f"{coverage['share']:.1%} of the boxes have an IoU < .5 with every anchor: they are trained through their "
            f"one best anchor at most. {'; '.join(coverage['hints'])}"
        )
        report.add("warning", "unmatched_boxes", text.strip(), coverage["unmatched"])
