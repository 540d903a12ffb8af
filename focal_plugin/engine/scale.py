"""A config made for some number of workers on another number: what is scaled, what is refused, what the start says.

Upstream's ``DefaultTrainer.auto_scale_workers`` does the scaling: batch and learning rate in proportion to the workers,
the schedule inversely, so that as many images are seen as before. Functions here read configs and never change one.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from ..config import add_focal_config, all_keys

logger = logging.getLogger(__name__)

# Upstream's and the paper's recipe: SGD with this learning rate for a batch of this many images.
REFERENCE_LR = 0.01
REFERENCE_BATCH = 16

# The nodes in which a key that nobody defines is a slip; in any other it may be another project's.
_NODES = ("MODEL", "SOLVER", "DATASETS", "DATALOADER", "TEST", "INPUT")
# Of several keys with one name the one in the first of these is meant.
_LIKELY = ("MODEL.RETINANET", "MODEL.FOCAL", "MODEL.OHEM", "SOLVER", "DATALOADER", "DATASETS", "TEST", "INPUT", "MODEL")
# What other frameworks call them.
_ELSEWHERE = {
    "NUM_GPUS": "--num-gpus on the command line",
    "GPUS": "--num-gpus on the command line",
    "BATCH_SIZE": "SOLVER.IMS_PER_BATCH",
    "LR": "SOLVER.BASE_LR",
    "LEARNING_RATE": "SOLVER.BASE_LR",
    "EPOCHS": "SOLVER.MAX_ITER, in steps",
}


# ------------------------------ what cannot be


def check_scale(cfg: CfgNode, num_workers: int) -> None:
    """Whether this many workers can train by ``cfg``, scaled from ``SOLVER.REFERENCE_WORLD_SIZE`` workers or not.

    Args:
        cfg: as written, not yet scaled.
        num_workers: of all machines together.

    Raises:
        ValueError: they cannot; the message gives numbers that would do.
    """
    solver = cfg.SOLVER
    reference, batch = solver.REFERENCE_WORLD_SIZE, solver.IMS_PER_BATCH
    if num_workers < 1:
        raise ValueError(f"{num_workers} workers: at least 1 is needed")
    as_it_stands = f"{_unscaled_overrides(batch, num_workers)} to take batch, learning rate and schedule as they stand"
    if reference < 0:
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE {reference} is no number of workers: write the number that the config is "
            f"made for (8, ...), or {as_it_stands}"
        )
    if not _is_scaled(cfg, num_workers):
        _check_shares(batch, num_workers, "" if reference else "or train on")
        return
    here = f"{_times(Fraction(num_workers, reference))} for {num_workers} worker(s) here"
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
            f"{_times(Fraction(reference, num_workers))} for {num_workers}, leaves no step to train: write "
            f"SOLVER.MAX_ITER {least} or more, or {as_it_stands}"
        )


def _check_shares(batch: int, num_workers: int, or_on: str) -> None:
    if batch > 0 and batch % num_workers == 0:
        return
    low, high = _nearest_multiples(batch, num_workers)
    # With a reference another number of workers is no way out: it is the reference's that the batch must suit.
    shares = [n for n in range(1, batch + 1) if batch % n == 0] if or_on else []
    workers = sorted(sorted(shares, key=lambda n: abs(n - num_workers))[:6])
    raise ValueError(
        f"SOLVER.IMS_PER_BATCH {batch} cannot be shared out evenly among {num_workers} workers: write "
        f"SOLVER.IMS_PER_BATCH {low} or {high}" + (f", {or_on} {' or '.join(map(str, workers))}" if workers else "")
    )


def _is_scaled(cfg: CfgNode, num_workers: int) -> bool:
    return cfg.SOLVER.REFERENCE_WORLD_SIZE not in (0, num_workers)


def _nearest_multiples(number: int, divisor: int) -> tuple[int, int]:
    """The two that enclose ``number``, or the first two."""
    low = max(number // divisor, 1) * divisor
    return low, low + divisor


def _unscaled_overrides(batch: int, num_workers: int) -> str:
    """The overrides with which nothing is scaled and the batch can be shared out."""
    nearest = min(_nearest_multiples(batch, num_workers), key=lambda n: abs(n - batch))
    return "SOLVER.REFERENCE_WORLD_SIZE 0" + (f" SOLVER.IMS_PER_BATCH {nearest}" if nearest != batch else "")


def _times(factor: Fraction) -> str:
    return f"x {factor}"


# ------------------------------ scaling


def scale_to_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
    """``cfg`` for this many workers, by upstream's rule and without what its rounding breaks.

    Upstream rounds a period to 0, with which a checkpointer divides, and two decays of the learning rate to one step.
    Here a period is at least 1 step, and a decay comes at least a step after the one before, or is dropped with a
    warning if training ends by then.

    Args:
        cfg: as written for ``SOLVER.REFERENCE_WORLD_SIZE`` workers (0: for any); not changed.
        num_workers: of all machines together.

    Returns:
        A new config, frozen if ``cfg`` is, whose ``SOLVER.REFERENCE_WORLD_SIZE`` is ``num_workers``, so that upstream's
        trainer does not scale it again; ``cfg`` itself if there is nothing to scale.

    Raises:
        ValueError: as :func:`check_scale`.
    """
    check_scale(cfg, num_workers)
    if not _is_scaled(cfg, num_workers):
        return cfg
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers).clone()
    scaled.defrost()
    periods = (cfg.SOLVER, scaled.SOLVER, "CHECKPOINT_PERIOD"), (cfg.TEST, scaled.TEST, "EVAL_PERIOD")
    for old, new, key in periods:
        if old[key] > 0:
            new[key] = max(new[key], 1)
    scaled.SOLVER.STEPS = _apart(cfg.SOLVER.STEPS, scaled.SOLVER.STEPS, scaled.SOLVER.MAX_ITER)
    if cfg.is_frozen():
        scaled.freeze()
    return scaled


def _apart(written: Sequence[int], steps: Sequence[int], max_iter: int) -> tuple[int, ...]:
    """The scaled decays in the order they were written in: strictly increasing, below ``max_iter``."""
    if any(a >= b for a, b in zip(written, written[1:])):
        return tuple(steps)  # not broken by rounding: upstream's scheduler says what is wrong
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


# ------------------------------ what is probably not meant


def learning_rate_warning(cfg: CfgNode) -> str:
    """A warning if SGD's learning rate is more than twice the reference for its batch and gradients are not clipped.

    Args:
        cfg: what is trained by, i.e. scaled.

    Returns:
        The warning, with the learning rate that keeps the reference's ratio to the batch; "" if there is none to give.
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


