"""Evaluate detections as COCO does: AP, curves and kinds of error. Matching and numbers are pycocotools' own."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import iou as box_iou

from ..files import printable

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CURVES = {"IoU .5": 0, "IoU .75": 5, "mean of IoU .5 to .95": slice(None)}
"""Name, and place among COCO's ten thresholds."""
BACKGROUND = 0.1  # IoU: what overlaps less has nothing to do with an object
KINDS = {  # of Bolya et al., "TIDE", ECCV 2020
    "Localization": "of an object of this class, but not closely enough",
    "Classification": "of an object of another class",
    "Both": "beside an object of another class",
    "Duplicate": "of an object that a detection of higher score has found",
    "Background": "where there is no object",
    "Missed": "an object that no detection is right about, whatever else lies on it",
}


@dataclass(frozen=True)
class PrecisionRecall:
    """COCO's interpolated precision at 101 recalls, and its mean: the AP at one IoU. All in 0..1."""

    iou: float
    recall: np.ndarray
    precision: np.ndarray
    ap: float


@dataclass(frozen=True)
class ClassResult:
    """The numbers of one class, or of all.

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


class Matches(NamedTuple):
    """What COCO's matching makes of an image; crowds, and detections in them, are in none of the lists."""

    correct: list[dict]
    false: list[dict]
    missed: list[dict]


@dataclass(frozen=True)
class Error:
    """A false detection or a missed object.

    Attributes:
        kind: of :data:`KINDS`.
        image_id: of the image.
        box: XYWH in pixels.
        name: of its class.
        score: of the detection; None for a missed object.
        other_box, other_name, overlap: what it overlaps most: an object, or, of a missed object, a detection; None,
            "" and 0 if there is nothing.
    """

    kind: str
    image_id: int
    box: Sequence[float]
    name: str
    score: float | None
    other_box: Sequence[float] | None = None
    other_name: str = ""
    overlap: float = 0.0


@dataclass
class Errors:
    """At one IoU, among the detections from ``score_threshold`` on.

    Attributes:
        correct: how many detections are right, and so how many objects are found.
        false_positives: the most confident first.
        misses: those of the largest boxes first.
    """

    score_threshold: float
    correct: int = 0
    false_positives: list[Error] = field(default_factory=list)
    misses: list[Error] = field(default_factory=list)

    def kinds(self) -> dict[str, int]:
        """Return how many there are of each of :data:`KINDS`."""
        counted = Counter(error.kind for error in self.false_positives + self.misses)
        return {kind: counted[kind] for kind in KINDS}


# ------------------------------ reading


