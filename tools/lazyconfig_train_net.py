#!/usr/bin/env python3
"""Train or evaluate by a Python config: Detectron2's script of this name with focal_plugin, on GPUs or the CPU.

tools/lazyconfig_train_net.py --config-file configs/lazy/retina_focal.py --num-gpus 8
tools/lazyconfig_train_net.py --config-file configs/lazy/retina_ohem.py --register mine_train=train.json:images \
    --register mine_val=val.json:images dataloader.train.dataset.names=mine_train \
    dataloader.test.dataset.names=mine_val model.num_classes=3 train.output_dir=output/mine
tools/lazyconfig_train_net.py --config-file configs/lazy/retina_focal.py --eval-only \
    train.init_checkpoint=output/model_final.pth

It is Detectron2's plain engine: what docs/reliability.md promises of stops and resumption is tools/train_net.py's.
A Python config is a program and is run; overrides are Hydra's, and a misspelt key is added without a word.
"""

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
    launch,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm

import focal_plugin  # noqa: F401, registers the model
from focal_plugin.data import add_register_argument, register_from_args
from focal_plugin.engine import SafeCheckpointer


def do_test(cfg, model):
    if "evaluator" in cfg.dataloader:
        results = inference_on_dataset(model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator))
        print_csv_format(results)
        return results


def do_train(args, cfg):
    model = instantiate(cfg.model).to(cfg.train.device)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(cfg.dataloader.train)
    on_cpu = cfg.train.device == "cpu"
    model = create_ddp_model(model, **cfg.train.ddp, **({"device_ids": None} if on_cpu else {}))
    trainer = (AMPTrainer if cfg.train.amp.enabled and not on_cpu else SimpleTrainer)(model, loader, optimizer)
    checkpointer = SafeCheckpointer(model, cfg.train.output_dir, trainer=trainer)
    is_main = comm.is_main_process()
    writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if is_main else None,
            hooks.EvalHook(cfg.train.eval_period, lambda: do_test(cfg, model)),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period) if is_main else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    # The checkpoint has the step that was just finished.
    trainer.train(trainer.iter + 1 if checkpointer.resumed_from else 0, cfg.train.max_iter)


def main(args):
    register_from_args(args.register)
    cfg = LazyConfig.apply_overrides(LazyConfig.load(args.config_file), args.opts)
    if not torch.cuda.is_available():
        cfg.train.device = "cpu"
    default_setup(cfg, args)
    if not args.eval_only:
        return do_train(args, cfg)
    model = instantiate(cfg.model).to(cfg.train.device)
    SafeCheckpointer(model).load(cfg.train.init_checkpoint)
    return do_test(cfg, model)


if __name__ == "__main__":
    parser = default_argument_parser("overrides: path.key=value, such as train.max_iter=100; examples: README.md")
    add_register_argument(parser)
    args = parser.parse_args()
    launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
