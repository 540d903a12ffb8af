"""Says in words how the comparison came out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .paper import BEST_OHEM, CE, FL, TABLES
from .statistics import Paired, paired_difference, signed

if TYPE_CHECKING:
    from .study import Outcome, Study

_LEARNED = 5.0  # percent AP; below, the order says nothing


@dataclass(frozen=True)
class PaperDifference:
    """AP of the focal loss and of its rival in the paper."""

    focal: float
    rival: float
    where: str

    @property
    def lead(self) -> float:
        return round(self.focal - self.rival, 1)


@dataclass(frozen=True)
class Comparison:
    """The focal loss against the best line of another kind.

    Attributes:
        kind: "OHEM" or "CE", the rival's.
        focal, rival: the two lines.
        picked_of: lines of that kind with a run that is done, which the rival is the best of.
        paired: focal minus rival in AP, seed by seed.
        paper: the same two kinds in the paper.
    """

    kind: str
    focal: Outcome
    rival: Outcome
    picked_of: int
    paired: Paired
    paper: PaperDifference


def _published(table: str, method: str) -> float:
    return next(row.published.AP for row in TABLES[table] if row.method == method)


PAPER = {
    "OHEM": PaperDifference(
        _published("1d", FL.method), _published("1d", BEST_OHEM.method), "Table 1d: COCO, ResNet-101-FPN, 600 px"
    ),
    "CE": PaperDifference(FL.published.AP, CE.published.AP, "Table 1b: COCO, ResNet-50-FPN, 600 px"),
}


def compare(found: Sequence[Outcome], focal: Outcome | None) -> list[Comparison]:
    """`focal` against the best OHEM and the best cross entropy, as far as there are any that are done."""
    if focal is None or focal.kind != "FL" or not focal.ap.count:
        return []
    comparisons = []
    for kind, paper in PAPER.items():
        rivals = [o for o in found if o.kind == kind and o.ap.count]
        if rivals:
            rival = max(rivals, key=lambda o: o.ap.mean)
            paired = paired_difference(focal.ap_by_seed(), rival.ap_by_seed())
            comparisons.append(Comparison(kind, focal, rival, len(rivals), paired, paper))
    return comparisons


def verdict(study: Study, found: Sequence[Outcome], comparisons: Sequence[Comparison]) -> list[str]:
    """What came out, beside what the paper saw: paragraphs that follow from the numbers."""
    ranked = sorted((o for o in found if o.ap.count), key=lambda o: -o.ap.mean)
    if not ranked:
        return ["No run has finished, so there is nothing to compare."]
    order = ", ".join(f"{o.title} {o.ap.mean:.1f}" for o in ranked)
    text = [f"By AP{' (mean over the seeds)' if len(study.seeds) > 1 else ''}: {order}."]
    if ranked[0].ap.mean < _LEARNED:
        return [*text, "No run has learned to detect yet, so the order means nothing."]
    text += [" ".join(_words(comparison, study.is_coco)) for comparison in comparisons]
    if any(o.kind == "FL" for o in found) and not any(o.kind == "FL" for o in ranked):
        text.append("No run of FL is done, so nothing is compared with it.")
    return [*text, _scope(study, ranked)]


def _words(comparison: Comparison, is_coco: bool) -> list[str]:
    paired, rival, paper = comparison.paired, comparison.rival, comparison.paper
    name = "the best OHEM" if comparison.kind == "OHEM" else "cross entropy"
    head = f"FL against {name}, {rival.title}"
    if comparison.picked_of > 1:
        head += f" (the best of {comparison.picked_of} by its mean AP; picking the best of them favours it)"
    there = f"In the paper it is {paper.lead:.1f} AP ahead ({paper.focal} against {paper.rival}; {paper.where})"
    if not paired.by_seed:
        return [f"{head}: no seed has both done, so there is no paired difference.", f"{there}."]
    text = [f"{head}: FL is {_ahead(paired.mean)} here, {_over(paired)}.", _interval(paired)]
    text.append(f"{there}{_beside(paired)}.")
    if is_coco and paired.low is not None and comparison.kind == "OHEM":
        agrees = "lies inside" if paired.holds(paper.lead) else "lies outside"
        text.append(f"The paper's difference {agrees} this interval.")
    return text


def _over(paired: Paired) -> str:
    each = ", ".join(f"{signed(difference)}" for difference in paired.by_seed.values())
    seeds = ", ".join(map(str, paired.by_seed))
    if len(paired.by_seed) == 1:
        return f"on the one seed that both have ({seeds})"
    return f"on average over the {len(paired.by_seed)} seeds that both have ({seeds}; per seed {each})"


def _interval(paired: Paired) -> str:
    if paired.low is None:
        return "One pair of runs has no interval: how much of this is chance cannot be said."
    meaning = "excludes 0" if paired.excludes_zero else "includes 0, so these seeds do not settle which is ahead"
    return f"The 95 % t interval of the difference, {signed(paired.low)} to {signed(paired.high)}, {meaning}."


def _beside(paired: Paired) -> str:
    if abs(paired.mean) < 0.05:
        return ""
    sure = "" if paired.excludes_zero else "in the mean, "
    return f": {sure}the same order" if paired.mean > 0 else f": {sure}the order here differs from the paper's"


def _ahead(lead: float) -> str:
    if abs(lead) < 0.05:
        return "level with it"
    return f"{abs(lead):.1f} AP {'ahead' if lead > 0 else 'behind'}"


def _scope(study: Study, ranked: Sequence[Outcome]) -> str:
    count = len({seed for o in ranked for seed in o.ap_by_seed()})
    seeds = ", ".join(map(str, sorted({seed for o in ranked for seed in o.ap_by_seed()})))
    text = (
        f"One seed ({seeds}): another may order the methods differently."
        if count == 1
        else (
            f"{count} seeds ({seeds}). The deviation is over seeds only: another data set, budget or learning rate may "
            "order the methods differently."
        )
    )
    if not study.is_coco:
        text += " None of this says how the methods compare at the scale of COCO."
    return text
