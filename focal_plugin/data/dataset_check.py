"""Read a COCO json as training reads it, and check it, its images and the anchors it needs before a training."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data.datasets import load_coco_json

from ..files import printable
from .anchors import check_coverage
from .dataset_report import SEVERITIES, DatasetReport
from .image_check import SAMPLE_SIZE, check_images

Coco = dict[str, list[dict]]  # complete elements by section
SECTIONS = ("images", "annotations", "categories")
MODES = ("all", "sample", "none")
_MAX_BOXES_FAST = 50_000  # whose anchors the fast form looks at
_UNMATCHED_SHARE = 0.05  # of the boxes, from which the anchors are worth a warning
_EMPTY_SIDE = 1e-5  # pixels; Detectron2's filter_empty_instances drops boxes that are not wider and higher
_SLACK = 1.0  # pixels by which rounding may push a box out of its image
_XYXY_MIN_LEAVING, _XYXY_MIN_VALID = 0.10, 0.99  # shares of the boxes that make XYXY a suspicion


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # and not isinstance, to which True is a number


def _whole_number(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    text = f"is no whole number from {low:,} to {high:,}"
    return lambda value: _is_number(value) and low <= value <= high and value == int(value), text


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(_is_number, value))


_ID, _SIDE = _whole_number(-(2**63), 2**63 - 1), _whole_number(1, 2**31 - 1)
_FILE_NAME = (lambda value: type(value) is str and value, "is no text, or empty")
_RULES = {  # section -> key -> (is a value valid?, what is wrong if not)
    "images": {"id": _ID, "file_name": _FILE_NAME, "width": _SIDE, "height": _SIDE},
    "annotations": {
        **dict.fromkeys(("id", "image_id", "category_id"), _ID),
        "bbox": (_is_box, "is no list of four numbers"),
        "iscrowd": (lambda value: value in (0, 1), "is neither 0 nor 1"),
        "ignore": (lambda value: value == 0, "is not 0, which Detectron2 refuses"),
    },
    "categories": {
        # 1.0 is refused: --register and Detectron2 list and sort these ids.
        "id": (lambda value: type(value) is int and _ID[0](value), _ID[1]),
        "name": (lambda value: type(value) is str, "is no text"),
    },
}
_OPTIONAL = ("iscrowd", "ignore")


def read_lists(json_file: str | os.PathLike) -> tuple[dict[str, list], list[str]]:
    """Return the lists of a COCO json by section, and the sections that it has no list of (here, an empty one).

    An OSError says that the file cannot be read, a ValueError that it is no json in UTF-8.
    """
    if os.path.exists(json_file) and not os.path.isfile(json_file):
        raise ValueError("it is a folder, a pipe or a device")  # a pipe would be waited for
    text = Path(json_file).read_text(encoding="utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("byte order mark at character 0: save the file as UTF-8 without one")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    lists = {section: content.get(section) if type(content) is dict else None for section in SECTIONS}
    missing = [section for section in SECTIONS if type(lists[section]) is not list]
    return {**lists, **{section: [] for section in missing}}, missing


def complete_elements(report: DatasetReport, section: str, elements: list) -> list[dict]:
    """Return the elements of a section that have all keys, of the right type, and report the others."""
    objects = {index: element for index, element in enumerate(elements) if type(element) is dict}
    others = {index: element for index, element in enumerate(elements) if index not in objects}
    faults = [("wrong_type", f"an element of {section} is no object", others)]
    for key, (is_valid, problem) in _RULES[section].items():
        missing = {index: row for index, row in objects.items() if key not in row and key not in _OPTIONAL}
        wrong = {index: row[key] for index, row in objects.items() if key in row and not is_valid(row[key])}
        faults.append(("missing_key", f'{section} without "{key}"', missing))
        faults.append(("wrong_type", f'"{key}" of {section} {problem}', wrong))
    for code, text, values in faults:
        found = list(values.items())
        report.add_all("fatal", code, text, found, lambda at: f"{section}[{at[0]}] = {printable(at[1])}", " times")
        objects = {index: row for index, row in objects.items() if index not in values}
    return list(objects.values())


def check_coco(
    json_file: str | os.PathLike, image_root: str | os.PathLike, cfg: CfgNode | None = None, *, images: str = "all"
) -> DatasetReport:
    """Check a data set in COCO format. Whatever is wrong with the files becomes a finding, never an exception.

    Without a fatal finding Detectron2's ``load_coco_json`` reads the file.

    Args:
        json_file, image_root: as Detectron2's; the file names in the json start from the folder ``image_root``.
        cfg: a Detectron2 config, for the anchors and DATALOADER.FILTER_EMPTY_ANNOTATIONS; None leaves both out.
        images: "all" decodes every image; "sample" (the fast form) opens at most 64, evenly spaced; "none" opens none.

    Raises:
        ValueError: ``images`` is none of the three.
    """
    if images not in MODES:
        raise ValueError(f"images={images!r} is none of {', '.join(MODES)}")
    json_file, image_root = os.fspath(json_file), os.fspath(image_root)
    report, lists = DatasetReport(), {section: [] for section in SECTIONS}
    try:
        lists, missing = read_lists(json_file)
        if missing:
            report.add("fatal", "no_coco", f"no COCO json: it lacks a list of {' and of '.join(missing)}", len(missing))
    except (OSError, ValueError) as problem:
        report.add("fatal", "not_json", f"the file cannot be read as json: {problem}")
    is_coco = not report.findings
    coco = {section: complete_elements(report, section, lists[section]) for section in SECTIONS}
    is_object = np.array([not row.get("iscrowd") for row in coco["annotations"]], bool)  # as Detectron2 counts them
    objects = [row for row, counts in zip(coco["annotations"], is_object) if counts]
    with_objects = {row["image_id"] for row in objects}
    report.summary = {
        "json_file": json_file,
        "image_root": image_root,
        **{section: len(elements) for section, elements in lists.items()},
        "images_with_objects": sum(row["id"] in with_objects for row in coco["images"]),
        "crowds": len(coco["annotations"]) - len(objects),
        "images_checked": images,
        "images_looked_at": 0,
        "sample_size": SAMPLE_SIZE,
        "classes": _count_classes(coco),
        "box_sizes": None,
        "anchors": None,
    }
    if is_coco:
        boxes, sizes = _box_arrays(coco)
        _check_ids(report, coco)
        _check_boxes(report, coco["annotations"], boxes, sizes)
        _check_evaluation(report, lists["annotations"])
        _check_objects(report, coco, objects, cfg)
        if not report.fatal:
            _ask_detectron2(report, coco["annotations"])
        report.summary["images_looked_at"] = check_images(report, coco["images"], image_root, images)
        _check_sizes(report, boxes[is_object], sizes[is_object], cfg)
    report.findings.sort(key=lambda finding: (not finding.fatal, SEVERITIES.index(finding.severity)))
    return report


def _box_arrays(coco: Coco) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes, (A, 4) XYWH, and widths and heights of their images, (A, 2), NaN where there is no image."""
    # NumPy takes no integer beyond 1e308.
    edges = [math.inf if abs(x) > sys.float_info.max else x for row in coco["annotations"] for x in row["bbox"]]
    by_image = {row["id"]: (row["width"], row["height"]) for row in coco["images"]}
    sizes = [by_image.get(row["image_id"], (math.nan, math.nan)) for row in coco["annotations"]]
    return np.array(edges, np.float64).reshape(-1, 4), np.array(sizes, np.float64).reshape(-1, 2)


