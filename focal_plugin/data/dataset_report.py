"""What the checks of a data set find, for programs and for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice

from tabulate import tabulate

from ..files import printable

SEVERITIES = ("error", "warning", "note")
MAX_EXAMPLES = 5
_MAX_CLASSES = 100  # rows of the class table
_REPLACED = "training replaces as many as DATALOADER.MAX_BAD_IMAGES allows, an evaluation stops; save them again"
FINDINGS = {  # level -> code -> text
    "fatal": {  # training would crash or learn something wrong
        "not_json": "the file cannot be read as json: {problem}",
        "no_coco": "no COCO json: it lacks a list of {sections}",
        "wrong_type": "{problem}: {count} times",
        "missing_key": '{section} without "{key}": {count} times',
        "no_images": '"images" is empty',
        "no_categories": '"categories" is empty',
        "duplicate_image_ids": "image ids given more than once (one hides the other): {count}",
        "duplicate_annotation_ids": "annotation ids given more than once (one hides the other): {count}",
        "duplicate_category_ids": "category ids given more than once (one hides the other): {count}",
        "unknown_image_ids": 'annotations with a image id that is not in "images": {count}',
        "unknown_category_ids": 'annotations with a category id that is not in "categories": {count}',
        "nonfinite_boxes": "boxes that are not finite (the loss becomes NaN): {count}",
        "not_loadable": "Detectron2 cannot load the file: {problem}. As all else is in order, look at "
        '"segmentation" and "keypoints": training on boxes needs neither, leave them out',
        "escaping_file_names": "file names that leave the image folder by '..': {count}",
        "missing_images": "images that are not in the image folder: {count}",
        "mis_sized_images": "images of another size than the json gives, so that its boxes are elsewhere (save upright "
        "what EXIF turns, or swap width, height and boxes in the json): {count}",
    },
    "error": {
        "missing_area": 'annotations without "area" (pycocotools stops with a KeyError when it evaluates): {count} '
        "times",
        "bad_area": 'annotations whose "area" is no number >= 0, which evaluation compares with: {count} times',
        "no_annotations": '"annotations" is empty: there is nothing to train on',
        "negative_boxes": "boxes of negative width or height (Detectron2 trains on the box turned over, beside its "
        "corner): {count}",
        "zero_boxes": "boxes without width or height (Detectron2 drops them without a word): {count}",
        "boxes_outside": "boxes entirely outside their image (Detectron2 drops them without a word): {count}",
        "xyxy_suspected": "the boxes look like [x1, y1, x2, y2], while COCO's are [x, y, width, height]: {share:.0%} "
        "leave their image as they are, and as corners nearly all would fit. Write [x1, y1, x2 - x1, y2 - y1]",
        "unreadable_images": f"images that cannot be opened ({_REPLACED}): {{count}}",
        "truncated_images": f"images that cannot be decoded to their end ({_REPLACED}): {{count}}",
        "only_crowds": "all annotations are crowds: there is nothing to train on",
    },
    "warning": {
        "missing_iscrowd": 'annotations without "iscrowd" (pycocotools, which evaluates where Detectron2\'s compiled '
        "part is absent, stops with a KeyError; write 0): {count} times",
        "annotation_id_zero": "an annotation has the id 0: in pycocotools a match with 0 counts as none, so its "
        "detection is counted as wrong and its object as missed; number from 1",
        "boxes_leave_image": "boxes that leave their image by more than a pixel (Detectron2 cuts them off): {count}",
        "empty_classes": "classes without boxes: {count}",
        "duplicate_class_names": "class names that an earlier class has (they are trained as different classes): "
        "{count}",
        "dropped_by_polygons": "annotations whose segmentation has no polygon of three points, which Detectron2 drops "
        "with their boxes when it loads the file (leave the segmentation out instead): {count} times",
        "repeated_file_names": "images with the file of an earlier image (objects of one are background in the other): "
        "{count}",
        "unmatched_boxes": "{share:.1%} of the boxes have an IoU < .5 with every anchor: they are trained through "
        "their one best anchor at most. {hints}",
    },
    "note": {
        "absolute_file_names": "absolute file names (the image folder is not used for them): {count}",
        "symlinked_images": "images that are symbolic links: {count}",
        "images_without_objects": "images without objects: {count}; {use}",
        "anchors_not_checked": "the anchors were not checked: {problem}",
    },
}
_LEVELS = {code: level for level, texts in FINDINGS.items() for code in texts}


@dataclass
class Finding:
    """One kind of fault, however often it occurs."""

    code: str  # a stable name for programs, such as "duplicate_image_ids"
    severity: str  # "error", "warning" or "note"
    message: str  # one or two sentences for people
    count: int  # elements (annotations, images, ...) that have it
    examples: list[str]  # a few of them, in words
    fatal: bool  # training would crash or learn something wrong; always an error

    def to_text(self) -> str:
        """Return a line, and one with the examples."""
        label = self.severity.upper() + (" (fatal)" if self.fatal else "")
        text = f"{label} {self.code}: {self.message}"
        if self.examples:
            more = ", ..." if self.count > len(self.examples) else ""
            text += f"\n    {', '.join(self.examples)}{more}"
        return text


@dataclass
class DatasetReport:
    """The findings about a data set, and its numbers.

    Attributes:
        findings: in :func:`~focal_plugin.data.check_coco`'s report the worst first.
        summary: counts, "classes" (id, name, boxes, images), "box_sizes" and "anchors"; what json can hold.
    """

    findings: list[Finding] = field(default_factory=list)
    summary: dict = field(default_factory=dict)

    @property
    def errors(self) -> list[Finding]:
        """Return the findings of severity "error", fatal ones included."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def fatal(self) -> list[Finding]:
        """Return the findings with which training would crash or learn something wrong."""
        return [finding for finding in self.findings if finding.fatal]

    def add(
        self, code: str, count: int = 1, examples: Iterable[str] = (), total: int = 0, level: str = "", **values
    ) -> None:
        """Add a finding of ``FINDINGS`` unless its count is 0.

        Of the examples the first few are kept; ``level`` replaces the one of ``FINDINGS``; ``values`` are what the text
        names in braces beside the count (which reads "count of total" where there is a total).
        """
        if count:
            level, text = level or _LEVELS[code], FINDINGS[_LEVELS[code]][code]
            message = text.format(count=f"{count:,}" + (f" of {total:,}" if total else ""), **values).strip()
            severity = "error" if level == "fatal" else level
            first = list(islice(examples, MAX_EXAMPLES))
            self.findings.append(Finding(code, severity, message, int(count), first, level == "fatal"))

    def to_dict(self) -> dict:
        """Return the summary, the findings and ``ok`` (no errors); what json can hold."""
        return {**self.summary, "findings": [asdict(finding) for finding in self.findings], "ok": not self.errors}

    def to_text(self) -> str:
        """Return counts, class table, box sizes, anchors, the findings, and a last line that sums up."""
        summary, kinds = self.summary, [finding.severity for finding in self.findings]
        looked_at = {"all": "{:,} files looked at", "sample": "the headers of {:,} looked at", "none": "none looked at"}
        parts = [
            f"{summary['json_file']}: {summary['images']:,} images ({summary['images_with_objects']:,} with objects; "
            f"{looked_at[summary['images_checked']].format(summary['images_looked_at'])}), "
            f"{summary['annotations']:,} annotations ({summary['crowds']:,} crowds), {summary['categories']:,} classes",
            _class_table(summary["classes"]),
        ]
        if sizes := summary["box_sizes"]:
            texts = (f"{name} {size:.4g}" for name, size in sizes.items())
            parts.append(f"Box sizes, sqrt(w * h) in pixels: {', '.join(texts)}")
        parts += [
            _anchors(summary["anchors"] or {"boxes": 0}),
            "\n".join(finding.to_text() for finding in self.findings),
        ]
        counts = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        texts = (f"{count} {kind}{'s' if count > 1 else ''}" for kind, count in counts.items())
        parts.append(f"Found: {', '.join(texts)}." if kinds else "Nothing found.")
        if self.fatal:
            parts[-1] += f" {len(self.fatal)} would break training."
        return "\n\n".join(part for part in parts if part)


