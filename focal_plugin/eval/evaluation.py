"""An evaluation in detail: COCO's numbers and curves class by class, and the single errors behind them.

All matching and every number is pycocotools' own. An error is one at one IoU, among the detections from one score on.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import iou as box_iou

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CURVES = {"IoU .5": 0, "IoU .75": 5, "mean of IoU .5 to .95": slice(None)}
"""Name, and place among COCO's ten thresholds."""
ELSEWHERE = 0.1  # IoU: what overlaps less has nothing to do with an object (Bolya et al., "TIDE", ECCV 2020)
KINDS = {
    "duplicate": "of an object that a detection of higher score has found",
    "wrong class": "of an object of another class",
    "wrong place": "of an object of this class, but not closely enough",
    "wrong class and place": "beside an object of another class",
    "background": "where there is no object",
}


@dataclass(frozen=True)
class ClassResult:
    """Of one class, or of all.

    Attributes:
        name: of the class.
        objects, detections: how many there are; crowds are no objects.
        scores: by name of :data:`METRICS`, in percent; None where there is no object of that kind.
        curves: by name of :data:`CURVES`, (101,) precisions at COCO's recalls; empty without objects.
    """

    name: str
    objects: int
    detections: int
    scores: dict[str, float | None]
    curves: dict[str, np.ndarray]


@dataclass(frozen=True)
class Error:
    """A false positive or a missed object.

    Attributes:
        image_id: of the image.
        box: XYWH in pixels.
        name: of its class.
        score: of the detection; None for a missed object.
        kind: of :data:`KINDS`; "" for a missed object.
        other_box, other_name, overlap: what it overlaps most: an object, or, of a missed object, a detection; None,
            "" and 0 if there is nothing.
    """

    image_id: int
    box: Sequence[float]
    name: str
    score: float | None = None
    kind: str = ""
    other_box: Sequence[float] | None = None
    other_name: str = ""
    overlap: float = 0.0


@dataclass
class Errors:
    """At one IoU, among the detections from a score on.

    Attributes:
        correct: detections that are right, and so the objects that are found.
        score_threshold: that score.
        false_positives: the most confident first.
        misses: those of the largest boxes first.
    """

    score_threshold: float
    correct: int = 0
    false_positives: list[Error] = field(default_factory=list)
    misses: list[Error] = field(default_factory=list)

    def kinds(self) -> dict[str, int]:
        """How many false positives there are of each of :data:`KINDS`."""
        counted = Counter(error.kind for error in self.false_positives)
        return {kind: counted[kind] for kind in KINDS}


# ------------------------------ reading


def read_truth(path: str | os.PathLike) -> COCO:
    """Annotations in COCO's format.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is something else; the message names it.
    """
    content = _read_json(path)
    lists = isinstance(content, dict) and [content.get(key) for key in ("images", "annotations", "categories")]
    if not lists or not all(isinstance(x, list) and all(isinstance(y, dict) for y in x) for x in lists):
        hint = "; are the two files swapped? Predictions go first" if isinstance(content, list) else ""
        raise ValueError(f"{path}: not annotations in COCO's format (images, annotations and categories){hint}")
    images, annotations, categories = lists
    try:
        image_ids, category_ids = _read_ids("images", images), _read_ids("categories", categories)
        for category in categories:
            if not isinstance(category["name"], str):
                raise ValueError(f"the name of category {category['id']} is no text")
        for annotation in annotations:
            _check_box(annotation["bbox"])
            if annotation["image_id"] not in image_ids or annotation["category_id"] not in category_ids:
                raise ValueError(f"annotation {annotation.get('id')} has an image_id or category_id that is not there")
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
            if annotation["iscrowd"] not in (0, 1) or not _is_number(annotation["area"]):
                raise ValueError(f"annotation {annotation.get('id')} has an iscrowd or area that is no number")
        if len({x["id"] for x in annotations}) < len(annotations):
            raise ValueError("two annotations have one id")
    except KeyError as e:
        raise ValueError(f"{path}: an entry without {e}; tools/check_dataset.py says more") from e
    except (TypeError, ValueError) as e:
        raise ValueError(f"{path}: {e}; tools/check_dataset.py says more") from e
    if not images or not categories:
        raise ValueError(f"{path}: it has no images or no categories")
    # COCOeval takes a match with the id 0 for none.
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    truth = COCO()
    truth.dataset = {"info": {}, **content}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def read_predictions(path: str | os.PathLike, truth: COCO) -> list[dict]:
    """Results in COCO's format, of the images and categories of ``truth``.

    Where all name their image (``file_name``, as those of tools/predict.py), that and not ``image_id`` says which it
    is.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is something else, or of other images or categories;
            the message names it.
    """
    content = _read_json(path)
    if not isinstance(content, list) or not all(isinstance(x, dict) for x in content):
        hint = " (are the two files swapped? predictions go first)" if isinstance(content, dict) else ""
        raise ValueError(f"{path}: not a list of results in COCO's format{hint}")
    for number, result in enumerate(content):
        try:
            _check_box(result["bbox"])
            if not _is_number(result["score"]):
                raise ValueError(f"score {result['score']!r:.60} is no number")
        except KeyError as e:
            raise ValueError(f"{path}: result {number} has no {e}") from e
        except (TypeError, ValueError) as e:
            raise ValueError(f"{path}: result {number}: {e}") from e
    if content and all(isinstance(result.get("file_name"), str) for result in content):
        _number_by_file_name(path, content, truth)
    for key, known in (("image_id", truth.imgs), ("category_id", truth.cats)):
        values = [result.get(key) for result in content]
        strange = [v for v in values if not isinstance(v, (int, str)) or v not in known]
        if strange:
            raise ValueError(
                f"{path}: {len(strange)} of {len(content)} results have another {key} than the annotations, such "
                f"as {str(strange[0])[:60]!r} (they have {str(next(iter(known)))[:60]!r}): predictions of other data?"
            )
    return [{key: result[key] for key in ("image_id", "category_id", "bbox", "score")} for result in content]


