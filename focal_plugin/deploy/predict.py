"""Run a trained model on images and videos of your own: pictures with boxes, and the detections as COCO results.

In Python, one image::

    predictor = Predictor(get_config("digits/focal.yaml", ["MODEL.WEIGHTS", "model_final.pth"]))
    found = predictor(cv2.imread("photo.png"))  # Instances: pred_boxes, pred_classes, scores
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import math
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib.transforms import Bbox
from tqdm import tqdm

from ..config import load_config
from ..data import add_register_argument
from ..engine import load_checked_config
from ..engine.checkpoint import build_trained_model
from ..files import atomic_write, printable

logger = logging.getLogger(__name__)

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
SHORTEST_EDGE = 400
"""Smaller pictures are drawn enlarged, or their labels could not be read."""


def add_model_arguments(parser: ArgumentParser) -> None:
    """Add ``--config-file``, ``--register`` and ``--classes``: which model, and how its classes are called."""
    parser.add_argument("--config-file", default="", metavar="FILE", help="the config of the model (required)")
    add_register_argument(parser, "for its class names and category ids")
    names = "class names (default: those in the checkpoint, else of --register or DATASETS.TEST, else numbers)"
    parser.add_argument("--classes", metavar="A,B,C", help=names)


def load_inference_config(args: Namespace) -> CfgNode:
    """Return the frozen, checked config of a command line, whose DATASETS.TEST need not be on this machine.

    ``args`` have ``config_file``, ``register`` and ``opts`` (``KEY VALUE ...``).

    Raises:
        FileNotFoundError, ValueError: the config, a key, the weights; the message says which.
    """
    given = load_config(args.config_file, args.opts)
    if not given.MODEL.WEIGHTS:
        raise ValueError("no trained weights: add MODEL.WEIGHTS path/to/model_final.pth")
    opts = [*args.opts, "DATASETS.TEST", "()"]
    cfg = load_checked_config(Namespace(**{**vars(args), "opts": opts, "eval_only": True, "resume": False}))
    registered = [text.partition("=")[0] for text in args.register]
    cfg.defrost()
    named = [name for name in given.DATASETS.TEST if name in registered]
    cfg.DATASETS.TEST = tuple(named or registered or given.DATASETS.TEST)
    cfg.freeze()
    return cfg


def read_extras(cfg: CfgNode) -> dict:
    """Return ``thing_classes`` and ``score_threshold`` of the checkpoint MODEL.WEIGHTS, where it has them.

    What cannot be of the model is left out with a warning. The weights have been loaded before, and so can be.
    """
    if "://" in cfg.MODEL.WEIGHTS or not cfg.MODEL.WEIGHTS.endswith(".pth"):
        return {}
    stored = torch.load(cfg.MODEL.WEIGHTS, map_location="meta", weights_only=True)  # no tensor is read
    names, score, extras = stored.get("thing_classes"), stored.get("score_threshold"), {}
    is_list = isinstance(names, list) and len(names) == cfg.MODEL.RETINANET.NUM_CLASSES
    if is_list and all(isinstance(name, str) and name.strip() for name in names):
        extras["thing_classes"] = names
    if isinstance(score, float) and 0 <= score <= 1:
        extras["score_threshold"] = score
    for key in (stored.keys() & {"thing_classes", "score_threshold"}) - extras.keys():
        logger.warning(f"{cfg.MODEL.WEIGHTS}: its {key} {printable(stored[key])} cannot be this model's: left out")
    return extras


def name_classes(cfg: CfgNode, given: str | None = None, stored: Sequence[str] = ()) -> tuple[list[str], list[int]]:
    """Return how the model's K classes are called, and their ids in COCO results.

    Args:
        cfg: whose first DATASETS.TEST, if it is registered with names, is asked for names last. Where its names are
            those used, the ids are its json's; else 0, 1, ...
        given: names with commas between them, which come first.
        stored: the checkpoint's, which come second. Where nothing says more, the names are "0", "1", ...

    Raises:
        ValueError: there are not K names in ``given`` or in the data set.
    """
    dataset = "".join(cfg.DATASETS.TEST[:1])
    known = MetadataCatalog.get(dataset).as_dict() if dataset in MetadataCatalog.list() else {}
    of_dataset, num_classes = list(known.get("thing_classes") or []), cfg.MODEL.RETINANET.NUM_CLASSES
    names = list(stored) or of_dataset or [str(number) for number in range(num_classes)]
    names = names if given is None else [name.strip() for name in given.split(",")]
    if len(names) != num_classes or not all(names):
        source = f"DATASETS.TEST {dataset}" if given is None else f"--classes {given}"
        raise ValueError(
            f"{source} has {len(names)} class names and the model {num_classes} (MODEL.RETINANET.NUM_CLASSES): give "
            "as many with --classes A,B,C"
        )
    if not set(names) <= set(of_dataset):
        return names, list(range(num_classes))
    ids = {index: category for category, index in known.get("thing_dataset_id_to_contiguous_id", {}).items()}
    indices = range(num_classes) if names == of_dataset else map(of_dataset.index, names)
    return names, [ids.get(index, index) for index in indices]


class Predictor:
    """Find objects in an image as the evaluation of the model would: on the GPU, or the CPU where there is none.

    Args:
        cfg: the config with ``MODEL.WEIGHTS``, which are read safely and must be all of the model's.
        classes: names with commas between them; None: the checkpoint's, else those of ``DATASETS.TEST``, else numbers.
        score_threshold: detections below it are left out. Lower than ``MODEL.RETINANET.SCORE_THRESH_TEST``, it
            replaces that: the model would never show them. None: the checkpoint's, else 0.5.

    Attributes:
        classes, category_ids: see :func:`name_classes`.

    Raises:
        FileNotFoundError, ValueError: ``MODEL.WEIGHTS``, or not K names.
    """

    def __init__(self, cfg: CfgNode, classes: str | None = None, score_threshold: float | None = None):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE = cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu"
        self.model = build_trained_model(cfg).eval()
        extras = read_extras(cfg)
        self.classes, self.category_ids = name_classes(cfg, classes, extras.get("thing_classes", ()))
        self.score_threshold = extras.get("score_threshold", 0.5) if score_threshold is None else score_threshold
        self.model.test_score_thresh = min(self.model.test_score_thresh, self.score_threshold)
        self.resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        if cfg.INPUT.FORMAT not in ("BGR", "RGB"):
            raise ValueError(f"INPUT.FORMAT {cfg.INPUT.FORMAT}: must be BGR or RGB to predict")
        self.is_rgb = cfg.INPUT.FORMAT == "RGB"

    def __call__(self, image: np.ndarray) -> Instances:
        """Return what is found in a BGR uint8 (H, W, 3) image, in its pixels, on the CPU.

        Instances with ``pred_boxes`` (N, 4) XYXY, ``pred_classes`` (N,) and ``scores`` (N,), highest first.
        """
        resized = self.resize.get_transform(image).apply_image(image[:, :, ::-1] if self.is_rgb else image)
        tensor = torch.as_tensor(resized.astype(np.float32).transpose(2, 0, 1))
        with torch.no_grad():
            (output,) = self.model([{"image": tensor, "height": image.shape[0], "width": image.shape[1]}])
        found = output["instances"].to("cpu")
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
            # Between two "$" Matplotlib would see a formula.
            name = printable(self.classes[label], quotes=False).replace("$", r"\$")
            visualizer.draw_text(f"{name} {score:.0%}", (x, top), color="w", horizontal_alignment="left")
            # In the picture, above the box or, where that is taken, below it or in it.
            size = axes.texts[-1].get_window_extent(renderer).padded(1)
            x, ends = max(0, min(x, width - size.width)), (top - size.height, bottom, top)
            spots = [Bbox.from_bounds(x, max(0, min(y, height - size.height)), size.width, size.height) for y in ends]
            taken.append(next((spot for spot in spots if not spot.count_overlaps(taken)), spots[0]))
            axes.texts[-1].set(position=taken[-1].p0 + 1, zorder=10 + score)
        picture = visualizer.output.get_image()[:, :, ::-1]  # which can come out a pixel smaller or larger
        return np.ascontiguousarray(picture if picture.shape == image.shape else cv2.resize(picture, (width, height)))


def find_inputs(arguments: Sequence[str], output: str | os.PathLike) -> list[Path]:
    """Return the images and videos that files, folders (with all below them) and globs name, each once.

    A file that is named outright is taken whatever its name ends in. In a folder that holds ``output``, that is left
    out: its pictures are of the last run.

    Raises:
        FileNotFoundError: an argument names nothing; the message says which.
    """
    found: dict[str, Path] = {}
    for argument in arguments:
        path, drawn, why = Path(argument), Path(output).resolve(), "no image or video in this folder"
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGES | VIDEOS]
            if drawn not in (path.resolve(), *path.resolve().parents):
                inside = [p for p in inside if drawn not in p.resolve().parents]
        else:  # before the glob: a file can be called a[1].png
            inside = [path] if path.is_file() else map(Path, sorted(glob.glob(argument, recursive=True)))
            why = "nothing matches" if glob.has_magic(argument) else "there is no such file or folder"
        files = {os.path.abspath(p): p for p in inside if p.is_file()}
        if not files:
            raise FileNotFoundError(f"{argument}: {why}")
        for key, path in files.items():
            found.setdefault(key, path)
    return list(found.values())


def output_names(paths: Sequence[Path]) -> list[Path]:
    """Return where the picture of each input goes below the output folder: as it lies below what they have in common.

    Names that would be one (``a.png`` and ``a.gif``, both drawn as .png) are told apart by a number.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]
    common = os.path.commonpath({path.parent for path in absolute})
    names: dict[str, Path] = {}  # by what a file system without upper case makes of them
    for path in absolute:
        suffix = path.suffix.lower()
        if suffix not in (".avi", ".jpg", ".jpeg"):
            suffix = ".mp4" if suffix in VIDEOS else ".png"
        first = path.relative_to(common).with_suffix(suffix)
        numbered = (first.with_name(f"{first.stem}_{number}{suffix}") for number in itertools.count(2))
        name = next(name for name in itertools.chain([first], numbered) if str(name).lower() not in names)
        names[str(name).lower()] = name
    return list(names.values())


