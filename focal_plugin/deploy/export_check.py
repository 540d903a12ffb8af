"""Does an exported model find what the model finds?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from detectron2.evaluation import inference_context
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import box_iou

from .export import INPUT, require

BOX_TOLERANCE = 1e-2  # pixels
SCORE_TOLERANCE = 1e-4
IOU_TOLERANCE = 1e-2  # see _at_a_cut

Detections = tuple[Tensor, Tensor, Tensor]  # boxes (N, 4), classes (N,), scores (N,)


def load_exported(path: str | os.PathLike) -> Callable[[Tensor], Detections]:
    """The exported model of a file, as a function of a float32 (3, H, W) image.

    Raises:
        MissingPackageError: onnxruntime is not installed, and the file ends in .onnx.
    """
    path = os.fspath(path)
    if not path.endswith(".onnx"):
        traced = torch.jit.load(path)

        def run(image: Tensor) -> Detections:
            with torch.no_grad():
                return tuple(traced(image)[:3])

        return run
    onnxruntime = require("onnxruntime", "checking an ONNX export (--no-check leaves it out)")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: tuple(map(torch.as_tensor, session.run(None, {INPUT: image.numpy()})[:3]))


@dataclass
class Difference:
    """Between what two models find in one image.

    Attributes:
        count: what the first finds.
        box, score: the largest differences of detections that have a partner of their class; pixels, and of 1.
        cut: detections that differ because they lie at a cut (see :func:`compare`).
        problems: one line for each detection that differs otherwise.
    """

    count: int
    box: float = 0.0
    score: float = 0.0
    cut: int = 0
    problems: list[str] = field(default_factory=list)


def compare(want: Detections, got: Detections, model: RetinaNet) -> Difference:
    """Pairs the detections of an image by two models, in whatever order they are.

    Equal scores may come in another order, and are no difference. Nor is a detection at a cut: two correct models
    that round differently need not agree on one whose score is the threshold, or that of the last of
    ``max_detections_per_image``, or that overlaps another by just the IoU at which NMS suppresses. (That is real: above
    1,000 candidates torchvision's eager NMS goes class by class, and its traced one shifts the boxes of each class,
    which costs digits.)

    Args:
        want, got: boxes (N, 4) XYXY, classes (N,), scores (N,).
        model: whose thresholds they were found with.
    """
    difference = Difference(len(want[0]))
    boxes = (want[0][:, None] - got[0][None]).abs().amax(dim=2)
    scores = (want[2][:, None] - got[2][None]).abs()
    cost = torch.maximum(boxes / BOX_TOLERANCE, scores / SCORE_TOLERANCE)
    cost = cost.masked_fill(want[1][:, None] != got[1][None], torch.inf).nan_to_num(nan=torch.inf, posinf=torch.inf)
    lone_want, lone_got = set(range(len(want[0]))), set(range(len(got[0])))
    for i, j in _pair(cost):
        apart = cost[i, j] > 1
        if apart and _at_a_cut(i, want, got, model) and _at_a_cut(j, got, want, model):
            difference.cut += 1
        else:
            difference.box = max(difference.box, float(boxes[i, j]))
            difference.score = max(difference.score, float(scores[i, j]))
            if apart:
                difference.problems.append(
                    f"{_name(i, want)} is off by {float(boxes[i, j]):.3g} px and {float(scores[i, j]):.3g} in score"
                )
        lone_want.remove(i)
        lone_got.remove(j)
    for lone, mine, other, what in ((lone_want, want, got, "missing"), (lone_got, got, want, "too many")):
        cut = {i for i in lone if _at_a_cut(i, mine, other, model)}
        difference.cut += len(cut)
        difference.problems += [f"{_name(i, mine)} is {what}" for i in sorted(lone - cut)]
    return difference


def _pair(cost: Tensor) -> Iterator[tuple[int, int]]:
    """Rows and columns of an (N, M) matrix, cheapest first, each at most once, while the cost is finite."""
    cost = cost.clone()
    for _ in range(min(cost.shape)):
        i, j = divmod(int(cost.argmin()), cost.shape[1])
        if not torch.isfinite(cost[i, j]):
            return
        yield i, j
        cost[i], cost[:, j] = torch.inf, torch.inf


def _at_a_cut(i: int, mine: Detections, other: Detections, model: RetinaNet) -> bool:
    """Whether rounding decides if the i-th of my detections is kept."""
    box, label, score = mine[0][i : i + 1], mine[1][i], mine[2][i]
    if score <= model.test_score_thresh + SCORE_TOLERANCE:
        return True
    if len(other[2]) >= model.max_detections_per_image and score <= other[2].min() + SCORE_TOLERANCE:
        return True
    rivals = other[0][(other[1] == label) & (other[2] >= score - SCORE_TOLERANCE)]
    return bool(((box_iou(box, rivals) - model.test_nms_thresh).abs() < IOU_TOLERANCE).any())


def _name(i: int, detections: Detections) -> str:
    box = ", ".join(f"{x:.1f}" for x in detections[0][i].tolist())
    return f"class {int(detections[1][i])} at ({box}), score {float(detections[2][i]):.4f},"


def detect(model: RetinaNet, image: Tensor) -> Detections:
    """What the model itself finds in a float32 (3, H, W) image."""
    with inference_context(model), torch.no_grad():
        found = model([{INPUT: image}])[0]["instances"]
    return found.pred_boxes.tensor, found.pred_classes, found.scores


def check_images(model: RetinaNet, sample: Tensor) -> dict[str, Tensor]:
    """Names and images to compare on: two sizes, each as it is and turned round, and one in which nothing is found."""
    height, width = sample.shape[-2:]
    other = (max(1, height * 3 // 4 + 5), max(1, width * 5 // 4 + 3))  # no multiple of the strides
    images = {}
    for size in ((height, width), other):
        image = interpolate(sample[None], size, mode="bilinear", align_corners=False)[0]
        images[f"{size[0]} x {size[1]}"] = image
        images[f"{size[0]} x {size[1]}, turned"] = image.flip(1, 2).contiguous()
    empty = _nothing_found(model, other)
    return images if empty is None else {**images, "nothing to find": empty}


def _nothing_found(model: RetinaNet, size: tuple[int, int]) -> Tensor | None:
    """An image of one colour in which the model finds nothing.

    Not of a smaller size than the others, for which a GroupNorm has too few pixels on the last level.
    """
    for colour in (model.pixel_mean.cpu(), *torch.tensor([0.0, 255.0, 64.0, 192.0]).view(4, 1, 1, 1)):
        image = colour.expand(3, *size).contiguous()
        if len(detect(model, image)[0]) == 0:
            return image
    return None


def check_export(model: RetinaNet, path: str | os.PathLike, sample: Tensor) -> dict[str, Difference]:
    """Compares an exported model with the model on the images of :func:`check_images`; their names and differences.

    Args:
        model: on the CPU, in whatever mode.
        path: of the exported model.
        sample: float32 (3, H, W).

    Raises:
        MissingPackageError: as :func:`load_exported`.
    """
    exported = load_exported(path)
    images = check_images(model, sample)
    differences = {}
    for name, image in images.items():
        want = detect(model, image)
        try:
            differences[name] = compare(want, exported(image), model)
        except Exception as e:  # of a runtime that is not ours
            differences[name] = Difference(len(want[0]), problems=[f"the exported model failed: {e}"])
    return differences


def format_differences(differences: dict[str, Difference]) -> str:
    """A line for each image, and one of the largest differences."""
    lines = []
    for name, d in differences.items():
        line = f"  {name:<22} {d.count:>4} detections, boxes within {d.box:.2g} px, scores within {d.score:.2g}"
        lines.append(line + (f"; {d.cut} at a cut-off not compared" if d.cut else ""))
        lines += [f"    {problem}" for problem in d.problems[:3]]
        if len(d.problems) > 3:
            lines.append(f"    and {len(d.problems) - 3} more")
    if all(d.count for d in differences.values()):
        lines.append("  an image in which nothing is found was not compared: the model found something in all tried")
    if not any(d.count for d in differences.values()):
        lines.append("  nothing was found in any image, which says little: give --sample-image one with objects")
    box, score = max(d.box for d in differences.values()), max(d.score for d in differences.values())
    wrong = sum(len(d.problems) for d in differences.values())
    verdict = f"NOT the same: {wrong} problem(s)" if wrong else "the same detections"
    lines.append(f"  {verdict}; largest differences {box:.2g} px, {score:.2g} in score")
    return "\n".join(lines)
