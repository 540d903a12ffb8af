"""Check, before a worker starts, all that can be seen to be wrong with a command line, a config and its data sets.

What is refused is refused in one message that says what to type. Functions here read configs and never change one.
"""

from __future__ import annotations

import difflib
import math
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from ..config import find_config, load_config
from ..config_yaml import lookup
from ..data import check_coco, register_from_args
from ..heads import build_retinanet_head
from .auto_scale import check_scale
from .torchrun import Workers


@dataclass(frozen=True)
class Job:
    """What the workers are given, all of it checked."""

    args: Namespace
    """As typed."""
    cfg: CfgNode
    """Frozen; not yet scaled to the number of workers."""
    resume: bool
    thing_classes: Mapping[str, Sequence[str]]
    """The class names of the data sets that the command line registers."""
    sizes: Mapping[str, int]
    """Images by data set name, where they are known."""
    warnings: Sequence[str]
    """What is wrong with the data and can be trained on."""


def preflight(args: Namespace, workers: Workers) -> Job:
    """Check all there is, and make the folder for the output.

    Raises:
        FileNotFoundError, ValueError: it cannot be trained or evaluated; the message says why and what to type.
    """
    resume = args.resume or workers.restarts > 0
    cfg = load_checked_config(args, resume)
    num_gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and workers.per_machine > num_gpus:
        raise ValueError(f"{workers.per_machine} workers on this machine (--num-gpus), which has {num_gpus} GPU(s)")
    if not args.eval_only:
        check_scale(cfg, workers.count)
    if "://" not in cfg.OUTPUT_DIR:
        try:
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        except OSError as e:
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made: {e}") from e
        if not os.access(cfg.OUTPUT_DIR, os.W_OK):
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be written to")
    has_to_look = workers.is_first and not args.eval_only
    sizes, warnings = check_training_data(cfg) if has_to_look else ({}, [])
    return Job(args, cfg, resume, register_from_args(args.register), sizes, warnings)


