"""What the checks of a data set find, for programs and for people."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tabulate import tabulate

from ..files import printable

SEVERITIES = ("error", "warning", "note")
_MAX_EXAMPLES = 5
_MAX_CLASSES = 100  # rows of the class table


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
        text = f"{self.severity.upper()}{' (fatal)' * self.fatal} {self.code}: {self.message}"
        more = ", ..." * (self.count > len(self.examples))
        return f"{text}\n    {', '.join(self.examples)}{more}" if self.examples else text


@dataclass
class DatasetReport:
    """The findings about a data set, and its numbers."""

    findings: list[Finding] = field(default_factory=list)  # in the report of `check_coco` the worst first
    summary: dict = field(default_factory=dict)  # counts, "classes" (id, name, boxes, images), "box_sizes", "anchors"

    @property
    def errors(self) -> list[Finding]:
        """Return the findings of severity "error", fatal ones included."""
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def fatal(self) -> list[Finding]:
        """Return the findings with which training would crash or learn something wrong."""
        return [finding for finding in self.findings if finding.fatal]

    def add(self, level: str, code: str, message: str, count: int = 1, examples: Iterable[str] = ()) -> None:
        """Add a finding, whose level is "fatal" or a severity."""
        fatal = level == "fatal"
        self.findings.append(Finding(code, "error" if fatal else level, message, count, list(examples), fatal))

    def add_all(
        self, level: str, code: str, text: str, found: Sequence, example: Callable[[Any], str] = str, of: str = ""
    ) -> None:
        """Add a finding about all elements ``found``, if there are any: how many (and ``of`` what), a few examples."""
        if found:
            message = f"{text}: {len(found):,}{of}"
            self.add(level, code, message, len(found), map(example, found[:_MAX_EXAMPLES]))

    def to_dict(self) -> dict:
        """Return the summary, the findings and ``ok`` (no errors); what json can hold."""
        return {**self.summary, "findings": [asdict(finding) for finding in self.findings], "ok": not self.errors}

    def to_text(self) -> str:
        """Return counts, class table, box sizes, anchors, the findings, and a last line that sums up."""
        summary = self.summary
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
        anchors = summary["anchors"]
        if anchors and anchors["boxes"]:  # the hints are in a finding
            text = "Anchors: of {boxes:,} boxes, {unmatched:,} ({share:.1%}) have an IoU < .5 with their best anchor; "
            text += "mean best IoU {mean_best_iou:.2f}"
            if anchors["unmatched_sizes"]:
                text += "\n  size of those in the resized image: median {unmatched_sizes[1]:.0f} pixels, "
                text += "10 % to 90 %: {unmatched_sizes[0]:.0f} to {unmatched_sizes[2]:.0f}"
            parts.append(text.format(**anchors))
        parts.append("\n".join(finding.to_text() for finding in self.findings))
        kinds = Counter(finding.severity for finding in self.findings)
        texts = (f"{count} {kind}{'s' * (count > 1)}" for kind, count in kinds.items())
        would_break = f" {len(self.fatal)} would break training." if self.fatal else ""
        parts.append(f"Found: {', '.join(texts)}.{would_break}" if kinds else "Nothing found.")
        return "\n\n".join(part for part in parts if part)


def _class_table(classes: list[dict]) -> str:
    total = max(sum(entry["boxes"] for entry in classes), 1)
    rows = [("id", "class", "boxes", "share", "images")]
    for entry in sorted(classes, key=lambda entry: -entry["boxes"])[:_MAX_CLASSES]:
        name, share = printable(entry["name"], 32, quotes=False), f"{entry['boxes'] / total:.1%}"
        rows.append((entry["id"], name, f"{entry['boxes']:,}", share, f"{entry['images']:,}"))
    align = ("right", "left", "right", "right", "right")
    text = tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=align) if classes else ""
    rarer = len(classes) - _MAX_CLASSES
    return text + (f"\n... and {rarer:,} rarer classes (--json has all)" if rarer > 0 else "")
