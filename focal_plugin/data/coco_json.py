"""Read a COCO json as training reads it, and turn its complete elements into NumPy tables."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..files import printable
from .dataset_report import DatasetReport

SECTIONS = ("images", "annotations", "categories")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # and not isinstance, to which True is a number


def _whole_number(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    text = f"is no whole number from {low:,} to {high:,}"
    return lambda value: _is_number(value) and low <= value <= high and value == int(value), text


_ID, _SIDE = _whole_number(-(2**63), 2**63 - 1), _whole_number(1, 2**31 - 1)
_RULES = {  # section -> key -> (is a value valid?, what is wrong if not)
    "images": {
        "id": _ID,
        "file_name": (lambda value: type(value) is str and value, "is no text, or empty"),
        "width": _SIDE,
        "height": _SIDE,
    },
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (
            lambda value: type(value) is list and len(value) == 4 and all(map(_is_number, value)),
            "is no list of four numbers",
        ),
        "iscrowd": (lambda value: value in (0, 1), "is neither 0 nor 1"),
        "ignore": (lambda value: value == 0, "is not 0, which Detectron2 refuses"),
    },
    "categories": {
        # 1.0 is none: --register and Detectron2 list and sort these ids.
        "id": (lambda value: type(value) is int and -(2**63) <= value < 2**63, "is no whole number"),
        "name": (lambda value: type(value) is str, "is no text"),
    },
}
_OPTIONAL = ("iscrowd", "ignore")


class Tables(NamedTuple):
    """The complete elements of a COCO json, in the file's order: structured arrays, with fields named as in the json.

    Beside these an annotation has "image_size": float64, (A, 2), width and height in pixels, NaN where there is no
    image; and "missing_iscrowd", "missing_area" and "bad_area": bool. Its "bbox" is float64, (A, 4), XYWH in pixels;
    may be NaN or infinite.
    """

    images: np.ndarray
    annotations: np.ndarray
    categories: np.ndarray


def read_lists(json_file: str | os.PathLike) -> tuple[dict[str, list], list[str]]:
    """Return the lists of a COCO json by section, and the sections that it has no list of (here, an empty one).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no json in UTF-8.
    """
    if os.path.exists(json_file) and not os.path.isfile(json_file):
        raise ValueError("it is a folder, a pipe or a device")  # a pipe would be waited for
    with open(json_file, encoding="utf-8") as file:
        text = file.read()
    if text.startswith("\ufeff"):
        raise ValueError("byte order mark at character 0: save the file as UTF-8 without one")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    lists = {section: content.get(section) if type(content) is dict else None for section in SECTIONS}
    missing = [section for section in SECTIONS if type(lists[section]) is not list]
    return {**lists, **{section: [] for section in missing}}, missing


def read_tables(report: DatasetReport, lists: dict[str, list]) -> Tables:
    """Return the complete elements, and report what is wrong with the others."""
    images, annotations, categories = (complete_elements(report, section, lists[section]) for section in SECTIONS)
    sizes, no_size = {row["id"]: (row["width"], row["height"]) for row in images}, (math.nan, math.nan)
    # NumPy takes no integer beyond 1e308.
    edges = [math.inf if abs(edge) > sys.float_info.max else edge for row in annotations for edge in row["bbox"]]
    areas = [row.get("area", 0) for row in annotations]
    return Tables(
        _table(images, ("id", "width", "height"), file_name=np.array([row["file_name"] for row in images], object)),
        _table(
            annotations,
            ("id", "image_id", "category_id"),
            bbox=np.array(edges, "f8").reshape(-1, 4),
            iscrowd=np.array([row.get("iscrowd", 0) for row in annotations], bool),
            image_size=np.array([sizes.get(row["image_id"], no_size) for row in annotations], "f8").reshape(-1, 2),
            missing_iscrowd=np.array(["iscrowd" not in row for row in annotations], bool),
            missing_area=np.array(["area" not in row for row in annotations], bool),
            bad_area=np.array([not (_is_number(area) and 0 <= area < math.inf) for area in areas], bool),
        ),
        _table(categories, ("id",), name=np.array([row["name"] for row in categories], object)),
    )


def _table(rows: list[dict], integers: Sequence[str], **columns: np.ndarray) -> np.ndarray:
    """Return a structured array of keys that are whole numbers in all rows, and of other columns."""
    columns = {**{key: np.array([row[key] for row in rows], "i8") for key in integers}, **columns}
    table = np.empty(len(rows), [(key, column.dtype, column.shape[1:]) for key, column in columns.items()])
    for key, column in columns.items():
        table[key] = column
    return table


def complete_elements(report: DatasetReport, section: str, elements: list) -> list[dict]:
    """Return the elements of a section that training can read, and report what is wrong with the others."""
    objects = {index: element for index, element in enumerate(elements) if type(element) is dict}
    others = {index: element for index, element in enumerate(elements) if index not in objects}
    faults = [("wrong_type", f"an element of {section} is no object", others)]
    for key, (is_valid, problem) in _RULES[section].items():
        missing = {index: row for index, row in objects.items() if key not in row and key not in _OPTIONAL}
        wrong = {index: row[key] for index, row in objects.items() if key in row and not is_valid(row[key])}
        faults.append(("missing_key", f'{section} without "{key}"', missing))
        faults.append(("wrong_type", f'"{key}" of {section} {problem}', wrong))
    for code, text, values in faults:
        examples = (f"{section}[{index}] = {printable(value)}" for index, value in values.items())
        report.add("fatal", code, f"{text}: {len(values):,} times", len(values), examples)
    faulty = set().union(*(values for _, _, values in faults))
    return [row for index, row in objects.items() if index not in faulty]
