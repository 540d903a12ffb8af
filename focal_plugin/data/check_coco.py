"""Checks a data set in COCO format before it costs a training: its json, its images, and the anchors that it needs."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
from detectron2.config import CfgNode

from .anchor_coverage import check_coverage
from .check_boxes import (
    box_image_sizes,
    check_boxes,
    check_classes,
    check_ids,
    check_objects,
    object_image_ids,
    rows_of,
)
from .check_images import SAMPLE_SIZE, check_images
from .coco_columns import SECTIONS, Columns, read_columns
from .coco_report import format_report
from .findings import SEVERITIES, Finding, note, warning

MODES = ("all", "sample", "none")
_MAX_BOXES_FAST = 50_000  # whose anchors the fast form looks at
_UNMATCHED_SHARE = 0.05  # of the boxes, from which the anchors are worth a warning


@dataclass
class Report:
    """What :func:`check_coco` found.

    Attributes:
        findings: the worst first.
        summary: counts, "classes" (id, name, boxes, images), "box_sizes" and "anchors"; what json can hold.
    """

    findings: list[Finding]
    summary: dict = field(default_factory=dict)

    @property
    def errors(self) -> list[Finding]:
        """Findings of severity "error", fatal ones included."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def fatal(self) -> list[Finding]:
        """Findings with which training would crash or learn something wrong."""
        return [finding for finding in self.findings if finding.fatal]

    def to_dict(self) -> dict:
        """The summary, the findings and ``ok`` (no errors); what json can hold."""
        return {**self.summary, "findings": [finding.to_dict() for finding in self.findings], "ok": not self.errors}

    def to_text(self) -> str:
        """For people: counts, classes, anchors, then the findings."""
        return format_report(self.findings, self.summary)


def check_coco(
    json_file: str | os.PathLike,
    image_root: str | os.PathLike,
    cfg: CfgNode | None = None,
    *,
    images: str = "all",
    max_workers: int | None = None,
) -> Report:
    """Checks a data set in COCO format. Whatever is wrong with the files becomes a finding, never an exception.

    The json is streamed into columns of numbers: it may be much bigger than what ``json.load`` could hold. Without
    a fatal finding Detectron2's ``load_coco_json`` reads the file.

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
    columns = read_columns(json_file)
    findings = list(columns.findings)
    summary = _summarize(columns, json_file, image_root, images)
    if columns.complete and not any(finding.code == "no_coco" for finding in findings):
        workers = max_workers or min(8, os.cpu_count() or 1)
        found, summary["images_looked_at"] = check_images(columns, os.fspath(image_root), images, workers)
        # Detectron2 allows duplicates in a file of such a name, for some of COCO 2014's own have them.
        findings += check_ids(columns, allow_duplicates="minival" in os.fspath(json_file))
        findings += check_boxes(columns) + check_classes(columns) + found
        findings += check_objects(columns, None if cfg is None else bool(cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS))
        summary["box_sizes"] = _box_sizes(columns)
        if cfg is not None:
            coverage, found = _check_anchors(columns, cfg, None if images == "all" else _MAX_BOXES_FAST)
            summary["anchors"] = coverage
            findings += found
    findings.sort(key=lambda finding: (not finding.fatal, SEVERITIES.index(finding.severity)))
    return Report(findings, summary)


def _summarize(columns: Columns, json_file, image_root, images: str) -> dict:
    rows, known = rows_of(columns.box_category_ids, columns.category_ids)
    num_classes, num_images = len(columns.category_ids), len(columns.image_ids)
    boxes_of_class = np.bincount(rows[known], minlength=num_classes)
    image_rows, in_image = rows_of(columns.box_image_ids, columns.image_ids)
    known &= in_image
    pairs = np.unique(rows[known] * num_images + image_rows[known])  # a class and an image, each pair once
    images_of_class = np.bincount(pairs // max(num_images, 1), minlength=num_classes)
    return {
        "json_file": os.fspath(json_file),
        "image_root": os.fspath(image_root),
        **{section: columns.counts[section] for section in SECTIONS},
        "images_with_objects": int(np.isin(object_image_ids(columns), columns.image_ids).sum()),
        "crowds": int(columns.crowd.sum()),
        "images_checked": images,
        "images_looked_at": 0,
        "sample_size": SAMPLE_SIZE,
        "classes": [
            {"id": key, "name": name, "boxes": int(boxes), "images": int(count)}
            for key, name, boxes, count in zip(
                columns.category_ids.tolist(), columns.category_names, boxes_of_class, images_of_class
            )
        ],
        "box_sizes": None,
        "anchors": None,
    }


def _usable(columns: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes that training would use as they are, and the sizes of their images."""
    widths, heights = box_image_sizes(columns)
    good = np.isfinite(columns.boxes).all(axis=1) & (columns.boxes[:, 2:] > 0).all(axis=1)
    good &= np.isfinite(widths) & ~columns.crowd
    return columns.boxes[good], widths[good], heights[good]


def _box_sizes(columns: Columns) -> dict | None:
    """Quantiles of sqrt(w * h), in pixels of the image files."""
    boxes, _, _ = _usable(columns)
    if not len(boxes):
        return None
    with np.errstate(over="ignore"):
        sizes = np.nan_to_num(np.sqrt(boxes[:, 2]) * np.sqrt(boxes[:, 3]))  # json has no infinity
    quantiles = np.quantile(sizes, (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)).tolist()
    return dict(zip(("min", "5%", "25%", "50%", "75%", "95%", "max"), quantiles))


def _check_anchors(columns: Columns, cfg, max_boxes: int | None) -> tuple[dict | None, list[Finding]]:
    try:
        coverage = check_coverage(*_usable(columns), cfg, max_boxes)
    except ValueError as error:
        return None, [note("anchors_not_checked", f"the anchors were not checked: {error}")]
    if coverage.get("share", 0) < _UNMATCHED_SHARE:
        return coverage, []
    message = (
        f"{coverage['share']:.1%} of the boxes have an IoU < .5 with every anchor: they are trained through their one "
        "best anchor at most. " + "; ".join(coverage["hints"])
    )
    return coverage, [warning("unmatched_boxes", message.strip(), coverage["unmatched"])]