def unknown_keys(cfg: CfgNode) -> list[str]:
    """Keys that were set on a config in Python and that neither Detectron2 nor focal_plugin reads.

    ``cfg.BASE_LR = 0.1`` raises no error: the attribute is new, and SOLVER.BASE_LR is what it was. Looked at are the
    top level and the nodes MODEL, SOLVER, DATASETS, DATALOADER, TEST and INPUT, but not other projects' nodes in them.

    Returns:
        A line for each, with the key that was probably meant.
    """
    known = get_cfg()
    add_focal_config(known)
    names = all_keys(known)
    lines = []
    for key in _strangers(cfg, known):
        meant = _meant(key, names)
        hint = f"; did you mean {meant}?" if meant else ""
        lines.append(f"{key}: no such key in Detectron2 or focal_plugin, nothing of theirs reads it{hint}")
    return lines


def _strangers(node: CfgNode, known: CfgNode, prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if not isinstance(value, CfgNode):
            # COMPUTED_ is upstream's own prefix for values that are put into a config by code.
            if name not in known and not name.startswith("COMPUTED_"):
                yield prefix + name
        elif isinstance(known.get(name), CfgNode) and (prefix or name in _NODES):
            yield from _strangers(value, known[name], f"{prefix}{name}.")


def _meant(key: str, names: Sequence[str]) -> str:
    """The existing key that is most like ``key``; "" if none is."""
    parent, _, name = key.upper().rpartition(".")
    if name in _ELSEWHERE and not parent.startswith("MODEL."):
        return _ELSEWHERE[name]
    endings = {n.rpartition(".")[2] for n in names}
    near = [name] if name in endings else difflib.get_close_matches(name, sorted(endings), n=3, cutoff=0.75)
    near += sorted(e for e in endings if e.endswith(f"_{name}"))

    def likelihood(candidate: str) -> tuple:
        node, _, ending = candidate.rpartition(".")
        place = _LIKELY.index(node) if node in _LIKELY else len(_LIKELY)
        return node != parent, near.index(ending), place, candidate

    return min((n for n in names if n.rpartition(".")[2] in near), key=likelihood, default="")


# ------------------------------ what the start says


def start_banner(
    base_cfg: CfgNode,
    cfg: CfgNode,
    num_workers: int,
    *,
    start: str,
    datasets: Mapping[str, int],
    classes: Sequence[str],
) -> str:
    """What is about to be trained, a line for each thing.

    Args:
        base_cfg: as written, with the overrides of the command line.
        cfg: the same, scaled to ``num_workers``: what is trained by.
        num_workers: of all machines together.
        start: where training starts, e.g. "RESUMING at step 1200 from output/model_0001199.pth".
        datasets: the number of images by data set name; "?" is printed for one that is not in it.
        classes: the class names.

    Returns:
        Lines of a name and what there is to say, aligned, without a newline at the end.
    """
    solver, base = cfg.SOLVER, base_cfg.SOLVER
    reference = base.REFERENCE_WORLD_SIZE
    factor = Fraction(num_workers, reference) if _is_scaled(base_cfg, num_workers) else Fraction(1)
    by_workers = f"{_times(factor)}, SOLVER.REFERENCE_WORLD_SIZE {reference}"
    rows = {
        "start": start,
        "workers": f"{num_workers} on {cfg.MODEL.DEVICE}",
        "batch": _change(base.IMS_PER_BATCH, solver.IMS_PER_BATCH, by_workers)
        + f", {Fraction(solver.IMS_PER_BATCH, num_workers)} per worker",
        "learning rate": f"{_change(base.BASE_LR, solver.BASE_LR, by_workers)}, {_describe_optimizer(solver)}",
        **_schedule(base_cfg, cfg, _times(1 / factor), datasets),
        "train on": _with_counts(cfg.DATASETS.TRAIN, datasets),
        "test on": _with_counts(cfg.DATASETS.TEST, datasets),
        "classes": f"{len(classes)}: {', '.join(classes[:6])}{', ...' if len(classes) > 6 else ''}",
        "loss": _describe_loss(cfg.MODEL),
        "AMP": solver.AMP.get("PRECISION", "float16") if solver.AMP.ENABLED else "off",
    }
    if factor != 1:
        rows["scaled"] = (
            f"from {reference} workers to {num_workers}, overrides on the command line as well: give them as for "
            f"{reference}, or SOLVER.REFERENCE_WORLD_SIZE 0 to take all as it stands"
        )
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())


