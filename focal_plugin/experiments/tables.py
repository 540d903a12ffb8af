"""The tables of a report: once as data, then as Markdown, or as HTML by the page's template."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from ..eval.texts import markdown_text
from .paper import Published
from .results import RunResult
from .statistics import Summary, paired_difference, signed, summarize
from .study import Outcome, Study, images_seen, reference

NONE = "–"
_APS = ("AP", "AP50", "AP75")
_SIZES = ("APs", "APm", "APl")


@dataclass
class Table:
    """
    Attributes:
        caption: what it shows.
        headers: of the columns; the first is that of the row headers.
        rows: of cells, each as long as `headers`.
        groups: name and number of the columns under it; the names are part of the Markdown's headers.
        marked: numbers of the rows that the others are compared with.
    """

    caption: str
    headers: list[str]
    rows: list[list[str]]
    groups: list[tuple[str, int]] = field(default_factory=list)
    marked: tuple[int, ...] = ()

    def markdown(self) -> str:
        """Reads well in a terminal too."""
        groups = [name for name, count in self.groups for _ in range(count)] or [""] * len(self.headers)
        headers = [markdown_text(f"{group} {header}".strip()) for group, header in zip(groups, self.headers)]
        rows = [[markdown_text(cell) for cell in row] for row in self.rows]
        align = ["left"] + ["right"] * (len(headers) - 1) if rows else None
        return tabulate(rows, headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def comparison_table(study: Study, found: Sequence[Outcome]) -> Table:
    """The paper's numbers beside ours; what compares is the difference, on COCO also to the paper itself."""
    anchor = reference(found)
    alone = anchor is not None and [o.kind for o in found].count(anchor.kind) == 1
    to = f"to {anchor.kind if alone else anchor.title}" if anchor else "to FL"
    scaled = any(o.line.published and o.line.paper_title != o.title for o in found)
    headers = ["method", *(["row"] if scaled else []), *_APS, to, *_APS, to, *(_APS if study.is_coco else ()), "seeds"]
    gaps = [("here − paper", 3)] if study.is_coco else []
    groups = [("", 1), ("paper", 4 + scaled), ("here", 4), *gaps, ("", 1)]
    rows = [
        [
            outcome.title,
            *([outcome.line.paper_title if outcome.line.published else NONE] if scaled else ()),
            *_paper_cells(outcome, anchor),
            *_here_cells(outcome, anchor),
            *(_gaps(outcome) if study.is_coco else ()),
            _seed_count(outcome),
        ]
        for outcome in found
    ]
    marked = tuple(i for i, outcome in enumerate(found) if outcome is anchor)
    return Table(f"Paper: {study.caption}. Here: {study.profile}", headers, rows, groups, marked)


def class_table(study: Study, found: Sequence[Outcome]) -> Table:
    """AP of each class beside the number of instances it was learned from."""
    truth = json.loads(Path(study.data.train_json).read_text(encoding="utf-8"))
    instances = Counter(a["category_id"] for a in truth["annotations"] if not a.get("iscrowd"))
    rows = [
        [c["name"], f"{instances[c['id']]:,}", *(_number(o.metric(f"AP-{c['name']}").mean) for o in found)]
        for c in sorted(truth["categories"], key=lambda c: c["id"])
    ]
    return Table("AP per class, mean over the seeds", ["class", "instances", *(o.title for o in found)], rows)


def size_table(study: Study, found: Sequence[Outcome]) -> Table:
    """AP of small, medium and large objects; the paper gives them, and its time per image, in Table 1e only."""
    published = [o.line.published for o in found if o.line.published]
    sizes = any(p.APs is not None for p in published)
    ours = ["small", "medium", "large"]
    groups = [("", 1), *([("paper", 4)] if sizes else []), ("here", 3)]
    rows = []
    for outcome in found:
        theirs = outcome.line.published or _NOTHING
        cells = [_number(getattr(theirs, name)) for name in _SIZES] + [_number(theirs.ms, 0)] if sizes else []
        rows.append([outcome.title, *cells, *(_mean_and_deviation(outcome.metric(name)) for name in _SIZES)])
    headers = ["method", *([*ours, "ms per image"] if sizes else []), *ours]
    return Table("AP by the size of the object (under 32², under 96², the rest, in pixels)", headers, rows, groups)


