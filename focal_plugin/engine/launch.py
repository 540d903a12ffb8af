"""From the command line to a training or evaluation run: what ``tools/train_net.py`` calls."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import multiprocessing

from ..config import find_config
from ..data import add_register_argument, register_from_args
from .checkpoint import SafeCheckpointer
from .preemption import EXIT_PREEMPTED, Preempted, fail_together, stop_requested, stopped_by_sigterm
from .preflight import Job, preflight
from .torchrun import Workers
from .trainer import FocalTrainer, describe_start

logger = logging.getLogger(__name__)


def argument_parser() -> ArgumentParser:
    """Return Detectron2's parser with ``--register``."""
    parser = default_argument_parser()
    # Right after the flags and not behind `opts`, which swallows all that follows it.
    add_register_argument(parser, "for DATASETS.TRAIN and DATASETS.TEST")
    return parser


def run(args: Namespace) -> int:
    """Train or evaluate as the command line says, on as many workers as it says.

    What can be seen to be wrong with the command line, the config or a data set is found before a worker starts, and
    printed as one message. The workers are started here, or were by torchrun, of which this is then one.

    Returns:
        The exit code. 0: done; 1: failed; 2: refused; :data:`~focal_plugin.engine.preemption.EXIT_PREEMPTED` (75):
        stopped by SIGTERM with all saved, the same command with ``--resume`` goes on.
    """
    try:
        workers = Workers.find(args)
        job = preflight(args, workers)
    except (FileNotFoundError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    try:
        with _stopping(job):
            workers.launch(_worker, job, on_cpu=job.cfg.MODEL.DEVICE == "cpu")
    except Preempted:
        return EXIT_PREEMPTED
    except (ConfigError, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1
    except multiprocessing.ProcessExitedException as e:
        # A worker that was still importing when SIGTERM was handed on to it has died of it.
        if e.exit_code == EXIT_PREEMPTED or (stop_requested() and e.exit_code == -signal.SIGTERM):
            return EXIT_PREEMPTED
        print(f"error: {e}; why, it has printed above", file=sys.stderr)
        return 1
    except multiprocessing.ProcessRaisedException as e:
        text = str(e)
        for error in (f"\n{__name__}.ConfigError: ", "\nFloatingPointError: "):
            if error in text:  # what the worker has raised says it all, without its traceback
                text = text.rpartition(error)[2].rstrip()
        print(f"error: {text}", file=sys.stderr)
        return 1
    return 0


class ConfigError(ValueError):
    """What a worker was told to start from or to train on cannot be used; the message says why and what to do."""


def _stopping(job: Job):
    """Let SIGTERM stop a training with a checkpoint; an evaluation has nothing to save."""
    return nullcontext() if job.args.eval_only else stopped_by_sigterm()


def _worker(job: Job) -> None:
    try:
        with _stopping(job), fail_together():
            main(job)
            comm.synchronize()
    finally:
        if comm.get_world_size() > 1:
            # Not left to the end of the process, in which the threads of a process group can abort it.
            torch.distributed.destroy_process_group()


def main(job: Job) -> dict | None:
    """Train or, with ``--eval-only``, evaluate as one worker. Return the results of the last evaluation."""
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
        logger.info(describe_start(checkpointer, cfg))
        results = FocalTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    with _refusing_bad_input():
        trainer = FocalTrainer(cfg)
        trainer.resume_or_load(resume=job.resume)
    if comm.is_main_process():
        logger.info("\n" + trainer.banner(job.sizes))
        for line in job.warnings:  # last, where it is seen
            logger.warning(line)
    return trainer.train()


@contextmanager
def _refusing_bad_input() -> Iterator[None]:
    """Make a missing file and a bad value in what follows a :class:`ConfigError`, of which the message is printed."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise ConfigError(str(e)) from e
