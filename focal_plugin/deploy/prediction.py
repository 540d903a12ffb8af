"""A trained model on images and videos of your own: pictures with boxes, and the detections as COCO results."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import Visualizer

from ..engine.checkpoint import build_trained_model
from ..files import atomic_write

IMAGES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"}
Progress = Callable[[Iterable[np.ndarray], Optional[int]], Iterable[np.ndarray]]
_CODECS = {".avi": "MJPG"}  # all else is written as .mp4


def _no_progress(frames: Iterable[np.ndarray], total: int | None) -> Iterable[np.ndarray]:
    return frames


class UnreadableError(ValueError):
    """An image or a video cannot be read, or one cannot be written; the message names it."""


class Predictor(DefaultPredictor):
    """Upstream's, whose weights are read as safely as this project's others, and must be all of the model's.

    Args:
        cfg: the config; upstream's doc says which keys are read.
        score_threshold: detections below it are left out. Lower than ``MODEL.RETINANET.SCORE_THRESH_TEST``, it
            replaces that: the model would never show them.

    Raises:
        FileNotFoundError, ValueError: ``MODEL.WEIGHTS``.
    """

    def __init__(self, cfg: CfgNode, score_threshold: float = 0.0):
        cfg = cfg.clone()
        cfg.defrost()
        weights, cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS, ""
        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = min(cfg.MODEL.RETINANET.SCORE_THRESH_TEST, score_threshold)
        super().__init__(cfg)
        cfg.MODEL.WEIGHTS = weights
        self.model = build_trained_model(cfg).eval()
        self.score_threshold = score_threshold

    def detect(self, image: np.ndarray) -> Instances:
        """What is found in a BGR uint8 (H, W, 3) image, in its pixels, on the CPU."""
        found = self(image)["instances"].to("cpu")
        return found[found.scores >= self.score_threshold]


def find_inputs(arguments: Sequence[str], output: str | os.PathLike | None = None) -> list[Path]:
    """The images and videos that files, folders (with all below them) and globs name, each once.

    A file that is named outright is taken whatever its name ends in.

    Args:
        arguments: of the command line.
        output: a folder whose pictures are left out where it lies in one that is named: they are of the last run.

    Raises:
        FileNotFoundError: one of them names nothing; the message says which.
    """
    if not arguments:
        raise FileNotFoundError("no images: name files, folders or globs")
    found: dict[str, Path] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in IMAGES | VIDEOS and p.is_file()]
            if output is not None and not path.resolve().is_relative_to(Path(output).resolve()):
                inside = [p for p in inside if not p.resolve().is_relative_to(Path(output).resolve())]
            if not inside:
                raise FileNotFoundError(f"{argument}: no image or video in this folder")
        elif path.is_file():  # before the glob: a file can be called a[1].png
            inside = [path]
        else:
            inside = [p for p in map(Path, sorted(glob.glob(argument, recursive=True))) if p.is_file()]
            if not inside:
                what = "nothing matches" if glob.has_magic(argument) else "there is no such file or folder"
                raise FileNotFoundError(f"{argument}: {what}")
        for path in inside:
            found.setdefault(os.path.abspath(path), path)
    return list(found.values())


def output_names(paths: Sequence[Path]) -> list[Path]:
    """Where the picture of each input goes below the output folder: as it lies below the folder of all of them.

    Names that would still be one (``a.png`` and ``a.gif``, both drawn as .png) are told apart by a number.
    """
    absolute = [Path(os.path.abspath(path)) for path in paths]
    folders = {path.parent for path in absolute}
    try:
        common = os.path.commonpath(folders) if folders else ""
    except ValueError:  # on several drives
        common = ""
    names: list[Path] = []
    taken: set[str] = set()
    for path in absolute:
        name = path.relative_to(common) if common else Path(path.name)
        suffix = path.suffix.lower()
        if suffix in VIDEOS:
            suffix = suffix if suffix in _CODECS else ".mp4"
        elif suffix not in (".jpg", ".jpeg"):
            suffix = ".png"
        candidate, number = name.with_suffix(suffix), 2
        while os.path.normcase(candidate).lower() in taken:
            candidate, number = name.with_name(f"{name.stem}_{number}{suffix}"), number + 1
        taken.add(os.path.normcase(candidate).lower())
        names.append(candidate)
    return names


def predict_image(predictor: Predictor, path: Path, output: Path, metadata: Metadata) -> Instances:
    """What is found in an image, turned as its EXIF says, as it is for training; draws it to ``output``.

    Raises:
        UnreadableError: it is no image, or the picture cannot be written.
    """
    try:
        image = read_image(os.fspath(path), "BGR")
    except Exception as e:  # Pillow raises what its decoders do
        raise UnreadableError(f"{path} cannot be read as an image: {e}") from e
    found = _detect(predictor, image, path)
    output.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(os.fspath(output), draw(image, found, metadata)):
        raise UnreadableError(f"{output} cannot be written")
    return found


def _detect(predictor: Predictor, image: np.ndarray, path: Path) -> Instances:
    try:
        return predictor.detect(image)
    except ValueError as e:  # of a side that would be resized to no pixel, or too few for the network's norms
        raise UnreadableError(f"{path}, {image.shape[1]} x {image.shape[0]} pixels, cannot be predicted on: {e}") from e


def draw(image: np.ndarray, found: Instances, metadata: Metadata) -> np.ndarray:
    """A BGR uint8 (H, W, 3) image with boxes, classes and scores, as upstream's Visualizer draws them."""
    drawn = Visualizer(image[:, :, ::-1], metadata).draw_instance_predictions(found).get_image()[:, :, ::-1]
    # Matplotlib's canvas can come out a pixel smaller or larger.
    return drawn if drawn.shape == image.shape else cv2.resize(drawn, image.shape[1::-1])