def cost_table(found: Sequence[Outcome]) -> Table:
    """Time, memory, and how many examples each method is trained on; means over the runs that are done."""
    rows = [_cost_line(outcome) for outcome in found]
    peak_of = sorted({run.peak_memory_of for o in found for run in o.done if run.peak_memory})
    memory = f"peak, MiB ({' or '.join(peak_of)})" if peak_of else "peak, MiB"
    headers = ["method", "s/step", "run, min", memory, "positives", "negatives", "images seen"]
    return Table("Time, memory and examples per image", headers, rows)


def step_seconds(result: RunResult) -> float:
    """Median time of a training step."""
    return statistics.median([r["time"] for r in result.history() if "time" in r] or [math.nan])


def examples_per_image(result: RunResult) -> tuple[float, float]:
    """Positives and negatives per image in the classification loss, mean over the run."""
    history = result.history()

    def mean(mined: str, anchors: str) -> float:
        name = mined if any(mined in record for record in history) else anchors
        return statistics.fmean([record[name] for record in history if name in record] or [math.nan])

    return mean(*EXAMPLES["positives"]), mean(*EXAMPLES["negatives"])


# In metrics.json: what OHEM kept, or else all anchors that are not ignored.
EXAMPLES = {
    "positives": ("ohem/num_pos", "num_pos_anchors"),
    "negatives": ("ohem/num_neg", "num_neg_anchors"),
}
_NOTHING = Published(math.nan, math.nan, math.nan)


def _cost_line(outcome: Outcome) -> list[str]:
    examples = [examples_per_image(run) for run in outcome.done]
    peaks = [run.peak_memory / 2**20 for run in outcome.done if run.peak_memory]
    images = {images for run in outcome.runs if (images := images_seen(run.config()))}
    return [
        outcome.title,
        _number(summarize(map(step_seconds, outcome.done)).mean, 3),
        _number(summarize(run.seconds / 60 for run in outcome.done).mean),
        f"{max(peaks):,.0f}" if peaks else NONE,
        _count(summarize(positives for positives, _ in examples).mean),
        _count(summarize(negatives for _, negatives in examples).mean),
        " or ".join(f"{number:,}" for number in sorted(images)) or NONE,
    ]


def _paper_cells(outcome: Outcome, anchor: Outcome | None) -> list[str]:
    own, base = outcome.line.published, anchor.line.published if anchor else None
    if own is None:
        return [NONE] * 4
    difference = own.AP - base.AP if base and anchor is not outcome else math.nan
    return [*(_number(getattr(own, name)) for name in _APS), _signed(difference)]


def _here_cells(outcome: Outcome, anchor: Outcome | None) -> list[str]:
    if not outcome.ap.count:
        return [_why_not(outcome), *[NONE] * 3]
    paired = paired_difference(outcome.ap_by_seed(), anchor.ap_by_seed()) if anchor and anchor is not outcome else None
    return [*(_mean_and_deviation(outcome.metric(name)) for name in _APS), _signed(paired.mean if paired else math.nan)]


def _gaps(outcome: Outcome) -> list[str]:
    published = outcome.line.published or _NOTHING
    return [_signed(outcome.metric(name).mean - getattr(published, name)) for name in _APS]


def _why_not(outcome: Outcome) -> str:
    return " / ".join(sorted({run.status for run in outcome.runs})) or "missing"


def _seed_count(outcome: Outcome) -> str:
    total = len(outcome.runs)
    others = Counter(run.status for run in outcome.runs if not run.ok)
    text = f"{len(outcome.done)} of {total}" if others or not total else str(total)
    return f"{text} ({', '.join(f'{count} {status}' for status, count in sorted(others.items()))})" if others else text


def _mean_and_deviation(summary: Summary) -> str:
    if summary.count < 2:
        return _number(summary.mean)
    return f"{summary.mean:.1f} ± {summary.deviation:.1f}"


def _count(number: float) -> str:
    return _number(number, 0 if number >= 1000 else 1)


def _signed(difference: float) -> str:
    return NONE if math.isnan(difference) else signed(difference)


def _number(value: float | None, digits: int = 1) -> str:
    return NONE if value is None or math.isnan(value) else f"{value:,.{digits}f}"
