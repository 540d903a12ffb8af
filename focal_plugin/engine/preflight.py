"""Check, before a worker starts, all that can be seen to be wrong with a command line, a config and its data sets.

What is refused is refused in one message that says what to type. No function here changes a config that it is given;
:func:`scale_to_workers` returns another, made for another number of workers.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

from ..config import load_config
from ..config_yaml import all_keys, lookup
from ..data import check_coco, register_from_args
from ..files import printable
from ..heads import build_retinanet_head
from .torchrun import Workers

logger = logging.getLogger(__name__)

_USUAL_LR, _USUAL_BATCH = 0.01, 16  # of SGD, in Detectron2's and the paper's recipe


@dataclass(frozen=True)
class Job:
    """What the workers are given, all of it checked."""

    args: Namespace  # as typed
    cfg: CfgNode  # frozen; not yet scaled to the number of workers
    resume: bool  # as typed, or because torchrun or SLURM has started the run again
    thing_classes: Mapping[str, Sequence[str]]  # of the data sets that the command line registers
    warnings: Sequence[str]  # what is wrong with the data and can be trained on


def preflight(args: Namespace, workers: Workers) -> Job:
    """Check all there is, and make the folder for the output.

    Raises:
        FileNotFoundError, ValueError: it cannot be trained or evaluated; the message says why and what to type.
    """
    resume = args.resume or workers.restarts > 0
    cfg = load_checked_config(Namespace(**{**vars(args), "resume": resume}))
    num_gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and workers.per_machine > num_gpus:
        raise ValueError(f"{workers.per_machine} workers on this machine (--num-gpus), which has {num_gpus} GPU(s)")
    if not args.eval_only:
        check_scale(cfg, workers.count)
    if "://" not in cfg.OUTPUT_DIR:
        try:
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
            tempfile.TemporaryFile(dir=cfg.OUTPUT_DIR).close()
        except OSError as e:
            raise ValueError(f"OUTPUT_DIR {cfg.OUTPUT_DIR} cannot be made or written to: {e}") from e
    has_to_look = not (args.eval_only or workers.local_rank)  # the first worker of a machine
    warnings = check_training_data(cfg) if has_to_look else []
    return Job(args, cfg, resume, register_from_args(args.register), warnings)


def load_checked_config(args: Namespace, needs_data: bool = True) -> CfgNode:
    """Return the frozen config of a command line, its data sets registered; write nothing.

    ``args`` have ``config_file``, ``register``, ``opts`` (``KEY VALUE ...``), ``eval_only`` and ``resume``. The data
    sets of the config are checked if it ``needs_data``. Errors are those of :func:`preflight`.
    """
    if not args.config_file:
        raise ValueError("no config: give --config-file, e.g. --config-file configs/retina_focal.yaml")
    register_from_args(args.register)
    cfg = load_config(args.config_file, args.opts)
    check_values(cfg)
    if torch.device(cfg.MODEL.DEVICE).type == "cpu" or not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.AMP.ENABLED = False  # Detectron2's AMPTrainer needs CUDA
    if needs_data:
        check_datasets(cfg, splits=("TEST",) if args.eval_only else ("TRAIN", "TEST"))
    if not (args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        weights = cfg.MODEL.WEIGHTS
        if args.eval_only and not weights:
            raise ValueError("no trained weights to evaluate: add MODEL.WEIGHTS path/to/model_final.pth")
        if weights and "://" not in weights and not os.path.isfile(weights):
            raise FileNotFoundError(f"MODEL.WEIGHTS: there is no file {weights!r}")
    if cfg.MODEL.META_ARCHITECTURE == "FocalRetinaNet":
        # A head that is thrown away says in a moment what a worker would say minutes later.
        levels = range(len(cfg.MODEL.RETINANET.IN_FEATURES))
        try:
            build_retinanet_head(cfg, [ShapeSpec(channels=64, stride=8 * 2**level) for level in levels])
        except (AssertionError, KeyError, TypeError) as e:  # Detectron2's, mostly about the anchors
            raise ValueError(f"MODEL.RETINANET and MODEL.ANCHOR_GENERATOR do not fit each other: {e}") from e
    cfg.freeze()
    return cfg


# ------------------------------ values


def check_values(cfg: CfgNode, keys: Iterable[str] = ()) -> None:
    """Raise a ValueError that has a line for each value that cannot be, and says what can.

    Without it they would end in an obscure error minutes later, or in none and a model that learns nothing. ``keys``
    are those that are looked at one by one; empty: all.
    """
    defaults = load_config("")
    problems = []
    for key in keys or {**_RULES, **dict.fromkeys(all_keys(cfg))}:
        value, default, valid = lookup(cfg, key), lookup(defaults, key), False
        if key in _RULES:
            expected, is_valid = _RULES[key]
            with suppress(OverflowError, RuntimeError, TypeError):  # None, a text among numbers, no device
                valid = is_valid(value)
        else:  # yacs takes None for any value; for a name, such as that of a norm, it can be meant
            valid = value is not None or isinstance(default, (str, type(None)))
            expected = f"a value, such as its default, {printable(default)}"
        if not valid:
            problems.append(f"{key} {printable(value)}: must be {expected}")
    model, net = cfg.MODEL, cfg.MODEL.RETINANET
    if not problems and len(net.IOU_LABELS) != len(net.IOU_THRESHOLDS) + 1:
        parts = f"one more than IOU_THRESHOLDS {net.IOU_THRESHOLDS}, which part the IoUs"
        problems.append(f"MODEL.RETINANET.IOU_LABELS {net.IOU_LABELS}: must be {parts}")
    if not problems and len(model.PIXEL_MEAN) != len(model.PIXEL_STD):
        problems.append("MODEL.PIXEL_MEAN and PIXEL_STD: must be as long as each other")
    if cfg.TEST.EARLY_STOP_PATIENCE and not (cfg.TEST.EVAL_PERIOD and cfg.TEST.BEST_METRIC):
        problems.append("TEST.EARLY_STOP_PATIENCE: needs TEST.EVAL_PERIOD > 0 and a TEST.BEST_METRIC, such as bbox/AP")
    if problems:
        raise ValueError("\n".join(problems))


_Rule = tuple[str, Callable[[Any], bool]]  # what a value must be, in words and as a test


def _each(rule: _Rule, like: str, least: int = 1, increasing: bool = False) -> _Rule:
    def is_valid(values: Sequence) -> bool:
        ordered = not increasing or list(values) == sorted(set(values))
        return ordered and len(values) >= least and all(map(rule[1], values))

    return f"a list, each {rule[0]}: {like}", is_valid


_NUMBER = "a number", lambda value: type(value) in (int, float) and math.isfinite(value)
_POSITIVE = "a positive number", lambda value: _NUMBER[1](value) and value > 0
_FROM_0 = "a whole number from 0", lambda value: type(value) is int and value >= 0
_FROM_1 = "a whole number from 1", lambda value: type(value) is int and value >= 1
_IOU = "a number in (0, 1]", lambda value: 0 < value <= 1
_NAME = "a name", lambda name: isinstance(name, str) and name != ""

# yacs has seen to the types, but for None and for what is in lists.
_RULES: dict[str, _Rule] = {
    "OUTPUT_DIR": ("a folder", _NAME[1]),
    "MODEL.DEVICE": ("cuda or cpu; it is no device", lambda name: torch.device(name).type in ("cpu", "cuda")),
    "MODEL.META_ARCHITECTURE": ("registered, as FocalRetinaNet is", META_ARCH_REGISTRY.__contains__),
    "MODEL.BACKBONE.NAME": ("registered, as build_retinanet_resnet_fpn_backbone is", BACKBONE_REGISTRY.__contains__),
    "MODEL.PIXEL_MEAN": _each(_NUMBER, "one a channel"),
    "MODEL.PIXEL_STD": _each(_POSITIVE, "one a channel"),
    "MODEL.ANCHOR_GENERATOR.SIZES": _each(_each(_POSITIVE, "pixels"), "one for each level"),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": _each(_each(_POSITIVE, "ratios"), "one for each level or one for all"),
    "MODEL.RETINANET.IN_FEATURES": _each(_NAME, '["p3", "p4"]'),
    "MODEL.RETINANET.IOU_THRESHOLDS": _each(_IOU, "increasing, [0.4, 0.5]", increasing=True),
    "MODEL.RETINANET.IOU_LABELS": _each(("-1, 0 or 1", (-1, 0, 1).__contains__), "[0, -1, 1]"),
    **dict.fromkeys(("DATASETS.TRAIN", "DATASETS.TEST"), _each(_NAME, '("name",)', least=0)),
    "INPUT.MIN_SIZE_TRAIN": _each(_FROM_1, "(800,)"),
    "SOLVER.STEPS": _each(_FROM_0, "increasing, (60000, 80000)", least=0, increasing=True),
    "SOLVER.BASE_LR": _POSITIVE,
    "SOLVER.OPTIMIZER": ("one of SGD, ADAMW", ("SGD", "ADAMW").__contains__),
    "SOLVER.AMP.PRECISION": ("one of float16, bfloat16", ("float16", "bfloat16").__contains__),
    **dict.fromkeys(("MODEL.RETINANET.NUM_CLASSES", "MODEL.RETINANET.NUM_CONVS"), _FROM_1),
    **dict.fromkeys(("SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD"), _FROM_1),
    **dict.fromkeys(("SOLVER.WARMUP_ITERS", "SOLVER.REFERENCE_WORLD_SIZE", "SOLVER.CHECKPOINTS_TO_KEEP"), _FROM_0),
    **dict.fromkeys(("TEST.EVAL_PERIOD", "TEST.EARLY_STOP_PATIENCE", "INPUT.MIN_SIZE_TEST"), _FROM_0),
    **dict.fromkeys(("DATALOADER.NUM_WORKERS", "DATALOADER.MAX_BAD_IMAGES"), _FROM_0),
}


# ------------------------------ data sets


def check_datasets(cfg: CfgNode, splits: Sequence[str] = ("TRAIN", "TEST")) -> None:
    """Raise a ValueError, unless all data sets are registered, on disk and, if that is known, of the model's classes.

    It has a line for each problem, which says what to type.
    """
    problems = dict.fromkeys(_dataset_problem(cfg, key, name) for key in splits for name in cfg.DATASETS[key])
    if "TRAIN" in splits and not cfg.DATASETS.TRAIN:
        problems["DATASETS.TRAIN is empty: there is nothing to train on"] = None
    if any(problems):
        raise ValueError("\n".join(filter(None, problems)))


def _dataset_problem(cfg: CfgNode, key: str, name: str) -> str:
    if name not in DatasetCatalog:
        near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        own = f"--register {name}=annotations.json:image_dir"
        return f"DATASETS.{key}: no data set '{name}' is registered.{hint} To add your own: {own}"
    meta = MetadataCatalog.get(name)
    for path in (meta.get("json_file"), meta.get("image_root")):
        if path and "://" not in path and not os.path.exists(path) and not meta.get("lazily_generated"):
            way_out = "set DETECTRON2_DATASETS to the folder that holds them (Detectron2's own), or --register them"
            return f"DATASETS.{key}: '{name}' has no {path}; if the data are elsewhere, {way_out}"
    classes, expected = meta.get("thing_classes"), cfg.MODEL.RETINANET.NUM_CLASSES
    if classes is None or len(classes) == expected:
        return ""
    is_wrong_key = cfg.MODEL.ROI_HEADS.NUM_CLASSES != 80 == expected
    more = " (RetinaNet does not read MODEL.ROI_HEADS.NUM_CLASSES, which was changed)" if is_wrong_key else ""
    what, key = f"{len(classes)} classes {printable(list(classes), 100)}", "MODEL.RETINANET.NUM_CLASSES"
    return f"'{name}' has {what}, but {key} is {expected}: set {key} {len(classes)}{more}"


def check_training_data(cfg: CfgNode) -> list[str]:
    """Run the fast form of ``tools/check_dataset.py`` on every data set that has a COCO json on this machine.

    Return a warning for each with faults; raise a ValueError if training or evaluation on one would crash or be wrong.
    """
    warnings, fatal = [], []
    for name in dict.fromkeys([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        meta = MetadataCatalog.get(name)
        if meta.get("lazily_generated"):
            DatasetCatalog.get(name)  # makes it, before workers wait for each other
            continue
        json_file, image_root = meta.get("json_file"), meta.get("image_root", "")
        if not json_file or "://" in json_file or meta.get("evaluator_type") != "coco":
            continue  # Cityscapes, LVIS and others have a json of another form
        report = check_coco(json_file, image_root, cfg, images="sample")
        shown = report.fatal or [finding for finding in report.findings if finding.severity != "note"]
        if shown:
            problem = "cannot be used" if report.fatal else "has faults"
            title = f"'{name}' {problem} (tools/check_dataset.py {json_file} {image_root} says more):"
            (fatal if report.fatal else warnings).append("\n  ".join([title, *(found.to_text() for found in shown)]))
    if fatal:
        raise ValueError("\n".join(fatal))
    return warnings


# ------------------------------ the number of workers


def check_scale(cfg: CfgNode, num_workers: int) -> None:
    """Raise a ValueError, with numbers that would do, if so many workers cannot train by ``cfg``, scaled if it says so.

    ``num_workers`` are those of all machines.
    """
    solver, batch = cfg.SOLVER, cfg.SOLVER.IMS_PER_BATCH
    made_for = solver.REFERENCE_WORLD_SIZE or num_workers
    is_scaled = made_for != num_workers
    if made_for < 1:
        problem = f"SOLVER.REFERENCE_WORLD_SIZE {made_for}: must be a number of workers"
    elif is_scaled and solver.OPTIMIZER != "SGD":
        problem = f"SOLVER.OPTIMIZER {solver.OPTIMIZER}: scaling the learning rate as the batch is a rule for SGD only"
    elif batch < 1 or batch % made_for:
        low = max(batch // made_for, 1) * made_for
        # With a reference, another number of workers is no way out: it is the reference that the batch must suit.
        others = range(1, min(made_for, batch + 1)) if not solver.REFERENCE_WORLD_SIZE else ()
        fewer = [str(count) for count in others if batch % count == 0]
        ways = f"SOLVER.IMS_PER_BATCH {low} or {low + made_for}" + f", or train on {' or '.join(fewer)}" * bool(fewer)
        problem = f"SOLVER.IMS_PER_BATCH {batch} cannot be shared out evenly among {made_for} workers: write {ways}"
    elif is_scaled and not round(solver.MAX_ITER * made_for / num_workers):
        least = num_workers // (2 * made_for) + 1
        problem = f"SOLVER.MAX_ITER {solver.MAX_ITER} would leave no step: write SOLVER.MAX_ITER {least} or more"
    else:
        return
    if is_scaled:
        problem += (
            f". The config is for {made_for} workers, and would be scaled to {num_workers}; to take all as it stands, "
            f"write SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.IMS_PER_BATCH {max(batch // num_workers, 1) * num_workers}"
        )
    raise ValueError(problem)


def scale_to_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Scale batch and learning rate as the workers, the schedule inversely, without what Detectron2's rounding breaks.

    A period, which Detectron2 rounds to 0, is at least 1 step, and a decay of the learning rate comes at least a step
    after the one before, or is dropped with a warning if training ends by then. Return a new config, frozen if ``cfg``
    is; ``cfg`` itself if there is nothing to scale.
    """
    check_scale(cfg, num_workers)
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
    if scaled is cfg:
        return cfg
    scaled.defrost()
    solver, steps = scaled.SOLVER, list(scaled.SOLVER.STEPS)
    solver.CHECKPOINT_PERIOD = max(solver.CHECKPOINT_PERIOD, 1)
    scaled.TEST.EVAL_PERIOD = max(scaled.TEST.EVAL_PERIOD, min(cfg.TEST.EVAL_PERIOD, 1))  # 0 is never, and stays 0
    if list(cfg.SOLVER.STEPS) == sorted(set(cfg.SOLVER.STEPS)):  # what was wrong as written stays so
        steps = [*accumulate(steps, lambda last, step: max(step, last + 1), initial=0)][1:]
    solver.STEPS = tuple(step for step in steps if step < solver.MAX_ITER)
    dropped = tuple(step for step in steps if step >= solver.MAX_ITER)
    if dropped:
        end = f"training ends after {solver.MAX_ITER} steps, without {dropped}"
        logger.warning(f"SOLVER.STEPS {cfg.SOLVER.STEPS}, scaled to {tuple(steps)}: {end}")
    if cfg.is_frozen():
        scaled.freeze()
    return scaled


def usual_lr(solver: CfgNode) -> float:
    """Return the learning rate that SGD has in the paper's recipe for a batch of ``IMS_PER_BATCH``."""
    return _USUAL_LR * solver.IMS_PER_BATCH / _USUAL_BATCH


def learning_rate_warning(cfg: CfgNode) -> str:
    """Return a warning, with the usual rate, if SGD has over twice that for its batch, unclipped; "" if it has not.

    ``cfg`` is what is trained by, i.e. scaled.
    """
    solver, usual = cfg.SOLVER, usual_lr(cfg.SOLVER)
    times = solver.BASE_LR / usual
    if solver.OPTIMIZER != "SGD" or solver.CLIP_GRADIENTS.ENABLED or times <= 2 * (1 + 1e-9):
        return ""
    what = f"times what a batch of {solver.IMS_PER_BATCH} usually has ({_USUAL_LR} for {_USUAL_BATCH} images)"
    way_out = f"if the loss becomes infinite, set SOLVER.BASE_LR {usual:g} or SOLVER.CLIP_GRADIENTS.ENABLED True"
    return f"SOLVER.BASE_LR {solver.BASE_LR:g} is {times:.3g} {what}, and gradients are not clipped: {way_out}"
