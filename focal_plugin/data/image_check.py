"""Checks on the image files of a COCO json: there, inside their folder, readable, of the size that the json gives."""

from __future__ import annotations

import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import printable
from .dataset_report import DatasetReport

SAMPLE_SIZE = 64  # images that the fast form looks at
_BATCH = 32  # images that a thread takes at a time
_EXIF_ORIENTATION = 274
_SWAPS_SIDES = (5, 6, 7, 8)

_REPLACED = "training replaces as many as DATALOADER.MAX_BAD_IMAGES allows, an evaluation stops; save them again"
_MESSAGES = {  # code -> (level of the finding, text)
    "escaping_file_names": ("fatal", "file names that leave the image folder by '..'"),
    "missing_images": ("fatal", "images that are not in the image folder"),
    "unreadable_images": ("error", f"images that cannot be opened ({_REPLACED})"),
    "mis_sized_images": (
        "fatal",
        "images of another size than the json gives, so that its boxes are elsewhere (save upright what EXIF turns, "
        "or swap width, height and boxes in the json)",
    ),
    "truncated_images": ("error", f"images that cannot be decoded to their end ({_REPLACED})"),
    "absolute_file_names": ("note", "absolute file names (the image folder is not used for them)"),
    "symlinked_images": ("note", "images that are symbolic links"),
    "repeated_file_names": (
        "warning",
        "images with the file of an earlier image (objects of one are background in the other)",
    ),
}


def check_images(
    report: DatasetReport,
    file_names: Sequence[str],
    sizes: np.ndarray,
    image_root: str,
    images: str,
    max_workers: int,
) -> int:
    """Look at the image files, and at all their names in any case.

    Args:
        report: takes the findings.
        file_names: of I images, as in the json.
        sizes: (I, 2), the width and height that the json gives, in pixels.
        image_root: folder that the names start from.
        images: "all" (decodes each), "sample" (the header of at most ``SAMPLE_SIZE``, evenly spaced) or "none".
        max_workers: threads.

    Returns:
        The number of images looked at.
    """
    faults, seen, rows = defaultdict(list), set(), []  # code -> examples in words
    for row, name in enumerate(file_names):
        if os.path.isabs(name):
            faults["absolute_file_names"].append(printable(name))
        if ".." in name and not os.path.isabs(name) and ".." in PurePath(name).parts:
            if _escapes(image_root, name):
                faults["escaping_file_names"].append(printable(name))
        else:  # a name with ".." is never opened
            rows.append(row)
        if name in seen:
            faults["repeated_file_names"].append(printable(name))
        seen.add(name)
    if images == "none":
        rows = []
    elif images == "sample" and len(rows) > SAMPLE_SIZE:
        rows = [rows[place] for place in np.linspace(0, len(rows) - 1, SAMPLE_SIZE).astype(int)]

    def inspect(batch: list[int]) -> list[tuple[str, str]]:
        return [
            fault
            for row in batch
            for fault in _inspect(image_root, file_names[row], tuple(sizes[row].tolist()), images == "all")
        ]

    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    hidden = images != "all" or not sys.stderr.isatty()
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about odd EXIF data and huge images
        with tqdm(total=len(rows), unit="image", file=sys.stderr, disable=hidden) as bar:
            for batch, found in zip(batches, pool.map(inspect, batches)):
                bar.update(len(batch))
                for code, example in found:
                    faults[code].append(example)
    for code, examples in faults.items():
        level, text = _MESSAGES[code]
        report.add(level, code, f"{text}: {len(examples):,}", len(examples), examples)
    return len(rows)


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


def _inspect(image_root: str, name: str, expected: tuple[int, int], decode: bool) -> Iterator[tuple[str, str]]:
    """Yield (code, example) of each fault of an image file."""
    path = os.path.join(image_root, name)
    try:
        if not os.path.isfile(path):  # a folder, a pipe and a device are no images either
            yield "missing_images", printable(name)
            return
        if os.path.islink(path):
            yield "symlinked_images", printable(name)
    except ValueError:  # a NUL, or half of a surrogate pair: no file can be called that
        yield "missing_images", printable(name)
        return
    try:
        image = Image.open(path)
    except Exception as problem:  # Pillow raises nearly anything on a broken file
        yield "unreadable_images", f"{printable(name)}: {_first_line(problem, path)}"
        return
    with image:
        try:
            turned = image.getexif().get(_EXIF_ORIENTATION) in _SWAPS_SIDES
        except Exception:  # to Detectron2's `read_image`, then it is not turned
            turned = False
        size = image.size[::-1] if turned else image.size
        if size != expected:
            why = ", turned by its EXIF orientation" if turned else ""
            text = f"{printable(name)}: {size[0]} x {size[1]}{why}, in the json {expected[0]} x {expected[1]}"
            yield "mis_sized_images", text
        if decode:
            try:
                image.convert("RGB")
            except Exception as problem:
                yield "truncated_images", f"{printable(name)}: {_first_line(problem, path)}"


def _first_line(problem: Exception, path: str) -> str:
    if os.path.getsize(path) == 0:
        return "an empty file"
    lines = str(problem).replace(repr(path), "it").replace(path, "it").splitlines() or [type(problem).__name__]
    return printable(lines[0], 100).strip("'\"")