def _count_classes(coco: Coco) -> list[dict]:
    """Return id, name, number of boxes and number of images of each class."""
    boxes, known = Counter(row["category_id"] for row in coco["annotations"]), {row["id"] for row in coco["images"]}
    pairs = {(row["category_id"], row["image_id"]) for row in coco["annotations"] if row["image_id"] in known}
    images, classes = Counter(key for key, _ in pairs), [(row["id"], row["name"]) for row in coco["categories"]]
    return [{"id": key, "name": name, "boxes": boxes[key], "images": images[key]} for key, name in classes]


def _check_ids(report: DatasetReport, coco: Coco) -> None:
    """Report empty lists, duplicate ids, and ids of nothing."""
    for section, what in zip(SECTIONS, ("image", "annotation", "category")):
        count, times = report.summary[section], Counter(row["id"] for row in coco[section])
        if not count:
            level, more = ("error", ": there is nothing to train on") if what == "annotation" else ("fatal", "")
            report.add(level, f"no_{section}", f'"{section}" is empty{more}')
        # Detectron2 allows duplicates in a file of such a name, because some of COCO 2014's own have them.
        level = "warning" if what == "annotation" and "minival" in report.summary["json_file"] else "fatal"
        text, twice = f"{what} ids given more than once (one hides the other)", [key for key in times if times[key] > 1]
        report.add_all(level, f"duplicate_{what}_ids", text, twice)
        if what == "annotation" or not count or len(coco[section]) < count:
            continue  # an empty list and incomplete elements are findings themselves, not what refers to them
        unknown = [row for row in coco["annotations"] if row[f"{what}_id"] not in times]
        examples = [f"annotation {row['id']}: {what} {row[f'{what}_id']}" for row in unknown]
        text = f'annotations with a {what} id that is not in "{section}"'
        report.add_all("fatal", f"unknown_{what}_ids", text, examples, of=f" of {len(coco['annotations']):,}")


