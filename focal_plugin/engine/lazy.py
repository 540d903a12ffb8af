"""Python configs (Detectron2's LazyConfig) on upstream's engine: what ``tools/lazyconfig_train_net.py`` calls."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import AMPTrainer, SimpleTrainer, create_ddp_model, default_setup, default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from ..data import register_from_args
from ..data.check import check_files, check_registered
from ..lazy_config import find_lazy_config, load_lazy_config
from ..rng import rng_kept
from .checkpoint import SafeCheckpointer
from .hooks import BestCheckpointer, EvalHook, FlushScalars
from .launch import launch_workers, refusing_bad_input, work
from .place import find_place

logger = logging.getLogger(__name__)


def run(args: Namespace) -> int:
    """As :func:`focal_plugin.engine.launch.run`, for a Python config: 0 done, 1 failed, 2 refused."""
    try:
        place = find_place()
        place.adapt(args)
        cfg = load_checked_lazy_config(args)
        _check_workers(args, cfg)
    except (FileNotFoundError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return launch_workers(place, _worker, args, on_cpu=cfg.train.device == "cpu", saves_on_sigterm=False)


def _worker(args: Namespace) -> None:
    work(main, args)


def main(args: Namespace) -> dict | None:
    """One worker: trains or, with ``--eval-only``, evaluates. Returns the results of the last evaluation."""
    cfg = load_checked_lazy_config(args)
    default_setup(cfg, args)
    setup_logger(cfg.train.output_dir, distributed_rank=comm.get_rank(), name="focal_plugin")
    if cfg.train.device == "cpu":
        logger.warning(f"running on the CPU in float32, with {args.num_gpus} worker(s).")
    if not args.eval_only:
        return train(cfg, resume=args.resume)
    with refusing_bad_input():
        model = _built(cfg, "model").to(cfg.train.device)
        SafeCheckpointer(model, cfg.train.output_dir).resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    return evaluate(cfg, model)


def train(cfg: DictConfig, resume: bool = False) -> dict | None:
    """Upstream's ``do_train`` with whole checkpoints that run no code, and evaluations that draw no random numbers.

    Args:
        cfg: with the :data:`focal_plugin.lazy_config.PARTS`.
        resume: from the newest checkpoint in ``train.output_dir`` that is whole.

    Returns:
        the results of the last evaluation, on the main worker; None if there was none.

    Raises:
        Refused: a part of the config cannot be built, or a checkpoint not be loaded.
        FloatingPointError: the loss became infinite or NaN.
    """
    options, last = cfg.train, {}
    with refusing_bad_input():
        model = _built(cfg, "model").to(options.device)
        cfg.optimizer.params.model = model
        optimizer = _built(cfg, "optimizer")
        model = create_ddp_model(model, **({"device_ids": None} if options.device == "cpu" else {}), **options.ddp)
        loader = _built(cfg, "dataloader.train")
        trainer = (AMPTrainer if options.amp.enabled else SimpleTrainer)(model, loader, optimizer)
        checkpointer = SafeCheckpointer(model, options.output_dir, trainer=trainer)

    def evaluate_and_keep():
        last["results"] = evaluate(cfg, model)
        return last["results"]

    # The writers last, to write what the others have logged; and the checkpoints before the evaluation, which is long.
    trainer.register_hooks(
        [
            FlushScalars(),
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=_built(cfg, "lr_multiplier")),
            hooks.PeriodicCheckpointer(checkpointer, **options.checkpointer) if comm.is_main_process() else None,
            # Its third argument is for a request to stop, which nobody makes here.
            EvalHook(options.eval_period, evaluate_and_keep, None),
            *_main_worker_hooks(options, checkpointer),
        ]
    )
    with refusing_bad_input():
        start = _resume_or_load(trainer, checkpointer, options, resume)
    trainer.train(start, options.max_iter)
    return last.get("results")


def _main_worker_hooks(options: DictConfig, checkpointer: SafeCheckpointer) -> list:
    if not comm.is_main_process():
        return []
    best = []
    if options.eval_period > 0 and options.get("best_metric"):
        best.append(BestCheckpointer(options.eval_period, checkpointer, options.best_metric))
    writers = default_writers(options.output_dir, options.max_iter)
    return [*best, hooks.PeriodicWriter(writers, period=options.log_period)]


def _resume_or_load(trainer, checkpointer: SafeCheckpointer, options: DictConfig, resume: bool) -> int:
    """Returns the step to start with."""
    rest = checkpointer.resume_or_load(options.init_checkpoint, resume=resume)
    resumed_from = checkpointer.resumed_from
    if resumed_from and checkpointer.skipped:
        raise ValueError(f"{resumed_from} is of another model: {'; '.join(checkpointer.skipped)}")
    if checkpointer.skipped:
        logger.warning(f"FRESH, weights from {options.init_checkpoint}; skipped: {'; '.join(checkpointer.skipped)}")
    checkpointer.begin_run(rest.get("run", "") if resumed_from else None)
    start = trainer.iter + 1 if resumed_from else 0  # the checkpoint has the step that was just finished
    if start > options.max_iter:
        raise ValueError(
            f"{resumed_from} has done {start} steps, and train.max_iter is {options.max_iter}: raise train.max_iter, "
            "or start afresh in another train.output_dir"
        )
    if resumed_from:
        logger.warning(
            f"RESUMING after step {start}, from {resumed_from}: weights, optimizer and schedule go on, the order of "
            "the images and the random numbers begin anew"
        )
    return start


def evaluate(cfg: DictConfig, model: nn.Module) -> dict:
    """Upstream's ``do_test``: ``dataloader.evaluator`` on ``dataloader.test``; prints the results on the main worker.

    Training goes on with the random numbers that it would have drawn without.
    """
    with rng_kept():
        with refusing_bad_input():
            loader, evaluator = _built(cfg, "dataloader.test"), _built(cfg, "dataloader.evaluator")
        results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def _built(cfg: DictConfig, key: str) -> Any:
    """What upstream's ``instantiate`` makes of a part of the config; what it refuses, as a ValueError with the key."""
    try:
        return instantiate(OmegaConf.select(cfg, key))
    except (AssertionError, AttributeError, KeyError, OmegaConfBaseException, TypeError, ValueError) as e:
        raise ValueError(f"{key}: {e.args[0] if e.args else type(e).__name__}") from e