def read_truth(path: str | os.PathLike) -> COCO:
    """Read annotations in COCO's format.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is something else; the message names it.
    """
    content = _read_json(path)
    sections = ("images", "categories", "annotations")
    lists = [content.get(section) for section in sections] if isinstance(content, dict) else [None]
    if not all(isinstance(entries, list) for entries in lists) or not (lists[0] and lists[1]):
        hint = "; are the two files swapped? Predictions go first" if isinstance(content, list) else ""
        raise ValueError(f"{path}: not annotations in COCO's format (images, annotations and categories){hint}")
    ids: dict[str, set] = {}

    def is_valid(entry: dict) -> bool:  # of a category, it has a name, of an annotation, it is of an image and category
        if section == "annotations":
            entry.setdefault("iscrowd", 0)
            entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
            known = entry["image_id"] in ids["images"] and entry["category_id"] in ids["categories"]
            return known and entry["iscrowd"] in (0, 1) and _is_box(entry["bbox"], entry["area"])
        return isinstance(entry["id"], (int, str)) and (section == "images" or isinstance(entry["name"], str))

    for section, entries in zip(sections, lists):
        way_out = f"tools/check_dataset.py {path} IMAGES says more"
        _check(entries, is_valid, f"{path}: not an entry of {section} as COCO has them; {way_out}")
        ids[section] = {entry.get("id") for entry in entries}
        if len(ids[section]) < len(entries) or len(set(map(type, ids[section]))) > 1:  # COCOeval sorts them
            raise ValueError(f"{path}: {section} share an id, or have numbers and text for ids; {way_out}")
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["id"] = number  # COCOeval takes a match with the id 0 for none
    truth = COCO()
    truth.dataset = {"info": {}, **content}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def read_predictions(path: str | os.PathLike, truth: COCO) -> list[dict]:
    """Read results in COCO's format, of the images and categories of ``truth``.

    Where all name their image (``file_name``) or class (``category``), as tools/predict.py's do, whose ids are its own,
    the name says which it is.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it is something else, or of other images or categories;
            the message names it.
    """
    results = _read_json(path)
    if not isinstance(results, list):
        hint = " (are the two files swapped? Predictions go first)" if isinstance(results, dict) else ""
        raise ValueError(f"{path}: not a list of results in COCO's format{hint}")
    ids = ("image_id", "category_id")
    _check(
        results,
        lambda r: _is_box(r["bbox"], r["score"]) and all(isinstance(r[key], (int, str)) for key in ids),
        f"{path}: not a result in COCO's format (image_id, category_id, bbox of four numbers, score)",
    )
    classes = {key: category["name"] for key, category in truth.cats.items()}
    files = {key: os.path.basename(str(image.get("file_name"))) for key, image in truth.imgs.items()}
    predict = (
        f"the annotations' classes are {printable(list(classes.values()), 200)}; run tools/predict.py with --register "
        "NAME=ANNOTATIONS.JSON:IMAGE_DIR DATASETS.TEST \"('NAME',)\", or with these names in the model's order, "
        "--classes A,B,C"
    )
    _identify(path, results, "image_id", files, "file_name", "are the predictions of other data?")
    _identify(path, results, "category_id", classes, "category", predict)
    return [{key: result[key] for key in (*ids, "bbox", "score")} for result in results]


def _identify(path, results: list[dict], key: str, names: dict, name_key: str, way_out: str) -> None:
    """Give the results the annotations' ids by the names of what they are of; refuse what the annotations have not."""
    given = [r.get(name_key) for r in results]
    if all(isinstance(name, str) for name in given):
        given = [os.path.basename(name) if name_key == "file_name" else name for name in given]
        if any(names.get(r[key]) != name for r, name in zip(results, given)):
            counts = Counter(names.values())
            for name in given:
                if counts[name] != 1:
                    what = f"{'several' if counts[name] else 'no'} {name_key} {printable(name, 80)}"
                    raise ValueError(f"{path}: the annotations have {what}; {way_out}")
            by_name = {name: id_ for id_, name in names.items()}
            for result, name in zip(results, given):
                result[key] = by_name[name]
    strange = [r[key] for r in results if r[key] not in names]
    if strange:
        raise ValueError(
            f"{path}: {len(strange)} of {len(results)} results have another {key} than the annotations, such as "
            f"{printable(strange[0])} (they have {printable(next(iter(names)))}); {way_out}"
        )


def _check(entries: list, is_valid: Callable[[dict], bool], problem: str) -> None:
    for entry in entries:
        with contextlib.suppress(AttributeError, KeyError, IndexError, TypeError, OverflowError):
            if is_valid(entry):
                continue
        raise ValueError(f"{problem}: {printable(entry, 200)}")


def _is_box(box: Any, number: Any) -> bool:
    """Whether these are a box, of four finite numbers, and another finite number."""
    return isinstance(box, list) and len(box) == 4 and all(map(math.isfinite, [*box, number]))


def _read_json(path: str | os.PathLike) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {os.fspath(path)}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not readable as json ({e})") from e


# ------------------------------ numbers


