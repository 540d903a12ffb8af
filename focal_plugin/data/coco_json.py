"""Read a COCO json as training reads it, and turn its rows into NumPy columns."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..files import printable
from .dataset_report import MAX_EXAMPLES, DatasetReport

SECTIONS = ("images", "annotations", "categories")


def read_json(json_file: str | os.PathLike) -> Any:
    """Return the content of a json file.

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
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def missing_lists(content: Any) -> list[str]:
    """Return which of ``SECTIONS`` the content of a json has no list of."""
    content = content if isinstance(content, dict) else {}
    return [section for section in SECTIONS if not isinstance(content.get(section), list)]


def _whole(low: int, high: int) -> Callable[[Any], str]:
    def problem(value):
        if type(value) not in (int, float):  # and not isinstance, to which True is a number
            return "is no number"
        is_valid = low <= value <= high and value == int(value)
        return "" if is_valid else f"is no whole number from {low:,} to {high:,}"

    return problem


def _unless(is_valid: Callable[[Any], bool], problem: str) -> Callable[[Any], str]:
    return lambda value: "" if is_valid(value) else problem


_INT64, _SIDE = _whole(-(2**63), 2**63 - 1), _whole(1, 2**31 - 1)
_NUMBERS = {int, float}
_KEYS = {  # section -> key -> a function that says what is wrong with a value, or nothing
    "images": {
        "id": _INT64,
        "file_name": _unless(lambda value: type(value) is str and value, "is no text, or empty"),
        "width": _SIDE,
        "height": _SIDE,
    },
    "annotations": {
        "id": _INT64,
        "image_id": _INT64,
        "category_id": _INT64,
        "bbox": _unless(
            lambda value: type(value) is list and len(value) == 4 and _NUMBERS.issuperset(map(type, value)),
            "is no list of four numbers",
        ),
        "iscrowd": _unless(lambda value: value in (0, 1), "is neither 0 nor 1"),
        "ignore": _unless(lambda value: value == 0, "is not 0, which Detectron2 refuses"),
    },
    "categories": {
        # Not 1.0: this is the one id that --register and Detectron2 list and sort.
        "id": lambda value: "is no whole number" if type(value) is float else _INT64(value),
        "name": _unless(lambda value: type(value) is str, "is no text"),
    },
}
_OPTIONAL = {"iscrowd", "ignore"}


@dataclass
class Columns:
    """The complete rows of a COCO json, in the file's order.

    Attributes:
        image_ids: int64, (I,).
        sizes: int64, (I, 2), width and height in pixels.
        file_names: I strings, as in the file.
        annotation_ids, box_image_ids, box_category_ids: int64, (A,).
        boxes: float64, (A, 4), XYWH in pixels; may be NaN or infinite.
        crowd: bool, (A,).
        category_ids: int64, (C,).
        category_names: C strings.
    """

    image_ids: np.ndarray
    sizes: np.ndarray
    file_names: list[str]
    annotation_ids: np.ndarray
    box_image_ids: np.ndarray
    box_category_ids: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    category_ids: np.ndarray
    category_names: list[str]

    def box_image_sizes(self) -> np.ndarray:
        """Return width and height of each box's image: float64, (A, 2), in pixels; NaN where there is no image."""
        rows, known = rows_of(self.box_image_ids, self.image_ids)
        sizes = np.full((len(rows), 2), np.nan)
        sizes[known] = self.sizes[rows[known]]
        return sizes

    def object_image_ids(self) -> np.ndarray:
        """Return the ids of the images with an object that is no crowd, as Detectron2 counts them; int64, sorted."""
        return np.unique(self.box_image_ids[~self.crowd])


def read_columns(report: DatasetReport, lists: dict[str, list]) -> Columns:
    """Return the complete rows, and report what is wrong with the others."""
    images, annotations, categories = (_complete_rows(report, section, lists[section]) for section in SECTIONS)
    try:
        boxes = np.array([row["bbox"] for row in annotations], dtype=np.float64)
    except OverflowError:  # an integer beyond 1e308: infinity
        boxes = np.array([[float(str(number)) for number in row["bbox"]] for row in annotations])
    return Columns(
        *_integers(images, "id").T,
        _integers(images, "width", "height"),
        [row["file_name"] for row in images],
        *_integers(annotations, "id", "image_id", "category_id").T,
        boxes.reshape(-1, 4),
        np.array([bool(row.get("iscrowd")) for row in annotations], dtype=bool),
        *_integers(categories, "id").T,
        [row["name"] for row in categories],
    )


def _integers(rows: list[dict], *names: str) -> np.ndarray:
    return np.array([[row[name] for name in names] for row in rows], dtype=np.int64).reshape(-1, len(names))


def _complete_rows(report: DatasetReport, section: str, elements: list) -> list[dict]:
    def add(level: str, code: str, message: str, places: list[int], name: str | None = None) -> None:
        """Add a finding about the elements at some places, which shows their values under a key."""
        examples = [f"{section}[{place}]" for place in places[:MAX_EXAMPLES]]
        if code in ("wrong_type", "bad_area"):
            values = [elements[place][name] if name else elements[place] for place in places[:MAX_EXAMPLES]]
            examples = [f"{example} = {printable(value)}" for example, value in zip(examples, values)]
        report.add(level, code, f"{message}: {len(places):,} times", len(places), examples)

    rows = [place for place, element in enumerate(elements) if type(element) is dict]
    no_objects = [place for place, element in enumerate(elements) if type(element) is not dict]
    add("fatal", "wrong_type", f"an element of {section} is no object", no_objects)
    incomplete = set()
    for name, find_problem in _KEYS[section].items():
        lacking, wrong = [], defaultdict(list)
        for place in rows:
            if name not in elements[place]:
                lacking.append(place)
            elif problem := find_problem(elements[place][name]):
                wrong[problem].append(place)
        for problem, places in wrong.items():
            add("fatal", "wrong_type", f'"{name}" of {section} {problem}', places, name)
        if name not in _OPTIONAL:
            add("fatal", "missing_key", f'{section} without "{name}"', lacking)
            incomplete.update(lacking, *wrong.values())
    if section == "annotations":
        lacking = [place for place in rows if "iscrowd" not in elements[place]]
        message = (
            'annotations without "iscrowd" (pycocotools, which evaluates where Detectron2\'s compiled part is absent, '
            "stops with a KeyError; write 0)"
        )
        add("warning", "missing_iscrowd", message, lacking)
        lacking = [place for place in rows if "area" not in elements[place]]
        message = 'annotations without "area" (pycocotools stops with a KeyError when it evaluates)'
        add("error", "missing_area", message, lacking)
        areas = ((place, elements[place].get("area", 0)) for place in rows)
        wrong = [place for place, area in areas if type(area) not in (int, float) or not 0 <= area < float("inf")]
        message = 'annotations whose "area" is no number >= 0, which evaluation compares with'
        add("error", "bad_area", message, wrong, "area")
    return [elements[place] for place in rows if place not in incomplete]


def rows_of(ids: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where in ``table`` each of ``ids`` is: (rows, known); a row means something only where known is True."""
    if not len(table):
        return np.zeros(len(ids), np.int64), np.zeros(len(ids), bool)
    order = np.argsort(table, kind="stable")
    rows = order[np.searchsorted(table, ids, sorter=order).clip(max=len(table) - 1)]
    return rows, table[rows] == ids
