"""From the command line to a training or evaluation run: what ``tools/train_net.py`` calls."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tabulate import tabulate
from torch import multiprocessing

from ..config import find_config
from ..config_yaml import all_keys, lookup
from ..data import add_register_argument, register_from_args
from ..data.loader import stream_of
from .checkpoint import SafeCheckpointer
from .preemption import EXIT_PREEMPTED, Preempted, fail_together, stop_requested, stopped_by_sigterm
from .preflight import Job, learning_rate_warning, preflight
from .torchrun import Workers
from .trainer import FocalTrainer

logger = logging.getLogger(__name__)


def argument_parser() -> ArgumentParser:
    """Return Detectron2's parser with ``--register``."""
    parser = default_argument_parser()
    # Right after the flags and not behind `opts`, which swallows all that follows it.
    add_register_argument(parser, "for DATASETS.TRAIN and DATASETS.TEST")
    return parser


def run(args: Namespace) -> int:
    """Train or evaluate as the command line says, on workers that are started here or were by torchrun.

    Returns:
        The exit code. 0: done; 1: failed; 2: refused, with a message; 75 (``preemption.EXIT_PREEMPTED``): stopped by
        SIGTERM with all saved, the same command (of a training, with ``--resume``) goes on.
    """
    error, code = "", 0
    try:
        with _refusing_bad_input():
            workers = Workers.find(args)
            job = preflight(args, workers)
        with stopped_by_sigterm():
            workers.launch(_worker, job, on_cpu=job.cfg.MODEL.DEVICE == "cpu")
    except Preempted:
        code = EXIT_PREEMPTED
    except KeyboardInterrupt:
        error, code = "interrupted: the same command with --resume goes on from the last checkpoint", 130
    except (ConfigError, FloatingPointError) as e:
        error, code = str(e), 2 if isinstance(e, ConfigError) else 1
    except multiprocessing.ProcessExitedException as e:
        # A worker that was still importing when SIGTERM was handed on to it has died of it.
        is_stopped = e.exit_code == EXIT_PREEMPTED or (stop_requested() and e.exit_code == -signal.SIGTERM)
        error, code = ("", EXIT_PREEMPTED) if is_stopped else (f"{e}; why, it has printed above", 1)
    except multiprocessing.ProcessRaisedException as e:
        # What a worker has raised on purpose says it all, without its traceback.
        *_, error = re.split(rf"\n(?:{__name__}.ConfigError|FloatingPointError): ", str(e))
        code = 2 if f"\n{__name__}.ConfigError: " in str(e) else 1
    if error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(3)  # mostly the first worker says the same, and torchrun then ends this one
        print(f"error: {error.rstrip()}", file=sys.stderr)
    elif code and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would end the process by the signal, not with 75
    return code


class ConfigError(ValueError):
    """Refuse a command line, config, checkpoint or data set; the message says what to type."""