def _check_boxes(report: DatasetReport, annotations: list[dict], boxes: np.ndarray, sizes: np.ndarray) -> None:
    """Report boxes that are no numbers, have no size, or are not where their image is."""
    (x, y, w, h), (widths, heights) = boxes.T, sizes.T
    finite = np.isfinite(boxes).all(axis=1)
    has_size, negative = finite & (w > _EMPTY_SIDE) & (h > _EMPTY_SIDE), finite & ((w < 0) | (h < 0))
    with np.errstate(invalid="ignore", over="ignore"):
        outside = (x >= widths) | (y >= heights) | (x + w <= 0) | (y + h <= 0)
        leaving = (x < -_SLACK) | (y < -_SLACK) | (x + w > widths + _SLACK) | (y + h > heights + _SLACK)
    cut = has_size & leaving & ~outside
    for level, code, text, mask in (
        ("fatal", "nonfinite_boxes", "that are not finite (the loss becomes NaN)", ~finite),
        ("error", "negative_boxes", "of negative width or height (Detectron2 turns them over)", negative),
        ("error", "zero_boxes", "without width or height (Detectron2 drops them)", finite & ~has_size & ~negative),
        ("error", "boxes_outside", "entirely outside their image (Detectron2 drops them)", has_size & outside),
        ("warning", "boxes_leave_image", "that leave their image (Detectron2 cuts them)", cut),
    ):
        found = [annotations[index] for index in np.flatnonzero(mask)]
        report.add_all(level, code, f"boxes {text}", found, _box_text, f" of {len(mask):,}")
    fits_as_xyxy = (x >= -_SLACK) & (y >= -_SLACK) & (w > x) & (h > y)
    fits_as_xyxy &= (w <= widths + _SLACK) & (h <= heights + _SLACK)
    num_finite = max(int(finite.sum()), 1)
    share = leaving[finite].sum() / num_finite
    if share >= _XYXY_MIN_LEAVING and fits_as_xyxy[finite].sum() / num_finite >= _XYXY_MIN_VALID:
        text = f"as [x, y, width, height] {share:.0%} of the boxes leave their image, as corners nearly all would fit"
        report.add("error", "xyxy_suspected", f"{text}. Write [x1, y1, x2 - x1, y2 - y1]", num_finite)


def _check_evaluation(report: DatasetReport, annotations: list) -> None:
    """Report what training does not mind, but pycocotools' evaluation; of incomplete annotations as well."""
    rows = {f"annotations[{index}]": row for index, row in enumerate(annotations) if type(row) is dict}
    for level, key, hint in (
        ("error", "area", "pycocotools stops with a KeyError when it evaluates"),
        ("warning", "iscrowd", "pycocotools stops with a KeyError where Detectron2's compiled part is absent; write 0"),
    ):
        lacking = [place for place, row in rows.items() if key not in row]
        report.add_all(level, f"missing_{key}", f'annotations without "{key}" ({hint})', lacking, of=" times")
    areas = {place: row["area"] for place, row in rows.items() if "area" in row}
    wrong = [(place, area) for place, area in areas.items() if not (_is_number(area) and 0 <= area < math.inf)]
    text = 'annotations whose "area" is no number >= 0, which evaluation compares with'
    report.add_all("error", "bad_area", text, [f"{place} = {printable(area)}" for place, area in wrong], of=" times")
    if any(_is_number(row.get("id")) and row["id"] == 0 for row in rows.values()):
        text = "the object of the annotation with id 0 counts as missed in pycocotools; number from 1"
        report.add("warning", "annotation_id_zero", text)


def _box_text(row: dict) -> str:
    return f"annotation {row['id']} (image {row['image_id']}): {printable(row['bbox'])}"


