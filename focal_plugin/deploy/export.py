"""Write a trained model as TorchScript or ONNX through Detectron2's ``TracingAdapter``, and compare the two.

The exported model takes one image and returns what ``model([{"image": image}])`` does, as a tuple of tensors
(:data:`OUTPUTS`). Height and width are free.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_context
from detectron2.export import TracingAdapter
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..files import atomic_write, versions
from .predict import read_picture, to_input

FILES = {"torchscript": "model.ts", "onnx": "model.onnx"}
OPSET = 16  # Detectron2's STABLE_ONNX_OPSET_VERSION, 11, is older than torch exports today
INPUT = "image"
# Detectron2's order: the fields of Instances sorted by name, then its image size.
OUTPUTS = {
    "boxes": ("float32", ["N", 4], "XYXY in pixels of the input image"),
    "classes": ("int64", ["N"], "index into the class names"),
    "scores": ("float32", ["N"], "confidence in the class, 0 to 1, highest first"),
    "image_size": ("int64", [2], "height and width of the input image"),
}
BOX_TOLERANCE = 1e-2  # pixels
SCORE_TOLERANCE = 1e-4
COMPARED = 20  # detections of an image that are compared even if they score less than MIN_SCORE
MIN_SCORE = 0.3

Detections = tuple[Tensor, Tensor, Tensor]  # boxes (N, 4) XYXY, classes (N,), scores (N,)


def require(package: str, purpose: str) -> object:
    """Import a package that only the export needs, or raise an ImportError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise ImportError(f"{purpose} needs the package {package} ({e}): pip install {package}") from e


def read_sample(cfg: CfgNode, path: str | os.PathLike | None = None) -> Tensor:
    """Return an image, or noise in which most models find something, as the exported model takes it: see `to_input`.

    Raises:
        ValueError: it is no image; the message names it.
    """
    coarse = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    blobs = coarse.repeat(32, axis=0).repeat(32, axis=1)  # fine noise is flat for a network
    return to_input(cfg, blobs if path is None else read_picture(path))


def export(model: nn.Module, image: Tensor, path: str | os.PathLike) -> None:
    """Write a RetinaNet on the CPU, traced with a float32 (3, H, W) image, as ONNX if ``path`` ends in .onnx.

    Else as TorchScript: ``torch.jit.load`` reads it and needs torchvision, whose NMS it calls. The file is whole or not
    there.

    Raises:
        ImportError: onnx is not installed.
        ValueError: an operation of the model cannot be exported.
    """
    is_onnx, outputs = os.fspath(path).endswith(".onnx"), list(OUTPUTS)
    if is_onnx:
        require("onnx", "an ONNX export")
    axes = {INPUT: {1: "height", 2: "width"}} | {name: {0: "N"} for name in outputs[:3]}
    names = {"input_names": [INPUT], "output_names": outputs, "dynamic_axes": axes}
    try:
        # A copy, for the exporters leave modules in other modes.
        adapter = TracingAdapter(copy.deepcopy(model).eval(), [{INPUT: image}]).eval()
        inputs = adapter.flattened_inputs
        with atomic_write(path, "wb") as file:
            if is_onnx:  # by the exporter that can follow Detectron2's data-dependent shapes
                torch.onnx.export(adapter, inputs, file, dynamo=False, opset_version=OPSET, **names)
            else:  # not compared with a second trace: that would find the adapter's new outputs_schema different
                torch.jit.save(torch.jit.trace(adapter, inputs, check_trace=False), file)
    except (RuntimeError, ValueError) as e:  # an operation that torch's exporters do not know; a too small image
        size = "{} x {}".format(*image.shape[1:])
        raise ValueError(f"{type(model).__name__} cannot be exported with a sample image of {size}: {e}") from e


def write_description(path: str | os.PathLike, cfg: CfgNode, classes: Sequence[str], formats: Sequence[str]) -> None:
    """Write ``model.json``: all that a program must know to use the exported model."""
    retinanet, made_by = cfg.MODEL.RETINANET, versions()
    if "onnx" in formats:
        made_by |= {"onnx": require("onnx", "an ONNX export").__version__, "opset": OPSET}
    description = {
        "files": {name: FILES[name] for name in formats},
        "input": {
            "name": INPUT,
            "dtype": "float32",
            "shape": [3, "height", "width"],
            "values": "0 to 255; the model itself subtracts the mean, divides and pads",
            "channels": cfg.INPUT.FORMAT,
            "resize": {
                "shortest_edge": cfg.INPUT.MIN_SIZE_TEST,
                "longest_edge_at_most": cfg.INPUT.MAX_SIZE_TEST,
                "how": "aspect ratio kept, bilinear with antialiasing as Pillow's; shortest_edge 0: not resized",
            },
        },
        "outputs": [{"name": name, "dtype": d, "shape": s, "meaning": m} for name, (d, s, m) in OUTPUTS.items()],
        "after": "boxes are those of the resized image: divide by the factor it was resized by",
        "classes": list(classes),
        "thresholds": {
            "score": retinanet.SCORE_THRESH_TEST,
            "nms_iou": retinanet.NMS_THRESH_TEST,
            "candidates_per_level": retinanet.TOPK_CANDIDATES_TEST,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        },
        "device": "cpu",
        "weights": os.path.basename(cfg.MODEL.WEIGHTS),
        "versions": made_by,
    }
    with atomic_write(path) as file:
        file.write(json.dumps(description, indent=2) + "\n")


class Difference(NamedTuple):
    """What two models find differently in one image: of those paired, how many and how far apart at most."""

    count: int = 0
    box: float = 0.0  # pixels
    score: float = 0.0
    skipped: int = 0  # that have no partner and, see compare, need none
    problems: Sequence[str] = ()  # a line for each other one


