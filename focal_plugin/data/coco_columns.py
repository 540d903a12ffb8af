"""A COCO json as columns of numbers: what the checks need, in a small part of the memory that json.load takes."""

from __future__ import annotations

import difflib
import os
from array import array
from dataclasses import dataclass, field

import numpy as np

from .coco_shapes import keypoints_problem, segmentation_is_dropped, segmentation_problem
from .findings import Finding, Tally, error, fatal, note, shown, warning
from .json_stream import LIST, NotAnObjectError, stream_json

SECTIONS = ("images", "annotations", "categories")
REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}
_REQUIRED_SETS = {section: set(names) for section, names in REQUIRED.items()}
KNOWN = {
    "images": {*REQUIRED["images"], "license", "flickr_url", "coco_url", "url", "date_captured"},
    "annotations": {
        *REQUIRED["annotations"],
        "area",
        "iscrowd",
        "ignore",
        "segmentation",
        "keypoints",
        "num_keypoints",
    },
    "categories": {*REQUIRED["categories"], "supercategory", "keypoints", "skeleton"},
    "": {*SECTIONS, "info", "licenses"},
}
_INT64 = 1 << 63
_NUMBERS = {int, float}  # not bool, which is a subclass
_MAX_SIDE = 1 << 31  # pixels
_MAX_KINDS, _MAX_UNKNOWN = 1000, 20  # unknown keys to tell apart, and to report
_MAX_KEY = 80  # characters of one

_STRUCTURE = {
    "missing_key": (fatal, '{section} without "{name}"'),
    "wrong_type": (fatal, "{what} {why}"),
    "malformed": (warning, "{what} {why} (training on boxes does not need it)"),
    "float_number": (warning, "{what} is written with a point (write whole numbers)"),
    "bad_area": (error, '{section} whose "area" is no number >= 0, which evaluation compares with'),
    "missing_area": (error, '{section} without "area" (pycocotools stops with a KeyError when it evaluates)'),
    "missing_iscrowd": (
        warning,
        '{section} without "iscrowd" (pycocotools, which evaluates where Detectron2\'s compiled part is absent, stops '
        "with a KeyError; write 0)",
    ),
    "dropped_by_polygons": (
        warning,
        "{section} whose segmentation has no polygon of three points, which Detectron2 drops with their boxes when it "
        "loads the file (leave the segmentation out instead)",
    ),
}


@dataclass
class Columns:
    """The rows of a COCO json that are complete, in the file's order.

    Attributes:
        image_ids, widths, heights: int64, (I,); sizes in pixels.
        file_names: I strings, as in the file.
        annotation_ids, box_image_ids, box_category_ids: int64, (A,).
        boxes: float64, (A, 4), XYWH in pixels; may be NaN or infinite.
        crowd: bool, (A,).
        category_ids: int64, (C,).
        category_names: C strings.
        counts: elements of each of ``SECTIONS`` in the file, rows that lack something included.
        findings: what is wrong with the structure; such rows are not in the columns.
        complete: False if the file could not be read to its end: then the columns hold a part of it.
    """

    image_ids: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    file_names: list[str]
    annotation_ids: np.ndarray
    box_image_ids: np.ndarray
    box_category_ids: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    category_ids: np.ndarray
    category_names: list[str]
    counts: dict[str, int]
    findings: list[Finding] = field(default_factory=list)
    complete: bool = True


def read_columns(json_file: str | os.PathLike) -> Columns:
    """Streams a COCO json into columns; whatever is wrong with it becomes a finding.

    Args:
        json_file: its path.
    """
    reader = _ColumnReader()
    problem = None
    try:
        if os.path.exists(json_file) and not os.path.isfile(json_file):
            raise ValueError("it is a folder, a pipe or a device")  # of which a pipe would be waited for
        for key, index, value in stream_json(json_file):
            reader.add(key, index, value)
    except NotAnObjectError:
        pass  # then the lists are missing, which is what to say
    except (OSError, ValueError) as caught:
        problem = fatal("not_json", f"the file cannot be read as json: {caught}")
    return reader.columns(problem)


