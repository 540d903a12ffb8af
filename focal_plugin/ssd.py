"""SSD's loss on RetinaNet's network: softmax over classes and background, three hard negatives for each positive.

Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, 2.2. Shapes as in :mod:`focal_plugin.heads`.
"""

import sys

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor

from .heads import RETINANET_HEAD_REGISTRY, HardExampleHead
from .losses.args import check
from .losses.formulas import Focal
from .losses.softmax import SoftmaxLoss, softmax_weights


@RETINANET_HEAD_REGISTRY.register()
class SSDHead(HardExampleHead):
    """Softmax cross entropy over K + 1 outputs an anchor, of all positives and the hardest negatives of each image.

    Both losses are divided by the positives, by the model's normalizer. An image without a positive trains on the
    negatives of one; SSD leaves it out.

    Smooth L1, the other half of SSD's loss, is ``MODEL.RETINANET.SMOOTH_L1_LOSS_BETA 1.0`` with ``BBOX_REG_WEIGHTS
    (10.0, 10.0, 5.0, 5.0)``, the inverse of the variances in its authors' code. The biases start with no prior, all
    equal. No weights of ``cls_score`` of a stock RetinaNet fit.
    """

    @configurable
    def __init__(self, *, num_classes: int, neg_pos_ratio: float = 3.0, **kwargs):
        """
        Args:
            neg_pos_ratio: negatives kept for each positive.
            kwargs: of :class:`focal_plugin.heads.FocalHead`, as the errors are, without ``loss`` and ``class_alpha``.
                gamma and alpha (foreground alpha, background 1 - alpha) are 0 and off by default; gamma > 0 is the
                softmax focal loss.
        """
        if kwargs.get("loss", "focal") != "focal" or len(kwargs.get("class_alpha", ())):
            raise ValueError("SSDHead is a softmax: MODEL.FOCAL.LOSS and MODEL.FOCAL.CLASS_ALPHA are not for it")
        check(0 < neg_pos_ratio < float("inf"), "MODEL.SSD.NEG_POS_RATIO", "a finite number > 0", neg_pos_ratio)
        # The ratio is the only limit, and nothing is suppressed.
        mining = {"ohem_batch_size": sys.maxsize, "nms_thresh": 0.0, "neg_pos_ratio": neg_pos_ratio}
        over = {"normalizer": "positives", "box_loss_on": "positives"}
        super().__init__(num_classes=num_classes, num_outputs=num_classes + 1, **mining, **over, **kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        return {**super().from_config(cfg, input_shape), "neg_pos_ratio": cfg.MODEL.SSD.NEG_POS_RATIO}

    def classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        weights = softmax_weights(self.alpha, self.num_outputs, background=True, inputs=logits)
        return SoftmaxLoss(Focal(self.gamma), weights)(logits, labels)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return K + 1 logits an anchor in training, else what RetinaNet's inference and the exporters take."""
        logits, deltas = super().forward(features)
        return (logits if self.training else [self.detection_logits(x) for x in logits]), deltas

    def detection_logits(self, logits: Tensor) -> Tensor:
        """Return (N, A * K, Hi, Wi) numbers whose sigmoid is the softmax of the (N, A * (K + 1), Hi, Wi) ``logits``."""
        n, channels, height, width = logits.shape
        x = logits.view(n, channels // self.num_outputs, self.num_outputs, height, width).float()
        log_p = x.log_softmax(dim=2)[:, :, :-1]
        # log(p / (1 - p)), where p that is 1 gives infinity, whose sigmoid is 1.
        return (log_p - torch.log1p(-log_p.exp())).flatten(1, 2)
