"""Train by a config made for some number of workers on another number: refuse, scale, and say what was made of it.

Detectron2's ``DefaultTrainer.auto_scale_workers`` does the scaling: batch and learning rate in proportion to the
workers, the schedule inversely, so that as many images are seen as before. No function here changes a config.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from ..config_yaml import lookup

logger = logging.getLogger(__name__)

# SGD's learning rate, and its batch, in Detectron2's and the paper's recipe.
REFERENCE_LR = 0.01
REFERENCE_BATCH = 16


def check_scale(cfg: CfgNode, num_workers: int) -> None:
    """Check that this many workers, of all machines, can train by ``cfg`` as written, scaled to them or not.

    Raises:
        ValueError: they cannot; the message gives numbers that would do.
    """
    solver = cfg.SOLVER
    reference, batch = solver.REFERENCE_WORLD_SIZE, solver.IMS_PER_BATCH
    if num_workers < 1:
        raise ValueError(f"{num_workers} workers: at least 1 is needed")
    nearest = min(_nearest_multiples(batch, num_workers), key=lambda n: abs(n - batch))
    other_batch = f" SOLVER.IMS_PER_BATCH {nearest}" if nearest != batch else ""
    as_it_stands = f"SOLVER.REFERENCE_WORLD_SIZE 0{other_batch} to take batch, learning rate and schedule as they stand"
    if reference < 0:
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} is no number of workers: write the number that the config is "
            f"made for (8, ...), or {as_it_stands}"
        )
    if not _is_scaled(cfg, num_workers):
        _check_shares(batch, num_workers, can_take_others=not reference)
        return
    here = f"x {Fraction(num_workers, reference)} for {num_workers} worker(s) here"
    if solver.get("OPTIMIZER", "SGD") != "SGD":
        raise ValueError(
            f"SOLVER.OPTIMIZER {solver.OPTIMIZER} with SOLVER.REFERENCE_WORLD_SIZE {reference}: the learning rate "
            f"would be scaled {here}, as the batch, which is a rule for SGD only; write {as_it_stands}"
        )
    if batch < 1 or batch % reference:
        low, high = _nearest_multiples(batch, reference)
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {batch} is for the {reference} workers of SOLVER.REFERENCE_WORLD_SIZE, among whom "
            f"it cannot be shared out evenly: write the batch of {reference} workers ({low}, {high}, ...), which is "
            f"scaled {here}; or {as_it_stands}"
        )
    if solver.MAX_ITER > 0 and not round(solver.MAX_ITER / (num_workers / reference)):
        least = int(num_workers / reference / 2) + 1
        raise ValueError(
            f"SOLVER.MAX_ITER {solver.MAX_ITER}, made for {reference} workers and scaled "
            f"x {Fraction(reference, num_workers)} for {num_workers}, leaves no step to train: write "
            f"SOLVER.MAX_ITER {least} or more, or {as_it_stands}"
        )


def _check_shares(batch: int, num_workers: int, can_take_others: bool) -> None:
    if batch > 0 and batch % num_workers == 0:
        return
    low, high = _nearest_multiples(batch, num_workers)
    # With a reference another number of workers is no way out: it is the reference's that the batch must suit.
    shares = [n for n in range(1, batch + 1) if batch % n == 0] if can_take_others else []
    nearest = sorted(sorted(shares, key=lambda n: abs(n - num_workers))[:6])
    raise ValueError(
        f"SOLVER.IMS_PER_BATCH {batch} cannot be shared out evenly among {num_workers} workers: write "
        f"SOLVER.IMS_PER_BATCH {low} or {high}" + (f", or train on {' or '.join(map(str, nearest))}" if nearest else "")
    )


def _is_scaled(cfg: CfgNode, num_workers: int) -> bool:
    return cfg.SOLVER.REFERENCE_WORLD_SIZE not in (0, num_workers)


def _nearest_multiples(number: int, divisor: int) -> tuple[int, int]:
    """Return the two that enclose ``number``, or the first two."""
    low = max(number // divisor, 1) * divisor
    return low, low + divisor


def scale_to_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Scale ``cfg`` to this many workers by Detectron2's rule, without what its rounding breaks.

    Detectron2 rounds a period to 0, with which a checkpointer divides, and two decays of the learning rate to one step.
    Here a period is at least 1 step, and a decay comes at least a step after the one before, or is dropped with a
    warning if training ends by then.

    Returns:
        A new config, frozen if ``cfg`` is, whose ``SOLVER.REFERENCE_WORLD_SIZE`` is ``num_workers``, so that
        Detectron2's trainer does not scale it again; ``cfg`` itself if there is nothing to scale.

    Raises:
        ValueError: as :func:`check_scale`.
    """
    check_scale(cfg, num_workers)
    if not _is_scaled(cfg, num_workers):
        return cfg
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers).clone()
    scaled.defrost()
    if cfg.SOLVER.CHECKPOINT_PERIOD > 0:
        scaled.SOLVER.CHECKPOINT_PERIOD = max(scaled.SOLVER.CHECKPOINT_PERIOD, 1)
    if cfg.TEST.EVAL_PERIOD > 0:
        scaled.TEST.EVAL_PERIOD = max(scaled.TEST.EVAL_PERIOD, 1)
    scaled.SOLVER.STEPS = _apart(cfg.SOLVER.STEPS, scaled.SOLVER.STEPS, scaled.SOLVER.MAX_ITER)
    if cfg.is_frozen():
        scaled.freeze()
    return scaled


