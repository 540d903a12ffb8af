"""Run a trained model on images and videos of your own: pictures with boxes, and the detections as COCO results.

In Python, one image::

    predictor = Predictor(get_config("digits/focal.yaml", ["MODEL.WEIGHTS", "model_final.pth"]))
    found = predictor(cv2.imread("photo.png"))  # Instances: pred_boxes, pred_classes, scores
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_PIL_to_numpy, read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..data import add_register_argument
from ..engine import load_checked_config
from ..engine.checkpoint import build_trained_model
from ..files import atomic_write, printable

logger = logging.getLogger(__name__)

VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
SHORTEST_EDGE = 400  # smaller pictures are drawn enlarged, or their labels could not be read


def add_model_arguments(parser: ArgumentParser) -> None:
    """Add ``--config-file``, ``--register`` and ``--classes``: which model, and how its classes are called."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="the config of the model (required)")
    add_register_argument(parser, "for its class names and category ids")
    text = "class names (default: those in the checkpoint, else of --register or DATASETS.TEST, else numbers)"
    split = functools.partial(re.split, r"\s*,\s*")
    parser.add_argument("--classes", type=split, default=(), metavar="A,B,C", help=text)


def load_inference_config(args: Namespace) -> CfgNode:
    """Return the checked config of a command line, whose DATASETS need not be on this machine.

    ``args`` have ``config_file``, ``register`` and ``opts`` (``KEY VALUE ...``).

    Raises:
        FileNotFoundError, ValueError: the config, a key, the weights; the message says which.
    """
    cfg = load_checked_config(Namespace(**vars(args), eval_only=False, resume=False), needs_data=False)
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("no trained weights: add MODEL.WEIGHTS path/to/model_final.pth")
    registered = [text.partition("=")[0] for text in args.register]
    cfg.defrost()
    cfg.DATASETS.TEST = tuple(sorted(registered, key=lambda name: name not in cfg.DATASETS.TEST)) or cfg.DATASETS.TEST
    return cfg


def name_classes(cfg: CfgNode, given: Sequence[str] = ()) -> tuple[list[str], list[int]]:
    """Return how the model's K classes are called, and their ids in COCO results.

    The names are those ``given``, else those of the first DATASETS.TEST where it is registered, else "0", "1", ... The
    ids are that data set's where its names are those used, else 0, 1, ...

    Raises:
        ValueError: there are not K names in ``given`` or in the data set.
    """
    dataset = "".join(cfg.DATASETS.TEST[:1])
    known = MetadataCatalog.get(dataset).as_dict() if dataset in MetadataCatalog.list() else {}
    of_dataset, indices = list(known.get("thing_classes") or []), range(cfg.MODEL.RETINANET.NUM_CLASSES)
    names = list(given) or of_dataset or [str(index) for index in indices]
    if len(names) != len(indices) or not all(names):
        source = f"--classes {','.join(given)}" if given else f"DATASETS.TEST {dataset}"
        text = f"{source} has {len(names)} class names and the model {len(indices)} (MODEL.RETINANET.NUM_CLASSES)"
        raise ValueError(f"{text}: give as many with --classes A,B,C")
    if not set(names) <= set(of_dataset):
        return names, list(indices)
    ids = {index: category for category, index in known.get("thing_dataset_id_to_contiguous_id", {}).items()}
    positions = indices if names == of_dataset else map(of_dataset.index, names)
    return names, [ids.get(position, position) for position in positions]


def to_input(cfg: CfgNode, image: np.ndarray) -> Tensor:
    """Turn a BGR uint8 (H, W, 3) image into a model's: float32 (C, H', W'), 0 to 255, resized as for a test."""
    image = convert_PIL_to_numpy(Image.fromarray(image[:, :, ::-1]), cfg.INPUT.FORMAT)
    resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST).get_transform(image)
    return torch.as_tensor(resize.apply_image(image).astype(np.float32).transpose(2, 0, 1))