def check_export(model: RetinaNet, path: str | os.PathLike, sample: Tensor) -> dict[str, Difference]:
    """Compare an exported model with the model in a handful of images, whose names are returned with the differences.

    Two sizes of the sample, float32 (3, H, W), each as it is and turned round, and an image in which nothing is found.
    The model is on the CPU, in whatever mode.

    Raises:
        ImportError: onnxruntime is not installed, and the file ends in .onnx.
    """
    exported, differences, images = load_exported(path), {}, {}
    height, width = sample.shape[-2:]
    other = (max(1, height * 3 // 4 + 5), max(1, width * 5 // 4 + 3))  # no multiple of the strides
    for size in ((height, width), other):
        image = interpolate(sample[None], size, mode="bilinear", align_corners=False)[0]
        images[f"{size[0]} x {size[1]}"] = image
        images[f"{size[0]} x {size[1]}, turned"] = image.flip(1, 2).contiguous()
    # Of one colour, and not of a smaller size, for which a GroupNorm has too few pixels on the last level.
    colours = (model.pixel_mean.cpu(), *torch.tensor([0.0, 255.0, 64.0, 192.0]).view(4, 1, 1, 1))
    for image in (colour.expand(3, *other).contiguous() for colour in colours):
        if len(detect(model, image)[0]) == 0:
            images["nothing to find"] = image
            break
    for name, image in images.items():
        want = detect(model, image)
        try:
            differences[name] = compare(want, exported(image), model)
        except Exception as e:  # of a runtime that is not ours
            differences[name] = Difference(problems=[f"the exported model failed: {e}"])
    return differences


def load_exported(path: str | os.PathLike) -> Callable[[Tensor], Detections]:
    """Return the exported model of a file as a function of a float32 (3, H, W) image."""
    path = os.fspath(path)
    if path.endswith(".onnx"):
        onnxruntime = require("onnxruntime", "checking an ONNX export (--no-check leaves it out)")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return lambda image: tuple(map(torch.as_tensor, session.run(None, {INPUT: image.numpy()})[:3]))
    traced = torch.jit.load(path)
    return lambda image: tuple(output.detach() for output in traced(image)[:3])


def detect(model: RetinaNet, image: Tensor) -> Detections:
    """Return what the model itself finds in a float32 (3, H, W) image."""
    with inference_context(model), torch.no_grad():
        found = model([{INPUT: image}])[0]["instances"]
    return found.pred_boxes.tensor, found.pred_classes, found.scores


def compare(want: Detections, got: Detections, model: RetinaNet) -> Difference:
    """Pair what two models find in an image, in whatever order it is, and say what has no partner.

    It must have one if it scores :data:`MIN_SCORE` or is among the best :data:`COMPARED`, and lies above what cuts it
    off: the model's threshold, and the other's last detection where that has ``max_detections_per_image``. Which of the
    others are kept, of thousands that suppress each other, rounding decides.
    """
    boxes = (want[0][:, None] - got[0][None]).abs().amax(dim=2)
    apart = (want[2][:, None] - got[2][None]).abs()
    cost = torch.maximum(boxes / BOX_TOLERANCE, apart / SCORE_TOLERANCE).nan_to_num(nan=1e6).clamp(max=1e6)
    cost = cost.masked_fill(want[1][:, None] != got[1][None], 1e6)
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(cost)) if cost[i, j] <= 1]
    problems, skipped = [], 0
    for side, mine, other, what in ((0, want, got, "missing"), (1, got, want, "too many")):
        is_full = len(other[2]) >= model.max_detections_per_image
        cut = max(model.test_score_thresh, float(other[2].min()) if is_full else 0.0) + SCORE_TOLERANCE
        best = mine[2].argsort(descending=True, stable=True)[:COMPARED].tolist()
        for i in set(range(len(mine[0]))) - {pair[side] for pair in pairs}:
            box, label, score = (found[i] for found in mine)
            if score <= cut or (score < MIN_SCORE and i not in best):  # not NaN
                skipped += 1
                continue
            near = (other[0][other[1] == label] - box).abs().amax(dim=1).tolist()
            place = ", ".join(f"{x:.1f}" for x in box.tolist())
            problems.append(
                f"class {label} at ({place}), score {score:.4f}, is {what}; the nearest of its class is "
                f"{min(near, default=math.inf):.3g} px off"
            )
    box, score = (max((float(x[i, j]) for i, j in pairs), default=0.0) for x in (boxes, apart))
    return Difference(len(pairs), box, score, skipped, problems)


def format_differences(differences: dict[str, Difference]) -> str:
    """Return a line for each image, and a verdict."""
    lines = []
    for name, d in differences.items():
        line = f"  {name:<22} {d.count:>4} detections, boxes within {d.box:.2g} px, scores within {d.score:.2g}"
        lines.append(line + (f"; {d.skipped} of low score not compared" if d.skipped else ""))
        lines += [f"    {problem}" for problem in d.problems[:3]]
        lines += [f"    and {len(d.problems) - 3} more"] if len(d.problems) > 3 else []
    compared, wrong = (sum(found) for found in zip(*((d.count, len(d.problems)) for d in differences.values())))
    verdict = f"the same {compared} detections, to {BOX_TOLERANCE:g} px and {SCORE_TOLERANCE:g} in score"
    if not compared:
        verdict = "nothing was found that could be compared, which says little: give --sample-image one with objects"
    return "\n".join([*lines, f"  NOT the same: {wrong} problem(s)" if wrong else f"  {verdict}"])