def load_checked_config(args: Namespace, resume: bool | None = None) -> CfgNode:
    """Return the frozen config of a command line, its data sets registered; write nothing.

    ``args`` have ``config_file``, ``register``, ``opts`` (``KEY VALUE ...``), ``eval_only`` and ``resume``.

    Raises:
        FileNotFoundError, ValueError: it cannot be trained (with ``args.eval_only``: evaluated); the message says why.
    """
    if not args.config_file:
        raise ValueError("no config: give --config-file, e.g. --config-file configs/retina_focal.yaml")
    register_from_args(args.register)
    cfg = load_config(find_config(args.config_file), args.opts)
    check_values(cfg)
    if torch.device(cfg.MODEL.DEVICE).type == "cpu" or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.AMP.ENABLED = False  # Detectron2's AMPTrainer needs CUDA
    check_datasets(cfg, splits=("TEST",) if args.eval_only else ("TRAIN", "TEST"))
    is_resumed = args.resume if resume is None else resume
    if not (is_resumed and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        weights = cfg.MODEL.WEIGHTS
        if args.eval_only and not weights:
            raise ValueError("--eval-only would evaluate random weights: add MODEL.WEIGHTS path/to/model_final.pth")
        if weights and "://" not in weights and not os.path.isfile(weights):
            raise FileNotFoundError(f"MODEL.WEIGHTS: there is no file {weights!r}")
    if cfg.MODEL.META_ARCHITECTURE == "FocalRetinaNet":
        # A head that is thrown away says in a moment what a worker would say minutes later.
        num_levels = len(cfg.MODEL.RETINANET.IN_FEATURES)
        build_retinanet_head(cfg, [ShapeSpec(channels=64, stride=8 * 2**i) for i in range(num_levels)])
    cfg.freeze()
    return cfg


# ------------------------------ values


def check_values(cfg: CfgNode) -> None:
    """Check values that would end in an obscure error minutes later, or in none and a model that learns nothing.

    Raises:
        ValueError: with a line for each value that cannot be, which says what can.
    """
    problems = []
    for key, (is_valid, expected) in _RULES.items():
        value = lookup(cfg, key)
        if not is_valid(value):
            problems.append(f"{key} {value!r}: must be {expected}")
    retinanet = cfg.MODEL.RETINANET
    if not problems and len(retinanet.IOU_LABELS) != len(retinanet.IOU_THRESHOLDS) + 1:
        problems.append(
            f"MODEL.RETINANET.IOU_LABELS {retinanet.IOU_LABELS}: must be one more than IOU_THRESHOLDS "
            f"{retinanet.IOU_THRESHOLDS}, which part the IoUs"
        )
    if not problems and len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD):
        problems.append("MODEL.PIXEL_MEAN and PIXEL_STD: must be as long as each other")
    if problems:
        raise ValueError("\n".join(problems))


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_whole(low: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= low


def _all(is_valid: Callable[[Any], bool], least: int = 1, increasing: bool = False) -> Callable[[Any], bool]:
    def check(values: Any) -> bool:
        is_list = isinstance(values, (list, tuple)) and len(values) >= least and all(map(is_valid, values))
        return is_list and (not increasing or all(a < b for a, b in zip(values, values[1:])))

    return check


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_device(value: Any) -> bool:
    try:
        return isinstance(value, str) and torch.device(value).type in ("cpu", "cuda")
    except RuntimeError:
        return False


_SIZES = _all(_all(_is_positive))
_DATASETS = (lambda value: isinstance(value, str) or _all(_is_name, 0)(value), 'names: ("name",)')
_LEAST = {  # of whole numbers
    "MODEL.RETINANET.NUM_CLASSES": 1,
    "MODEL.RETINANET.NUM_CONVS": 0,
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.MAX_BAD_IMAGES": 0,
    "INPUT.MIN_SIZE_TEST": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 1,
    "SOLVER.WARMUP_ITERS": 0,
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "SOLVER.CHECKPOINTS_TO_KEEP": 0,
    "TEST.EVAL_PERIOD": 0,
    "TEST.EARLY_STOP_PATIENCE": 0,
}
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "OUTPUT_DIR": (_is_name, "a folder"),
    "SEED": (lambda value: type(value) is int, "a whole number; negative: another one each time"),
    "MODEL.DEVICE": (_is_device, "cuda or cpu; it is no device"),
    "MODEL.META_ARCHITECTURE": (
        lambda name: name in META_ARCH_REGISTRY,
        "a registered meta-architecture; it is not registered, and FocalRetinaNet is this plugin's",
    ),
    "MODEL.BACKBONE.NAME": (
        lambda name: name in BACKBONE_REGISTRY,
        "a name in Detectron2's BACKBONE_REGISTRY, such as build_retinanet_resnet_fpn_backbone",
    ),
    "MODEL.PIXEL_MEAN": (
        _all(lambda value: type(value) in (int, float) and math.isfinite(value)),
        "a number for each channel",
    ),
    "MODEL.PIXEL_STD": (_all(_is_positive), "a positive number for each channel"),
    "MODEL.ANCHOR_GENERATOR.SIZES": (_SIZES, "lists of positive numbers (pixels), one for each level"),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (_SIZES, "lists of positive numbers, one for each level or one for all"),
    "MODEL.RETINANET.IN_FEATURES": (_all(_is_name), 'names of levels, such as ["p3", "p4"]'),
    "MODEL.RETINANET.IOU_THRESHOLDS": (
        _all(lambda value: _is_positive(value) and value <= 1, increasing=True),
        "increasing numbers in (0, 1]",
    ),
    "MODEL.RETINANET.IOU_LABELS": (_all(lambda value: value in (-1, 0, 1)), "a list of -1, 0 and 1"),
    "DATASETS.TRAIN": _DATASETS,
    "DATASETS.TEST": _DATASETS,
    "INPUT.MIN_SIZE_TRAIN": (_all(_is_whole(1)), "whole numbers from 1 (pixels): (800,)"),
    "SOLVER.BASE_LR": (_is_positive, "a positive number"),
    "SOLVER.STEPS": (_all(_is_whole(0), 0, increasing=True), "increasing whole numbers: (60000, 80000)"),
    "SOLVER.OPTIMIZER": (lambda value: value in ("SGD", "ADAMW"), "one of SGD, ADAMW"),
    "SOLVER.AMP.PRECISION": (lambda value: value in ("float16", "bfloat16"), "one of float16, bfloat16"),
    **{key: (_is_whole(low), f"a whole number from {low}") for key, low in _LEAST.items()},
}


