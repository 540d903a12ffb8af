"""What the checks of a data set found, for programs and for people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import islice

from ..files import printable

SEVERITIES = ("error", "warning", "note")
MAX_EXAMPLES = 5
_MAX_CLASSES = 100  # rows of the class table


@dataclass
class Finding:
    """One kind of fault, however often it occurs.

    Attributes:
        code: a stable name for programs, such as "duplicate_image_ids".
        severity: "error", "warning" or "note".
        message: one or two sentences for people.
        count: elements (annotations, images, ...) that have it.
        examples: up to ``MAX_EXAMPLES`` of them, in words.
        fatal: training would crash or learn something wrong; always an error.
    """

    code: str
    severity: str
    message: str
    count: int = 1
    examples: list[str] = field(default_factory=list)
    fatal: bool = False

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

    def add(self, level: str, code: str, message: str, count: int = 1, examples: Iterable[str] = ()) -> None:
        """Add a finding unless its count is 0; ``level`` is "fatal" or one of ``SEVERITIES``."""
        if count:
            severity = "error" if level == "fatal" else level
            first = list(islice(examples, MAX_EXAMPLES))
            self.findings.append(Finding(code, severity, message, int(count), first, level == "fatal"))

    def to_dict(self) -> dict:
        """Return the summary, the findings and ``ok`` (no errors); what json can hold."""
        return {**self.summary, "findings": [asdict(finding) for finding in self.findings], "ok": not self.errors}

    def to_text(self) -> str:
        """Return counts, class table, box sizes, anchors, the findings, and a last line that sums up."""
        parts = [_counts(self.summary), _class_table(self.summary["classes"]), _sizes(self.summary["box_sizes"])]
        parts += [_anchors(self.summary["anchors"]), "\n".join(finding.to_text() for finding in self.findings)]
        kinds = [finding.severity for finding in self.findings]
        counts = ", ".join(
            f"{kinds.count(kind)} {kind}{'s'[: kinds.count(kind) != 1]}" for kind in dict.fromkeys(kinds)
        )
        parts.append(f"Found: {counts}." if kinds else "Nothing found.")
        if self.fatal:
            parts[-1] += f" {len(self.fatal)} would break training."
        return "\n\n".join(part for part in parts if part)


def _counts(summary: dict) -> str:
    looked = {
        "all": f"{summary['images_looked_at']:,} files looked at",
        "sample": f"the headers of {summary['images_looked_at']:,} looked at",
        "none": "none looked at",
    }[summary["images_checked"]]
    return (
        f"{summary['json_file']}: {summary['images']:,} images ({summary['images_with_objects']:,} with objects; "
        f"{looked}), {summary['annotations']:,} annotations ({summary['crowds']:,} crowds), "
        f"{summary['categories']:,} classes"
    )


def _class_table(classes: list[dict]) -> str:
    if not classes:
        return ""
    rows = [("id", "class", "boxes", "share", "images")]
    total = max(sum(entry["boxes"] for entry in classes), 1)
    for entry in sorted(classes, key=lambda entry: -entry["boxes"])[:_MAX_CLASSES]:
        name, share = printable(entry["name"], 32).strip("'"), f"{entry['boxes'] / total:.1%}"
        rows.append((str(entry["id"]), name, f"{entry['boxes']:,}", share, f"{entry['images']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        f"{key:>{widths[0]}}  {name:<{widths[1]}}  {boxes:>{widths[2]}}  {share:>{widths[3]}}  {images:>{widths[4]}}"
        for key, name, boxes, share, images in rows
    ]
    if len(classes) > _MAX_CLASSES:
        lines.append(f"... and {len(classes) - _MAX_CLASSES:,} rarer classes (--json has all)")
    return "\n".join(lines)


def _sizes(sizes: dict[str, float] | None) -> str:
    if not sizes:
        return ""
    return "Box sizes, sqrt(w * h) in pixels: " + ", ".join(f"{name} {size:.4g}" for name, size in sizes.items())


def _anchors(anchors: dict | None) -> str:
    if not anchors or not anchors["boxes"]:
        return ""
    text = (
        f"Anchors: of {anchors['boxes']:,} boxes, {anchors['unmatched']:,} ({anchors['share']:.1%}) have an IoU < .5 "
        f"with their best anchor; mean best IoU {anchors['mean_best_iou']:.2f}"
    )
    if anchors["unmatched_sizes"]:
        low, middle, high = anchors["unmatched_sizes"]
        text += (
            f"\n  size of those in the resized image: median {middle:.0f} pixels, 10 % to 90 %: {low:.0f} to {high:.0f}"
        )
    return text  # the hints are in a finding
