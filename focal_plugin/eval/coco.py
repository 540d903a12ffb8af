"""Evaluate detections as COCO does: AP, curves and kinds of error. Matching and numbers are pycocotools' own.

``truth`` is from :func:`read_truth`, ``predictions`` are from :func:`read_predictions`; from ``iou`` on a detection has
found an object. Readers raise OSError or ValueError; the message names the file.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import iou as box_iou

from ..files import printable

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
CURVES = ("IoU .5", "IoU .75", "mean of IoU .5 to .95")
BACKGROUND_IOU = 0.1  # what overlaps less has nothing to do with an object
_MALFORMED = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
_SWAPPED = "Are the two files swapped? Predictions go first."


class PrecisionRecall(NamedTuple):
    """COCO's interpolated precision at the recalls 0, .01 to 1, and its mean: the AP at one IoU. All in 0..1."""

    iou: float
    precision: np.ndarray
    ap: float


class Error(NamedTuple):
    """A false detection or a missed object, of a kind as Bolya et al. call it ("TIDE", ECCV 2020)."""

    kind: str  # Localization, Classification, Both, Duplicate, Background or Missed
    entry: dict  # the detection or object, in COCO's format
    other: dict | None = None  # the object, or of a missed object the detection, that it overlaps most
    overlap: float = 0.0  # IoU with it


def read_truth(path: str | os.PathLike) -> COCO:
    """Read annotations in COCO's format; ids of annotations are made anew, from 1."""
    content, truth = None, COCO()
    try:
        content = json.loads(Path(path).read_bytes())
        for section in ("annotations", "categories", "images"):
            ids = sorted(entry["id"] for entry in content[section])  # as COCOeval does, which takes no mix of types
            if len(set(ids)) < len(ids) or not (ids or section == "annotations"):
                raise ValueError(f"two {section} with one id" if ids else f"no {section}")
        names = {category["id"]: category["name"] + "" for category in content["categories"]}
        images = {image["id"] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"], start=1):
            box, annotation["id"] = annotation["bbox"], number  # COCOeval takes a match with the id 0 for none
            _check_numbers(box, 0)
            math.isnan(annotation.setdefault("area", box[2] * box[3]))  # which COCOeval takes, but nothing else
            known = annotation["category_id"] in names and annotation["image_id"] in images
            if annotation.setdefault("iscrowd", 0) not in (0, 1) or not known:
                raise ValueError(f"iscrowd, category_id or image_id of {printable(annotation, 200)}")
        truth.dataset = {"info": {}, **content}
        with contextlib.redirect_stdout(None):
            truth.createIndex()
    except _MALFORMED as e:
        hint = f"{_SWAPPED} " * isinstance(content, list) + f"tools/check_dataset.py {path} IMAGES says more"
        raise ValueError(f"{path}: not annotations in COCO's format ({type(e).__name__}: {e}). {hint}") from e
    return truth


def read_predictions(path: str | os.PathLike, truth: COCO) -> list[dict]:
    """Read results in COCO's format, of the images and categories of ``truth``.

    Names of images (``file_name``) and classes (``category``) count more than ids: tools/predict.py has ids of its own.
    """
    results = result = None
    try:
        results = json.loads(Path(path).read_bytes())
        for result in results:
            _check_numbers(result["bbox"], result["score"])
            hash((result.setdefault("image_id"), result["category_id"]))  # a file_name may stand for the first
    except _MALFORMED as e:
        problem = f"{printable(result, 200)} ({type(e).__name__}: {e})" + f". {_SWAPPED}" * isinstance(results, dict)
        raise ValueError(f"{path}: no list of image_id, category_id, bbox and score, as COCO has it: {problem}") from e
    files = {id_: os.path.basename(str(image.get("file_name"))) for id_, image in truth.imgs.items()}
    classes = {id_: category["name"] for id_, category in truth.cats.items()}
    way_out = (
        f"run tools/predict.py with --classes A,B,C, which are the annotations' {printable([*classes.values()], 200)} "
        "in the order of the model, or with --register NAME=ANNOTATIONS.JSON:IMAGE_DIR"
    )
    for key, name_key, names in (("image_id", "file_name", files), ("category_id", "category", classes)):
        hint = way_out if names is classes else "are the predictions of other images?"
        counts = Counter(names.values())
        ids = {name: id_ for id_, name in names.items() if counts[name] == 1}
        for result in results:
            name = result.get(name_key)
            if isinstance(name, str):
                name = os.path.basename(name) if names is files else name
                result[key] = ids.get(name, result[key] if names is classes else None)
                if names.get(result[key]) != name:
                    which = f"{counts[name] or 'no'} {name_key} {printable(name, 80)}"
                    raise ValueError(f"{path}: the annotations have {which}; {hint}")
            elif result[key] not in names:
                which = f"{key} {printable(result[key])} is not in the annotations"
                raise ValueError(f"{path}: {which}, which have {printable([*names], 100)}: predictions of other data?")
    return [{key: result[key] for key in ("image_id", "category_id", "bbox", "score")} for result in results]


def _check_numbers(box: Any, number: Any) -> None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(math.isfinite, [*box, number])):
        raise ValueError(f"{printable([box, number], 100)} is no box of four numbers and a number")


