#!/usr/bin/env python3
"""Train or evaluate a model of focal_plugin with Detectron2's engine.

tools/train_net.py --config-file configs/retina_focal.yaml --num-gpus 8
tools/train_net.py --config-file configs/retina_focal.yaml --eval-only MODEL.WEIGHTS output/model_final.pth
tools/train_net.py --config-file configs/retina_focal.yaml --register mine_train=train.json:images \
    --register mine_val=val.json:images DATASETS.TRAIN '("mine_train",)' DATASETS.TEST '("mine_val",)' \
    MODEL.RETINANET.NUM_CLASSES 3
"""

import sys

from focal_plugin.engine import argument_parser, run

if __name__ == "__main__":
    sys.exit(run(argument_parser().parse_args()))
