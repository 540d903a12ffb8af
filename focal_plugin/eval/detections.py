"""What detectors find: precision-recall curves, and pictures of their boxes beside the ground truth."""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import iou as box_iou

# Okabe and Ito's colours, which colour-blind readers can tell apart as well.
TRUTH, CORRECT, WRONG, MISSED = "#56B4E9", "#009E73", "#E69F00", "white"
_DASHED = (0, (3, 2))
_OUTLINE = [withStroke(linewidth=2.6, foreground="black", alpha=0.6)]  # visible on any background


@dataclass(frozen=True)
class PrecisionRecall:
    """COCO's interpolated precision at 101 recalls, and its mean: the AP at one IoU. All in 0..1."""

    iou: float
    recall: np.ndarray
    precision: np.ndarray
    ap: float


@dataclass(frozen=True)
class Method:
    """A column of the mosaic."""

    title: str
    detections: Path  # in COCO's result format


def precision_recall(coco_gt_json: Path, results_json: Path, iou: float = 0.5) -> PrecisionRecall:
    """The mean curve over all classes that have ground truth, as COCO's AP at this IoU is computed."""
    return precision_recall_curves(coco_gt_json, results_json, [iou])[0]


def precision_recall_curves(coco_gt_json: Path, results_json: Path, ious: Sequence[float]) -> list[PrecisionRecall]:
    """`precision_recall` at several IoUs, in one evaluation."""
    detections = _read(results_json)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(coco_gt_json))
        evaluation = COCOeval(truth, truth.loadRes(detections) if detections else COCO(), "bbox")
        params = evaluation.params
        params.iouThrs = np.array(ious)
        # All areas, 100 detections: the others take most of the time.
        params.areaRng, params.areaRngLbl, params.maxDets = params.areaRng[:1], params.areaRngLbl[:1], [100]
        evaluation.evaluate()
        evaluation.accumulate()
    curves = []
    for iou, precision in zip(ious, evaluation.eval["precision"][..., 0, 0]):  # recall x class
        precision = precision[:, (precision > -1).all(axis=0)]
        mean = precision.mean(axis=1) if precision.size else np.full(len(precision), np.nan)
        curves.append(PrecisionRecall(iou, params.recThrs, mean, float(mean.mean())))
    return curves


def choose_images(coco: COCO, count: int) -> list[int]:
    """Image ids from the fewest objects to the most, evenly spread, and one without any if there is one."""
    objects = {i: len(coco.getAnnIds(imgIds=[i], iscrowd=False)) for i in coco.getImgIds()}
    ranked = sorted(objects, key=lambda i: (objects[i], i))
    empty = [i for i in ranked if not objects[i]][: int(count > 1)]
    filled = [i for i in ranked if objects[i]]
    places = np.linspace(0, len(filled) - 1, min(count - len(empty), len(filled))).round().astype(int)
    return [filled[place] for place in places] + empty


def match(truth: list[dict], detections: list[dict], iou: float = 0.5) -> tuple[list[bool], list[bool]]:
    """Which detections are correct, which objects are found; the highest score chooses first, as in COCO."""
    correct, found = [False] * len(detections), [False] * len(truth)
    if truth and detections:
        overlaps = box_iou([d["bbox"] for d in detections], [t["bbox"] for t in truth], [0] * len(truth))
        for d in sorted(range(len(detections)), key=lambda d: -detections[d]["score"]):
            same = [t["category_id"] == detections[d]["category_id"] for t in truth]
            free = np.where(np.array(same) & ~np.array(found), overlaps[d], -1.0)
            best = int(free.argmax())
            if free[best] >= iou:
                correct[d] = found[best] = True
    return correct, found


