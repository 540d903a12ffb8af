"""Values of a config that would end in an obscure error minutes later, or in none and a model that learns nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY


def check_values(cfg: CfgNode) -> None:
    """Checks the keys that a RetinaNet and its training read.

    Raises:
        ValueError: with a line for each value that cannot be, which says what can.
    """
    problems = []
    for key, (is_right, wanted) in _RULES.items():
        value = _get(cfg, key)
        if not is_right(value):
            problems.append(f"{key} {value!r}: must be {wanted}")
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


def _get(cfg: CfgNode, key: str) -> Any:
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def _is_whole(low: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= low


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _list_of(is_right: Callable[[Any], bool], least: int = 1) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, (list, tuple)) and len(values) >= least and all(map(is_right, values))


def _increasing(is_right: Callable[[Any], bool], least: int = 1) -> Callable[[Any], bool]:
    is_list = _list_of(is_right, least)
    return lambda values: is_list(values) and all(a < b for a, b in zip(values, values[1:]))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_device(value: Any) -> bool:
    try:
        return isinstance(value, str) and torch.device(value).type in ("cpu", "cuda")
    except (RuntimeError, TypeError):
        return False


_SIZES = _list_of(_list_of(_is_positive))
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "OUTPUT_DIR": (_is_text, "a folder"),
    "MODEL.DEVICE": (_is_device, "cuda or cpu; it is no device"),
    "MODEL.BACKBONE.NAME": (
        lambda name: isinstance(name, str) and name in BACKBONE_REGISTRY,
        "a name in Detectron2's BACKBONE_REGISTRY, such as build_retinanet_resnet_fpn_backbone",
    ),
    "MODEL.PIXEL_MEAN": (_list_of(_is_number), "a number for each channel"),
    "MODEL.PIXEL_STD": (_list_of(_is_positive), "a positive number for each channel"),
    "MODEL.ANCHOR_GENERATOR.SIZES": (_SIZES, "lists of positive numbers (pixels), one for each level"),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": (_SIZES, "lists of positive numbers, one for each level or one for all"),
    "MODEL.RETINANET.NUM_CLASSES": (_is_whole(1), "a whole number from 1"),
    "MODEL.RETINANET.NUM_CONVS": (_is_whole(0), "a whole number from 0"),
    "MODEL.RETINANET.IN_FEATURES": (_list_of(_is_text), 'names of levels, such as ["p3", "p4"]'),
    "MODEL.RETINANET.IOU_THRESHOLDS": (
        _increasing(lambda value: _is_number(value) and 0 < value <= 1),
        "increasing numbers in (0, 1]",
    ),
    "MODEL.RETINANET.IOU_LABELS": (_list_of(lambda value: value in (-1, 0, 1)), "a list of -1, 0 and 1"),
    "DATASETS.TRAIN": (lambda value: isinstance(value, str) or _list_of(_is_text, 0)(value), 'names: ("name",)'),
    "DATASETS.TEST": (lambda value: isinstance(value, str) or _list_of(_is_text, 0)(value), 'names: ("name",)'),
    "DATALOADER.NUM_WORKERS": (_is_whole(0), "a whole number from 0"),
    "DATALOADER.MAX_BAD_IMAGES": (_is_whole(0), "a whole number from 0"),
    "INPUT.MIN_SIZE_TRAIN": (_list_of(_is_whole(1)), "whole numbers from 1 (pixels): (800,)"),
    "INPUT.MIN_SIZE_TEST": (_is_whole(0), "a whole number of pixels, 0 for as they are"),
    "SOLVER.IMS_PER_BATCH": (_is_whole(1), "a whole number from 1"),
    "SOLVER.BASE_LR": (_is_positive, "a positive number"),
    "SOLVER.MAX_ITER": (_is_whole(1), "a whole number from 1"),
    "SOLVER.STEPS": (_increasing(_is_whole(0), 0), "increasing whole numbers: (60000, 80000)"),
    "SOLVER.WARMUP_ITERS": (_is_whole(0), "a whole number from 0"),
    "SOLVER.CHECKPOINT_PERIOD": (_is_whole(1), "a whole number from 1"),
    "SOLVER.CHECKPOINTS_TO_KEEP": (_is_whole(0), "a whole number from 0"),
    "SOLVER.REFERENCE_WORLD_SIZE": (_is_whole(0), "a whole number from 0"),
    "TEST.EVAL_PERIOD": (_is_whole(0), "a whole number from 0"),
    "TEST.EARLY_STOP_PATIENCE": (_is_whole(0), "a whole number from 0"),
    "SEED": (lambda value: type(value) is int, "a whole number; negative: another one each time"),
}