def _class_table(classes: list[dict]) -> str:
    total = max(sum(entry["boxes"] for entry in classes), 1)
    rows = [("id", "class", "boxes", "share", "images")]
    for entry in sorted(classes, key=lambda entry: -entry["boxes"])[:_MAX_CLASSES]:
        name, share = printable(entry["name"], 32).strip("'"), f"{entry['boxes'] / total:.1%}"
        rows.append((entry["id"], name, f"{entry['boxes']:,}", share, f"{entry['images']:,}"))
    align = ("right", "left", "right", "right", "right")
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align) if classes else ""
    rarer = len(classes) - _MAX_CLASSES
    return text + (f"\n... and {rarer:,} rarer classes (--json has all)" if rarer > 0 else "")


def _anchors(anchors: dict) -> str:
    if not anchors["boxes"]:
        return ""
    lines = [
        f"Anchors: of {anchors['boxes']:,} boxes, {anchors['unmatched']:,} ({anchors['share']:.1%}) have an IoU < .5 "
        f"with their best anchor; mean best IoU {anchors['mean_best_iou']:.2f}"
    ]
    if anchors["unmatched_sizes"]:
        low, middle, high = anchors["unmatched_sizes"]
        spread = f"10 % to 90 %: {low:.0f} to {high:.0f}"
        lines.append(f"  size of those in the resized image: median {middle:.0f} pixels, {spread}")
    return "\n".join(lines)  # the hints are in a finding