def _check_objects(report: DatasetReport, coco: Coco, objects: list[dict], cfg: CfgNode | None) -> None:
    """Report classes without boxes or with the same name, and images without objects."""
    used, names = {row["category_id"] for row in objects}, [row["name"] for row in coco["categories"]]
    if coco["annotations"]:
        empty = [f"{printable(row['name'])} (id {row['id']})" for row in coco["categories"] if row["id"] not in used]
        report.add_all("warning", "empty_classes", "classes without boxes", empty, of=f" of {len(names):,}")
    if coco["annotations"] and not objects:
        report.add("error", "only_crowds", "all annotations are crowds: there is nothing to train on")
    text = "class names that an earlier class has (they are trained as different classes)"
    repeated = list((Counter(names) - Counter(set(names))).elements())  # each use after the first
    report.add_all("warning", "duplicate_class_names", text, repeated, printable)
    use = {
        None: "DATALOADER.FILTER_EMPTY_ANNOTATIONS says whether training uses them",
        True: "training leaves them out; DATALOADER.FILTER_EMPTY_ANNOTATIONS False would use them as background",
        False: "training uses them as background (DATALOADER.FILTER_EMPTY_ANNOTATIONS is False)",
    }[None if cfg is None else bool(cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)]
    if count := len(coco["images"]) - report.summary["images_with_objects"]:
        text = f"images without objects: {count:,} of {len(coco['images']):,}; {use}"
        report.add("note", "images_without_objects", text, count)


def _ask_detectron2(report: DatasetReport, annotations: list[dict]) -> None:
    """Let Detectron2 load the masks and keypoints that it might stumble over, and report what it refuses or drops."""
    asked = []
    for index, row in enumerate(annotations):
        mask, keypoints = row.get("segmentation"), row.get("keypoints")
        # Not the plain polygons, which most masks are: to load a whole file costs more than all other checks.
        is_plain = type(mask) is list and all(type(polygon) is list for polygon in mask)
        is_plain = is_plain and any(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask)
        if keypoints or (mask and not is_plain):
            asked.append({"id": index, "image_id": 0, "segmentation": mask, "keypoints": keypoints})
    if not asked:
        return
    content = {"images": [{"id": 0, "file_name": "", "width": 1, "height": 1}], "annotations": asked}
    logger = logging.getLogger(load_coco_json.__module__)
    was_disabled, logger.disabled = logger.disabled, True  # it would log what the report says
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "asked.json")
            path.write_text(json.dumps(content))
            (record,) = load_coco_json(str(path), "", extra_annotation_keys=["id"])
    except Exception as problem:  # any, depending on what it stumbles over
        text = f"Detectron2 cannot load the file: {type(problem).__name__}: {printable(str(problem), 200)}"
        hint = 'leave out "segmentation" and "keypoints", which training on boxes does not need'
        report.add("fatal", "not_loadable", f"{text}; {hint}")
        return
    finally:
        logger.disabled = was_disabled
    kept = {annotation["id"] for annotation in record["annotations"]}
    dropped = [annotations[row["id"]] for row in asked if row["id"] not in kept]
    text = "annotations that Detectron2 drops, as no polygon has three points (leave the segmentation out instead)"
    report.add_all("warning", "dropped_by_polygons", text, dropped, _box_text, " times")


def _check_sizes(report: DatasetReport, boxes: np.ndarray, sizes: np.ndarray, cfg: CfgNode | None) -> None:
    """Sum up the sizes of the boxes that training would use as they are, and report what no anchor matches."""
    usable = np.isfinite(boxes).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1) & np.isfinite(sizes[:, 0])
    boxes, sizes = boxes[usable], sizes[usable]
    if len(boxes):
        with np.errstate(over="ignore"):
            sides = np.nan_to_num(np.sqrt(boxes[:, 2]) * np.sqrt(boxes[:, 3]))  # json has no infinity
        quantiles = np.quantile(sides, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)).tolist()
        report.summary["box_sizes"] = dict(zip(("min", "5%", "25%", "50%", "75%", "95%", "max"), quantiles))
    if cfg is None:
        return
    try:
        max_boxes = None if report.summary["images_checked"] == "all" else _MAX_BOXES_FAST
        coverage = report.summary["anchors"] = check_coverage(boxes, sizes, cfg, max_boxes)
    except ValueError as error:
        report.add("note", "anchors_not_checked", f"the anchors were not checked: {error}")
        return
    if coverage.get("share", 0) >= _UNMATCHED_SHARE:
        text = f"{coverage['share']:.1%} of the boxes have an IoU < .5 with every anchor, and one at most to train on"
        report.add("warning", "unmatched_boxes", ". ".join([text, *coverage["hints"]]), coverage["unmatched"])