class _ColumnReader:
    def __init__(self):
        self._lists: set[str] = set()
        self._counts = dict.fromkeys(SECTIONS, 0)
        self._faults, self._unknown = Tally(), Tally()
        self._near: dict[tuple[str, str], str] = {}  # (section, unknown key) -> the key that may be meant
        self._ids = {section: array("q") for section in SECTIONS}
        self._sizes, self._file_names = array("q"), []
        self._links, self._boxes, self._crowd = array("q"), array("d"), array("b")
        self._names: list[str] = []
        self._add_row = {
            "images": self._add_image,
            "annotations": self._add_annotation,
            "categories": self._add_category,
        }

    def add(self, key: str, index: int | None, value) -> None:
        """Takes one step of :func:`stream_json`."""
        if key not in self._add_row:
            if index is None and key not in KNOWN[""]:
                self._note_unknown("", {key: value}, "")
            return
        if index is None:
            if value is LIST:
                self._lists.add(key)
            return
        self._counts[key] += 1
        if type(value) is not dict:
            self._faults.add(("wrong_type", key, "", "is no object"), f"{key}[{index}] = {shown(value)}")
        else:
            where = f"{key}[{index}]"
            if not value.keys() <= KNOWN[key]:
                self._note_unknown(key, value, where)
            complete = value.keys() >= _REQUIRED_SETS[key]
            if not complete:
                for name in REQUIRED[key]:
                    if name not in value:
                        self._faults.add(("missing_key", key, name, ""), where)
            self._add_row[key](value, where, complete)

    def columns(self, problem: Finding | None) -> Columns:
        sizes = np.frombuffer(self._sizes, np.int64).reshape(-1, 2)
        links = np.frombuffer(self._links, np.int64).reshape(-1, 2)
        ids = {section: np.frombuffer(values, np.int64) for section, values in self._ids.items()}
        return Columns(
            image_ids=ids["images"],
            widths=sizes[:, 0],
            heights=sizes[:, 1],
            file_names=self._file_names,
            annotation_ids=ids["annotations"],
            box_image_ids=links[:, 0],
            box_category_ids=links[:, 1],
            boxes=np.frombuffer(self._boxes, np.float64).reshape(-1, 4),
            crowd=np.frombuffer(self._crowd, np.int8).astype(bool),
            category_ids=ids["categories"],
            category_names=self._names,
            counts=self._counts,
            findings=self._findings(problem),
            complete=problem is None,
        )

    def _add_image(self, item: dict, where: str, complete: bool) -> None:
        key = self._whole("images", "id", item, where)
        name = item.get("file_name")
        if "file_name" in item and not (type(name) is str and name):
            self._wrong("images", "file_name", name, where, "is no text, or empty")
            complete = False
        sizes = [self._whole("images", side, item, where, 1, _MAX_SIDE) for side in ("width", "height")]
        if complete and key is not None and None not in sizes:
            self._ids["images"].append(key)
            self._file_names.append(name)
            self._sizes.extend(sizes)

    def _add_category(self, item: dict, where: str, complete: bool) -> None:
        key, name = item.get("id"), item.get("name")
        if "name" in item and type(name) is not str:
            self._wrong("categories", "name", name, where, "is no text")
            complete = False
        if isinstance(key, float):  # the one id that --register and Detectron2 list and sort
            self._wrong("categories", "id", key, where, "is no whole number")
        elif (key := self._whole("categories", "id", item, where)) is not None and complete:
            self._ids["categories"].append(key)
            self._names.append(name)

    def _add_annotation(self, item: dict, where: str, complete: bool) -> None:
        ids = [self._whole("annotations", name, item, where) for name in ("id", "image_id", "category_id")]
        box = self._box(item, where)
        crowd = self._is_crowd(item, where)
        self._check_area(item, where)
        # Detectron2's load_coco_json raises on all of these, so that training cannot begin.
        if not _equals_zero(item.get("ignore", 0)):
            self._wrong("annotations", "ignore", item["ignore"], where, "is not 0, which Detectron2 refuses")
        self._check_shape("segmentation", item, where, segmentation_problem)
        self._check_shape("keypoints", item, where, keypoints_problem)
        if complete and None not in ids and box is not None:
            self._ids["annotations"].append(ids[0])
            self._links.extend(ids[1:])
            self._boxes.extend(box)
            self._crowd.append(crowd)

    def _whole(
        self, section: str, name: str, item: dict, where: str, low: int = -_INT64, limit: int = _INT64
    ) -> int | None:
        """The whole number under a key, or None after noting why there is none."""
        value = item.get(name)
        if type(value) is int and low <= value < limit:
            return value
        if name not in item:
            return None
        if type(value) is float and value.is_integer() and low <= value < limit:
            self._faults.add(("float_number", section, name, ""), f"{where} = {shown(value)}")
            return int(value)
        is_number = type(value) is int or type(value) is float
        why = f"is no whole number from {low:,} to {limit - 1:,}" if is_number else "is no number"
        self._wrong(section, name, value, where, why)
        return None

    def _box(self, item: dict, where: str) -> list[float] | None:
        """XYWH, or None after noting why there is no box."""
        box = item.get("bbox")
        if type(box) is list and len(box) == 4 and _NUMBERS.issuperset(map(type, box)):
            try:
                return list(map(float, box))
            except OverflowError:  # an integer beyond 1e308
                return [float(str(x)) for x in box]  # which gives infinity
        if "bbox" in item:
            self._wrong("annotations", "bbox", box, where, "is no list of four numbers")
        return None

    def _check_shape(self, name: str, item: dict, where: str, find_problem) -> None:
        value = item.get(name)
        if not value:
            return
        why, raises = find_problem(value) or ("", False)
        if raises:
            self._wrong("annotations", name, value, where, why)
            return
        if why:
            self._faults.add(("malformed", "annotations", name, why), f"{where} = {shown(value)}")
        if name == "segmentation" and segmentation_is_dropped(value):
            self._faults.add(("dropped_by_polygons", "annotations", name, ""), where)

    def _is_crowd(self, item: dict, where: str) -> bool:
        crowd = item.get("iscrowd")
        if "iscrowd" not in item:
            self._faults.add(("missing_iscrowd", "annotations", "iscrowd", ""), where)
        elif not (crowd == 0 or crowd == 1):
            self._wrong("annotations", "iscrowd", crowd, where, "is neither 0 nor 1")
        return bool(crowd)

    def _check_area(self, item: dict, where: str) -> None:
        area = item.get("area")
        if "area" not in item:
            self._faults.add(("missing_area", "annotations", "area", ""), where)
        elif type(area) not in (int, float) or not 0 <= area < float("inf"):
            self._faults.add(("bad_area", "annotations", "area", ""), f"{where} = {shown(area)}")

    def _wrong(self, section: str, name: str, value, where: str, why: str) -> None:
        self._faults.add(("wrong_type", section, name, why), f"{where} = {shown(value)}")

    def _note_unknown(self, section: str, item: dict, where: str) -> None:
        for name in item.keys() - KNOWN[section]:
            key = section, name[:_MAX_KEY]
            if key not in self._near and len(self._near) < _MAX_KINDS:
                near = difflib.get_close_matches(key[1], KNOWN[section] - item.keys(), n=1, cutoff=0.7)
                self._near[key] = near[0] if near else ""
            if key in self._near:
                self._unknown.add((*key, self._near[key]), where)

    def _findings(self, problem: Finding | None) -> list[Finding]:
        found = [problem] if problem else self._missing_lists()
        found += [_structure_finding(*entry) for entry in self._faults.items()]
        unknown = sorted(self._unknown.items(), key=lambda entry: (not entry[0][2], -entry[1]))  # with a hint first
        found += [_unknown_finding(*entry) for entry in unknown[:_MAX_UNKNOWN]]
        if len(unknown) > _MAX_UNKNOWN:
            found.append(note("unknown_key", f"{len(unknown) - _MAX_UNKNOWN:,} or more other unknown keys: not read"))
        return found

    def _missing_lists(self) -> list[Finding]:
        missing = [section for section in SECTIONS if section not in self._lists]
        message = f"no COCO json: it lacks a list of {' and of '.join(missing)}"
        return [fatal("no_coco", message, len(missing))] if missing else []


def _structure_finding(kind: tuple, count: int, examples: list[str]) -> Finding:
    code, section, name, why = kind
    make, message = _STRUCTURE[code]
    what = f'"{name}" of {section}' if name else f"an element of {section}"
    message = message.format(what=what, section=section, name=name, why=why)
    return make(code, f"{message}: {count:,} times", count, examples)


def _unknown_finding(kind: tuple, count: int, examples: list[str]) -> Finding:
    section, name, near = kind
    message = f"unknown key {shown(name)} " + (f"of {section}, {count:,} times" if section else "at the top level")
    examples = examples if section else []
    if near:
        return warning("unknown_key", f'{message}: did you mean "{near}"?', count, examples)
    return note("unknown_key", f"{message}: not read", count, examples)


def _equals_zero(value) -> bool:
    return isinstance(value, (int, float)) and value == 0