def draw_mosaic(
    coco_gt_json: Path,
    image_root: Path,
    methods: Sequence[Method],
    path: Path,
    *,
    num_images: int = 7,
    score_threshold: float = 0.3,
    iou: float = 0.5,
) -> list[int]:
    """Draws a few images, one per row, with the ground truth and every method's detections side by side.

    Returns:
        The ids of the images that were drawn.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(coco_gt_json))
    names = {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())}
    shown = [_by_image(_read(method.detections), score_threshold) for method in methods]
    images = choose_images(coco, num_images)

    figure, axes = _grid(len(images), 1 + len(methods))
    for axis, title in zip(axes[0], ["ground truth", *(method.title for method in methods)]):
        axis.set_title(title, fontsize=10)
    for image_id, line in zip(images, axes):
        with Image.open(Path(image_root) / coco.imgs[image_id]["file_name"]) as image:
            pixels = np.asarray(image.convert("RGB"))
        truth = coco.loadAnns(coco.getAnnIds(imgIds=[image_id], iscrowd=False))
        for axis in line:
            axis.imshow(pixels, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(f"image {image_id}", fontsize=8)
        for annotation in truth:
            _box(line[0], annotation["bbox"], names[annotation["category_id"]], TRUTH)
        for axis, detections in zip(line[1:], shown):
            _draw_detections(axis, truth, detections[image_id], names, iou)
    _explain(figure, score_threshold, iou)
    figure.savefig(path, dpi=150)
    return images


def _draw_detections(axis, truth: list[dict], detections: list[dict], names: dict, iou: float) -> None:
    correct, found = match(truth, detections, iou)
    for annotation, hit in zip(truth, found):
        if not hit:
            _box(axis, annotation["bbox"], "", MISSED, linestyle=_DASHED)
    # The highest scores last, on top.
    for detection, right in sorted(zip(detections, correct), key=lambda pair: pair[0]["score"]):
        score = f"{detection['score']:.2f}".lstrip("0")
        label = f"{names[detection['category_id']]}  {score}"
        _box(axis, detection["bbox"], label, CORRECT if right else WRONG)


def _box(axis, bbox: Sequence[float], label: str, color: str, **style) -> None:
    x, y, width, height = bbox
    # Pixel i spans i - .5 to i + .5 in a picture drawn by imshow; a COCO box counts from its left edge, 0.
    corner = (x - 0.5, y - 0.5)
    style.update(fill=False, edgecolor=color, linewidth=1.4, path_effects=_OUTLINE)
    axis.add_patch(Rectangle(corner, width, height, **style))
    if label:
        axis.text(
            max(corner[0], -0.5),
            max(corner[1], -0.5),
            label,
            fontsize=6.5,
            color="white" if color == CORRECT else "black",
            va="bottom" if y > 8 else "top",
            clip_on=True,
            bbox={"facecolor": color, "edgecolor": "none", "pad": 0.7},
        )


def _grid(rows: int, columns: int, side: float = 2.5):
    """Square cells, packed; 2.5 inches at 150 dpi show an image of 128 pixels three times its size."""
    head, foot, left = 1.25, 0.1, 0.3
    width, height = left + columns * side, head + foot + rows * side
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=left / width, right=0.997, bottom=foot / height, top=1 - head / height, wspace=0.03, hspace=0.03
    )
    return figure, axes


def _explain(figure: Figure, score_threshold: float, iou: float) -> None:
    handles = [
        Line2D([], [], color=TRUTH, label="ground truth"),
        Line2D([], [], color=CORRECT, label=f"correct: right class, IoU ≥ {iou:g}"),
        Line2D([], [], color=WRONG, label="false: wrong class or place, or found twice"),
        Line2D([], [], color=MISSED, linestyle=_DASHED, label="missed object"),
    ]
    height = figure.get_figheight()
    title = f"Detections with a score of at least {score_threshold:g}, same validation images"
    figure.suptitle(title, y=1 - 0.1 / height, va="top", fontsize=12)
    figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.36 / height),
        ncols=2 if figure.get_figwidth() < 10 else 4,
        fontsize=8,
        facecolor="#606060",  # white cannot be seen on white
        labelcolor="white",
        framealpha=1,
        borderpad=0.3,
    )


def _read(results_json: Path) -> list[dict]:
    return json.loads(Path(results_json).read_text(encoding="utf-8"))


def _by_image(detections: Sequence[dict], score_threshold: float) -> dict[int, list[dict]]:
    images = defaultdict(list)
    for detection in detections:
        if detection["score"] >= score_threshold:
            images[detection["image_id"]].append(detection)
    return images
