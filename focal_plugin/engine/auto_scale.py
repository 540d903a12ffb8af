"""Train by a config made for some number of workers on another number of them.

Detectron2's ``auto_scale_workers`` scales batch and learning rate in proportion to the workers, and the schedule
inversely, so that as many images are seen as before. No function here changes a config.
"""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

logger = logging.getLogger(__name__)

_USUAL_LR, _USUAL_BATCH = 0.01, 16  # of SGD, in Detectron2's and the paper's recipe


def check_scale(cfg: CfgNode, num_workers: int) -> None:
    """Check that this many workers, of all machines, can train by ``cfg``, scaled to them if it says so.

    Raises:
        ValueError: they cannot; the message gives numbers that would do.
    """
    solver, batch = cfg.SOLVER, cfg.SOLVER.IMS_PER_BATCH
    is_scaled = solver.REFERENCE_WORLD_SIZE not in (0, num_workers)
    made_for = solver.REFERENCE_WORLD_SIZE if is_scaled else num_workers
    if made_for < 1:
        problem = f"SOLVER.REFERENCE_WORLD_SIZE {made_for}: must be a number of workers"
    elif is_scaled and solver.OPTIMIZER != "SGD":
        problem = f"SOLVER.OPTIMIZER {solver.OPTIMIZER}: scaling the learning rate as the batch is a rule for SGD only"
    elif batch < 1 or batch % made_for:
        low = max(batch // made_for, 1) * made_for
        # With a reference, another number of workers is no way out: it is the reference that the batch must suit.
        others = range(1, min(made_for, batch + 1)) if not solver.REFERENCE_WORLD_SIZE else ()
        fewer = [str(count) for count in others if batch % count == 0]
        problem = (
            f"SOLVER.IMS_PER_BATCH {batch} cannot be shared out evenly among {made_for} workers: write "
            f"SOLVER.IMS_PER_BATCH {low} or {low + made_for}" + f", or train on {' or '.join(fewer)}" * bool(fewer)
        )
    elif is_scaled and not round(solver.MAX_ITER * made_for / num_workers):
        least = num_workers // (2 * made_for) + 1
        problem = f"SOLVER.MAX_ITER {solver.MAX_ITER} would leave no step: write SOLVER.MAX_ITER {least} or more"
    else:
        return
    if is_scaled:
        problem += (
            f". The config is for {made_for} workers (SOLVER.REFERENCE_WORLD_SIZE), and would be scaled to "
            f"{num_workers}; to take all as it stands, write "
            f"SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.IMS_PER_BATCH {max(batch // num_workers, 1) * num_workers}"
        )
    raise ValueError(problem)


def scale_to_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Scale ``cfg`` to this many workers by Detectron2's rule, without what its rounding breaks.

    A period, which Detectron2 rounds to 0, is at least 1 step, and a decay of the learning rate comes at least a step
    after the one before, or is dropped with a warning if training ends by then.

    Returns:
        A new config for ``num_workers``, frozen if ``cfg`` is; ``cfg`` itself if there is nothing to scale.

    Raises:
        ValueError: as :func:`check_scale`.
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
        for i, step in enumerate(steps):
            steps[i] = max(step, steps[i - 1] + 1 if i else 1)
    solver.STEPS = tuple(step for step in steps if step < solver.MAX_ITER)
    if len(solver.STEPS) < len(steps):
        logger.warning(
            f"SOLVER.STEPS {cfg.SOLVER.STEPS}, scaled to {tuple(steps)}: training ends after {solver.MAX_ITER} steps, "
            f"without {tuple(step for step in steps if step not in solver.STEPS)}."
        )
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
    return (
        f"SOLVER.BASE_LR {solver.BASE_LR:g} is {times:.3g} times what a batch of "
        f"{solver.IMS_PER_BATCH} usually has ({_USUAL_LR} for {_USUAL_BATCH} images), and gradients are not "
        f"clipped: if the loss becomes infinite, set SOLVER.BASE_LR {usual:g} or SOLVER.CLIP_GRADIENTS.ENABLED True"
    )