def _schedule(base_cfg: CfgNode, cfg: CfgNode, factor: str, datasets: Mapping[str, int]) -> dict[str, str]:
    solver, base = cfg.SOLVER, base_cfg.SOLVER
    names = cfg.DATASETS.TRAIN
    images = sum(datasets[name] for name in names) if set(names) <= set(datasets) else 0
    epochs = f"{solver.MAX_ITER * solver.IMS_PER_BATCH / images:.3g}" if images else "?"
    decays = solver.LR_SCHEDULER_NAME
    if decays == "WarmupMultiStepLR":
        decays = _change(base.STEPS, solver.STEPS, factor) + f", each x {solver.GAMMA:g}" * bool(solver.STEPS)
    evaluation = _change(base_cfg.TEST.EVAL_PERIOD, cfg.TEST.EVAL_PERIOD, factor)
    return {
        "steps": f"{_change(base.MAX_ITER, solver.MAX_ITER, factor)}, {epochs} epochs",
        "warm-up": _change(base.WARMUP_ITERS, solver.WARMUP_ITERS, factor),
        "LR decays at": decays,
        "checkpoint every": _change(base.CHECKPOINT_PERIOD, solver.CHECKPOINT_PERIOD, factor),
        "evaluate every": f"{evaluation}, and at the end" if cfg.TEST.EVAL_PERIOD > 0 else "only at the end",
    }


def _change(base: float | tuple, now: float | tuple, note: str) -> str:
    return _figure(now) if base == now else f"{_figure(base)} -> {_figure(now)} ({note})"


def _figure(value: float | tuple) -> str:
    if isinstance(value, (tuple, list)):
        return " ".join(map(_figure, value)) or "no step"
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _with_counts(names: Sequence[str], counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} ({counts[n]:,} images)" if n in counts else f"{n} (? images)" for n in names) or "nothing"


def _describe_optimizer(solver: CfgNode) -> str:
    clip = solver.CLIP_GRADIENTS
    clipped = f"clipped ({clip.CLIP_TYPE} {clip.CLIP_VALUE:g})" if clip.ENABLED else "not clipped"
    return f"{solver.get('OPTIMIZER', 'SGD')}, gradients {clipped}"


def _describe_loss(model: CfgNode) -> str:
    focal, ohem, retina = model.FOCAL, model.OHEM, model.RETINANET
    if model.META_ARCHITECTURE != "FocalRetinaNet":
        return f"that of {model.META_ARCHITECTURE}"
    alpha = f"alpha {retina.FOCAL_LOSS_ALPHA:g}" if retina.FOCAL_LOSS_ALPHA >= 0 else "alpha off"
    if focal.CLASS_ALPHA:
        alpha = f"alpha of each class {focal.CLASS_ALPHA}"
    parts = [focal.LOSS, alpha, f"gamma {retina.FOCAL_LOSS_GAMMA:g}"]
    if focal.LOSS == "focal_star":
        parts.append(f"beta {focal.STAR_BETA:g}")
    parts.append(f"normalizer {focal.NORMALIZER}" + " over all workers" * focal.NORMALIZER_SYNC)
    mined = f"; {', '.join(f'{key} {ohem[key]}' for key in ohem)}" if focal.HEAD == "OHEMHead" else ""
    return f"{focal.HEAD}: {', '.join(parts)}{mined}"
