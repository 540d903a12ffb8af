"""Checks on the image files of a COCO json: there, inside their folder, readable, of the size that the json gives."""

import os
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import PurePath

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from ..files import printable
from .dataset_report import DatasetReport

SAMPLE_SIZE = 64  # images that the fast form looks at
_CHUNK = 32  # images that a thread takes at a time
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_MIS_SIZED = "(save upright what EXIF turns, or swap width, height and boxes in the json)"
_REPLACED = "(training replaces DATALOADER.MAX_BAD_IMAGES at most, an evaluation stops; save them again)"
_FILE_FINDINGS = (
    ("fatal", "missing_images", "images that are not in the image folder"),
    ("fatal", "mis_sized_images", f"images of another size than the json gives {_MIS_SIZED}"),
    ("error", "unreadable_images", f"images that cannot be opened {_REPLACED}"),
    ("error", "truncated_images", f"images that cannot be decoded to their end {_REPLACED}"),
    ("note", "symlinked_images", "images that are symbolic links"),
)


def check_images(report: DatasetReport, images: list[dict], image_root: str, mode: str) -> int:
    """Look at the names of complete elements of the json and at their files; return at how many in this mode."""
    names = [image["file_name"] for image in images]
    repeated = list((Counter(names) - Counter(set(names))).elements())  # each use after the first
    upward = [name for name in names if ".." in PurePath(name).parts and not os.path.isabs(name)]
    escaping = [name for name in upward if _escapes(image_root, name)]
    for level, code, text, found in (
        ("warning", "repeated_file_names", "images with the file of an earlier image (merge the two)", repeated),
        ("note", "absolute_file_names", "absolute file names (not in the image folder)", filter(os.path.isabs, names)),
        ("fatal", "escaping_file_names", "file names that leave the image folder by '..'", escaping),
    ):
        report.add_all(level, code, text, list(found), printable)
    never_opened = set(names if mode == "none" else upward)
    files = [image for image in images if image["file_name"] not in never_opened]
    if mode == "sample" and len(files) > SAMPLE_SIZE:
        files = [files[index] for index in np.linspace(0, len(files) - 1, SAMPLE_SIZE).astype(int)]
    faults = defaultdict(list)  # code -> examples in words
    hidden = mode != "all" or not sys.stderr.isatty()
    with warnings.catch_warnings(), ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about odd EXIF data and huge images
        found = pool.imap(lambda image: list(_inspect(image_root, image, mode == "all")), files, _CHUNK)
        for of_image in tqdm(found, total=len(files), unit="image", file=sys.stderr, disable=hidden):
            for code, example in of_image:
                faults[code].append(example)
    for level, code, text in _FILE_FINDINGS:
        report.add_all(level, code, text, faults[code])
    return len(files)


def _escapes(image_root: str, name: str) -> bool:
    """Return whether a relative name with ".." ends outside the folder, as it reads or on the disk."""
    if os.path.normpath(name).split(os.sep)[0] == "..":
        return True
    try:
        root = os.path.realpath(image_root)
        folder = os.path.realpath(os.path.join(image_root, os.path.dirname(name)))
        return os.path.commonpath([root, folder]) != root
    except (OSError, ValueError):  # such as a NUL in it
        return True


def _inspect(image_root: str, row: dict, decode: bool) -> Iterator[tuple[str, str]]:
    """Yield (code, example) of each fault of an image file."""
    path, name = os.path.join(image_root, row["file_name"]), printable(row["file_name"])
    if not os.path.isfile(path):  # a folder, a pipe and a device are no images either
        yield "missing_images", name
        return
    if os.path.islink(path):
        yield "symlinked_images", name
    try:
        image = Image.open(path)
    except Exception as problem:  # Pillow raises nearly anything on a broken file
        yield "unreadable_images", f"{name}: {_first_line(problem, path)}"
        return
    with image:
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        except Exception:  # to Detectron2's `read_image`, then it is not turned
            turned = False
        width, height = image.size[::-1] if turned else image.size
        if (width, height) != (row["width"], row["height"]):
            size = f"{width} x {height}{', turned by its EXIF orientation' * turned}"
            yield "mis_sized_images", f"{name}: {size}, in the json {row['width']} x {row['height']}"
        if decode:
            try:
                image.convert("RGB")
            except Exception as problem:
                yield "truncated_images", f"{name}: {_first_line(problem, path)}"


def _first_line(problem: Exception, path: str) -> str:
    if os.path.getsize(path) == 0:
        return "an empty file"
    lines = str(problem).replace(repr(path), "it").replace(path, "it").splitlines() or [type(problem).__name__]
    return printable(lines[0], 100, quotes=False)
