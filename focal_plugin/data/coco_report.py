"""A data set check in words: see :class:`focal_plugin.data.check_coco.Report`."""

from __future__ import annotations

from .findings import Finding, shown

_MAX_CLASSES = 100  # rows of the class table


def format_report(findings: list[Finding], summary: dict) -> str:
    """Counts, class table, sizes, anchors, the findings, and a last line that sums up."""
    parts = [_counts(summary), _class_table(summary["classes"]), _sizes(summary), _anchors(summary["anchors"])]
    parts += ["\n".join(finding.to_text() for finding in findings), _verdict(findings)]
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
    ordered = sorted(classes, key=lambda entry: -entry["boxes"])
    for entry in ordered[:_MAX_CLASSES]:
        name = shown(entry["name"], 32).strip("'")
        share = f"{entry['boxes'] / total:.1%}"
        rows.append((str(entry["id"]), name, f"{entry['boxes']:,}", share, f"{entry['images']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        f"{key:>{widths[0]}}  {name:<{widths[1]}}  {boxes:>{widths[2]}}  {share:>{widths[3]}}  {images:>{widths[4]}}"
        for key, name, boxes, share, images in rows
    ]
    if len(ordered) > _MAX_CLASSES:
        lines.append(f"... and {len(ordered) - _MAX_CLASSES:,} rarer classes (--json has all)")
    return "\n".join(lines)


def _sizes(summary: dict) -> str:
    sizes = summary["box_sizes"]
    if not sizes:
        return ""
    return "Box sizes, sqrt(w * h) in pixels: " + ", ".join(f"{name} {size:.4g}" for name, size in sizes.items())


def _anchors(anchors: dict | None) -> str:
    if not anchors or not anchors["boxes"]:
        return ""
    lines = [
        f"Anchors: of {anchors['boxes']:,} boxes, {anchors['unmatched']:,} ({anchors['share']:.1%}) have an IoU < .5 "
        f"with their best anchor; mean best IoU {anchors['mean_best_iou']:.2f}"
    ]
    if anchors["unmatched_sizes"]:
        low, middle, high = anchors["unmatched_sizes"]
        lines.append(
            f"  size of those in the resized image: median {middle:.0f} pixels, 10 % to 90 %: {low:.0f} to {high:.0f}"
        )
    return "\n".join(lines)  # the hints are in a finding


def _verdict(findings: list[Finding]) -> str:
    kinds = [finding.severity for finding in findings]
    fatal = sum(finding.fatal for finding in findings)
    counts = ", ".join(f"{kinds.count(kind)} {kind}{'s' * (kinds.count(kind) != 1)}" for kind in dict.fromkeys(kinds))
    if not findings:
        return "Nothing found."
    return f"Found: {counts}." + (f" {fatal} would break training." if fatal else "")
