"""From the command line to a training or evaluation run: what ``tools/train_net.py`` calls."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import multiprocessing

from ..config import find_config, load_config
from ..data import add_register_argument, check_datasets, check_training_data, register_from_args
from ..heads import build_retinanet_head
from .checkpoint import SafeCheckpointer
from .interrupt import RESUME_ME, Interrupted, stop_requested, stopped_by_sigterm
from .place import Place, find_place
from .scale import check_scale
from .trainer import FocalTrainer, check_amp_precision, check_optimizer, describe_start
from .values import check_values
from .workers import ending_together

logger = logging.getLogger(__name__)


def argument_parser() -> ArgumentParser:
    """Upstream's parser with ``--register``."""
    parser = default_argument_parser()
    # Right after the flags and not behind `opts`, which swallows all that follows it.
    add_register_argument(parser, "for DATASETS.TRAIN and DATASETS.TEST")
    return parser


def run(args: Namespace) -> int:
    """Trains or evaluates as the command line says, on as many workers as it says; returns the exit code.

    What can be seen to be wrong with the command line, the config or a data set is found before a worker starts, and
    printed as one message. The workers are started here, or were by torchrun or srun, of which this is then one.

    Returns:
        0: done; 1: failed; 2: refused; :data:`~focal_plugin.engine.interrupt.RESUME_ME` (75): stopped by SIGTERM with
        all saved, the same command with ``--resume`` goes on.
    """
    try:
        place = find_place()
        place.adapt(args)
        cfg = load_checked_config(args)
        _check_workers(args, cfg, place)
        _check_output_dir(cfg.OUTPUT_DIR)
        args.found = check_training_data(cfg) if place.is_first and not args.eval_only else None
    except (FileNotFoundError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return launch_workers(place, _worker, args, on_cpu=cfg.MODEL.DEVICE == "cpu", saves_on_sigterm=not args.eval_only)


def launch_workers(
    place: Place, worker: Callable[[Namespace], None], args: Namespace, *, on_cpu: bool, saves_on_sigterm: bool
) -> int:
    """Has ``worker(args)`` run by every worker; what becomes of it, printed and as the exit code of :func:`run`."""
    if on_cpu:
        # Upstream's launch goes by the machine, not by what the config says, and would give CPU workers NCCL.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with stopped_by_sigterm() if saves_on_sigterm else nullcontext():
            place.launch(worker, args)
    except Interrupted:
        return RESUME_ME
    except (Refused, FloatingPointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2 if isinstance(e, Refused) else 1
    except multiprocessing.ProcessExitedException as e:
        # A worker that was still importing when SIGTERM was handed on to it has died of it.
        if e.exit_code == RESUME_ME or (stop_requested() and e.exit_code == -signal.SIGTERM):
            return RESUME_ME
        print(f"error: {e}; why, it has printed above", file=sys.stderr)
        return 1
    except multiprocessing.ProcessRaisedException as e:
        print(f"error: {_without_traceback(str(e))}", file=sys.stderr)
        return 1
    return 0


class Refused(ValueError):
    """What a worker was told to start from or to train on cannot be used; the message says why and what to do."""


def _without_traceback(text: str) -> str:
    """What a worker has raised, where the message says it all."""
    for error in (f"{__name__}.Refused: ", "FloatingPointError: "):
        if f"\n{error}" in text:
            return text.rpartition(f"\n{error}")[2].rstrip()
    return text


def _worker(args: Namespace) -> None:
    with nullcontext() if args.eval_only else stopped_by_sigterm():
        work(main, args)


def work(main: Callable[[Namespace], object], args: Namespace) -> None:
    """``main(args)`` in one of the workers, which end together and leave their process group."""
    try:
        with ending_together():
            main(args)
            comm.synchronize()
    finally:
        if comm.get_world_size() > 1:
            # Not left to the end of the process, in which the threads of a process group can abort it.
            torch.distributed.destroy_process_group()


def main(args: Namespace) -> dict | None:
    """One worker: trains or, with ``--eval-only``, evaluates. Returns the results of the last evaluation."""
    cfg = setup(args)
    if args.eval_only:
        with refusing_bad_input():
            model = FocalTrainer.build_model(cfg)
            checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        logger.info(describe_start(checkpointer, cfg))
        results = FocalTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    with refusing_bad_input():
        trainer = FocalTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
    if args.found is not None and comm.is_main_process():
        logger.info("\n" + trainer.banner(args.found.sizes))
        for line in args.found.lines:  # last, where it is seen
            logger.warning(line)
    return trainer.train()


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Makes a missing file and a bad value in what follows :class:`Refused`, of which only the message is printed."""
    try:
        yield
    except (OSError, ValueError) as e:
        raise Refused(str(e)) from e


def setup(args: Namespace) -> CfgNode:
    """Registers the data sets, makes and checks the config, and does upstream's ``default_setup``."""
    cfg = load_checked_config(args)
    if cfg.MODEL.DEVICE == "cpu" and args.num_gpus > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.num_gpus))
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="focal_plugin")
    if cfg.MODEL.DEVICE == "cpu":
        found = "" if torch.cuda.is_available() else "No GPU found: "
        logger.warning(f"{found}running on the CPU in float32, with {args.num_gpus} worker(s).")
    return cfg