def predict_video(
    predictor: Predictor, path: Path, output: Path, metadata: Metadata, progress: Progress = _no_progress
) -> Iterator[Instances]:
    """What is found in each frame of a video, one after the other; draws them to a video at ``output``.

    Args:
        progress: wraps the iterator of frames, of which there are ``total`` (None: unknown), as tqdm does.

    Raises:
        UnreadableError: it is no video, or none can be written.
    """
    with _releasing(cv2.VideoCapture(os.fspath(path))) as video:
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        rate = video.get(cv2.CAP_PROP_FPS)
        is_read, frame = video.read() if video.isOpened() else (False, None)
        if not is_read:
            raise UnreadableError(f"{path} cannot be read as a video (or OpenCV lacks its codec)")
        output.parent.mkdir(parents=True, exist_ok=True)
        codec = cv2.VideoWriter_fourcc(*_CODECS.get(output.suffix, "mp4v"))
        with _releasing(
            cv2.VideoWriter(os.fspath(output), codec, rate if rate > 0 else 25.0, frame.shape[1::-1])
        ) as writer:
            if not writer.isOpened():
                raise UnreadableError(f"{output} cannot be written as a video")
            for image in progress(_frames(video, frame), total if total > 0 else None):
                found = _detect(predictor, image, path)
                writer.write(np.ascontiguousarray(draw(image, found, metadata)))
                yield found


def _frames(video: cv2.VideoCapture, frame: np.ndarray) -> Iterator[np.ndarray]:
    is_read = True
    while is_read:
        yield frame
        is_read, frame = video.read()


@contextmanager
def _releasing(resource):
    try:
        yield resource
    finally:
        resource.release()


def as_coco(
    found: Instances, image_id: int, file_name: str, classes: Sequence[str], category_ids: Sequence[int], **extra
) -> list[dict]:
    """COCO results: XYWH boxes in pixels, and beside COCO's keys ``file_name`` and ``category``, the class's name."""
    boxes = BoxMode.convert(found.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
            "file_name": file_name,
            "category": classes[label],
            **extra,
        }
        for box, label, score in zip(boxes, found.pred_classes.tolist(), found.scores.tolist())
    ]


def predict(
    predictor: Predictor,
    paths: Sequence[Path],
    output: str | os.PathLike,
    classes: Sequence[str],
    category_ids: Sequence[int] | None = None,
    progress: Progress = _no_progress,
) -> Iterator[tuple[Path, int | UnreadableError]]:
    """Predicts and draws one input after the other, and writes ``detections.json`` at the end.

    ``image_id`` counts images (unreadable ones, too) and frames from 0 in the order of ``paths``.
    A frame has its number in the video, from 0, as ``frame``.

    Args:
        paths: from :func:`find_inputs`.
        output: folder of the pictures and of ``detections.json``.
        classes: K names.
        category_ids: of the classes 0..K-1; None: these numbers.
        progress: see :func:`predict_video`.

    Yields:
        each path with how many objects were found in it, or with why it could not be read.

    Raises:
        ValueError: a picture would overwrite an input.
    """
    targets = [Path(output) / name for name in output_names(paths)]
    overwritten = {target.resolve() for target in targets} & {path.resolve() for path in paths}
    if overwritten:
        raise ValueError(f"--output {output}: the picture would overwrite {min(overwritten)}; give another folder")
    metadata = Metadata(thing_classes=list(classes))
    category_ids = range(len(classes)) if category_ids is None else category_ids
    results: list[dict] = []
    image_id = 0
    for path, target in zip(paths, targets):
        before = len(results)
        is_video = path.suffix.lower() in VIDEOS
        try:
            if is_video:
                found: Iterable[Instances] = predict_video(predictor, path, target, metadata, progress)
            else:
                found = [predict_image(predictor, path, target, metadata)]
            for number, instances in enumerate(found):
                extra = {"frame": number} if is_video else {}
                results += as_coco(instances, image_id, os.fspath(path), classes, category_ids, **extra)
                image_id += 1
        except UnreadableError as e:
            image_id += not is_video
            yield path, e
        else:
            yield path, len(results) - before
    with atomic_write(Path(output) / "detections.json") as file:
        json.dump(results, file)
