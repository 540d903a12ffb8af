"""Writes a comparison down: a page to read, Markdown, the numbers for machines, and what they do and do not say."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from ..eval.detections import precision_recall_curves
from ..eval.page import render_html, render_markdown
from ..files import atomic_write, origin
from .notes import notes
from .record import recipe_of, storable, study_record
from .results import RunResult
from .sections import Sections
from .study import Data, Line, Study, outcomes, reference
from .tables import class_table, comparison_table
from .verdict import compare, verdict

__all__ = ["Data", "Line", "Study", "format_class_table", "format_table", "write_report"]

_IOUS = (0.5, 0.75)


def write_report(study: Study, results: Sequence[RunResult], report_dir: Path) -> Path:
    """Writes index.html, report.md, results.json and the pictures into `report_dir`.

    Args:
        study: what was asked for.
        results: one per line and seed, done or not.
        report_dir: the folder to write to.

    Returns:
        The path of index.html.
    """
    folder = Path(report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    found = outcomes(study, results)
    comparisons = compare(found, reference(found))
    curves = {
        (run.method, run.seed): precision_recall_curves(study.data.val_json, run.detections, _IOUS)
        for outcome in found
        for run in outcome.done
    }
    words = verdict(study, found, comparisons)
    # A dollar sign in a title is a dollar sign.
    with matplotlib.rc_context({"text.parse_math": False}):
        sections = Sections(study, found, curves, folder).build(words)
    made = origin(study.command)
    remarks = notes(study, found)
    context = {
        "study": study,
        "notes": remarks,
        "sections": sections,
        "recipes": [recipe_of(outcome) for outcome in found],
        "commands": [shlex.join(run.command) for outcome in found for run in outcome.runs],
        **made,
    }
    record = {
        **made,
        "notes": [" ".join(filter(None, (note.lead, note.text, note.code))) for note in remarks],
        "verdict": words,
        **study_record(study, found, comparisons, curves),
    }
    text = json.dumps(storable(record), indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_write(folder / "results.json") as file:
        file.write(text + "\n")
    with atomic_write(folder / "report.md") as file:
        file.write(render_markdown(context))
    with atomic_write(folder / "index.html") as file:
        file.write(render_html(context, folder))
    return folder / "index.html"


def format_table(study: Study, results: Sequence[RunResult]) -> str:
    """The comparison, one method per line; Markdown that reads well in a terminal too."""
    return comparison_table(study, outcomes(study, results)).markdown()


def format_class_table(study: Study, results: Sequence[RunResult]) -> str:
    """AP of each class; Markdown."""
    return class_table(study, outcomes(study, results)).markdown()
