"""What a report is about: the rows of a table and the setting they were trained in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config_yaml import lookup
from ..eval.texts import printable
from .paper import CAPTIONS, FL, Published, kind_of
from .results import RunResult, of_method
from .statistics import Summary, summarize

_KINDS = {"ohem": "OHEM", "ssd": "SSD", "flstar": "FL*", "fl": "FL", "ce": "CE"}
_KIND_IN_KEY = re.compile(r"(?:^|_)(ohem|ssd|flstar|fl|ce)(?=1to3|_|$)")


@dataclass(frozen=True)
class Data:
    """The data set the rows were trained and evaluated on, in COCO's format."""

    train_json: Path
    val_json: Path
    val_images: Path


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        method: equals RunResult.method.
        title: what was trained here, such as "OHEM 32/.5".
        published: what the paper measured; None for a row that its table has not.
        paper_title: the paper's own setting, such as "OHEM 128/.5".
    """

    method: str
    title: str
    published: Published | None
    paper_title: str


@dataclass(frozen=True)
class Study:
    """What was asked for.

    Attributes:
        table: of the paper, such as "1d".
        profile: "coco", "digits", or a config's name.
        is_coco: whether the data and the recipe are the paper's.
        lines: the rows, in the paper's order.
        seeds: that each row was to be trained with.
        data: what the rows were trained and evaluated on.
        command: what a person typed.
        left_out: titles of the table's rows that this command did not ask for.
    """

    table: str
    profile: str
    is_coco: bool
    lines: Sequence[Line]
    seeds: Sequence[int]
    data: Data
    command: str
    left_out: Sequence[str] = ()

    @property
    def caption(self) -> str:
        return CAPTIONS[self.table]

    @property
    def headline(self) -> str:
        """Of the report: names the paper's network and size only where they are ours."""
        name, _, subject = self.caption.partition(": ")
        return self.caption if self.is_coco else f"{name} on “{self.profile}”: {subject.partition(';')[0]}"


class Outcome:
    """A line with its runs, and what follows from both."""

    def __init__(self, line: Line, runs: Sequence[RunResult], title: str = ""):
        self.line, self.runs, self.title = line, list(runs), printable(title or line.title)
        self.done = [run for run in runs if run.ok]
        self.config = next((config for run in runs if (config := run.config())), {})
        self.kind = _kind(line, self.config)
        self.ratio = bool(lookup(self.config, "MODEL.OHEM.NEG_POS_RATIO")) or "1to3" in line.method

    @property
    def ap(self) -> Summary:
        return self.metric("AP")

    def metric(self, name: str) -> Summary:
        """Over the seeds that are done."""
        return summarize(run.metrics.get(f"bbox/{name}") for run in self.done)

    def ap_by_seed(self) -> dict[int, float]:
        return {run.seed: run.ap for run in self.done}


def outcomes(study: Study, results: Sequence[RunResult]) -> list[Outcome]:
    """In the study's order. Lines that share a title also get their method's name."""
    shared = {title for title, count in Counter(line.title for line in study.lines).items() if count > 1}
    titles = [f"{line.title} {line.method}" if line.title in shared else line.title for line in study.lines]
    return [Outcome(line, of_method(results, line.method), title) for line, title in zip(study.lines, titles)]


def best(found: Sequence[Outcome]) -> Outcome | None:
    """The highest mean AP of those with a run that is done."""
    return max((o for o in found if o.ap.count), key=lambda o: o.ap.mean, default=None)


def reference(found: Sequence[Outcome]) -> Outcome | None:
    """The row that the others are compared with: the paper's own focal loss, or else the paper's best row here.

    It is chosen by its settings and not by how it came out, so that it is not the winner of a draw.
    """
    own = [o for o in found if o.line.method.removesuffix("_anchors3x3").endswith(FL.key)]
    if len(own) == 1:
        return own[0]
    published = [o for o in found if o.line.published]
    return max(published, key=lambda o: o.line.published.AP, default=None)


def featured(found: Sequence[Outcome], most: int) -> list[Outcome]:
    """At most so many lines for a picture: the reference and the best of each kind, then the next best, in order."""
    done = [o for o in found if o.ap.count]
    groups = [[o for o in done if o.kind == "CE"], [o for o in done if o.kind == "OHEM"]]
    groups += [[o for o in done if o.kind == "OHEM" and o.ratio], [o for o in done if o.kind == "FL"], done]
    ranked = [reference(done), *map(best, groups), *sorted(done, key=lambda o: -o.ap.mean)]
    chosen = list({id(o): o for o in ranked if o}.values())[:most]
    return [o for o in found if o in chosen]


def images_seen(config: dict) -> int | None:
    """Images a run with this configuration is trained on, counted as often as it sees them."""
    steps, batch = lookup(config, "SOLVER.MAX_ITER"), lookup(config, "SOLVER.IMS_PER_BATCH")
    return steps * batch if steps and batch else None


def _kind(line: Line, config: dict) -> str:
    """By what was trained; of a line that never started, by its name."""
    if lookup(config, "MODEL.FOCAL.HEAD"):
        return kind_of(config)
    found = _KIND_IN_KEY.search(line.method)
    return _KINDS[found[1]] if found else "other"
