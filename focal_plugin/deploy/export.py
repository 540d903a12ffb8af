"""Write a trained model as TorchScript or ONNX through Detectron2's ``TracingAdapter``, and compare the two.

The exported model takes one image and returns what ``model([{"image": image}])`` does, as a tuple of tensors
(:data:`OUTPUTS`). Height and width are free.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import detectron2
import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import inference_context
from detectron2.export import TracingAdapter
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..files import atomic_write

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


class MissingPackageError(ImportError):
    """Tell that a package that only the export needs is not installed; the message says how to install it."""


def require(package: str, purpose: str) -> object:
    """Import ``package``, or raise a :class:`MissingPackageError`."""
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise MissingPackageError(f"{purpose} needs the package {package} ({e}): pip install {package}") from e


def read_sample(cfg: CfgNode, path: str | os.PathLike | None = None) -> Tensor:
    """Return an image as the exported model takes it: float32 (3, H, W), 0 to 255, resized as for a test.

    Without a ``path``: noise, which most models find something in.

    Raises:
        ValueError: it is no image; the message names it.
    """
    if path is None:
        coarse = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        image = coarse.repeat(32, axis=0).repeat(32, axis=1)  # blobs: fine noise is flat for a network
    else:
        try:
            image = read_image(path, cfg.INPUT.FORMAT)
        except Exception as e:  # Pillow raises what its decoders do
            raise ValueError(f"--sample-image {path} cannot be read as an image: {e}") from e
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    image = resize.get_transform(image).apply_image(image)
    return torch.as_tensor(image.astype(np.float32).transpose(2, 0, 1))


def export(model: nn.Module, image: Tensor, path: str | os.PathLike) -> None:
    """Write a model as ONNX if ``path`` ends in .onnx, else as TorchScript.

    ``torch.jit.load`` reads the latter and needs torchvision, whose NMS it calls.

    Args:
        model: a RetinaNet on the CPU, in whatever mode; it comes back as it was.
        image: float32 (3, H, W) to trace with.
        path: the file, which is whole or not there.

    Raises:
        MissingPackageError: onnx is not installed.
        ValueError: an operation of the model cannot be exported.
    """
    is_onnx = os.fspath(path).endswith(".onnx")
    if is_onnx:
        require("onnx", "an ONNX export")
    modes = [(module, module.training) for module in model.modules()]  # the exporters leave others behind
    try:
        adapter = TracingAdapter(model.eval(), [{INPUT: image}]).eval()
        with atomic_write(path, "wb") as file:
            if is_onnx:
                torch.onnx.export(
                    adapter,
                    adapter.flattened_inputs,
                    file,
                    dynamo=False,  # the other exporter cannot follow Detectron2's data-dependent shapes
                    opset_version=OPSET,
                    input_names=[INPUT],
                    output_names=list(OUTPUTS),
                    dynamic_axes={INPUT: {1: "height", 2: "width"}} | {name: {0: "N"} for name in list(OUTPUTS)[:3]},
                )
            else:  # not compared with a second trace: that would find the adapter's new outputs_schema different
                torch.jit.save(torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False), file)
    except (RuntimeError, ValueError) as e:  # an operation that torch's exporters do not know; a too small image
        height, width = image.shape[1:]
        raise ValueError(
            f"{type(model).__name__} with this backbone and head cannot be exported with a sample image of {height} x "
            f"{width}: {e}"
        ) from e
    finally:
        for module, training in modes:
            module.training = training


def write_description(path: str | os.PathLike, cfg: CfgNode, classes: Sequence[str], formats: Sequence[str]) -> None:
    """Write ``model.json``: all that a program must know to use the exported model."""
    retinanet = cfg.MODEL.RETINANET
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, detectron2)}
    if "onnx" in formats:
        versions |= {"onnx": require("onnx", "an ONNX export").__version__, "opset": OPSET}
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
        "versions": versions,
    }
    with atomic_write(path) as file:
        json.dump(description, file, indent=2)
        file.write("\n")


# ------------------------------ does it find what the model finds?


class Difference(NamedTuple):
    """What two models find differently in one image.

    Attributes:
        count: detections that have a partner.
        box, score: how far these are apart at most; pixels, and of 1.
        skipped: detections that have none and, see :func:`compare`, need none.
        problems: a line for each other one.
    """

    count: int = 0
    box: float = 0.0
    score: float = 0.0
    skipped: int = 0
    problems: Sequence[str] = ()


def check_export(model: RetinaNet, path: str | os.PathLike, sample: Tensor) -> dict[str, Difference]:
    """Compare an exported model with the model in a handful of images, whose names are returned with the differences.

    Two sizes, each as it is and turned round, and an image in which nothing is found.

    Args:
        model: on the CPU, in whatever mode.
        path: of the exported model.
        sample: float32 (3, H, W).

    Raises:
        MissingPackageError: onnxruntime is not installed, and the file ends in .onnx.
    """
    exported, differences = load_exported(path), {}
    for name, image in check_images(model, sample).items():
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


def check_images(model: RetinaNet, sample: Tensor) -> dict[str, Tensor]:
    """Return names and images of :func:`check_export`."""
    height, width = sample.shape[-2:]
    other = (max(1, height * 3 // 4 + 5), max(1, width * 5 // 4 + 3))  # no multiple of the strides
    images = {}
    for size in ((height, width), other):
        image = interpolate(sample[None], size, mode="bilinear", align_corners=False)[0]
        images[f"{size[0]} x {size[1]}"] = image
        images[f"{size[0]} x {size[1]}, turned"] = image.flip(1, 2).contiguous()
    # Of one colour, and not of a smaller size, for which a GroupNorm has too few pixels on the last level.
    for colour in (model.pixel_mean.cpu(), *torch.tensor([0.0, 255.0, 64.0, 192.0]).view(4, 1, 1, 1)):
        image = colour.expand(3, *other).contiguous()
        if len(detect(model, image)[0]) == 0:
            return {**images, "nothing to find": image}
    return images


def detect(model: RetinaNet, image: Tensor) -> Detections:
    """Return what the model itself finds in a float32 (3, H, W) image."""
    with inference_context(model), torch.no_grad():
        found = model([{INPUT: image}])[0]["instances"]
    return found.pred_boxes.tensor, found.pred_classes, found.scores


def compare(want: Detections, got: Detections, model: RetinaNet) -> Difference:
    """Pair what two models find in an image, in whatever order it is, and say what has no partner.

    It must have one if it scores :data:`MIN_SCORE` or is among the best :data:`COMPARED`, and lies above the model's
    own cuts: the threshold, and the last of ``max_detections_per_image``. Which of the others are kept, of thousands
    that suppress each other, rounding decides.
    """
    scores = want[2].sort(descending=True).values.tolist()
    least = model.test_score_thresh
    if len(scores) > COMPARED:
        least = max(least, min(MIN_SCORE, scores[COMPARED]))
    if len(scores) >= model.max_detections_per_image:
        least = max(least, scores[-1])
    boxes = (want[0][:, None] - got[0][None]).abs().amax(dim=2)
    apart = (want[2][:, None] - got[2][None]).abs()
    cost = torch.maximum(boxes / BOX_TOLERANCE, apart / SCORE_TOLERANCE).nan_to_num(nan=1e6).clamp(max=1e6)
    cost = cost.masked_fill(want[1][:, None] != got[1][None], 1e6)
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(cost)) if cost[i, j] <= 1]
    problems, skipped = [], 0
    for mine, other, paired, what in (
        (want, got, {i for i, _ in pairs}, "missing"),
        (got, want, {j for _, j in pairs}, "too many"),
    ):
        for i in set(range(len(mine[0]))) - paired:
            box, label, score = mine[0][i], int(mine[1][i]), float(mine[2][i])
            if score <= least + SCORE_TOLERANCE:  # not NaN
                skipped += 1
                continue
            near = (other[0][other[1] == label] - box).abs().amax(dim=1).tolist()
            nearest = f"; the nearest of its class is {min(near):.3g} px off" if near else ""
            place = ", ".join(f"{x:.1f}" for x in box.tolist())
            problems.append(f"class {label} at ({place}), score {score:.4f}, is {what}{nearest}")
    box, score = (max((float(x[i, j]) for i, j in pairs), default=0.0) for x in (boxes, apart))
    return Difference(len(pairs), box, score, skipped, problems)


def format_differences(differences: dict[str, Difference]) -> str:
    """Return a line for each image, and a verdict."""
    lines, compared, wrong = [], 0, 0
    for name, d in differences.items():
        line = f"  {name:<22} {d.count:>4} detections, boxes within {d.box:.2g} px, scores within {d.score:.2g}"
        lines.append(line + (f"; {d.skipped} of low score not compared" if d.skipped else ""))
        lines += [f"    {problem}" for problem in d.problems[:3]]
        lines += [f"    and {len(d.problems) - 3} more"] if len(d.problems) > 3 else []
        compared, wrong = compared + d.count, wrong + len(d.problems)
    verdict = f"the same {compared} detections, to {BOX_TOLERANCE:g} px and {SCORE_TOLERANCE:g} in score"
    if not compared:
        verdict = "nothing was found that could be compared, which says little: give --sample-image one with objects"
    return "\n".join([*lines, f"  NOT the same: {wrong} problem(s)" if wrong else f"  {verdict}"])
