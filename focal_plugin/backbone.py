"""Detectron2's RegNet within reach of a YAML config: a backbone small enough to train from scratch on a CPU."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem


@BACKBONE_REGISTRY.register()
def build_regnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build an FPN over a RegNet, for which Detectron2 has no builder.

    Read from the config: ``MODEL.RESNETS.STEM_OUT_CHANNELS``, ``DEPTH`` (blocks in all), ``WIDTH_PER_GROUP`` (of the
    group convolutions; also w_0 and w_a of the width rule, whose w_m is 2), ``NORM`` and ``OUT_FEATURES`` ("s1" at
    stride 4, "s2" at 8, ...); ``MODEL.BACKBONE.FREEZE_AT``; ``MODEL.FPN`` as for a ResNet.
    """
    regnet = cfg.MODEL.RESNETS
    bottom_up = RegNet(
        stem_class=SimpleStem,
        stem_width=regnet.STEM_OUT_CHANNELS,
        block_class=ResBottleneckBlock,
        depth=regnet.DEPTH,
        w_a=regnet.WIDTH_PER_GROUP,
        w_0=regnet.WIDTH_PER_GROUP,
        w_m=2.0,
        group_width=regnet.WIDTH_PER_GROUP,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm=regnet.NORM,
        out_features=regnet.OUT_FEATURES,
    )
    fpn = cfg.MODEL.FPN
    return FPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS, norm=fpn.NORM, fuse_type=fpn.FUSE_TYPE)