@contextmanager
def _refusing_bad_input() -> Iterator[None]:
    """Turn an OSError or ValueError raised inside into a :class:`ConfigError`, of which the message is printed."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise ConfigError(str(e)) from e


def _worker(job: Job) -> None:
    with stopped_by_sigterm():  # to the end: a second SIGTERM comes while the process group is taken down
        try:
            with fail_together():
                main(job)
                comm.synchronize()
        finally:
            if comm.get_world_size() > 1:
                # Not left to the end of the process, in which the threads of a process group can abort it.
                torch.distributed.destroy_process_group()


def main(job: Job) -> None:
    """Train or, with ``--eval-only``, evaluate as one worker."""
    args, cfg = job.args, job.cfg
    register_from_args(args.register, job.thing_classes)  # in a process of its own a worker knows of none
    if cfg.MODEL.DEVICE == "cpu" and comm.get_local_size() > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // comm.get_local_size()))
    # It opens the config file again, for the log.
    default_setup(cfg, Namespace(**{**vars(args), "config_file": str(find_config(args.config_file))}))
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="focal_plugin")
    if cfg.MODEL.DEVICE == "cpu":
        found = "" if torch.cuda.is_available() else "No GPU found: "
        logger.warning(f"{found}running on the CPU in float32, with {comm.get_local_size()} worker(s).")
    if args.eval_only:
        with _refusing_bad_input():
            model = FocalTrainer.build_model(cfg)
            checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=job.resume)
        skipped = "; skipped: " * bool(checkpointer.skipped) + "; ".join(checkpointer.skipped)
        logger.info(f"EVALUATING {checkpointer.resumed_from or cfg.MODEL.WEIGHTS}{skipped}")
        results = FocalTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return
    with _refusing_bad_input():
        trainer = FocalTrainer(cfg)
        trainer.resume_or_load(resume=job.resume)
    if comm.is_main_process():
        logger.info("\n" + start_banner(trainer))
        for line in filter(None, [*job.warnings, learning_rate_warning(trainer.cfg)]):  # last, where it is seen
            logger.warning(line)
    trainer.train()


def start_banner(trainer: FocalTrainer) -> str:
    """Return a table of what is going to be trained, from where and on what, and of what was scaled."""
    cfg, written = trainer.cfg, trainer.unscaled_cfg
    solver, model, clip = cfg.SOLVER, cfg.MODEL, cfg.SOLVER.CLIP_GRADIENTS
    # A subclass may have put Detectron2's checkpointer there, which knows neither.
    skipped, resumed_from = (getattr(trainer.checkpointer, name, "") for name in ("skipped", "resumed_from"))
    if resumed_from or trainer.start_iter:
        left = "" if trainer.start_iter < solver.MAX_ITER else ", which was the last: only the evaluation is left"
        start = f"RESUMING after step {trainer.start_iter}{left}, from {resumed_from or cfg.OUTPUT_DIR}"
    else:
        start = f"FRESH, weights from {model.WEIGHTS}" if model.WEIGHTS else "FRESH, with random weights"
    rows = {"start": start + "; skipped: " * bool(skipped) + "; ".join(skipped)}
    for key in all_keys(cfg):
        if lookup(cfg, key) != lookup(written, key):
            rows[key] = f"{lookup(written, key)} -> {lookup(cfg, key)}"
    if "SOLVER.REFERENCE_WORLD_SIZE" in rows:
        rows["SOLVER.REFERENCE_WORLD_SIZE"] += "; scales overrides as well, and 0 takes all as it stands"
    # Without those that are left out; a loader that is not ours does not say.
    images = len(trainer.data_loader.dataset) if stream_of(trainer.data_loader) is not None else 0
    train, test = (", ".join(names) or "nothing" for names in (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST))
    epochs = f"{solver.MAX_ITER * solver.IMS_PER_BATCH / images:.3g}" if images else "?"
    clipped = f"gradients clipped ({clip.CLIP_TYPE} {clip.CLIP_VALUE:g})" if clip.ENABLED else "gradients not clipped"
    precision = solver.AMP.PRECISION if solver.AMP.ENABLED else "float32"
    loss = {}
    if model.META_ARCHITECTURE == "FocalRetinaNet":
        loss = {**model.FOCAL, **{key: model.RETINANET[key] for key in ("FOCAL_LOSS_ALPHA", "FOCAL_LOSS_GAMMA")}}
        loss |= model.OHEM if model.FOCAL.HEAD == "OHEMHead" else {}
    rows |= {
        "data": f"{images or '?'} images of {train}; tested on {test}",
        "schedule": f"{solver.MAX_ITER} steps of {solver.IMS_PER_BATCH} images, {epochs} epochs",
        "optimizer": f"{solver.OPTIMIZER}, {solver.LR_SCHEDULER_NAME} of {solver.BASE_LR:g}, {clipped}, {precision}",
        "loss": ", ".join(f"{key} {value}" for key, value in loss.items()) or f"that of {model.META_ARCHITECTURE}",
    }
    return tabulate(rows.items(), tablefmt="plain", disable_numparse=True)