def _apart(written: Sequence[int], steps: Sequence[int], max_iter: int) -> tuple[int, ...]:
    """Return the scaled decays in the order they were written in: strictly increasing, below ``max_iter``."""
    if any(a >= b for a, b in zip(written, written[1:])):
        return tuple(steps)  # not broken by rounding: Detectron2's scheduler says what is wrong
    kept = []
    for step in steps:
        step = max(step, kept[-1] + 1 if kept else 1)
        if step < max_iter:
            kept.append(step)
    if len(kept) < len(steps):
        logger.warning(
            f"SOLVER.STEPS {tuple(written)}, scaled to {tuple(steps)}: training ends after {max_iter} steps, "
            f"so {tuple(kept)} are left of them."
        )
    return tuple(kept)


def learning_rate_warning(cfg: CfgNode) -> str:
    """Return a warning if SGD has more than twice the reference's learning rate for its batch, and nothing is clipped.

    It names the learning rate that keeps the reference's ratio to the batch; "" if there is nothing to warn of. ``cfg``
    is what is trained by, i.e. scaled.
    """
    solver = cfg.SOLVER
    if solver.get("OPTIMIZER", "SGD") != "SGD" or solver.CLIP_GRADIENTS.ENABLED or solver.IMS_PER_BATCH < 1:
        return ""
    usual = REFERENCE_LR * solver.IMS_PER_BATCH / REFERENCE_BATCH
    times = solver.BASE_LR / usual
    if times <= 2 * (1 + 1e-9):
        return ""
    return (
        f"SOLVER.BASE_LR {solver.BASE_LR:g} is {times:.3g} times what a batch of {solver.IMS_PER_BATCH} usually has "
        f"({REFERENCE_LR} for {REFERENCE_BATCH} images), and gradients are not clipped: if the loss becomes infinite, "
        f"set SOLVER.BASE_LR {usual:g} or SOLVER.CLIP_GRADIENTS.ENABLED True"
    )


def start_banner(
    base_cfg: CfgNode, cfg: CfgNode, num_workers: int, *, start: str, sizes: Mapping[str, int], classes: Sequence[str]
) -> str:
    """Say what is about to be trained, a line for each thing: base and effective values where they differ.

    Args:
        base_cfg: as written; ``cfg`` is the same scaled to ``num_workers``.
        start: from what, e.g. "RESUMING at step 1200 from output/model_0001199.pth".
        sizes: images by data set name; "?" is printed for one that is not in it.
        classes: their names.
    """
    solver, reference = cfg.SOLVER, base_cfg.SOLVER.REFERENCE_WORLD_SIZE
    rows = {"start": start, "workers": f"{num_workers} on {cfg.MODEL.DEVICE}"}
    keys = ["IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "WARMUP_ITERS", "STEPS", "CHECKPOINT_PERIOD"]
    for key in [*(f"SOLVER.{key}" for key in keys), "TEST.EVAL_PERIOD"]:
        base, now = lookup(base_cfg, key), lookup(cfg, key)
        rows[key] = f"{now}" if base == now else f"{base} -> {now}"
    if _is_scaled(base_cfg, num_workers):
        rows["scaled"] = (
            f"from SOLVER.REFERENCE_WORLD_SIZE {reference} to {num_workers} worker(s), overrides on the command line "
            f"as well: give them as for {reference}, or SOLVER.REFERENCE_WORLD_SIZE 0 to take all as it stands"
        )
    for title, names in (("train on", cfg.DATASETS.TRAIN), ("test on", cfg.DATASETS.TEST)):
        rows[title] = ", ".join(f"{name} ({sizes.get(name, '?')} images)" for name in names) or "nothing"
    images = sum(sizes.get(name, 0) for name in cfg.DATASETS.TRAIN) if set(cfg.DATASETS.TRAIN) <= set(sizes) else 0
    rows["epochs"] = f"{solver.MAX_ITER * solver.IMS_PER_BATCH / images:.3g}" if images else "?"
    rows["classes"] = f"{len(classes)}: {', '.join(classes[:6])}{', ...' if len(classes) > 6 else ''}"
    clip = solver.CLIP_GRADIENTS
    clipped = f"clipped ({clip.CLIP_TYPE} {clip.CLIP_VALUE:g})" if clip.ENABLED else "not clipped"
    rows["optimizer"] = f"{solver.get('OPTIMIZER', 'SGD')}, {solver.LR_SCHEDULER_NAME}, gradients {clipped}"
    rows["AMP"] = solver.AMP.get("PRECISION", "float16") if solver.AMP.ENABLED else "off"
    rows["loss"] = _describe_loss(cfg.MODEL)
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def _describe_loss(model: CfgNode) -> str:
    if model.META_ARCHITECTURE != "FocalRetinaNet":
        return f"that of {model.META_ARCHITECTURE}"
    keys = {name: model.RETINANET[name] for name in ("FOCAL_LOSS_ALPHA", "FOCAL_LOSS_GAMMA")}
    mined = model.OHEM if model.FOCAL.HEAD == "OHEMHead" else {}
    return ", ".join(f"{name} {value}" for name, value in {**model.FOCAL, **keys, **mined}.items())