def evaluate(truth: COCO, predictions: Sequence[Mapping]) -> tuple[ClassResult, list[ClassResult]]:
    """Evaluate as COCO does: all classes together, over which it means, and each.

    Args:
        truth: from :func:`read_truth`.
        predictions: from :func:`read_predictions`.
    """
    evaluation = _evaluate(truth, predictions)
    precision = _precision(evaluation)
    objects = Counter(a["category_id"] for a in truth.anns.values() if not a["iscrowd"])
    detections = Counter(p["category_id"] for p in predictions)
    classes = [
        _result(truth.cats[id_]["name"], objects[id_], detections[id_], precision[:, :, [place]])
        for place, id_ in enumerate(evaluation.params.catIds)
    ]
    return _result("all classes", sum(objects.values()), len(predictions), precision), classes


def precision_recall_curves(
    coco_gt_json: str | os.PathLike, results_json: str | os.PathLike, ious: Sequence[float]
) -> list[PrecisionRecall]:
    """Return, for each IoU, the mean curve over all classes that have objects, as COCO's AP at it is computed."""
    truth = read_truth(coco_gt_json)
    # All areas, 100 detections: the others take most of the time.
    params = {"iouThrs": np.array(ious), "areaRng": [[0, 1e10]], "areaRngLbl": ["all"], "maxDets": [100]}
    evaluation = _evaluate(truth, read_predictions(results_json, truth), **params)
    curves = [_curve(precision) for precision in _precision(evaluation)[..., 0]]
    return [PrecisionRecall(iou, evaluation.params.recThrs, c, float(c.mean())) for iou, c in zip(ious, curves)]


def _evaluate(truth: COCO, predictions: Sequence[Mapping], **params: Any) -> COCOeval:
    """Match detections with objects as COCO does, with these of its parameters."""
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes([dict(p) for p in predictions]) if predictions else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        vars(evaluation.params).update(params)
        evaluation.evaluate()
    return evaluation


