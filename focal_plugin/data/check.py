"""Checks that take a moment before training and save a long search after it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

_DEFAULT_NUM_CLASSES = 80
_SHOWN = 10  # class names in a message


def check_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Checks that every data set of a config is registered, on disk, and has as many classes as the model.

    A data set whose class names are known only after loading is not compared.

    Args:
        cfg: a Detectron2 CfgNode.
        splits: which of DATASETS.TRAIN and DATASETS.TEST to check.

    Raises:
        ValueError: with one line per problem, each saying what to type.
    """
    problems = []
    for key in splits:
        names = cfg.DATASETS[key]
        if isinstance(names, str):
            problems.append(f'DATASETS.{key} is the string "{names}", not a tuple: write ("{names}",)')
        else:
            problems += [
                check_registered(f"DATASETS.{key}", name)
                or check_files(f"DATASETS.{key}", name)
                or _check_classes(cfg, name)
                for name in names
            ]
        if key == "TRAIN" and not names:
            problems.append("DATASETS.TRAIN is empty: there is nothing to train on")
    problems = [problem for problem in dict.fromkeys(problems) if problem]  # in order, each once
    if problems:
        raise ValueError("\n".join(problems))


def check_registered(key: str, name: str) -> str | None:
    """The problem with a data set's name, which the config has under ``key``, or None."""
    if name in DatasetCatalog:
        return None
    near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    own = f"--register {name}=annotations.json:image_dir"
    return f"{key}: no data set '{name}' is registered.{hint} To add your own: {own}"


def check_files(key: str, name: str) -> str | None:
    """The problem with what a registered data set needs on disk, or None."""
    meta = MetadataCatalog.get(name)
    if meta.get("lazily_generated"):
        return None
    for what in ("json_file", "image_root"):
        path = meta.get(what)
        if path and "://" not in path and not os.path.exists(path):
            return (
                f"{key}: '{name}' has no {path}; if the data are elsewhere, set DETECTRON2_DATASETS to the "
                "folder that holds them (Detectron2's own data sets), or --register them"
            )
    return None


def _check_classes(cfg, name):
    """The problem with a registered data set's class count, or None."""
    classes, expected = MetadataCatalog.get(name).get("thing_classes"), cfg.MODEL.RETINANET.NUM_CLASSES
    if classes is None or len(classes) == expected:
        return None
    shown = ", ".join(map(str, classes[:_SHOWN])) + (", ..." if len(classes) > _SHOWN else "")
    wrong_key = cfg.MODEL.ROI_HEADS.NUM_CLASSES != _DEFAULT_NUM_CLASSES == expected
    return (
        f"'{name}' has {len(classes)} classes ({shown}), but MODEL.RETINANET.NUM_CLASSES is {expected}: "
        f"set MODEL.RETINANET.NUM_CLASSES {len(classes)}"
        + (" (RetinaNet does not read MODEL.ROI_HEADS.NUM_CLASSES, which was changed)" if wrong_key else "")
    )
