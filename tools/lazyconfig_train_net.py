#!/usr/bin/env python3
"""Train or evaluate by a Python config (Detectron2's LazyConfig), in the manner of upstream's script of this name.

tools/lazyconfig_train_net.py --config-file configs/lazy/retina_focal.py --num-gpus 8
tools/lazyconfig_train_net.py --config-file configs/lazy/retina_ohem.py --register mine_train=train.json:images \
    --register mine_val=val.json:images dataloader.train.dataset.names=mine_train \
    dataloader.test.dataset.names=mine_val model.num_classes=3 train.output_dir=output/mine
tools/lazyconfig_train_net.py --config-file configs/lazy/retina_focal.py --eval-only \
    train.init_checkpoint=output/model_final.pth

Overrides are in Hydra's grammar: key=value, +key=value for a key that the config leaves out, lists as [1,2].

A Python config is a program and is run: from somebody else read it first, or use YAML and tools/train_net.py, which run
nothing. Checkpoints are loaded and written as safely as there.

What tools/train_net.py does and this does not, since it is upstream's plain engine:
  - Resumption is not exact: weights, optimizer, schedule, the normaliser and the best metric go on; the order of the
    images, the random numbers and, with several workers, the statistics of batch norms of all but the first begin anew.
  - Batch, learning rate and schedule are taken as they stand (for the two configs here: 8 GPUs, a batch of 16), on
    whatever number of workers: there is no SOLVER.REFERENCE_WORLD_SIZE. On fewer, lower total_batch_size and
    optimizer.lr. The schedule is in fractions of train.max_iter, warmup included; that of YAML is in steps.
  - SIGTERM ends it at once, without a checkpoint.
  - An image that cannot be read ends it. The data are not looked at before it starts, but for the number of classes.
  - A loss that is infinite or NaN ends it as upstream does, on the main worker, without a batch to replay.
  - Mixed precision (train.amp.enabled) is float16. No early stopping. Gradients are not clipped.
"""

import sys

from focal_plugin.engine import argument_parser
from focal_plugin.engine.lazy import run

if __name__ == "__main__":
    sys.exit(run(argument_parser().parse_args()))