def _precision(evaluation: COCOeval) -> np.ndarray:
    """(IoU, recall, class, area); -1 where there is no object."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    return evaluation.eval["precision"][..., -1]


def _curve(precision: np.ndarray) -> np.ndarray:
    """The mean of (..., R, K) over all but R; NaN without objects of any of the K classes."""
    precision = precision.reshape(-1, *precision.shape[-2:])
    there = precision[:, :, (precision > -1).all(axis=(0, 1))]
    return there.mean(axis=(0, 2)) if there.size else np.full(there.shape[1], np.nan)


def _result(name: str, objects: int, detections: int, precision: np.ndarray) -> ClassResult:
    every = precision[..., 0]
    values = (every, every[0], every[5], *(precision[..., area] for area in (1, 2, 3)))
    means = [100 * float(x[x > -1].mean()) if (x > -1).any() else None for x in values]
    curves = {curve: _curve(every[place]) for curve, place in CURVES.items()} if means[0] is not None else {}
    return ClassResult(name, objects, detections, dict(zip(METRICS, means)), curves)


# ------------------------------ errors


def match(truth: COCO, predictions: Sequence[Mapping], iou: float = 0.5) -> dict[int, Matches]:
    """Match all detections with the objects of all sizes at one IoU, as COCO does; by image id."""
    most = max(Counter(p["image_id"] for p in predictions).values(), default=1)
    everything = {"areaRng": [[0, 1e10]], "areaRngLbl": ["all"], "maxDets": [most], "iouThrs": np.array([iou])}
    evaluation = _evaluate(truth, predictions, **everything)
    images = {image_id: Matches([], [], []) for image_id in truth.imgs}
    for matched in filter(None, evaluation.evalImgs):  # one per class and image
        correct, false, missed = images[matched["image_id"]]
        for id_, hit, ignored in zip(matched["dtIds"], matched["dtMatches"][0], matched["dtIgnore"][0]):
            if not ignored:
                (correct if hit else false).append(evaluation.cocoDt.anns[id_])
        for id_, hit, ignored in zip(matched["gtIds"], matched["gtMatches"][0], matched["gtIgnore"]):
            if not hit and not ignored:
                missed.append(truth.anns[id_])
    return images


def best_threshold(truth: COCO, predictions: Sequence[Mapping], iou: float = 0.5) -> float:
    """Return the score from which on detections have the highest F1, 2 * correct / (detections + objects).

    Args:
        truth: with no annotation of the id 0, as from :func:`read_truth`.
        predictions: results in COCO's format.
        iou: from which on a detection has found an object.

    Returns:
        The score; 0 if no detection is correct.
    """
    images = match(truth, predictions, iou).values()
    num_objects = sum(len(m.correct) + len(m.missed) for m in images)
    # The highest score chooses first: what those from a score on are matched with does not depend on the rest.
    scores = np.array([d["score"] for m in images for d in (*m.correct, *m.false)])
    correct = np.array([hit for m in images for hit in [True] * len(m.correct) + [False] * len(m.false)], dtype=bool)
    if not correct.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    scores, found = scores[order], np.cumsum(correct[order])
    f1 = 2 * found / (np.arange(1, len(scores) + 1) + num_objects)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # a threshold does not part equal scores
    return float(scores[f1.argmax()])


def find_errors(
    truth: COCO, predictions: Sequence[Mapping], iou: float = 0.5, score_threshold: float | None = None
) -> Errors:
    """Find what is detected and is not there, and what is there and not detected.

    Args:
        truth: from :func:`read_truth`.
        predictions: from :func:`read_predictions`.
        iou: from which on a detection has found an object.
        score_threshold: only detections from this score on; None: from :func:`best_threshold` on.

    Raises:
        ValueError: a number out of range.
    """
    if not 0 < iou <= 1:
        raise ValueError(f"the IoU must be in (0, 1], got {iou}")
    if score_threshold is None:
        score_threshold = best_threshold(truth, predictions, iou)
    if math.isnan(score_threshold):
        raise ValueError(f"the score threshold must be a number, got {score_threshold}")
    errors = Errors(score_threshold)
    shown = [p for p in predictions if p["score"] >= score_threshold]
    for image_id, (correct, false, missed) in match(truth, shown, iou).items():
        errors.correct += len(correct)
        objects = [o for o in truth.imgToAnns[image_id] if not o["iscrowd"]]
        errors.false_positives += [_false_positive(d, objects, truth.cats, iou) for d in false]
        for object_ in missed:
            overlaps = _overlaps(object_, [*correct, *false])
            near = overlaps.max(initial=0.0) >= BACKGROUND
            errors.misses.append(_error("Missed", object_, truth.cats, [*correct, *false], overlaps if near else None))
    errors.false_positives.sort(key=lambda e: -e.score)
    errors.misses.sort(key=lambda e: -e.box[2] * e.box[3])
    return errors


def _false_positive(detection: dict, objects: list[dict], categories: dict, iou: float) -> Error:
    overlaps = _overlaps(detection, objects)
    same = np.array([o["category_id"] == detection["category_id"] for o in objects], dtype=bool)
    # In TIDE's order, but that a duplicate, which is of the right class, comes before a wrong class.
    order = ("Duplicate", same, iou), ("Classification", ~same, iou)
    for kind, candidates, least in (*order, ("Localization", same, BACKGROUND), ("Both", ~same, BACKGROUND)):
        own = np.where(candidates, overlaps, 0.0)
        if own.max(initial=0.0) >= least:
            return _error(kind, detection, categories, objects, own)
    return _error("Background", detection, categories)


def _overlaps(entry: dict, others: list[dict]) -> np.ndarray:
    return box_iou([entry["bbox"]], [o["bbox"] for o in others], [0] * len(others))[0] if others else np.zeros(0)


def _error(kind: str, entry: dict, categories: dict, others: Sequence[dict] = (), overlaps: Any = None) -> Error:
    what = kind, entry["image_id"], entry["bbox"], categories[entry["category_id"]]["name"], entry.get("score")
    if overlaps is None:
        return Error(*what)
    other = others[overlaps.argmax()]
    return Error(*what, other["bbox"], categories[other["category_id"]]["name"], float(overlaps.max()))
