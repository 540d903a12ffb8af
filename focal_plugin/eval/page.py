"""Render pages: one HTML file that needs nothing else, or Markdown; and the page on one evaluation."""

from __future__ import annotations

import base64
import mimetypes
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pycocotools.coco import COCO

from ..files import atomic_write, origin, printable
from .coco import KINDS, METRICS, ClassResult, Error, Errors, evaluate, find_errors, read_predictions, read_truth
from .drawing import CORRECT, MISSED, TRUTH, WRONG, Box, crop, draw_curves, open_image, save_svg

NONE = "–"


def render_html(context: dict[str, Any], folder: Path, template: str = "page.html") -> str:
    """Render a page; ``folder`` has the pictures, which go into the page itself."""
    environment = _environment(autoescape=True)
    environment.filters["data_uri"] = lambda name: _data_uri(folder / name)
    return environment.get_template(template).render(context)


def render_markdown(context: dict[str, Any]) -> str:
    """Render report.md."""
    environment = _environment(autoescape=False)
    environment.filters["md"] = markdown_text
    return environment.get_template("report.md").render(context)


def markdown_text(text: str) -> str:
    """Return a text on one line, and without what Markdown would take for a table, a tag or a quotation."""
    text = " / ".join(line for line in _safe(text).splitlines() if line.strip())
    for mark, instead in (("&", "&amp;"), ("<", "&lt;"), ("|", "\\|"), ("`", "'"), ("[", "\\[")):
        text = text.replace(mark, instead)
    return text


def _safe(text: str) -> str:
    """The text with its lines; those with control characters, marks of direction or lone surrogates escaped."""
    lines = (line if line.isprintable() else printable(line, 10 * len(line), quotes=False) for line in text.split("\n"))
    return "\n".join(lines)


def _environment(autoescape: bool) -> Environment:
    return Environment(
        loader=PackageLoader("focal_plugin.eval", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        finalize=lambda value: _safe(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _data_uri(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


# ------------------------------ the page on one evaluation


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
    """Write one HTML file that needs nothing else.

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
    summary = _summary(errors, iou, chosen=score_threshold is None)
    with tempfile.TemporaryDirectory() as folder:
        context = {
            "title": f"Evaluation of {Path(predictions).name}",
            "meta": f"{len(truth.imgs):,} images, {total.objects:,} objects of {len(classes):,} classes, "
            f"{total.detections:,} detections",
            "notes": _notes(total, len({p["image_id"] for p in found}), len(truth.imgs)),
            "numbers": _table(total, classes),
            "curves": _curves(total, classes, Path(folder)),
            "summary": summary,
            "kinds": [(kind, count, KINDS[kind]) for kind, count in errors.kinds().items()],
            "galleries": [
                ("false", "The most confident false detections", len(errors.false_positives)),
                ("missed", "The largest missed objects", len(errors.misses)),
            ],
            "items": {
                "false": _items(errors.false_positives[:examples], truth, images, Path(folder), (WRONG, TRUTH)),
                "missed": _items(errors.misses[:examples], truth, images, Path(folder), (MISSED, WRONG)),
            },
            "has_images": images is not None,
            "colors": {"truth": TRUTH, "wrong": WRONG, "missed": MISSED, "correct": CORRECT},
            **origin(command),
        }
        html = render_html(context, Path(folder), "evaluation.html")
    with atomic_write(path) as file:
        file.write(html)
    return f"AP {_number(total.scores['AP'])}, AP50 {_number(total.scores['AP50'])}; {summary}"


def _notes(total: ClassResult, seen: int, num_images: int) -> list[str]:
    notes = []
    if not total.detections:
        notes.append("There is not a single detection in the predictions.")
    elif seen < num_images / 2:
        notes.append(f"Only {seen:,} of {num_images:,} images have a detection: are the predictions of other images?")
    if not total.objects:
        notes.append("The annotations have no objects, so there is no AP, and every detection is false.")
    return notes


def _table(total: ClassResult, classes: Sequence[ClassResult]) -> dict[str, Any]:
    rows = [
        [r.name, f"{r.objects:,}", f"{r.detections:,}", *(_number(r.scores[m]) for m in METRICS)]
        for r in [total, *classes]
    ]
    headers = ["class", "objects", "detections", "AP", "AP50", "AP75", "small", "medium", "large"]
    caption = (
        "AP as COCO defines it, in percent: mean over IoU .5 to .95, at .5, at .75, and by the size of the object "
        "(under 32², under 96², the rest, in pixels)"
    )
    return {"caption": caption, "headers": headers, "rows": rows, "groups": [], "marked": (0,)}


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"


def _summary(errors: Errors, iou: float, chosen: bool) -> str:
    wrong, missed = len(errors.false_positives), len(errors.misses)
    shown, objects = errors.correct + wrong, errors.correct + missed
    why = ", from which on F1 is the highest" if chosen and errors.score_threshold else ""
    text = f"at IoU {iou:g}, of the {shown:,} detections with a score of at least {errors.score_threshold:.3g}{why}, "
    return text + f"{errors.correct:,} are right and {wrong:,} false; {missed:,} of {objects:,} objects are missed"


def _curves(total: ClassResult, classes: Sequence[ClassResult], folder: Path) -> list[dict]:
    """Draw a panel for all classes and, the worst first, one for each."""
    several = sorted(classes, key=lambda r: r.scores["AP"] or 0.0) if len(classes) > 1 else []
    panels = []
    for number, result in enumerate(r for r in [total, *several] if r.curves):
        file = f"curve{number}.svg"
        save_svg(draw_curves(result.curves, small=number > 0), folder / file)
        areas = ", ".join(f"{name}: {100 * curve.mean():.1f}" for name, curve in result.curves.items())
        alt = f"Precision against recall of {result.name}; area under the curves, {areas}."
        panels.append({"file": file, "alt": alt, "name": result.name, "areas": areas})
    return panels


def _items(
    errors: Sequence[Error], truth: COCO, images: str | os.PathLike | None, folder: Path, colors: tuple[str, str]
) -> list[dict]:
    items = []
    for error in errors:
        name, file = truth.imgs[error.image_id].get("file_name", ""), None
        image = open_image(images, name) if images is not None else None
        if image is not None:
            boxes = [Box(box, color) for box, color in zip((error.box, error.other_box), colors) if box is not None]
            file = f"{error.kind}{len(items)}.jpg"
            crop(image, boxes).save(folder / file, quality=85)
        items.append({"caption": _caption(error), "file": file, "name": name})
    return items


def _caption(error: Error) -> str:
    rival = f"; there is “{error.other_name}”, IoU {error.overlap:.2f}" if error.other_name else ""
    if error.score is not None:
        return f"{error.kind}: “{error.name}”, {error.score:.2f}{rival}"
    size = "{:.0f} x {:.0f} px".format(*error.box[2:])
    return f"“{error.name}”, {size}" + (rival or "; no detection there")
