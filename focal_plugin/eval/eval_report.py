"""A page on one evaluation: numbers and curves class by class, and the errors that say most as pictures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pycocotools.coco import COCO

from .. import __version__
from ..experiments.figures import save_svg
from ..experiments.tables import NONE, Table
from ..files import atomic_write
from .crops import crop, find_image, open_image
from .detections import CORRECT, MISSED, TRUTH, WRONG
from .evaluation import (
    CURVES,
    KINDS,
    METRICS,
    ClassResult,
    Error,
    Errors,
    evaluate,
    find_errors,
    read_predictions,
    read_truth,
)
from .page import render_html
from .texts import printable

COLORS = ("#0072B2", "#D55E00", "#009E73")


def write_eval_report(
    predictions: str | os.PathLike,
    annotations: str | os.PathLike,
    path: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    iou: float = 0.5,
    score_threshold: float | None = None,
    examples: int = 24,
    command: str = "",
) -> str:
    """Writes one HTML file that needs nothing else.

    Args:
        predictions: results in COCO's format, as ``coco_instances_results.json`` of an evaluation.
        annotations: in COCO's format.
        path: the HTML file.
        images: the folder that the file names of the annotations start from; None: no pictures.
        iou: from which on a detection has found an object, for errors and pictures.
        score_threshold: only detections from this score on, for errors and pictures; None: from that of the highest F1.
        examples: so many pictures of each kind of error at most.
        command: what a person typed.

    Returns:
        The result in one line.

    Raises:
        FileNotFoundError, ValueError: a file or folder is not there or something else; the message names it.
    """
    if images is not None and not os.path.isdir(images):
        raise FileNotFoundError(f"there is no folder {os.fspath(images)}")
    if os.path.realpath(path) in map(os.path.realpath, (predictions, annotations)):
        raise ValueError(f"{os.fspath(path)} is one of the two files to read: give the page another name")
    if examples < 0:
        raise ValueError(f"the number of examples must be >= 0, got {examples}")
    truth = read_truth(annotations)
    found = read_predictions(predictions, truth)
    total, classes = evaluate(truth, found)
    errors = find_errors(truth, found, iou, score_threshold)
    with tempfile.TemporaryDirectory() as folder:
        context = {
            "title": f"Evaluation of {Path(predictions).name}",
            "meta": f"{len(truth.imgs):,} images, {total.objects:,} objects of {len(classes):,} classes, "
            f"{total.detections:,} detections",
            "notes": _notes(total, found, len(truth.imgs)),
            "numbers": _table(total, classes),
            "curves": _curves(total, classes, Path(folder)),
            "summary": _summary(errors, iou, chosen=score_threshold is None),
            "kinds": [(kind, count, KINDS[kind]) for kind, count in errors.kinds().items()],
            "galleries": _galleries(errors, truth, images, examples, Path(folder)),
            "has_images": images is not None,
            "colors": {"truth": TRUTH, "wrong": WRONG, "missed": MISSED, "correct": CORRECT},
            "command": command,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {"focal_plugin": __version__, "pycocotools": metadata.version("pycocotools")},
        }
        html = render_html(context, Path(folder), "evaluation.html")
    with atomic_write(path) as file:
        file.write(html)
    return f"AP {_number(total.scores['AP'])}, AP50 {_number(total.scores['AP50'])}; {context['summary']}"


def _notes(total: ClassResult, predictions: Sequence[dict], num_images: int) -> list[str]:
    notes = []
    seen = len({p["image_id"] for p in predictions})
    if not predictions:
        notes.append("There is not a single detection in the predictions.")
    elif seen < num_images / 2:
        notes.append(f"Only {seen:,} of {num_images:,} images have a detection: are the predictions of other images?")
    if not total.objects:
        notes.append("The annotations have no objects, so there is no AP, and every detection is false.")
    return notes


def _table(total: ClassResult, classes: Sequence[ClassResult]) -> Table:
    rows = [
        [r.name, f"{r.objects:,}", f"{r.detections:,}", *(_number(r.scores[m]) for m in METRICS)]
        for r in [total, *classes]
    ]
    headers = ["class", "objects", "detections", "AP", "AP50", "AP75", "small", "medium", "large"]
    caption = (
        "AP as COCO defines it, in percent: mean over IoU .5 to .95, at .5, at .75, and by the size of the object "
        "(under 32², under 96², the rest, in pixels)"
    )
    return Table(caption, headers, rows, marked=(0,))


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _summary(errors: Errors, iou: float, chosen: bool) -> str:
    wrong, missed = len(errors.false_positives), len(errors.misses)
    shown, objects = errors.correct + wrong, errors.correct + missed
    why = ", from which on F1 is the highest" if chosen and errors.score_threshold else ""
    text = f"at IoU {iou:g}, of the {shown:,} detections with a score of at least {errors.score_threshold:.3g}{why}, "
    return text + f"{errors.correct:,} are right and {wrong:,} false; {missed:,} of {objects:,} objects are missed"


# ------------------------------ pictures


def _curves(total: ClassResult, classes: Sequence[ClassResult], folder: Path) -> list[dict]:
    """A panel for all classes and, the worst first, one for each."""
    several = [r for r in sorted(classes, key=lambda r: r.scores["AP"] or 0.0) if r.curves]
    panels = []
    for place, result in enumerate([total, *(several if len(classes) > 1 else [])]):
        if not result.curves:
            continue
        file = f"curve{place}.svg"
        save_svg(_draw_curves(result, small=place > 0), folder / file)
        areas = ", ".join(f"{name}: {100 * curve.mean():.1f}" for name, curve in result.curves.items())
        alt = f"Precision against recall of {printable(result.name)}; area under the curves, {areas}."
        panels.append({"file": file, "alt": alt, "name": result.name, "areas": areas})
    return panels


def _draw_curves(result: ClassResult, small: bool) -> Figure:
    figure = Figure(figsize=(2.6, 2.0) if small else (4.4, 3.2), layout="constrained")
    axis = figure.subplots()
    recall = np.linspace(0, 1, 101)
    for (name, curve), color, style in zip(result.curves.items(), COLORS, ("-", "--", "-.")):
        axis.plot(recall, curve, style, color=color, linewidth=1.8, label=name)
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    if small:
        axis.tick_params(labelsize=7)
    else:
        axis.set(xlabel="recall", ylabel="precision, mean over classes")
        figure.legend(loc="outside upper left", ncols=len(CURVES), fontsize=8, frameon=False)
    return figure


def _galleries(
    errors: Errors, truth: COCO, images: str | os.PathLike | None, examples: int, folder: Path
) -> list[dict]:
    kinds = (
        ("false", "The most confident false detections", errors.false_positives, WRONG, TRUTH),
        ("missed", "The largest missed objects", errors.misses, MISSED, WRONG),
    )
    galleries = []
    for key, title, found, color, other_color in kinds:
        items = []
        for number, error in enumerate(found[:examples]):
            item = {
                "caption": _caption(error, errors.score_threshold),
                "file": None,
                "name": truth.imgs[error.image_id].get("file_name", ""),
            }
            if images is not None:
                item["file"] = _picture(error, truth, Path(images), folder / f"{key}{number}.jpg", color, other_color)
            items.append(item)
        galleries.append({"key": key, "title": title, "items": items, "count": len(found)})
    return galleries


def _caption(error: Error, score_threshold: float) -> str:
    rival = f"“{error.other_name}”, IoU {error.overlap:.2f}"
    if error.score is None:
        size = "{:.0f} x {:.0f} px".format(*error.box[2:])
        nothing = f"nothing with a score ≥ {score_threshold:.2g} there"
        return f"“{error.name}”, {size}; " + (f"there is {rival}" if error.other_name else nothing)
    return f"“{error.name}”, {error.score:.2f}: {error.kind}" + (f"; there is {rival}" if error.other_name else "")


def _picture(error: Error, truth: COCO, root: Path, path: Path, color: str, other_color: str) -> str | None:
    """The name of the file that it writes; None if the image cannot be read."""
    source = find_image(root, truth.imgs[error.image_id].get("file_name"))
    if source is None:
        return None
    boxes = [(error.box, color)] + ([(error.other_box, other_color)] if error.other_box is not None else [])
    try:
        crop(open_image(source), boxes).save(path, quality=85)
    except OSError:
        return None
    return path.name