def _number_by_file_name(path: str | os.PathLike, results: Sequence[dict], truth: COCO) -> None:
    """Gives results that name their images, whose numbers are tools/predict.py's own, the annotations' image ids."""
    ids = defaultdict(list)
    for image in truth.imgs.values():
        ids[os.path.basename(str(image.get("file_name")))].append(image["id"])
    for result in results:
        found = ids.get(os.path.basename(result["file_name"]), [])
        if len(found) != 1:
            many = "several images" if found else "no image"
            name = os.path.basename(result["file_name"])
            raise ValueError(f"{path}: the annotations have {many} called {name!r:.80}")
        result["image_id"] = found[0]


def _read_json(path: str | os.PathLike) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {os.fspath(path)}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as json ({e})") from e


def _read_ids(section: str, entries: Sequence[dict]) -> set:
    """COCOeval sorts them, which numbers and texts together do not let it."""
    ids = {entry["id"] for entry in entries}
    if not all(isinstance(i, int) for i in ids) and not all(isinstance(i, str) for i in ids):
        raise ValueError(f"the ids of {section} are neither all whole numbers nor all text")
    if len(ids) < len(entries):
        raise ValueError(f"two {section} have one id")
    return ids


def _check_box(box: Any) -> None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(f"bbox {str(box)[:60]} is not four numbers")


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


# ------------------------------ numbers


def evaluate(truth: COCO, predictions: Sequence[Mapping]) -> tuple[ClassResult, list[ClassResult]]:
    """Of all classes together, as COCO means over them, and of each.

    Args:
        truth: from :func:`read_truth`.
        predictions: from :func:`read_predictions`.
    """
    evaluation = _run(truth, predictions)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., -1]  # (threshold, recall, class, area); -1: no object
    objects = Counter(a["category_id"] for a in truth.anns.values() if not a["iscrowd"])
    detections = Counter(p["category_id"] for p in predictions)
    classes = []
    for place, category in enumerate(evaluation.params.catIds):
        counts = objects[category], detections[category]
        classes.append(ClassResult(truth.cats[category]["name"], *counts, *_numbers(precision[:, :, [place]])))
    total = ClassResult("all classes", sum(objects.values()), len(predictions), *_numbers(precision))
    return total, classes


def _numbers(precision: np.ndarray) -> tuple[dict[str, float | None], dict[str, np.ndarray]]:
    def mean(x: np.ndarray) -> float | None:
        return 100 * float(x[x > -1].mean()) if (x > -1).any() else None

    every = precision[..., 0]
    values = (every, every[0], every[5], *(precision[..., area] for area in (1, 2, 3)))
    there = every[:, :, (every > -1).all(axis=(0, 1))]
    curves = {}
    if there.shape[2]:
        curves = {name: np.atleast_3d(there[place].T).T.mean(axis=(0, 2)) for name, place in CURVES.items()}
    return dict(zip(METRICS, map(mean, values))), curves


