"""The `--register name=annotations.json:image_dir` flag, on top of Detectron2's `register_coco_instances`."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from .dataset_check import complete_elements, read_lists
from .dataset_report import DatasetReport

_FORM = "--register name=annotations.json:image_dir"


def add_register_argument(parser: ArgumentParser, purpose: str = "") -> None:
    """Add the flag ``--register``, repeatable, whose values :func:`register_from_args` takes."""
    text = f"register a COCO-format data set under NAME{', ' * bool(purpose)}{purpose}; repeatable"
    parser.add_argument("--register", action="append", default=[], metavar="NAME=ANNOTATIONS.JSON:IMAGE_DIR", help=text)


def register_from_args(
    args: Sequence[str] | None, known: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[str]]:
    """Register every data set of a repeatable `--register` flag, and return the class names by data set name.

    Args:
        args: "name=annotations.json:image_dir" each, split at the first "=" and at the last ":".
        known: what an earlier call returned, perhaps in another process: spares reading the annotations again.

    Raises:
        FileNotFoundError, ValueError: as :func:`register_coco_json`; or a part is missing, or a name has white space.
    """
    thing_classes = {}
    for text in args or ():
        name, _, paths = text.partition("=")
        json_file, _, image_root = paths.rpartition(":")
        if not (name and json_file and image_root) or name.split() != [name]:
            raise ValueError(f"--register {text}: not of the form {_FORM}")
        register_coco_json(name, json_file, image_root, (known or {}).get(name))
        thing_classes[name] = MetadataCatalog.get(name).thing_classes
    return thing_classes


def register_coco_json(
    name: str, json_file: str | os.PathLike, image_root: str | os.PathLike, thing_classes: Sequence[str] | None = None
) -> None:
    """Register a data set in COCO format, class names included: ``thing_classes`` by category id, else the json's.

    Registering the same three again does nothing, so that every spawned worker may do it. "~" is expanded in paths.

    Raises:
        FileNotFoundError: the json file or the image directory does not exist.
        ValueError: the file is no COCO json with categories, or the name is taken or cannot be part of a file name.
    """
    argument, form = f"--register {name}={json_file}:{image_root}", f"the form is {_FORM}"
    # Detectron2 writes files called after the data set, such as OUTPUT_DIR/inference/NAME_coco_format.json.
    if bad := [repr(p) for p in ("/", "\\", "..", "\0") if p in name] + ["'-' in front"] * name.startswith("-"):
        problem = f"the name {name!r} becomes part of file names, so it cannot have {' or '.join(bad)}"
        raise ValueError(f"{argument!r}: {problem}; {form}")
    # os.path's functions and not Path's, which raise for an unknown "~user" and for names that are too long.
    json_file, image_root = (str(Path(os.path.expanduser(path)).absolute()) for path in (json_file, image_root))
    # Metadata cannot be overwritten either, and some built-in names have nothing else but their "name".
    meta = MetadataCatalog[name].as_dict() if name in MetadataCatalog else {}
    if name in DatasetCatalog and [meta.get("json_file"), meta.get("image_root")] == [json_file, image_root]:
        return
    if name in DatasetCatalog or meta.keys() > {"name"}:
        hint = f"choose a new one, such as my_{name}, here and in DATASETS.TRAIN or DATASETS.TEST"
        raise ValueError(f"{argument}: '{name}' is the name of another data set; {hint}")
    for exists, kind, path in ((os.path.isfile, "file", json_file), (os.path.isdir, "directory", image_root)):
        if not exists(path):
            raise FileNotFoundError(f"{argument}: there is no {kind} {path}; {form}")
    try:
        metadata = {"thing_classes": thing_classes} if thing_classes else _read_classes(json_file)
    except ValueError as error:
        raise ValueError(f"{argument}: {json_file} {error}; {form}") from error
    register_coco_instances(name, metadata, json_file, image_root)


def _read_classes(json_file: str) -> dict:
    """Return the metadata that `load_coco_json` will set again, for whoever has to know before it does."""
    try:
        lists, missing = read_lists(json_file)
    except ValueError as error:
        raise ValueError(f"is not json ({error})") from error
    if missing:
        raise ValueError(f"is no COCO json: it lacks a list of {' and of '.join(missing)}")
    report = DatasetReport()  # asked for its first example only
    names = [(row["id"], row["name"]) for row in complete_elements(report, "categories", lists["categories"])]
    if report.findings:
        wrong = report.findings[0].examples[0]
        raise ValueError(f"has a category without a whole number as id or without a name: {wrong}")
    if not names:
        raise ValueError("has no categories: there is nothing to learn")
    ids = {category: index for index, category in enumerate(sorted(dict(names)))}
    if len(ids) < len(names):
        raise ValueError("has two categories with the same id")
    return {"thing_classes": [name for _, name in sorted(names)], "thing_dataset_id_to_contiguous_id": ids}