def evaluate(truth: COCO, predictions: Sequence[Mapping]) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Evaluate as COCO does.

    Returns:
        A row for the mean over all K classes and one for each: name, objects (without crowds), detections, and
        :data:`METRICS` in percent; by name of :data:`CURVES`, (1 + K, 101) precisions. Without objects they are NaN.
    """
    precision = _evaluate(truth, predictions)[1]
    every = precision[..., 0]
    parts = (every, every[:1], every[5:6], *(precision[..., area] for area in (1, 2, 3)))
    ids = sorted(truth.cats)
    table = {"name": ["all classes", *(truth.cats[id_]["name"] for id_ in ids)]}
    objects = [a for a in truth.anns.values() if not a["iscrowd"]]
    for key, entries in (("objects", objects), ("detections", predictions)):
        count = Counter(entry["category_id"] for entry in entries)
        table[key] = [sum(count.values()), *(count[id_] for id_ in ids)]
    table |= {metric: 100 * _with_mean(part.mean((0, 1))) for metric, part in zip(METRICS, parts)}
    curves = [_with_mean(part.mean(0)).T for part in (parts[1], parts[2], parts[0])]
    return pd.DataFrame(table), dict(zip(CURVES, curves))


def precision_recall_curves(
    coco_gt_json: str | os.PathLike, results_json: str | os.PathLike, ious: Sequence[float]
) -> list[PrecisionRecall]:
    """Return, for each IoU, the mean curve over all classes that have objects, as COCO's AP at it is computed."""
    truth = read_truth(coco_gt_json)
    # All areas, 100 detections: the others take most of the time.
    _, precision = _evaluate(truth, read_predictions(results_json, truth), ious, 100)
    curves = _with_mean(precision[..., 0])[..., 0]
    return [PrecisionRecall(iou, curve, float(curve.mean())) for iou, curve in zip(ious, curves)]


def _evaluate(truth: COCO, predictions: Sequence[Mapping], ious: Sequence[float] = (), most: int = 0) -> tuple:
    """COCO's evaluation and its masked precision, (IoU, recall, class, area); with ``ious``, only of all sizes."""
    with contextlib.redirect_stdout(None):
        found = truth.loadRes([dict(p) for p in predictions]) if predictions else COCO()
        evaluation = COCOeval(truth, found, "bbox")
        if ious:
            params = {"iouThrs": np.array(ious), "areaRng": [[0, 1e10]], "areaRngLbl": ["all"], "maxDets": [most]}
            vars(evaluation.params).update(params)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation, np.ma.masked_less(evaluation.eval["precision"][..., -1], 0)


def _with_mean(values: np.ma.MaskedArray) -> np.ndarray:
    """(..., 1 + K): the mean over the last axis, then the K values of it; NaN where they are masked."""
    return np.ma.concatenate([values.mean(-1, keepdims=True), values], axis=-1).filled(np.nan)


def match(truth: COCO, predictions: Sequence[Mapping], iou: float = 0.5) -> dict[int, tuple[list, list, list]]:
    """Match as COCO does; return, by image, correct and false detections and missed objects, all without crowds."""
    most = max(Counter(p["image_id"] for p in predictions).values(), default=1)
    evaluation, _ = _evaluate(truth, predictions, [iou], most)
    images: dict[int, tuple[list, list, list]] = {image_id: ([], [], []) for image_id in truth.imgs}
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

    It is 0 if no detection is correct. ``truth`` can be any without an annotation of the id 0.
    """
    images = match(truth, predictions, iou).values()
    num_objects = sum(len(correct) + len(missed) for correct, _, missed in images)
    ranked = [(d["score"], right) for image in images for right, found in zip((1, 0), image) for d in found]
    # The highest score chooses first: what those from a score on are matched with does not depend on the rest.
    scores, right = np.array(sorted(ranked, reverse=True)).reshape(-1, 2).T
    f1 = 2 * right.cumsum() / (np.arange(1, len(right) + 1) + num_objects)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # it does not part equal scores
    return float(scores[f1.argmax()]) if f1.any() else 0.0


def find_errors(truth: COCO, predictions: Sequence[Mapping], iou: float, score_threshold: float) -> list[Error]:
    """Find false detections from a score on, the highest score first, then what they miss, the largest box first."""
    # In TIDE's order, but that a duplicate, which is of the right class, comes before a wrong class.
    kinds = [("Duplicate", [True], iou), ("Classification", [False], iou)]
    kinds += [("Localization", [True], BACKGROUND_IOU), ("Both", [False], BACKGROUND_IOU)]
    false_positives, misses = [], []
    kept = [p for p in predictions if p["score"] >= score_threshold]
    for image_id, (correct, false, missed) in match(truth, kept, iou).items():
        objects = [o for o in truth.imgToAnns[image_id] if not o["iscrowd"]]
        false_positives += [_error(d, objects, kinds, "Background") for d in false]
        misses += [_error(o, correct + false, [("Missed", [True, False], BACKGROUND_IOU)], "Missed") for o in missed]
    false_positives.sort(key=lambda e: -e.entry["score"])
    return false_positives + sorted(misses, key=lambda e: -e.entry["bbox"][2] * e.entry["bbox"][3])


def _error(entry: dict, others: list[dict], kinds: Sequence[tuple[str, list[bool], float]], otherwise: str) -> Error:
    """Of the first kind of which another, of its classes (True: the entry's own), overlaps the entry by enough."""
    overlaps = box_iou([entry["bbox"]], [o["bbox"] for o in others], [0] * len(others))[0] if others else np.zeros(0)
    is_same = np.array([o["category_id"] == entry["category_id"] for o in others])
    for kind, classes, least in kinds:
        near = np.where(np.isin(is_same, classes), overlaps, -1)
        if near.max(initial=-1) >= least:
            return Error(kind, entry, others[near.argmax()], float(near.max()))
    return Error(otherwise, entry)
