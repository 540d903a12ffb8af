#!/usr/bin/env python
"""Compare what a training step costs with focal_plugin and with Detectron2 alone.

Usage: python benchmark/step.py --json step.json
       python benchmark/step.py --config-file retina_focal.yaml --steps 6 --blocks 3 \
           DATASETS.TRAIN '("digits_train",)' INPUT.MIN_SIZE_TRAIN '(800,)' SOLVER.IMS_PER_BATCH 8 MODEL.RESNETS.NORM BN

FocalTrainer with FocalRetinaNet and DefaultTrainer with RetinaNet train the same recipe with SGD, each with its own
data loader, hooks and writers, and without evaluation. They take turns in blocks of steps, so that a machine that gets
slower or faster does so for both. Measured are the CPU seconds of the process, in which one thread computes and loads
the data. Nothing stays but the data set, where Detectron2 keeps data sets. The second line measures ResNet-50 at 800
pixels, with one image a step: a batch of 8 is that of 8 workers, of which this is one.
"""

import argparse
import json
import logging
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from focal_plugin import get_config
from focal_plugin.engine import FocalTrainer
from focal_plugin.files import atomic_write, origin

TRAINERS = {"focal_plugin": (FocalTrainer, "FocalRetinaNet"), "stock": (DefaultTrainer, "RetinaNet")}


class Run:
    """A training that goes on for a block of steps at a time."""

    def __init__(self, trainer_class: type[DefaultTrainer], cfg: CfgNode):
        os.makedirs(cfg.OUTPUT_DIR)
        seed_all_rng(max(cfg.SEED, 0))
        self.trainer, self.done = trainer_class(cfg), 0
        self.trainer.storage = EventStorage()
        with self.trainer.storage:
            self.trainer.before_train()

    def measure(self, num_steps: int) -> float:
        """Train ``num_steps`` steps, hooks included, as ``train()`` does; return the CPU milliseconds of one."""
        trainer, start = self.trainer, time.process_time()
        with trainer.storage:
            for trainer.iter in range(self.done, self.done + num_steps):
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
        seconds = time.process_time() - start
        self.done += num_steps
        return 1000 * seconds / num_steps


def compare(config_file: str, opts: Sequence[str], steps: int, blocks: int, folder: str) -> dict:
    """Return the milliseconds of a step in every block, and their ratios; one block more, unmeasured, comes first.

    Args:
        config_file, opts: of the recipe.
        steps, blocks: of each trainer, the steps in all blocks together.
        folder: for what the trainers write.
    """
    size = steps // blocks
    runs = {}
    for name, (trainer_class, model) in TRAINERS.items():
        fixed = ["MODEL.META_ARCHITECTURE", model, "OUTPUT_DIR", os.path.join(folder, name), "MODEL.DEVICE", "cpu"]
        fixed += ["DATALOADER.NUM_WORKERS", "0", "SOLVER.OPTIMIZER", "SGD"]
        cfg = get_config(config_file, ["MODEL.WEIGHTS", "", *opts, *fixed])
        cfg.SOLVER.MAX_ITER = max(cfg.SOLVER.MAX_ITER, size * (blocks + 1) + 1)  # the last step would evaluate
        runs[name] = Run(trainer_class, cfg)
        runs[name].measure(size)
    milliseconds = {name: [] for name in runs}
    for block in range(blocks):
        for name in list(runs)[:: -1 if block % 2 else 1]:  # A B B A: to be the first of a pair is no advantage
            milliseconds[name].append(runs[name].measure(size))
    for run in runs.values():
        with run.trainer.storage:  # ended before its last step, which is why nothing is evaluated
            run.trainer.after_train()
    ratios = [ours / stock for ours, stock in zip(milliseconds["focal_plugin"], milliseconds["stock"])]
    return {"steps_per_block": size, "milliseconds": milliseconds, "ratios": ratios}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default="digits/focal.yaml", help="the recipe (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of each trainer (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=10, help="that they are made in (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured here")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE ..., over the config")
    args = parser.parse_args(argv)
    if not 2 <= args.blocks <= args.steps:
        parser.error(f"argument --blocks: must be at least 2 and at most --steps {args.steps}, got {args.blocks}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        # As in a user's run, what Detectron2 logs goes to a file; a trainer that finds no logger would print.
        logger, handler = logging.getLogger("detectron2"), logging.FileHandler(os.path.join(folder, "log.txt"))
        for undo, what in ((logger.setLevel, logger.level), (logger.removeHandler, handler)):
            stack.callback(undo, what)
        stack.callback(handler.close)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        result = compare(args.config_file, args.opts, args.steps, args.blocks, folder)
    command = shlex.join(["python", "benchmark/step.py", *(sys.argv[1:] if argv is None else argv)])
    result["environment"] = {**origin(command), "threads": 1, "data workers": 0}
    print(f"{result['environment']['machine']}, 1 core used; torch {torch.__version__}")
    print(f"{args.blocks} blocks of {result['steps_per_block']} steps each, medians:")
    for name, blocks in result["milliseconds"].items():
        print(f"{name:12} {statistics.median(blocks):9.2f} ms a step")
    low, median, high = statistics.quantiles(result["ratios"], n=4, method="inclusive")
    print(f"{'ratio':12} {median:9.3f}, quartiles {low:.3f} to {high:.3f}")
    if args.json:
        with atomic_write(args.json) as file:
            file.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