# ------------------------------ the config


def load_checked_lazy_config(args: Namespace) -> DictConfig:
    """The config of a command line, its data sets registered; runs the code of the config, writes nothing.

    Raises:
        FileNotFoundError, ValueError: it cannot be trained (with ``args.eval_only``: evaluated); the message says why.
    """
    args.thing_classes = register_from_args(args.register, getattr(args, "thing_classes", None))
    args.config_file = find_lazy_config(args.config_file)
    cfg = load_lazy_config(args.config_file, args.opts)
    if cfg.train.device == "cpu" or not torch.cuda.is_available():
        cfg.train.device = "cpu"
        cfg.train.amp.enabled = False  # upstream's AMPTrainer needs CUDA
    _check_data(cfg, ("test",) if args.eval_only else ("train", "test"))
    weights, tag = cfg.train.init_checkpoint, os.path.join(cfg.train.output_dir, "last_checkpoint")
    resumes = args.resume and os.path.isfile(tag)
    if args.eval_only and not weights and not resumes:
        raise ValueError("--eval-only would evaluate random weights: add train.init_checkpoint=path/to/model_final.pth")
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise FileNotFoundError(f"train.init_checkpoint: there is no file {weights!r}")
    return cfg


def _check_data(cfg: DictConfig, splits: Sequence[str]) -> None:
    """A data set that is not there, or has not as many classes as the model, as ``check_datasets`` does for YAML."""
    for split in splits:
        key = f"dataloader.{split}.dataset.names"
        names = OmegaConf.select(cfg, key, default=())
        for name in [names] if isinstance(names, str) else names:
            problem = check_registered(key, name) or check_files(key, name)
            if problem:
                raise ValueError(problem)
            classes, expected = MetadataCatalog.get(name).get("thing_classes"), cfg.model.get("num_classes")
            if None not in (classes, expected) and len(classes) != expected:
                raise ValueError(f"'{name}' has {len(classes)} classes: set model.num_classes={len(classes)}")


def _check_workers(args: Namespace, cfg: DictConfig) -> None:
    workers, batch = args.num_gpus * args.num_machines, OmegaConf.select(cfg, "dataloader.train.total_batch_size")
    if workers < 1:
        raise ValueError("--num-gpus and --num-machines: at least 1 of each; on the CPU --num-gpus counts workers")
    if cfg.train.device != "cpu" and args.num_gpus > torch.cuda.device_count():
        raise ValueError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()}")
    if not args.eval_only and batch and batch % workers:
        raise ValueError(f"dataloader.train.total_batch_size={batch} cannot be shared out among {workers} workers")
