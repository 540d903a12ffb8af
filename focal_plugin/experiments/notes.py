"""What a reader has to know before the first number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .paper import CAPTIONS
from .results import CONSOLE, typed
from .study import Outcome, Study, images_seen

_PAPER_IMAGES = 90_000 * 16


@dataclass(frozen=True)
class Note:
    """A statement; `code` is quoted as it is, such as an error."""

    lead: str
    text: str
    code: str = ""


def notes(study: Study, found: Sequence[Outcome]) -> list[Note]:
    """What is missing, failed, diverged, left out or unequal, and what setting this is."""
    return [
        *_setting(study),
        *_incomplete(found),
        *(note for outcome in found for note in _troubles(outcome)),
        *_left_out(study),
        *_budget(study, found),
        *_resumed(found),
    ]


def _setting(study: Study) -> list[Note]:
    if study.is_coco:
        return []
    return [
        Note(
            "Not the paper's setting.",
            f"The methods of {CAPTIONS[study.table].partition(':')[0]} were trained on “{study.profile}”, not on COCO "
            "with the paper's network and schedule. The paper's numbers stand beside ours for the order of the "
            "methods; the levels do not compare.",
        )
    ]


def _incomplete(found: Sequence[Outcome]) -> list[Note]:
    runs = [run for outcome in found for run in outcome.runs]
    done = sum(run.ok for run in runs)
    return [Note("Incomplete.", f"{done} of {len(runs)} runs are done.")] if done < len(runs) or not runs else []


def _troubles(outcome: Outcome) -> list[Note]:
    waiting = [run for run in outcome.runs if run.status == "missing"]
    found = []
    if waiting or not outcome.runs:
        seeds = f", {_seeds(waiting)}" if waiting else ""
        found.append(Note(f"{outcome.title}{seeds}: missing.", "Not run, or not to its end."))
    for run in outcome.runs:
        name = f"{outcome.title}, seed {run.seed}"
        if run.status == "diverged":
            text = (
                f"The loss was no number at step {run.step}. This is an outcome of the method with this recipe, not "
                "a crash; the run has no AP and is in no mean."
            )
            found.append(Note(f"{name}: diverged.", text))
        elif run.status == "failed":
            code = "" if run.exit_code is None else f" with exit code {run.exit_code}"
            text = f"It failed{code}; console: {typed(run.folder / CONSOLE)}."
            found.append(Note(f"{name}: failed.", text, run.error))
    return found


def _left_out(study: Study) -> list[Note]:
    if not study.left_out:
        return []
    return [Note("Left out.", f"Rows of the table that were not asked for: {', '.join(study.left_out)}.")]


def _budget(study: Study, found: Sequence[Outcome]) -> list[Note]:
    budgets: dict[int, list[str]] = {}
    for outcome in found:
        for run in outcome.runs:
            images = images_seen(run.config())
            if images:
                budgets.setdefault(images, []).append(f"{outcome.title} seed {run.seed}")
    texts = []
    if len(budgets) > 1:
        usual = max(budgets, key=lambda images: len(budgets[images]))
        others = (f"{images:,} images: {', '.join(runs)}" for images, runs in budgets.items() if images != usual)
        text = f"{len(budgets[usual])} of {sum(map(len, budgets.values()))} runs were trained on {usual:,} images; "
        text += f"{'; '.join(others)}. Their AP does not compare as it is."
        texts.append(Note("Unequal budgets.", text))
    if study.is_coco and set(budgets) - {_PAPER_IMAGES}:
        have = " and ".join(f"{images:,}" for images in sorted(set(budgets) - {_PAPER_IMAGES}))
        text = f"Trained on {have} images; the paper's schedule sees {_PAPER_IMAGES:,} (90,000 steps of 16)."
        texts.append(Note("Not the paper's budget.", text))
    return texts


def _resumed(found: Sequence[Outcome]) -> list[Note]:
    resumed = [f"{o.title} seed {r.seed}" for o in found for r in o.runs if r.attempts > 1 and r.status != "missing"]
    if not resumed:
        return []
    text = (
        f"{', '.join(resumed)}. Each went on from its last checkpoint, or from the start where there was none, with "
        "the images in the order of a run that was never stopped; the time given is that of the last attempt."
    )
    return [Note("Stopped and resumed.", text)]


def _seeds(runs: Sequence) -> str:
    return f"seed{'s' if len(runs) > 1 else ''} {', '.join(str(run.seed) for run in runs)}"
