"""Handwritten digits in cluttered scenes: a detection data set that needs no download.

The ink is real handwriting, the 1,797 images of 8x8 pixels that scikit-learn ships; everything around it is drawn.
The scenes keep what makes one-stage detection hard: small objects, mostly background, classes with a long tail, images
without any object, and hard negatives made of the same ink. Pixels are integers: a seed gives the same scenes anywhere.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import shutil
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from filelock import FileLock
from PIL import Image, ImageDraw

logger = logging.getLogger(__name__)

CLASS_NAMES = tuple("0123456789")
SPLITS = ("train", "val")
FORMAT_VERSION = 3  # part of the folder's name: raise it whenever a scene would come out different

MIN_SIDE, MAX_SIDE = 16, 36  # longest side of a digit's box, pixels
MIN_IMAGE_SIZE = 64
REGISTERED_SIZES = (128, 192, 256)  # the larger, the more background there is to each digit
MAX_DIGITS = 6
EMPTY_SHARE = 0.09  # of the scenes: clutter, but no digit
TAIL = 5.0  # class "0" is this many times as frequent as class "9", and geometric in between
TRAIN_SHARE = 0.8  # of the source images of every class

_CANVAS = 48  # side of the square on which a glyph is warped before it is shrunk to its size, pixels
_STEPS = np.sqrt([2, 3, 5, 7, 11, 13, 17])  # rationally independent: one for the count, one for each digit
_CLUTTER = ("line", "arc", "zigzag", "blob", "polygon")
_MARGIN = 2  # empty source pixels around the 8x8 ones: room for the rotation
_SOURCE = (
    "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning "
    "Repository, https://doi.org/10.24432/C50P49, CC BY 4.0; the 1,797 test images in scikit-learn"
)


@functools.lru_cache(maxsize=1)
def _load_handwriting():
    """Return scikit-learn's digits: (1797, 8, 8) uint8 ink of 0..255, and (1797,) labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits are made from scikit-learn's handwriting: pip install scikit-learn") from error
    digits = load_digits()
    return (digits.images * 255 // 16).astype(np.uint8), digits.target


@functools.lru_cache(maxsize=len(SPLITS))
def source_indices(split: str) -> list[np.ndarray]:
    """Return the indices into `load_digits()` that a split draws from, an array per class; the splits share none."""
    # Every class is cut once, in the source's order: neighbors in it look alike, and a random cut would be easier.
    labels = _load_handwriting()[1]
    per_class = [np.flatnonzero(labels == digit) for digit in range(len(CLASS_NAMES))]
    return [np.split(indices, [int(len(indices) * TRAIN_SHARE)])[SPLITS.index(split)] for indices in per_class]


def _draw_source(rng, split, label):
    indices = source_indices(split)[label]
    return _load_handwriting()[0][indices[rng.integers(len(indices))]]


def _draw_scrambled_source(rng, split):
    """Make ink that is no digit: quadrants of four digits, each a quarter turn off, so that strokes break."""
    scrambled = np.empty((8, 8), np.uint8)
    for rows, columns in itertools.product((slice(0, 4), slice(4, 8)), repeat=2):
        source = _draw_source(rng, split, rng.integers(len(CLASS_NAMES)))
        scrambled[rows, columns] = np.rot90(source[rows, columns], 1 + 2 * rng.integers(2))
    return scrambled


def _render_glyph(rng, source):
    """Warp (8, 8) uint8 ink, crop it, and scale its longer side to log-uniform in [MIN_SIDE, MAX_SIDE] pixels."""
    ink = Image.fromarray(_warp(rng, source))
    box = ink.point(lambda opacity: opacity > 127).getbbox()
    sides = box[2] - box[0], box[3] - box[1]
    scale = MIN_SIDE * (MAX_SIDE / MIN_SIDE) ** rng.random() / max(sides)
    size = tuple(max(1, round(scale * side)) for side in sides)
    return np.asarray(ink.resize(size, Image.Resampling.BILINEAR, box=box))


def _warp(rng, source):
    """Rotate, shear and enlarge 8x8 ink into (_CANVAS, _CANVAS) opacity, with thick or thin strokes."""
    padded = np.pad(source, _MARGIN)
    angle, shear, step = math.radians(rng.uniform(-10, 10)), rng.uniform(-0.1, 0.1), len(padded) / _CANVAS
    a, b = step * math.cos(angle), step * (math.sin(angle) + shear)
    c, d = -step * math.sin(angle), step * math.cos(angle)
    # Pillow looks up a point (x, y) of the canvas at (ax + by + e, cx + dy + f); the two centers coincide.
    e, f = (len(padded) - (a + b) * _CANVAS) / 2, (len(padded) - (c + d) * _CANVAS) / 2
    blurred = Image.fromarray(padded).transform(
        (_CANVAS, _CANVAS), Image.Transform.AFFINE, (a, b, e, c, d, f), Image.Resampling.BICUBIC
    )
    threshold = rng.integers(95, 126)  # the lower, the thicker
    return np.clip((np.asarray(blurred).astype(np.int32) - threshold) * 4 + 128, 0, 255).astype(np.uint8)


def draw_scene(
    split: str, index: int, *, image_size: int = 128, seed: int = 0
) -> tuple[np.ndarray, list[tuple[int, int, int, int]], list[int]]:
    """Draw scene ``index`` (from 0) of a split, which depends on the arguments alone.

    Return the (image_size, image_size, 3) uint8 RGB image; 0 to 6 XYWH boxes in whole pixels, tight to the ink; as many
    labels in 0..9.
    """
    rng = _generator(seed, SPLITS.index(split), index)
    image = _draw_background(rng, image_size)
    placed = []  # of (box, label), without label if scrambled; digits come first, to find room
    for label in draw_labels(split, index, seed=seed) + [None] * int(rng.integers(0, 3)):
        source = _draw_scrambled_source(rng, split) if label is None else _draw_source(rng, split, label)
        glyph = _render_glyph(rng, source)
        box = _find_place(rng, glyph.shape[1], glyph.shape[0], image_size, [box for box, _ in placed])
        if box is not None:
            _lay_ink(rng, image, glyph, box)
            placed.append((box, label))
    grain = int(rng.integers(2, 9))
    image += rng.integers(-grain, grain + 1, image.shape, dtype=np.int8)
    digits = [(box, label) for box, label in placed if label is not None]
    return np.clip(image, 0, 255).astype(np.uint8), [box for box, _ in digits], [label for _, label in digits]


def draw_labels(split: str, index: int, *, seed: int = 0) -> list[int]:
    """Return the digits that a scene gets if there is room.

    Over consecutive scenes the counts and the classes run evenly through their distributions (a Kronecker sequence
    instead of independent draws), so that chance takes no rare class out of a small split.
    """
    start = _generator(seed, SPLITS.index(split)).random(1 + MAX_DIGITS)
    share, *quantiles = (start + index * _STEPS) % 1
    if share < EMPTY_SHARE:
        return []
    count = 1 + int((share - EMPTY_SHARE) / (1 - EMPTY_SHARE) * MAX_DIGITS)
    weights = TAIL ** -np.linspace(0, 1, len(CLASS_NAMES))
    upto = np.cumsum(weights / weights.sum())[:-1]
    return np.searchsorted(upto, quantiles[:count], side="right").tolist()


def _generator(seed, *key):
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def _draw_background(rng, size):
    """Draw smooth shading under strokes, edges and blobs: (size, size, 3) int32."""
    gray = rng.integers(30, 111, (4, 4, 1))
    shading = np.clip(gray + rng.integers(-25, 26, (4, 4, 3)), 0, 255).astype(np.uint8)
    # Twice the size, then halved: Pillow draws without anti-aliasing.
    canvas = Image.fromarray(shading).resize((2 * size, 2 * size), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    for _ in range(int(rng.integers(5, 16) * (size / 128) ** 2)):
        kind = _CLUTTER[rng.integers(len(_CLUTTER))]
        start = rng.integers(0, 2 * size, 2)
        ground = canvas.getpixel(tuple(start.tolist()))
        _draw_clutter(rng, pen, kind, start, tuple(np.clip(ground + rng.integers(-70, 71, 3), 0, 255).tolist()))
    return np.asarray(canvas.reduce(2)).astype(np.int32)


def _draw_clutter(rng, pen, kind, start, color):
    """Draw clutter of a kind from a point, in half pixels."""
    if kind == "line":  # longer than any digit: a short one would be a "1" without a label
        angle, length = rng.uniform(0, 2 * math.pi), rng.uniform(90, 260)
        end = start + length * np.array([math.cos(angle), math.sin(angle)])
        pen.line([*start.tolist(), *end.tolist()], fill=color, width=int(rng.integers(2, 7)))
    elif kind == "arc":  # never closed: that would be a "0" without a label
        corners = [*start.tolist(), *(start + rng.integers(16, 90, 2)).tolist()]
        begin, sweep = rng.integers(360), rng.integers(60, 200)
        pen.arc(corners, int(begin), int(begin + sweep), fill=color, width=int(rng.integers(3, 8)))
    elif kind == "zigzag":
        points = start + rng.integers(-28, 29, (rng.integers(6, 9), 2))
        pen.line(list(map(tuple, points.tolist())), fill=color, width=int(rng.integers(2, 6)), joint="curve")
    elif kind == "blob":
        pen.ellipse([*start.tolist(), *(start + rng.integers(6, 50, 2)).tolist()], fill=color)
    else:
        points = start + rng.integers(-50, 51, (rng.integers(3, 6), 2))
        pen.polygon(list(map(tuple, points.tolist())), fill=color)


def _find_place(rng, width, height, size, taken):
    """Return an XYWH box that shares at most a tenth of the smaller with any taken one, or None."""
    for x, y in rng.integers(0, (size - width + 1, size - height + 1), (40, 2)).tolist():
        box = (x, y, width, height)
        if all(10 * _intersection(box, other) <= min(width * height, other[2] * other[3]) for other in taken):
            return box
    return None


def _intersection(one, other):
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(0, width) * max(0, height)


def _lay_ink(rng, image, glyph, box):
    """Blend a glyph into the image, in place, in a light color: most of the ground is darker, not all of it."""
    x, y, width, height = box
    region = image[y : y + height, x : x + width]
    color = np.clip(rng.integers(170, 256) + rng.integers(-35, 36, 3), 0, 255)
    region += (color - region) * glyph[..., None].astype(np.int32) // 255


def make_digits(
    root: str | os.PathLike, *, num_train: int = 4000, num_val: int = 300, image_size: int = 128, seed: int = 0
) -> Path:
    """Write the data set in COCO format, unless it is there already, and return the path of its folder.

    It holds `train.json`, `val.json`, `train/*.png` and `val/*.png`, and appears whole or not at all. Of several
    processes at once one draws while the others wait.

    Args:
        root: folder that holds the data sets; created when missing.
        num_train, num_val: images in `train` and in `val`, at least 1.
        image_size: side of the square images, pixels, at least 64.
        seed: non-negative; another seed gives other scenes from the same handwriting.

    Raises:
        ImportError: scikit-learn is missing and the data set is still to be drawn.
        ValueError: a number is out of its range.
    """
    if num_train < 1 or num_val < 1 or image_size < MIN_IMAGE_SIZE or seed < 0:
        needs = f"num_train >= 1, num_val >= 1, image_size >= {MIN_IMAGE_SIZE} and seed >= 0"
        raise ValueError(f"make_digits needs {needs}, not {num_train}, {num_val}, {image_size} and {seed}")
    counts, folder = {"train": num_train, "val": num_val}, _folder(root, num_train, num_val, image_size, seed)
    if _is_complete(folder, counts):  # asked first without the lock: the data may lie where nothing can be written
        return folder
    draft = folder.with_name(f".{folder.name}.draft")  # to be renamed when it is whole
    _load_handwriting()  # raises where there is none, before anything is written
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(draft.with_suffix(".lock")):
        if not _is_complete(folder, counts):
            logger.warning(f"Drawing, once, {num_train} + {num_val} scenes of digits into {folder}")
            for leftover in (draft, folder):  # of a killed run; a damaged data set
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                for split, count in counts.items():
                    _write_split(draft, split, count, image_size, seed)
                draft.rename(folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return folder


def _folder(root, num_train=4000, num_val=300, image_size=128, seed=0):
    return Path(root) / f"v{FORMAT_VERSION}-train{num_train}-val{num_val}-size{image_size}-seed{seed}"


def _is_complete(folder, counts):
    return all(
        (folder / f"{split}.json").is_file() and len(list((folder / split).glob("*.png"))) == count
        for split, count in counts.items()
    )


def _write_split(folder, split, count, image_size, seed):
    (folder / split).mkdir(parents=True)
    images, annotations = [], []
    for index in range(count):
        pixels, boxes, labels = draw_scene(split, index, image_size=image_size, seed=seed)
        image = {"id": index + 1, "file_name": f"{index:06d}.png", "width": image_size, "height": image_size}
        # Level 1, runs only (type 3): noise does not compress any better, only slower.
        Image.fromarray(pixels).save(folder / split / image["file_name"], compress_level=1, compress_type=3)
        images.append(image)
        for box, label in zip(boxes, labels):
            ids = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": label + 1}
            annotations.append({**ids, "bbox": [float(x) for x in box], "area": float(box[2] * box[3]), "iscrowd": 0})
    content = {
        "info": {"description": f"digits in cluttered scenes, {split}", "version": FORMAT_VERSION, "source": _SOURCE},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": label + 1, "name": name} for label, name in enumerate(CLASS_NAMES)],
    }
    (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")


def register_digits() -> None:
    """Register `digits_train` and `digits_val`, and `digits_192px_train` and so on for larger scenes.

    They are drawn on first use and live in `$DETECTRON2_DATASETS/digits` ("datasets/digits" without the variable), as
    Detectron2's own data sets do. Calling it again is harmless and follows a variable that has changed since.
    """
    for size, split in itertools.product(REGISTERED_SIZES, SPLITS):
        name = f"digits_{split}" if size == REGISTERED_SIZES[0] else f"digits_{size}px_{split}"
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, functools.partial(_load_registered, name, split, size))
        elif getattr(DatasetCatalog[name], "func", None) is not _load_registered:
            logger.warning(f"'{name}' is registered already, and not by focal_plugin: left as it is")
            continue
        _set_metadata(name, split, size)


def _load_registered(name, split, size):
    meta = _set_metadata(name, split, size)
    make_digits(Path(meta.json_file).parents[1], image_size=size)
    return load_coco_json(meta.json_file, meta.image_root, name)


def _set_metadata(name, split, size):
    root = Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()
    meta, folder = MetadataCatalog.get(name), _folder(root / "digits", image_size=size)
    for key in ("json_file", "image_root"):  # Metadata refuses to change an attribute, but not to lose it
        meta.__dict__.pop(key, None)
    return meta.set(
        json_file=str(folder / f"{split}.json"),
        image_root=str(folder / split),
        evaluator_type="coco",
        lazily_generated=True,
        thing_classes=list(CLASS_NAMES),
        thing_dataset_id_to_contiguous_id={label + 1: label for label in range(len(CLASS_NAMES))},
    )
