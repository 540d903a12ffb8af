"""A trained model as TorchScript or ONNX, through upstream's ``TracingAdapter``.

The exported model takes one image and returns what ``model([{"image": image}])`` does, as a tuple of tensors
(:data:`OUTPUTS`). Height and width are free. Whether it computes the same, :mod:`focal_plugin.deploy.export_check`
says.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import detectron2
import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data.detection_utils import read_image
from detectron2.export import TracingAdapter
from torch import Tensor, nn

from ..files import TEMPORARY, atomic_write
from .model import resize_for_test

FILES = {"torchscript": "model.ts", "onnx": "model.onnx"}
OPSET = 16  # upstream's STABLE_ONNX_OPSET_VERSION, 11, is older than torch exports today
INPUT = "image"
# Upstream's order: the fields of Instances sorted by name, then its image size.
OUTPUTS = {
    "boxes": ("float32", ["N", 4], "XYXY in pixels of the input image"),
    "classes": ("int64", ["N"], "index into the class names"),
    "scores": ("float32", ["N"], "confidence in the class, 0 to 1, highest first"),
    "image_size": ("int64", [2], "height and width of the input image"),
}


class MissingPackageError(ImportError):
    """A package that only the export needs is not installed; the message says how to install it."""


def require(package: str, purpose: str) -> object:
    """The module ``package``.

    Raises:
        MissingPackageError: it cannot be imported.
    """
    try:
        return importlib.import_module(package)
    except ImportError as e:
        raise MissingPackageError(f"{purpose} needs the package {package} ({e}): pip install {package}") from e


def read_sample(cfg: CfgNode, path: str | os.PathLike | None = None) -> Tensor:
    """An image as the exported model takes it: float32 (3, H, W), 0..255, resized as for a test.

    Args:
        cfg: the config of the model.
        path: an image file; None: noise, which most models find something in.

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
    image = resize_for_test(cfg).get_transform(image).apply_image(image)
    return torch.as_tensor(image.astype(np.float32).transpose(2, 0, 1))


def export_torchscript(model: nn.Module, image: Tensor, path: str | os.PathLike) -> None:
    """Writes a model that ``torch.jit.load`` reads; needs torch and torchvision, whose NMS it calls.

    Args:
        model: a RetinaNet on the CPU, in whatever mode; it comes back as it was.
        image: float32 (3, H, W) to trace with.
        path: the file, which is whole or not there.

    Raises:
        ValueError: an operation of the model cannot be exported.
    """
    with _tracing(model, image) as adapter:
        # Not compared with a second trace: that would find the adapter's new outputs_schema different.
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
    with atomic_write(path, "wb") as file:
        torch.jit.save(traced, file)


def export_onnx(model: nn.Module, image: Tensor, path: str | os.PathLike) -> None:
    """Writes an ONNX model of opset :data:`OPSET` whose input's height and width are free; arguments as above.

    Raises:
        MissingPackageError: onnx is not installed.
        ValueError: an operation of the model cannot be exported.
    """
    require("onnx", "an ONNX export")
    temporary = Path(path).with_name(Path(path).name + TEMPORARY)
    try:
        with _tracing(model, image) as adapter:
            torch.onnx.export(
                adapter,
                adapter.flattened_inputs,
                os.fspath(temporary),
                dynamo=False,  # the other exporter cannot follow upstream's data-dependent shapes
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_axes={INPUT: {1: "height", 2: "width"}} | {name: {0: "N"} for name in list(OUTPUTS)[:3]},
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


EXPORTERS = {"torchscript": export_torchscript, "onnx": export_onnx}


@contextmanager
def _tracing(model: nn.Module, image: Tensor) -> Iterator[TracingAdapter]:
    """The model in inference mode behind upstream's adapter; both exporters leave modes behind that are not its own."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield TracingAdapter(model.eval(), [{INPUT: image}]).eval()
    except (RuntimeError, ValueError) as e:  # an operation that torch's exporters do not know; a too small image
        height, width = image.shape[1:]
        raise ValueError(
            f"{type(model).__name__} with this backbone and head cannot be exported with a sample image of {height} x "
            f"{width}: {e}"
        ) from e
    finally:
        for module, training in modes:
            module.training = training


def describe(cfg: CfgNode, classes: Sequence[str], formats: Sequence[str]) -> dict:
    """What a program must know to use the exported model, for :func:`write_description`."""
    retinanet = cfg.MODEL.RETINANET
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, detectron2)}
    if "onnx" in formats:
        versions |= {"onnx": require("onnx", "an ONNX export").__version__, "opset": OPSET}
    return {
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


def write_description(path: str | os.PathLike, description: dict) -> None:
    """``model.json``, beside the exported model."""
    with atomic_write(path) as file:
        json.dump(description, file, indent=2)
        file.write("\n")
