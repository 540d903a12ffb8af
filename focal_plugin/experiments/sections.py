"""The body of a report, section by section: text, tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from ..eval.coco import PrecisionRecall
from ..eval.drawing import Method, draw_mosaic
from . import figures
from .statistics import paired_difference, signed
from .study import Outcome, Study, featured, reference
from .tables import EXAMPLES, Table, class_table, comparison_table, cost_table, size_table

_CURVES = 7  # that can be told apart; of more methods, a few are drawn
_FEW = 5  # also beside the ground truth in the mosaic
_IMAGES = 6

Curves = Mapping[tuple[str, int], Sequence[PrecisionRecall]]


@dataclass(frozen=True)
class Picture:
    """
    Attributes:
        file: its name in the report's folder.
        alt: what it shows, to who cannot see it.
        caption: what one has to know to read it.
        wide: too wide for a phone; it scrolls in its own box there.
    """

    file: str
    alt: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Section:
    key: str
    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    after: Sequence[str] = field(default=())  # paragraphs below the tables


class Sections:
    """Builds them, and saves the pictures beside the report."""

    def __init__(self, study: Study, found: Sequence[Outcome], curves: Curves, folder: Path):
        self.study, self.found, self.curves, self.folder = study, found, curves, folder
        self.anchor = reference(found)
        self.drawn = featured(found, _CURVES if sum(bool(o.done) for o in found) <= _CURVES else _FEW)
        # The reference first: it is what has the colour of its kind.
        self.styles = figures.Styles(sorted(self.drawn, key=lambda o: o is not self.anchor))

    def build(self, verdict: Sequence[str]) -> list[Section]:
        result = Section(
            "result",
            "The table",
            tables=[comparison_table(self.study, self.found)],
            after=[_legend(self.study, self.anchor)],
        )
        if not self.drawn:
            return [result, Section("verdict", "What came out", verdict)]
        return [
            result,
            Section("verdict", "What came out", verdict, pictures=self._averages()),
            Section("parts", "By class and by size", tables=self._parts(), after=_PARTS),
            Section("precision", "Precision and recall", self._which(), pictures=self._precision()),
            Section("training", "Training", self._which(), pictures=self._training()),
            Section("cost", "Time, memory, examples", tables=[cost_table(self.found)], after=self._cost_notes()),
            Section("detections", "Detections", pictures=[self._mosaic()]),
        ]

    def _save(self, name: str, figure: Figure, alt: str, caption: str) -> Picture:
        figures.save_svg(figure, self.folder / f"{name}.svg")
        return Picture(f"{name}.svg", alt, caption)

    def _averages(self) -> list[Picture]:
        done = [o for o in self.found if o.ap.count]
        values = ", ".join(f"{o.title} {o.ap.mean:.1f}" for o in done)
        caption = "AP per method: bars are means over the seeds, dots the single seeds"
        caption += ", whiskers one standard deviation." if any(o.ap.count > 1 for o in done) else "."
        if self.study.is_coco:
            caption += " Diamonds: the paper."
        chart = figures.draw_ap(done, self.styles, paper=self.study.is_coco)
        pictures = [self._save("ap", chart, f"Bar chart of AP: {values}.", caption)]
        differences = self._differences(done)
        if differences:
            to = self.anchor.title
            means = ", ".join(f"{title} {signed(paired.mean)}" for title, (_, paired) in differences.items())
            caption = f"AP minus that of {to} with the same seed: dots are seeds, the stroke their mean"
            caption += (
                ", the band its 95 % t interval (cut off where it is much wider)."
                if any(p.low is not None for _, p in differences.values())
                else "."
            )
            chart = figures.draw_differences(differences)
            pictures.append(self._save("differences", chart, f"Differences in AP to {to}: {means}.", caption))
        return pictures

    def _differences(self, done: Sequence[Outcome]) -> dict:
        if self.anchor is None:
            return {}
        base = self.anchor.ap_by_seed()
        pairs = {o.title: (self.styles.color(o), paired_difference(o.ap_by_seed(), base)) for o in done}
        return {title: pair for title, pair in pairs.items() if pair[1].by_seed and title != self.anchor.title}

    def _parts(self) -> list[Table]:
        return [size_table(self.study, self.found), class_table(self.study, self.found)]

    def _which(self) -> list[str]:
        done = [o for o in self.found if o.ap.count]
        if len(done) == len(self.drawn):
            return []
        names = ", ".join(o.title for o in self.drawn)
        return [
            f"Drawn are {len(self.drawn)} of {len(done)} methods, to keep the curves apart: {names} "
            "(the reference, the best of each kind, then the next best by AP)."
        ]

    def _precision(self) -> list[Picture]:
        per_line = {
            o.title: [
                figures.mean_precision_recall(c) for c in zip(*(self.curves[o.line.method, s] for s in _seeds(o)))
            ]
            for o in self.drawn
        }
        pictures = []
        for panel, iou in enumerate(c.iou for c in next(iter(per_line.values()))):
            curves = {title: by_iou[panel] for title, by_iou in per_line.items()}
            values = ", ".join(f"{title} {100 * curve.ap:.1f}" for title, curve in curves.items())
            caption = f"IoU {iou:g}: mean curves over classes and seeds; the legend has the AP at this IoU."
            alt = f"Precision against recall at IoU {iou:g}; AP: {values}."
            chart = figures.draw_precision_recall(curves, self.styles)
            pictures.append(self._save(f"precision_recall_{100 * iou:.0f}", chart, alt, caption))
        return pictures

    def _training(self) -> list[Picture]:
        panels = [
            (
                "loss_cls",
                ("loss_cls",),
                "classification loss",
                "Classification loss, log scale. The methods divide it by different counts and weight it differently: "
                "only the shapes of the curves compare.",
                "log",
            ),
            ("loss_box_reg", ("loss_box_reg",), "box regression loss", "Box regression loss.", "linear"),
        ]
        for name, keys in EXAMPLES.items():
            caption = f"{name.capitalize()} per image that take part in the classification loss: of OHEM those that "
            caption += "it mined, of the others all anchors but the ignored ones, so that theirs can coincide."
            panels.append((f"examples_{name}", keys, f"{name} per image", caption, "log"))
        histories = {o.title: [run.history() for run in o.done] for o in self.drawn}
        pictures = []
        for name, keys, label, caption, scale in panels:
            curves = {title: figures.mean_over_runs(runs, keys) for title, runs in histories.items()}
            curves = {title: curve for title, curve in curves.items() if len(curve[0])}
            if curves:
                ends = ", ".join(f"{title} {values[-1]:.3g}" for title, (_, values) in curves.items())
                chart = figures.draw_steps(curves, self.styles, label, scale)
                alt = f"{label.capitalize()} over the training steps; at the end: {ends}."
                pictures.append(self._save(name, chart, alt, f"{caption} Mean over the seeds, smoothed."))
        return pictures

    def _cost_notes(self) -> list[str]:
        runs = [run for o in self.found for run in o.done]
        settings = sorted({(run.parallel, run.threads) for run in runs})
        beside = "; ".join(f"{p} at a time with {t} thread{'s' if t > 1 else ''} each" for p, t in settings)
        return [
            f"Runs shared the machine, {beside}, so times hold for that and not for a run of its own."
            if any(parallel > 1 for parallel, _ in settings)
            else f"Runs had the machine to themselves: {beside}.",
            _COST,
        ]

    def _mosaic(self) -> Picture:
        shown = featured(self.found, _FEW)
        methods = [
            Method(f"{o.title}\nseed {o.done[0].seed}, AP {o.done[0].ap:.1f}", o.done[0].detections) for o in shown
        ]
        file, data = "detections.jpg", self.study.data
        draw_mosaic(data.val_json, data.val_images, methods, self.folder / file, num_images=_IMAGES)
        names = ", ".join(o.title for o in shown)
        alt = f"The same validation images side by side: ground truth, then the detections of {names}."
        return Picture(file, alt, f"Ground truth, then {names}, of the first seed that is done.", wide=True)


_PARTS = ("Means over the seeds that are done. A class or size without objects in the validation set has no AP.",)

_COST = """\
s/step: median over a run. run: the whole process, with start-up and evaluation, of its last attempt. peak: the most
of any seed, of the GPU's memory as PyTorch counts it, or resident in the process without a GPU. positives, negatives:
examples per image that take part in the classification loss, mean over the run (FL and CE: all anchors but the
ignored ones; OHEM: those it mined). images seen: steps times batch."""


def _seeds(outcome: Outcome) -> list[int]:
    return [run.seed for run in outcome.done]


def _legend(study: Study, anchor: Outcome | None) -> str:
    text = "AP as COCO defines it, in percent"
    if len(study.seeds) > 1:
        text += "; mean ± sample standard deviation over the seeds that are done"
    text += "."
    if anchor:
        text += f" “to …”: AP minus that of {anchor.title}, here over the seeds that both have done."
    if not study.is_coco:
        text += " The paper's AP and ours are of different data and do not compare; the two differences do."
    return text
