"""Checks on the image files of a COCO json: there, inside their folder, readable, of the size that the json gives."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePath

import numpy as np
from PIL import Image
from tqdm import tqdm

from .coco_columns import Columns
from .findings import Finding, Tally, error, fatal, note, shown, warning

SAMPLE_SIZE = 64  # images that the fast form looks at
_BATCH = 32  # images that a thread takes at a time
_EXIF_ORIENTATION = 274
_SWAPS_SIDES = (5, 6, 7, 8)

_REPLACED = "training replaces as many as DATALOADER.MAX_BAD_IMAGES allows, an evaluation stops; save them again"
_MESSAGES = {
    "escaping_file_names": (fatal, "file names that leave the image folder by '..'"),
    "missing_images": (fatal, "images that are not in the image folder"),
    "unreadable_images": (error, f"images that cannot be opened ({_REPLACED})"),
    "mis_sized_images": (
        fatal,
        "images of another size than the json gives, so that its boxes are elsewhere (save upright what EXIF turns, "
        "or swap width, height and boxes in the json)",
    ),
    "truncated_images": (error, f"images that cannot be decoded to their end ({_REPLACED})"),
    "absolute_file_names": (note, "absolute file names (the image folder is not used for them)"),
    "symlinked_images": (note, "images that are symbolic links"),
}


def check_images(columns: Columns, image_root: str, images: str, max_workers: int) -> tuple[list[Finding], int]:
    """Looks at the image files.

    Args:
        columns: of the json.
        image_root: folder that its file names start from.
        images: "all" (decodes each), "sample" (the header of at most ``SAMPLE_SIZE``, evenly spaced) or "none".
        max_workers: threads.

    Returns:
        (findings, number of images looked at); names are checked all in any case, without looking at the disk.
    """
    tally = Tally()
    suspects = _check_names(columns, tally)
    rows = np.setdiff1d(np.arange(len(columns.file_names)), suspects)
    if images == "none":
        rows = rows[:0]
    elif images == "sample":
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), SAMPLE_SIZE)).astype(int)] if len(rows) else rows
    for row in suspects:  # few, so both forms ask the disk
        if _escapes(image_root, columns.file_names[row]):
            tally.add("escaping_file_names", shown(columns.file_names[row]))
    for fault, example in _look_at(columns, rows, image_root, images == "all", max_workers):
        tally.add(fault, example)
    found = []
    for code, count, examples in tally.items():
        make, text = _MESSAGES[code]
        found.append(make(code, f"{text}: {count:,}", count, examples))
    return found + _check_repeated(columns), len(rows)


def _check_names(columns: Columns, tally: Tally) -> np.ndarray:
    """Rows of the names with a ".." in them, which nothing opens."""
    suspects = []
    for row, name in enumerate(columns.file_names):
        if os.path.isabs(name):
            tally.add("absolute_file_names", shown(name))
        elif ".." in name and ".." in PurePath(name).parts:
            suspects.append(row)
    return np.array(suspects, dtype=np.int64)


def _escapes(image_root: str, name: str) -> bool:
    """Whether a relative name with ".." ends outside the folder, as it reads or on the disk."""
    if os.path.normpath(name).split(os.sep)[0] == "..":
        return True
    try:
        root = os.path.realpath(image_root)
        folder = os.path.realpath(os.path.join(image_root, os.path.dirname(name)))
        return os.path.commonpath([root, folder]) != root
    except (OSError, ValueError):  # such as a NUL in it
        return True


def _check_repeated(columns: Columns) -> list[Finding]:
    seen, twice = set(), []
    for name in columns.file_names:
        (twice.append if name in seen else seen.add)(name)
    if not twice:
        return []
    message = f"images with the file of an earlier image (objects of one are background in the other): {len(twice):,}"
    return [warning("repeated_file_names", message, len(twice), map(shown, twice))]


def _look_at(
    columns: Columns, rows: np.ndarray, image_root: str, decode: bool, max_workers: int
) -> Iterator[tuple[str, str]]:
    """(fault, example) of each fault of these images, in their order."""
    batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
    hidden = not (decode and sys.stderr.isatty())
    with warnings.catch_warnings(), ThreadPoolExecutor(max_workers) as pool:
        warnings.simplefilter("ignore")  # Pillow's, about odd EXIF data and huge images
        work = pool.map(partial(_inspect_batch, columns, image_root, decode), batches)
        with tqdm(total=len(rows), unit="image", file=sys.stderr, disable=hidden) as bar:
            for batch, faults in zip(batches, work):
                bar.update(len(batch))
                yield from faults


def _inspect_batch(columns: Columns, image_root: str, decode: bool, rows: np.ndarray) -> list[tuple[str, str]]:
    return [fault for row in rows for fault in _inspect(columns, image_root, decode, row)]


def _inspect(columns: Columns, image_root: str, decode: bool, row: int) -> Iterator[tuple[str, str]]:
    name = columns.file_names[row]
    path = os.path.join(image_root, name)
    try:
        if not os.path.isfile(path):  # a folder, a pipe and a device are no images either
            yield "missing_images", shown(name)
            return
        if os.path.islink(path):
            yield "symlinked_images", shown(name)
    except ValueError:  # a NUL, or half of a surrogate pair: no file can be called that
        yield "missing_images", shown(name)
        return
    expected = int(columns.widths[row]), int(columns.heights[row])
    yield from _inspect_file(path, name, expected, decode)


def _inspect_file(path: str, name: str, expected: tuple[int, int], decode: bool) -> Iterator[tuple[str, str]]:
    try:
        image = Image.open(path)
    except Exception as problem:  # Pillow raises nearly anything on a broken file
        yield "unreadable_images", f"{shown(name)}: {_first_line(problem, path)}"
        return
    with image:
        size, turned = _oriented_size(image)
        if size != expected:
            why = ", turned by its EXIF orientation" if turned else ""
            text = f"{shown(name)}: {size[0]} x {size[1]}{why}, in the json {expected[0]} x {expected[1]}"
            yield "mis_sized_images", text
        if decode:
            try:
                image.convert("RGB")
            except Exception as problem:
                yield "truncated_images", f"{shown(name)}: {_first_line(problem, path)}"


def _oriented_size(image: Image.Image) -> tuple[tuple[int, int], bool]:
    """Width and height as Detectron2's `read_image` gives them, and whether EXIF swapped them."""
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # as upstream: then it is not turned
        orientation = None
    turned = orientation in _SWAPS_SIDES
    return (image.size[::-1] if turned else image.size), turned


def _first_line(problem: Exception, path: str) -> str:
    if os.path.getsize(path) == 0:
        return "an empty file"
    lines = str(problem).replace(repr(path), "it").replace(path, "it").splitlines() or [type(problem).__name__]
    return shown(lines[0], 100).strip("'\"")