class Predictor:
    """Find objects in an image as the evaluation of the model would: on the GPU, or the CPU where there is none.

    Args:
        cfg: the config with ``MODEL.WEIGHTS``, which are read safely and must be all of the model's.
        classes: K names; without, the checkpoint's, else as :func:`name_classes`.
        score_threshold: detections below it are left out; it may be lower than ``MODEL.RETINANET.SCORE_THRESH_TEST``.
            None: the checkpoint's, else 0.5.

    Raises:
        FileNotFoundError, ValueError: ``MODEL.WEIGHTS``, or not K names.
    """

    def __init__(self, cfg: CfgNode, classes: Sequence[str] = (), score_threshold: float | None = None):
        self.cfg = cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu"
        self.model = build_trained_model(cfg).eval()
        stored = _read_stored(cfg)
        self.classes, self.category_ids = name_classes(cfg, classes or stored.get("thing_classes", ()))
        self.score_threshold = stored.get("score_threshold", 0.5) if score_threshold is None else score_threshold
        self.model.test_score_thresh = min(self.model.test_score_thresh, self.score_threshold)

    def __call__(self, image: np.ndarray) -> Instances:
        """Return what is found in a BGR uint8 (H, W, 3) image, in its pixels, on the CPU.

        Instances with ``pred_boxes`` (N, 4) XYXY, ``pred_classes`` (N,) and ``scores`` (N,), highest first.
        """
        inputs = {"image": to_input(self.cfg, image), "height": image.shape[0], "width": image.shape[1]}
        with torch.no_grad():
            found = self.model([inputs])[0]["instances"].to("cpu")
        return found[found.scores >= self.score_threshold]

    def draw(self, image: np.ndarray, found: Instances) -> np.ndarray:
        """Return a BGR uint8 image with boxes, classes and scores, one colour a class; a small one is enlarged."""
        scale = min(4, math.ceil(SHORTEST_EDGE / min(image.shape[:2])))
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        (height, width), visualizer, taken = image.shape[:2], Visualizer(image[:, :, ::-1]), []
        axes, renderer = visualizer.output.ax, visualizer.output.canvas.get_renderer()
        colors, boxes = colormap(rgb=True, maximum=1), (found.pred_boxes.tensor * scale).tolist()
        for (x, top, right, bottom), label, score in zip(boxes, found.pred_classes.tolist(), found.scores.tolist()):
            visualizer.draw_box((x, top, right, bottom), alpha=1.0, edge_color=colors[label % len(colors)])
            axes.patches[-1].set(zorder=5 + score)  # the surest on top, as its label
            # Between two "$" Matplotlib would see a formula.
            name = printable(self.classes[label], quotes=False).replace("$", r"\$")
            visualizer.draw_text(f"{name} {score:.0%}", (x, top), color="w", horizontal_alignment="left")
            # In the picture, above the box or, where that is taken, below it or in it.
            size = axes.texts[-1].get_window_extent(renderer).padded(1)
            x, ends = max(0, min(x, width - size.width)), (top - size.height, bottom, top)
            spots = [Bbox.from_bounds(x, max(0, min(y, height - size.height)), size.width, size.height) for y in ends]
            taken.append(next((spot for spot in spots if not spot.count_overlaps(taken)), spots[0]))
            axes.texts[-1].set(position=taken[-1].p0 + 1, zorder=10 + score)
        return np.ascontiguousarray(visualizer.output.get_image()[:, :, ::-1])


