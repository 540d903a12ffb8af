"""retina_focal.yaml as a Python config: FL, R-50-FPN 1x, for 8 GPUs and a batch of 16.

Detectron2's COCO-Detection/retinanet_R_50_FPN_1x.py with the plugin's classes. Where its YAML and Python forms of that
recipe differ, this follows the YAML; tests/engine/test_lazy.py compares the two. Unlike YAML this is code, and is run.
"""

from pathlib import Path

import detectron2
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig

from focal_plugin.heads import FocalHead
from focal_plugin.retinanet import FocalRetinaNet, LowQualityMatcher

# Not by model_zoo.get_config, which needs the pkg_resources that newer setuptools have no more.
_ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
model, dataloader, optimizer, lr_multiplier, train = LazyConfig.load(
    str(_ZOO / "COCO-Detection" / "retinanet_R_50_FPN_1x.py"),
    ("model", "dataloader", "optimizer", "lr_multiplier", "train"),
)

# ------------------------------ the plugin's model, with the keys of MODEL.FOCAL and MODEL.RETINANET

model._target_ = FocalRetinaNet
model.normalizer = "ema"
model.normalizer_sync = False
model.focal_loss_alpha = 0.25
model.focal_loss_gamma = 2.0
model.smooth_l1_beta = 0.0
model.box_reg_loss_type = "smooth_l1"
model.test_score_thresh = 0.05
model.test_topk_candidates = 1000
model.test_nms_thresh = 0.5
model.max_detections_per_image = 100
model.vis_period = 0

model.head._target_ = FocalHead
model.head.loss = "focal"
model.head.alpha = "${..focal_loss_alpha}"
model.head.gamma = "${..focal_loss_gamma}"
model.head.star_beta = 1.0
model.head.class_alpha = []
model.head.norm = ""

# Detectron2's matcher makes every anchor of IoU 0 a match of a box that no anchor touches.
model.anchor_matcher = L(LowQualityMatcher)(thresholds=[0.4, 0.5], labels=[0, -1, 1], min_low_quality_iou=0.0)

# ------------------------------ where the Python form is not the YAML form

# Of the one size there is, the Python form draws from a range: the size is the same, the random numbers are not.
dataloader.test.mapper.augmentations[0].sample_style = "choice"
# The evaluation is that of boxes, writes what was detected, and comes once, at the end.
dataloader.evaluator.tasks = ["bbox"]
dataloader.evaluator.output_dir = "${train.output_dir}/inference"
train.eval_period = 0
train.seed = -1
