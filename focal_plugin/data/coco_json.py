"""Read a COCO json as training reads it, and turn its rows into NumPy tables."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..files import printable
from .dataset_report import MAX_EXAMPLES, DatasetReport

SECTIONS = ("images", "annotations", "categories")


_KEYS = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "iscrowd", "ignore", "area"),
    "categories": ("id", "name"),
}
_OPTIONAL = ("iscrowd", "ignore", "area")
_IDS = -(2**63), 2**63 - 1
_SIDES = 1, 2**31 - 1
_RANGES = {"id": _IDS, "image_id": _IDS, "category_id": _IDS, "width": _SIDES, "height": _SIDES}
_RULES = {  # key -> (is a value valid?, what is wrong if not)
    "file_name": (lambda value: type(value) is str and value, "is no text, or empty"),
    "name": (lambda value: type(value) is str, "is no text"),
    "bbox": (
        lambda value: type(value) is list and len(value) == 4 and all(map(_is_number, value)),
        "is no list of four numbers",
    ),
    "iscrowd": (lambda value: value in (0, 1), "is neither 0 nor 1"),
    "ignore": (lambda value: value == 0, "is not 0, which Detectron2 refuses"),
    "area": (lambda value: _is_number(value) and 0 <= value < math.inf, "is no area"),
}
_IMAGE = [("id", "i8"), ("width", "i8"), ("height", "i8"), ("file_name", object)]
_ANNOTATION = [("id", "i8"), ("image_id", "i8"), ("category_id", "i8"), ("bbox", "f8", 4), ("iscrowd", bool)]
_CATEGORY = [("id", "i8"), ("name", object)]


class Tables(NamedTuple):
    """The complete rows of a COCO json, in the file's order: structured arrays, whose fields are named as in the json.

    Beside these an annotation has "image_size": float64, (A, 2), width and height in pixels; NaN where there is no
    image. Its "bbox" is float64, (A, 4), XYWH in pixels; may be NaN or infinite.
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


def find_faults(section: str, element: Any) -> Iterator[tuple[str, str, str]]:
    """Yield what is wrong with an element of a section: (code of the finding, key or nothing, problem in words)."""
    if type(element) is not dict:
        yield "wrong_type", "", f"an element of {section} is no object"
        return
    for key in _KEYS[section]:
        if key not in element:
            if key != "ignore":
                yield f"missing_{key}" if key in _OPTIONAL else "missing_key", key, ""
        elif problem := _find_problem(section, key, element[key]):
            yield "bad_area" if key == "area" else "wrong_type", key, f'"{key}" of {section} {problem}'


def _find_problem(section: str, key: str, value: Any) -> str:
    if key in _RULES:
        is_valid, problem = _RULES[key]
        return "" if is_valid(value) else problem
    if not _is_number(value):
        return "is no number"
    if section == "categories" and type(value) is float:  # 1.0: --register and Detectron2 list and sort these ids
        return "is no whole number"
    low, high = _RANGES[key]
    is_whole = low <= value <= high and value == int(value)
    return "" if is_whole else f"is no whole number from {low:,} to {high:,}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)  # and not isinstance, to which True is a number


def read_tables(report: DatasetReport, lists: dict[str, list]) -> Tables:
    """Return the complete rows, and report what is wrong with the others."""
    images, annotations, categories = (_complete_rows(report, section, lists[section]) for section in SECTIONS)
    sizes, no_size = {row["id"]: (row["width"], row["height"]) for row in images}, (math.nan, math.nan)

    def fields(row: dict) -> tuple:
        box = [_to_float(number) for number in row["bbox"]]
        ids = row["id"], row["image_id"], row["category_id"]
        return (*ids, box, bool(row.get("iscrowd")), sizes.get(row["image_id"], no_size))

    return Tables(
        np.array([(row["id"], row["width"], row["height"], row["file_name"]) for row in images], _IMAGE),
        np.array(list(map(fields, annotations)), [*_ANNOTATION, ("image_size", "f8", 2)]),
        np.array([(row["id"], row["name"]) for row in categories], _CATEGORY),
    )


def _to_float(number: float) -> float:
    try:
        return float(number)
    except OverflowError:  # an integer beyond 1e308
        return math.inf


def _complete_rows(report: DatasetReport, section: str, elements: list) -> list[dict]:
    places, rows = defaultdict(list), []
    for place, element in enumerate(elements):
        faults = list(find_faults(section, element))
        for fault in faults:
            places[fault].append(place)
        if all(code not in ("wrong_type", "missing_key") for code, _, _ in faults):
            rows.append(element)
    for (code, key, problem), where in places.items():
        examples = [f"{section}[{place}]" for place in where[:MAX_EXAMPLES]]
        if not code.startswith("missing"):
            values = [elements[place][key] if key else elements[place] for place in where[:MAX_EXAMPLES]]
            examples = [f"{example} = {printable(value)}" for example, value in zip(examples, values)]
        report.add(code, len(where), examples, section=section, key=key, problem=problem)
    return rows