class UnreadableError(ValueError):
    """Tell that an image or a video cannot be read, or one cannot be written; the message names it."""


def predict(
    predictor: Predictor, paths: Sequence[Path], output: str | os.PathLike
) -> Iterator[tuple[Path, int | UnreadableError]]:
    """Predict and draw one input after the other, and write ``detections.json`` at the end.

    These are COCO results, with ``file_name``, ``category`` (the class's name) and, for videos, the ``frame`` from 0.
    ``image_id`` counts images (unreadable ones, too) and frames from 0 in the order of ``paths``.

    Args:
        predictor: names the classes, too.
        paths: from :func:`find_inputs`.
        output: folder of the pictures and of ``detections.json``.

    Yields:
        Each path with how many objects were found in it, or with why it could not be read.

    Raises:
        ValueError: a picture would overwrite an input.
    """
    targets = [Path(output) / name for name in output_names(paths)]
    overwritten = {target.resolve() for target in targets} & {path.resolve() for path in paths}
    if overwritten:
        raise ValueError(f"--output {output}: the picture would overwrite {min(overwritten)}; give another folder")
    results: list[dict] = []
    image_id = 0
    for path, target in zip(paths, targets):
        before, is_video = len(results), path.suffix.lower() in VIDEOS
        try:
            for number, found in enumerate(_predict_file(predictor, path, target, is_video)):
                place = {"file_name": os.fspath(path), **({"frame": number} if is_video else {})}
                for result in instances_to_coco_json(found, image_id):
                    label = result["category_id"]
                    category = {"category_id": predictor.category_ids[label], "category": predictor.classes[label]}
                    results.append({**result, **category, **place})
                image_id += 1
        except UnreadableError as e:
            image_id += not is_video
            yield path, e
        else:
            yield path, len(results) - before
    with atomic_write(Path(output) / "detections.json") as file:
        json.dump(results, file)