# ------------------------------ data sets


def check_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Check that every data set of a config is registered, on disk, and has as many classes as the model.

    A data set whose class names are known only after loading is not compared.

    Raises:
        ValueError: with one line per problem, each saying what to type.
    """
    problems = []
    for key in splits:
        names = cfg.DATASETS[key]
        if isinstance(names, str):
            problems.append(f'DATASETS.{key} is the string "{names}", not a tuple: write ("{names}",)')
            continue
        problems += [missing_dataset(f"DATASETS.{key}", name) or _wrong_classes(cfg, name) for name in names]
        if key == "TRAIN" and not names:
            problems.append("DATASETS.TRAIN is empty: there is nothing to train on")
    problems = [problem for problem in dict.fromkeys(problems) if problem]  # in order, each once
    if problems:
        raise ValueError("\n".join(problems))


def missing_dataset(key: str, name: str) -> str:
    """Return what a data set, which the config has under ``key``, lacks on this machine; "" if nothing."""
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        own = f"--register {name}=annotations.json:image_dir"
        return f"{key}: no data set '{name}' is registered.{hint} To add your own: {own}"
    meta = MetadataCatalog.get(name)
    for path in (meta.get("json_file"), meta.get("image_root")):
        if path and "://" not in path and not os.path.exists(path) and not meta.get("lazily_generated"):
            return (
                f"{key}: '{name}' has no {path}; if the data are elsewhere, set DETECTRON2_DATASETS to the "
                "folder that holds them (Detectron2's own data sets), or --register them"
            )
    return ""


def _wrong_classes(cfg: CfgNode, name: str) -> str:
    classes, expected = MetadataCatalog.get(name).get("thing_classes"), cfg.MODEL.RETINANET.NUM_CLASSES
    if classes is None or len(classes) == expected:
        return ""
    shown = ", ".join(map(str, classes[:10])) + (", ..." if len(classes) > 10 else "")
    is_wrong_key = cfg.MODEL.ROI_HEADS.NUM_CLASSES != 80 == expected
    return (
        f"'{name}' has {len(classes)} classes ({shown}), but MODEL.RETINANET.NUM_CLASSES is {expected}: "
        f"set MODEL.RETINANET.NUM_CLASSES {len(classes)}"
        + (" (RetinaNet does not read MODEL.ROI_HEADS.NUM_CLASSES, which was changed)" if is_wrong_key else "")
    )


def check_training_data(cfg: CfgNode) -> tuple[dict[str, int], list[str]]:
    """Run the fast form of ``tools/check_dataset.py`` on every data set that has a COCO json on this machine.

    Returns:
        Images by data set name, where they are known, and a warning for each data set with faults.

    Raises:
        ValueError: training or evaluation on one of them would crash or be wrong.
    """
    sizes, warnings, fatal = {}, [], []
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        meta = MetadataCatalog.get(name)
        if meta.get("lazily_generated"):
            sizes[name] = len(DatasetCatalog.get(name))
            continue
        json_file = meta.get("json_file")
        if not json_file or "://" in json_file or meta.get("evaluator_type") != "coco":
            continue  # Cityscapes, LVIS and others have a json of another form
        image_root = meta.get("image_root", "")
        report = check_coco(json_file, image_root, cfg, images="sample")
        sizes[name] = report.summary["images"]
        more = f"tools/check_dataset.py {json_file} {image_root}"
        faults = [f"  {f.to_text()}" for f in report.findings if f.severity != "note" and not f.fatal]
        if report.fatal:
            lines = "\n".join(f"  {finding.to_text()}" for finding in report.fatal)
            fatal.append(f"'{name}' cannot be trained on:\n{lines}\n  All that is wrong: {more}")
        elif faults:
            warnings.append("\n".join([f"'{name}' has faults ({more} says more):", *faults]))
    if fatal:
        raise ValueError("\n".join(fatal))
    return sizes, warnings