def _read_stored(cfg: CfgNode) -> dict:
    """Return what a checkpoint that has been loaded holds, without names and a threshold that cannot be the model's."""
    if "://" in cfg.MODEL.WEIGHTS or not cfg.MODEL.WEIGHTS.endswith(".pth"):
        return {}
    stored = torch.load(cfg.MODEL.WEIGHTS, map_location="meta", weights_only=True)  # no tensor is read
    num_classes, is_possible = cfg.MODEL.RETINANET.NUM_CLASSES, {}
    is_possible["score_threshold"] = lambda score: isinstance(score, float) and 0 <= score <= 1
    is_possible["thing_classes"] = lambda names: (
        isinstance(names, list) and len(names) == num_classes and all(isinstance(n, str) and n.strip() for n in names)
    )
    for key in is_possible.keys() & stored.keys():
        if not is_possible[key](stored[key]):
            value = printable(stored.pop(key))
            logger.warning(f"{cfg.MODEL.WEIGHTS}: its {key} {value} cannot be this model's: left out")
    return stored


def predict(
    predictor: Predictor, targets: Mapping[Path, Path], output: Path
) -> Iterator[tuple[Path, int | ValueError]]:
    """Draw what is found in each image or video to its target, and write ``detections.json`` at the end.

    These are COCO results, with ``file_name``, ``category`` (the class's name) and, for videos, the ``frame`` from 0.
    ``image_id`` counts images (unreadable ones, too) and frames from 0.

    Yields:
        Each path with how many objects were found in it, or with why it could not be read or drawn.
    """
    results: list[dict] = []
    image_id = 0
    for path, target in targets.items():
        before, is_video = len(results), path.suffix.lower() in VIDEOS
        try:
            for number, found in enumerate(_predict_file(predictor, path, target)):
                for result in instances_to_coco_json(found, image_id):
                    label = result["category_id"]
                    result |= {"category_id": predictor.category_ids[label], "category": predictor.classes[label]}
                    result |= {"file_name": os.fspath(path), **({"frame": number} if is_video else {})}
                    results.append(result)
                image_id += 1
        except ValueError as e:
            image_id += not is_video
            yield path, e
        else:
            yield path, len(results) - before
    with atomic_write(output / "detections.json") as file:
        json.dump(results, file)


def _predict_file(predictor: Predictor, path: Path, target: Path) -> Iterator[Instances]:
    """Yield what is found in an image, or in each frame of a video, after drawing it to ``target``."""
    is_video, writer = path.suffix.lower() in VIDEOS, None  # which ends its file when nothing refers to it any more
    if is_video:
        video = cv2.VideoCapture(os.fspath(path))
        total, rate = (max(0, video.get(key)) for key in (cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS))  # 0: unknown
        frames = (frame for _, frame in iter(video.read, (False, None)))
        images = tqdm(frames, total=total or None, unit="frame", disable=None)
        codec = cv2.VideoWriter_fourcc(*("MJPG" if target.suffix.lower() == ".avi" else "mp4v"))
    else:
        images = [read_picture(path)]
    for image in images:
        try:
            found = predictor(image)
        except ValueError as e:  # of a side that would be resized to no pixel, or too few for the network's norms
            height, width = image.shape[:2]
            raise ValueError(f"{path}, {width} x {height} pixels, cannot be predicted on: {e}") from e
        picture = predictor.draw(image, found)
        target.parent.mkdir(parents=True, exist_ok=True)
        if is_video:
            writer = writer or cv2.VideoWriter(os.fspath(target), codec, rate or 25, picture.shape[1::-1])
            writer.write(picture)
        if not (writer.isOpened() if is_video else cv2.imwrite(os.fspath(target), picture)):
            raise ValueError(f"{target} cannot be written")
        yield found
    if is_video and writer is None:
        raise ValueError(f"{path} cannot be read as a video (or OpenCV lacks its codec)")


def read_picture(path: str | os.PathLike) -> np.ndarray:
    """Return an image file as BGR uint8 (H, W, 3), turned as its EXIF says, or raise a ValueError."""
    try:
        return read_image(os.fspath(path), "BGR")
    except Exception as e:  # Pillow raises what its decoders do
        raise ValueError(f"{path} cannot be read as an image: {e}") from e
