"""Render pages: one HTML file that needs nothing else, or Markdown; and the page on one evaluation."""

from __future__ import annotations

import base64
import math
import mimetypes
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pycocotools.coco import COCO

from ..files import atomic_write, origin, printable
from ..losses.args import check
from .coco import METRICS, Error, best_threshold, evaluate, find_errors, read_predictions, read_truth
from .drawing import MISSED, TRUTH, WRONG, crop, draw_curves, open_image

NONE = "–"
_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", "|": "\\|", "`": "'", "[": "\\["})


def render_html(context: dict[str, Any], folder: Path, template: str) -> str:
    """Render a page; ``folder`` has the pictures, which go into the page itself."""

    def data_uri(name: str) -> str:
        data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
        return f"data:{mimetypes.guess_type(name)[0]};base64,{data}"

    return _render(template, context, data_uri=data_uri)


def render_markdown(context: dict[str, Any]) -> str:
    """Render report.md."""
    return _render("report.md", context, md=markdown_text)


def _render(template: str, context: dict[str, Any], **filters: Callable[[str], str]) -> str:
    environment = Environment(
        loader=PackageLoader("focal_plugin.eval", "templates"),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        finalize=lambda value: _safe(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(context)


def markdown_text(text: str) -> str:
    """Return a text on one line, and without what Markdown would take for a table, a tag or a quotation."""
    text = " / ".join(line for line in _safe(text).splitlines() if line.strip())
    return text.translate(_MARKDOWN)


def _safe(text: str) -> str:
    """The text with its lines; those with control characters, marks of direction or lone surrogates escaped."""
    lines = (line if line.isprintable() else printable(line, 10 * len(line), quotes=False) for line in text.split("\n"))
    return "\n".join(lines)


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
    """Write one HTML file that needs nothing else; return the result in one line.

    Args:
        predictions, annotations: in COCO's format; the first are ``coco_instances_results.json`` of an evaluation.
        images: the folder that the file names of the annotations start from; None: no pictures.
        iou: from which on a detection has found an object, for errors and pictures.
        score_threshold: only detections from this score on, for errors and pictures; None: from that of the highest F1.
        examples: so many pictures, at most, of false detections and of missed objects.

    Raises:
        OSError, ValueError: a file or folder is not there or something else; the message names it.
    """
    if images is not None and not os.path.isdir(images):
        raise FileNotFoundError(f"there is no folder {os.fspath(images)}")
    if os.path.realpath(path) in map(os.path.realpath, (predictions, annotations)):
        raise ValueError(f"{os.fspath(path)} is one of the two files to read: give the page another name")
    check(examples >= 0, "--examples", ">= 0", examples)
    check(0 < iou <= 1, "--iou", "in (0, 1]", iou)
    check(score_threshold == score_threshold, "--score-threshold", "a number", score_threshold)
    truth = read_truth(annotations)
    found = read_predictions(predictions, truth)
    table, curves = evaluate(truth, found)
    threshold = best_threshold(truth, found, iou) if score_threshold is None else score_threshold
    errors = find_errors(truth, found, iou, threshold)
    kinds = Counter(error.kind for error in errors)
    num_objects, num_false = int(table.objects[0]), len(errors) - kinds["Missed"]
    correct = num_objects - kinds["Missed"]
    why = ", from which on F1 is the highest" if score_threshold is None and threshold else ""
    summary = (
        f"at IoU {iou:g}, of the {correct + num_false:,} detections with a score of at least {threshold:.3g}{why}, "
        f"{correct:,} are right and {num_false:,} false; {kinds['Missed']:,} of {num_objects:,} objects are missed"
    )
    with tempfile.TemporaryDirectory() as folder, atomic_write(path) as file:
        context = {
            "name": _safe(Path(predictions).name),
            "total": table.iloc[0],
            "truth": truth,
            "num_seen": len({p["image_id"] for p in found}),
            "rows": table[["name", *METRICS, "objects", "detections"]].map(_text).values.tolist(),
            "curves": draw_curves(table, curves, Path(folder)),
            "summary": summary,
            "kinds": kinds,
            "threshold": threshold,
            "wrong": errors[:num_false][:examples],
            "misses": errors[num_false:][:examples],
            "draw": lambda error: _draw_error(error, truth, images, Path(folder)),
            "has_images": images is not None,
            "colors": {"truth": TRUTH, "wrong": WRONG, "missed": MISSED},
            **origin(command),
        }
        file.write(render_html(context, Path(folder), "evaluation.html"))
    return f"AP {_text(table.AP[0])}, AP50 {_text(table.AP50[0])}; {summary}"


def _text(value: object) -> str:
    if isinstance(value, float):
        return NONE if math.isnan(value) else f"{value:.1f}"
    return value if isinstance(value, str) else f"{value:,}"


def _draw_error(error: Error, truth: COCO, images: str | os.PathLike | None, folder: Path) -> str:
    """Draw an error; return the picture's name in the folder, "" if the image cannot be read."""
    image = images is not None and open_image(images, truth.imgs[error.entry["image_id"]].get("file_name"))
    if not image:
        return ""
    colors, file = (MISSED, WRONG) if error.kind == "Missed" else (WRONG, TRUTH), f"{error.kind}{error.entry['id']}.jpg"
    boxes = [(entry["bbox"], color, "") for entry, color in zip((error.entry, error.other), colors) if entry]
    crop(image, boxes).save(folder / file, quality=85)
    return file