def _predict_file(predictor: Predictor, path: Path, target: Path, is_video: bool) -> Iterator[Instances]:
    """Yield what is found in an image, or in each frame of a video, after drawing it to ``target``."""
    images, rate = _open(path, is_video)
    writer = None
    try:
        for image in images:
            height, width = image.shape[:2]
            try:
                found = predictor(image)
            except ValueError as e:  # of a side that would be resized to no pixel, or too few for the network's norms
                raise UnreadableError(f"{path}, {width} x {height} pixels, cannot be predicted on: {e}") from e
            picture = predictor.draw(image, found)
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_video and writer is None:
                codec = cv2.VideoWriter_fourcc(*("MJPG" if target.suffix == ".avi" else "mp4v"))
                writer = cv2.VideoWriter(os.fspath(target), codec, rate, picture.shape[1::-1])
            if not (writer.isOpened() if is_video else cv2.imwrite(os.fspath(target), picture)):
                raise UnreadableError(f"{target} cannot be written")
            if is_video:
                writer.write(picture)
            yield found
    finally:
        if writer is not None:
            writer.release()


def _open(path: Path, is_video: bool) -> tuple[Iterable[np.ndarray], float]:
    """Return the BGR images of a file, and how many of them a second has."""
    if not is_video:
        try:
            return [read_image(os.fspath(path), "BGR")], 0.0  # turned as its EXIF says, as it is for training
        except Exception as e:  # Pillow raises what its decoders do
            raise UnreadableError(f"{path} cannot be read as an image: {e}") from e
    video = cv2.VideoCapture(os.fspath(path))
    total, rate, (is_read, first) = video.get(cv2.CAP_PROP_FRAME_COUNT), video.get(cv2.CAP_PROP_FPS), video.read()
    if not is_read:
        raise UnreadableError(f"{path} cannot be read as a video (or OpenCV lacks its codec)")
    others = itertools.takewhile(lambda frame: frame is not None, (video.read()[1] for _ in itertools.count()))
    frames = itertools.chain([first], others)
    return tqdm(frames, total=total if total > 0 else None, unit="frame", disable=None), rate if rate > 0 else 25.0
