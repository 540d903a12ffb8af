"""Read a COCO json as training reads it, and pick the elements that training can use."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..files import printable
from .dataset_report import DatasetReport

SECTIONS = ("images", "annotations", "categories")


def is_number(value: Any) -> bool:
    return type(value) in (int, float)  # and not isinstance, to which True is a number


def _whole_number(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    text = f"is no whole number from {low:,} to {high:,}"
    return lambda value: is_number(value) and low <= value <= high and value == int(value), text


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
            lambda value: type(value) is list and len(value) == 4 and all(map(is_number, value)),
            "is no list of four numbers",
        ),
        "iscrowd": (lambda value: value in (0, 1), "is neither 0 nor 1"),
        "ignore": (lambda value: value == 0, "is not 0, which Detectron2 refuses"),
    },
    "categories": {
        # 1.0 is refused: --register and Detectron2 list and sort these ids.
        "id": (lambda value: type(value) is int and _ID[0](value), _ID[1]),
        "name": (lambda value: type(value) is str, "is no text"),
    },
}
_OPTIONAL = ("iscrowd", "ignore")


def read_lists(json_file: str | os.PathLike) -> tuple[dict[str, list], list[str]]:
    """Return the lists of a COCO json by section, and the sections that it has no list of (here, an empty one).

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is no json in UTF-8.
    """
    if os.path.exists(json_file) and not os.path.isfile(json_file):
        raise ValueError("it is a folder, a pipe or a device")  # a pipe would be waited for
    text = Path(json_file).read_text(encoding="utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("byte order mark at character 0: save the file as UTF-8 without one")
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    lists = {section: content.get(section) if type(content) is dict else None for section in SECTIONS}
    missing = [section for section in SECTIONS if type(lists[section]) is not list]
    return {**lists, **{section: [] for section in missing}}, missing


def complete_elements(report: DatasetReport, section: str, elements: list) -> list[dict]:
    """Return the elements of a section that have all keys, of the right type, and report the others."""
    objects = {index: element for index, element in enumerate(elements) if type(element) is dict}
    others = {index: element for index, element in enumerate(elements) if index not in objects}
    faults = [("wrong_type", f"an element of {section} is no object", others)]
    for key, (is_valid, problem) in _RULES[section].items():
        missing = {index: row for index, row in objects.items() if key not in row and key not in _OPTIONAL}
        wrong = {index: row[key] for index, row in objects.items() if key in row and not is_valid(row[key])}
        faults.append(("missing_key", f'{section} without "{key}"', missing))
        faults.append(("wrong_type", f'"{key}" of {section} {problem}', wrong))
    for code, text, values in faults:
        found = [(f"{section}[{index}]", value) for index, value in values.items()]
        report.add_all("fatal", code, text, found, lambda at: f"{at[0]} = {printable(at[1])}", " times")
        objects = {index: row for index, row in objects.items() if index not in values}
    return list(objects.values())


def box_arrays(annotations: list[dict], images: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes of complete annotations, (A, 4) XYWH in pixels, which may be NaN or infinite, and their images'
    sizes, (A, 2) widths and heights in pixels, NaN where there is no image; both float64.
    """
    # NumPy takes no integer beyond 1e308.
    edges = [math.inf if abs(edge) > sys.float_info.max else edge for row in annotations for edge in row["bbox"]]
    sizes, no_size = {row["id"]: (row["width"], row["height"]) for row in images}, (math.nan, math.nan)
    sizes = [sizes.get(row["image_id"], no_size) for row in annotations]
    return np.array(edges, np.float64).reshape(-1, 4), np.array(sizes, np.float64).reshape(-1, 2)