def load_checked_config(args: Namespace) -> CfgNode:
    """The frozen config of a command line, its data sets registered; writes nothing.

    Raises:
        FileNotFoundError, ValueError: it cannot be trained (with ``args.eval_only``: evaluated); the message says why.
    """
    if not args.config_file:
        raise ValueError("no config: give --config-file, e.g. --config-file configs/retina_focal.yaml")
    # The workers, to which args go, need not read the annotations for them again.
    args.thing_classes = register_from_args(args.register, getattr(args, "thing_classes", None))
    # Upstream's default_setup opens this path again.
    args.config_file = str(find_config(args.config_file))
    cfg = load_config(args.config_file, args.opts)
    check_values(cfg)
    _choose_device(cfg)
    check_datasets(cfg, splits=("TEST",) if args.eval_only else ("TRAIN", "TEST"))
    _check_weights(cfg, args)
    _check_model(cfg)
    cfg.freeze()
    return cfg


def _choose_device(cfg: CfgNode) -> None:
    device = torch.device(cfg.MODEL.DEVICE).type
    if device == "cpu" or (device == "cuda" and not torch.cuda.is_available()):
        cfg.MODEL.DEVICE = "cpu"
    if cfg.MODEL.DEVICE == "cpu":
        # Upstream's AMPTrainer needs CUDA.
        cfg.SOLVER.AMP.ENABLED = False


def _check_weights(cfg: CfgNode, args: Namespace) -> None:
    weights = cfg.MODEL.WEIGHTS
    if args.resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        return
    if args.eval_only and not weights:
        raise ValueError("--eval-only would evaluate random weights: add MODEL.WEIGHTS path/to/model_final.pth")
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise FileNotFoundError(f"MODEL.WEIGHTS: there is no file {weights!r}")


def _check_model(cfg: CfgNode) -> None:
    """What a worker would say minutes later, from a head on features of one channel width."""
    check_optimizer(cfg)
    check_amp_precision(cfg)
    name = cfg.MODEL.META_ARCHITECTURE
    if name not in META_ARCH_REGISTRY:
        raise ValueError(f"MODEL.META_ARCHITECTURE: {name!r} is not registered; FocalRetinaNet is this plugin's")
    if name == "FocalRetinaNet":
        shapes = [ShapeSpec(channels=64, stride=2**i) for i, _ in enumerate(cfg.MODEL.RETINANET.IN_FEATURES, start=3)]
        build_retinanet_head(cfg, shapes)


def _check_output_dir(folder: str) -> None:
    if "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        raise ValueError(f"OUTPUT_DIR {folder} cannot be made: {e}") from e
    if not os.access(folder, os.W_OK):
        raise ValueError(f"OUTPUT_DIR {folder} cannot be written to")


def _check_workers(args: Namespace, cfg: CfgNode, place: Place) -> None:
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ValueError(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: at least 1 of each is needed; on the CPU "
            "--num-gpus counts workers"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(f"--machine-rank {args.machine_rank}: the ranks of {args.num_machines} machine(s) start at 0")
    num_gpus = torch.cuda.device_count()
    if cfg.MODEL.DEVICE != "cpu" and args.num_gpus > num_gpus:
        hint = (
            "; srun --gpus-per-task hides the others from a task: use --gpus-per-node"
            if place.launcher == "srun"
            else ""
        )
        raise ValueError(f"--num-gpus {args.num_gpus}: this machine has {num_gpus}{hint}")
    if args.num_machines > 1 and args.dist_url == "auto" and not place.launcher:
        raise ValueError("--dist-url auto is for one machine: give all of them tcp://HOST_OF_RANK_0:PORT")
    if not args.eval_only:
        check_scale(cfg, args.num_gpus * args.num_machines)