def _run(truth: COCO, predictions: Sequence[Mapping], **params: Any) -> COCOeval:
    """COCO's matching."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes([dict(p) for p in predictions]) if predictions else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
    return evaluation


# ------------------------------ errors


def best_score_threshold(truth: COCO, predictions: Sequence[Mapping], iou: float = 0.5) -> float:
    """The score from which on detections have the highest F1, 2 * correct / (detections + objects); 0 without any."""
    evaluation = _match(truth, predictions, iou)
    scores, correct, num_objects = [np.zeros(0)], [np.zeros(0, dtype=bool)], 0
    for matched in filter(None, evaluation.evalImgs):
        counts = ~matched["dtIgnore"][0].astype(bool)
        scores.append(np.array(matched["dtScores"])[counts])
        correct.append(matched["dtMatches"][0][counts] > 0)
        num_objects += int((~np.array(matched["gtIgnore"]).astype(bool)).sum())
    scores, correct = np.concatenate(scores), np.concatenate(correct)
    if not correct.any():
        return 0.0
    # The highest score chooses first: what those from a score on are matched with does not depend on the rest.
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(correct[order])
    f1 = 2 * found / (np.arange(1, len(scores) + 1) + num_objects)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # a threshold does not part equal scores
    return float(scores[f1.argmax()])


def find_errors(
    truth: COCO, predictions: Sequence[Mapping], iou: float = 0.5, score_threshold: float | None = None
) -> Errors:
    """What is found that is not there, and what is there and not found.

    Args:
        truth: from :func:`read_truth`.
        predictions: from :func:`read_predictions`.
        iou: from which on a detection has found an object.
        score_threshold: only detections from this score on; None: from :func:`best_score_threshold` on.

    Raises:
        ValueError: a number out of range.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"the IoU must be in (0, 1], got {iou}")
    if score_threshold is not None and math.isnan(score_threshold):
        raise ValueError(f"the score threshold must be a number, got {score_threshold}")
    if score_threshold is None:
        score_threshold = best_score_threshold(truth, predictions, iou)
    evaluation = _match(truth, [p for p in predictions if p["score"] >= score_threshold], iou)
    found = evaluation.cocoDt
    objects, detections = _by_image(truth.anns.values()), _by_image(found.anns.values())
    errors = Errors(score_threshold)
    for matched in filter(None, evaluation.evalImgs):
        wrong = (matched["dtMatches"][0] == 0) & ~matched["dtIgnore"][0].astype(bool)
        errors.correct += int(((matched["dtMatches"][0] > 0) & ~matched["dtIgnore"][0].astype(bool)).sum())
        image = matched["image_id"]
        for detection in (found.anns[i] for i in np.array(matched["dtIds"])[wrong]):
            errors.false_positives.append(_false_positive(detection, objects[image], truth.cats, iou))
        missed = (matched["gtMatches"][0] == 0) & ~np.array(matched["gtIgnore"]).astype(bool)
        for object_ in (truth.anns[i] for i in np.array(matched["gtIds"])[missed]):
            errors.misses.append(_miss(object_, detections[image], truth.cats))
    errors.false_positives.sort(key=lambda e: -e.score)
    errors.misses.sort(key=lambda e: -e.box[2] * e.box[3])
    return errors


def _match(truth: COCO, predictions: Sequence[Mapping], iou: float) -> COCOeval:
    """COCO's matching of all detections with objects of all sizes at one IoU."""
    most = max(Counter(p["image_id"] for p in predictions).values(), default=1)
    everything = {"areaRng": [[0, 1e10]], "areaRngLbl": ["all"], "maxDets": [most], "iouThrs": np.array([iou])}
    return _run(truth, predictions, **everything)


def _by_image(entries: Iterable[dict]) -> dict[int, list[dict]]:
    images = defaultdict(list)
    for entry in entries:
        if not entry.get("iscrowd"):
            images[entry["image_id"]].append(entry)
    return images


def _overlaps(box: Sequence[float], entries: Sequence[dict]) -> np.ndarray:
    return box_iou([box], [e["bbox"] for e in entries], [0] * len(entries))[0] if entries else np.zeros(0)


def _false_positive(detection: dict, objects: list[dict], categories: dict, iou: float) -> Error:
    overlaps = _overlaps(detection["bbox"], objects)
    same = np.array([o["category_id"] == detection["category_id"] for o in objects], dtype=bool)
    own, other = np.where(same, overlaps, 0.0), np.where(same, 0.0, overlaps)
    most_own, most_other = own.max(initial=0.0), other.max(initial=0.0)
    # In TIDE's order, but that a duplicate, which is of the right class, comes before a wrong class.
    if most_own >= iou:
        kind, place = "duplicate", own
    elif most_other >= iou:
        kind, place = "wrong class", other
    elif most_own >= ELSEWHERE:
        kind, place = "wrong place", own
    elif most_other >= ELSEWHERE:
        kind, place = "wrong class and place", other
    else:
        return Error(*_what(detection, categories), detection["score"], "background")
    return Error(*_what(detection, categories), detection["score"], kind, *_rival(place, objects, categories))


def _miss(object_: dict, detections: list[dict], categories: dict) -> Error:
    overlaps = _overlaps(object_["bbox"], detections)
    if overlaps.max(initial=0.0) < ELSEWHERE:
        return Error(*_what(object_, categories))
    return Error(*_what(object_, categories), None, "", *_rival(overlaps, detections, categories))


def _what(entry: dict, categories: dict) -> tuple[int, Sequence[float], str]:
    return entry["image_id"], entry["bbox"], categories[entry["category_id"]]["name"]


def _rival(overlaps: np.ndarray, entries: list[dict], categories: dict) -> tuple[Sequence[float], str, float]:
    place = int(overlaps.argmax())
    return entries[place]["bbox"], categories[entries[place]["category_id"]]["name"], float(overlaps[place])
