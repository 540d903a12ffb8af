"""``FocalRetinaNet``: Detectron2's RetinaNet with the loss taken out of the meta-architecture and into its head.

Shapes as in :mod:`focal_plugin.heads`.
"""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ciou_loss, diou_loss
from detectron2.modeling import META_ARCH_REGISTRY, build_anchor_generator, build_backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from fvcore.nn import giou_loss, smooth_l1_loss
from torch import Tensor

from .config import NO_KEYS
from .heads import AnchorTargets, FocalHead, HeadLosses, build_retinanet_head, is_foreground
from .losses.args import check
from .losses.modules import Float32Buffers
from .scalars import DeferredScalars


def iou_loss(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-7) -> Tensor:
    """Return ``1 - IoU`` of each pair of (M, 4) XYXY boxes: 1 without a gradient where they do not touch.

    ``eps`` keeps the quotient of two empty boxes finite. The successors are fvcore's and Detectron2's.
    """
    top_left = torch.maximum(boxes1[:, :2], boxes2[:, :2])
    bottom_right = torch.minimum(boxes1[:, 2:], boxes2[:, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=1)
    area1, area2 = ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (boxes1, boxes2))
    return 1 - intersection / (area1 + area2 - intersection + eps)


_IOU_LOSSES = {"iou": iou_loss, "giou": giou_loss, "diou": diou_loss, "ciou": ciou_loss}


class LowQualityMatcher(Matcher):
    """Detectron2's matcher, in which the best anchor of a box counts as its match only from an IoU on.

    As Detectron v1, which takes back low-quality matches under IoU 0.4 (``_get_retinanet_blobs``). An anchor that
    overlaps no box at all is never positive; ``Matcher`` makes every anchor of IoU 0 a match of a box that no anchor
    touches.
    """

    def __init__(self, thresholds: list[float], labels: list[int], min_low_quality_iou: float = 0.0):
        is_valid = 0 <= min_low_quality_iou <= 1
        check(is_valid, "MODEL.FOCAL.MIN_LOW_QUALITY_IOU", "in [0, 1]", min_low_quality_iou)
        super().__init__(thresholds, labels, allow_low_quality_matches=True)
        self.min_low_quality_iou = min_low_quality_iou

    def set_low_quality_matches_(self, match_labels: Tensor, match_quality_matrix: Tensor) -> None:
        before = match_labels.clone()
        super().set_low_quality_matches_(match_labels, match_quality_matrix)
        best = match_quality_matrix.max(dim=0).values
        too_low = (best < self.min_low_quality_iou) | (best == 0)
        match_labels[too_low] = before[too_low]


@META_ARCH_REGISTRY.register()
class FocalRetinaNet(Float32Buffers, RetinaNet):
    """RetinaNet whose head computes the classification loss and says which examples are trained on.

    Parameters, anchors, matching (but for a box that no anchor touches, see :class:`LowQualityMatcher`) and inference
    are those of ``RetinaNet``, and so, with the default keys, are loss and gradients. A stock state_dict loads
    strictly; one of this model has one key more, ``loss_normalizer``.
    """

    # The running mean: a step moves it by less than bfloat16 resolves.
    float32_buffers = ("loss_normalizer",)

    @configurable
    def __init__(self, *, normalizer: str = "ema", normalizer_sync: bool = False, **kwargs):
        """
        Args:
            normalizer: "ema" (the running mean of positives, from 100, momentum 0.9) or "batch" (those of this step).
            normalizer_sync: count over all workers: N workers then give the gradients of one with the joint batch
                (not with ``MODEL.OHEM.SCOPE batch``, which mines each worker's batch).
            kwargs: of ``RetinaNet``. ``head`` needs the method ``losses`` of the heads in
                :data:`focal_plugin.heads.RETINANET_HEAD_REGISTRY`; alpha, gamma and the number of classes are the
                head's, and may be given here only if they agree.

        Raises:
            ValueError: a value out of range; the message names its config key.
        """
        super().__init__(**kwargs)
        check(normalizer in ("ema", "batch"), "MODEL.FOCAL.NORMALIZER", "ema or batch", normalizer)
        box_loss, allowed = self.box_reg_loss_type, ["smooth_l1", *_IOU_LOSSES]
        check(box_loss in allowed, "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", ", ".join(allowed), box_loss)
        if not hasattr(self.head, "losses"):
            raise TypeError(f"{type(self.head).__name__} has no method losses(pred_logits, targets)")
        if isinstance(self.head, FocalHead):
            for name in ("focal_loss_alpha", "focal_loss_gamma", "num_classes"):
                given, of_head = kwargs.get(name), getattr(self.head, name.replace("focal_loss_", ""))
                if given is not None and given != of_head:
                    raise ValueError(f"{name}={given}, but the head, which owns the loss, has {of_head}")
        self.normalizer, self.normalizer_sync = normalizer, normalizer_sync
        # RetinaNet keeps a Python float, which no checkpoint saves: a resumed run starts again from 100.
        self.register_buffer("loss_normalizer", torch.tensor(100.0))
        self._scalars = DeferredScalars()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        if "FOCAL" not in cfg.MODEL or "OHEM" not in cfg.MODEL:
            raise ValueError(NO_KEYS)
        # Not from RetinaNet's from_config: that builds a RetinaNetHead, and a second head drawn after it would start
        # from other random weights than stock RetinaNet with the same seed.
        retinanet, focal = cfg.MODEL.RETINANET, cfg.MODEL.FOCAL
        backbone = build_backbone(cfg)
        shapes = [backbone.output_shape()[f] for f in retinanet.IN_FEATURES]
        matcher = LowQualityMatcher(retinanet.IOU_THRESHOLDS, retinanet.IOU_LABELS, focal.MIN_LOW_QUALITY_IOU)
        return {
            "backbone": backbone,
            "head": build_retinanet_head(cfg, shapes),
            "head_in_features": retinanet.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, shapes),
            "box2box_transform": Box2BoxTransform(weights=retinanet.BBOX_REG_WEIGHTS),
            "anchor_matcher": matcher,
            "num_classes": retinanet.NUM_CLASSES,
            "focal_loss_alpha": retinanet.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": retinanet.FOCAL_LOSS_GAMMA,
            "smooth_l1_beta": retinanet.SMOOTH_L1_LOSS_BETA,
            "box_reg_loss_type": retinanet.BBOX_REG_LOSS_TYPE,
            "normalizer": focal.NORMALIZER,
            "normalizer_sync": focal.NORMALIZER_SYNC,
            "test_score_thresh": retinanet.SCORE_THRESH_TEST,
            "test_topk_candidates": retinanet.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": retinanet.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "vis_period": cfg.VIS_PERIOD,
            "input_format": cfg.INPUT.FORMAT,
        }

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Return the losses of a batch; RetinaNet's own method transposes the logits first."""
        pred_logits, pred_deltas = predictions
        anchors = self.anchor_generator(features)
        gt_labels, gt_boxes = self.label_anchors(anchors, gt_instances)
        return self.losses(anchors, pred_logits, gt_labels, pred_deltas, gt_boxes)

    def losses(
        self,
        anchors: list[Boxes],
        pred_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """Return "loss_cls" and "loss_box_reg", scalars that every parameter of the head takes part in.

        Args:
            anchors: per level, (Hi * Wi * A) boxes.
            pred_logits: per level, (N, A * num_outputs, Hi, Wi), as the head returns them (RetinaNet: transposed).
            gt_labels: per image, (R,) as from ``label_anchors``: a class in [0, K), K for background, -1 ignored.
            pred_deltas: per level, (N, A * 4, Hi, Wi).
            gt_boxes: per image, the (R, 4) matched boxes; of no meaning where there is no foreground.
        """
        anchors = Boxes.cat(anchors).tensor
        deltas = self.flatten_deltas(pred_deltas)
        labels = torch.stack(gt_labels) if gt_labels else anchors.new_zeros((0, len(anchors)), dtype=torch.long)
        boxes = torch.stack(gt_boxes) if gt_boxes else anchors.new_zeros((0, len(anchors), 4))
        foreground = is_foreground(labels, self.num_classes)

        out: HeadLosses = self.head.losses(pred_logits, self.anchor_targets(anchors, deltas, labels, boxes))
        loss_box = self._box_losses(anchors, deltas, boxes, out.box_mask).sum()

        num_pos = self._normalizer(foreground.sum(), running_mean=self.normalizer == "ema")
        num_examples = num_pos if out.num_examples is None else self._normalizer(out.num_examples)
        num_boxes = num_pos if out.num_boxes is None else self._normalizer(out.num_boxes)
        loss_cls = out.loss_cls / num_examples

        num_images = max(len(labels), 1)
        scalars = {
            "num_pos_anchors": foreground.sum() / num_images,
            "num_neg_anchors": (labels == self.num_classes).sum() / num_images,
            "loss_normalizer": num_pos,
        }
        if out.loss_cls_pos is not None:
            positive = out.loss_cls_pos / num_examples
            scalars |= {"loss_cls/positive": positive, "loss_cls/negative": loss_cls - positive}
        self._scalars.put(scalars)
        return {"loss_cls": loss_cls, "loss_box_reg": loss_box / num_boxes}

    @staticmethod
    def flatten_deltas(pred_deltas: list[Tensor]) -> Tensor:
        """Return (N, R, 4), from one (N, A * 4, Hi, Wi) per level."""
        deltas = [x.permute(0, 2, 3, 1).reshape(len(x), x.shape[1:].numel() // 4, 4) for x in pred_deltas]
        return torch.cat(deltas, dim=1)

    def anchor_targets(self, anchors: Tensor, deltas: Tensor, labels: Tensor, gt_boxes: Tensor) -> AnchorTargets:
        """Return what the head is told of the (R, 4) anchors; deltas and matched boxes are (N, R, 4), labels (N, R)."""
        deltas = deltas.detach()

        def box_losses() -> Tensor:
            foreground = is_foreground(labels, self.num_classes)
            losses = deltas.new_zeros(labels.shape, dtype=torch.float32)
            losses[foreground] = self._box_losses(anchors, deltas, gt_boxes, foreground).float()
            return losses

        def pred_boxes() -> Tensor:
            repeated = anchors.repeat(len(deltas), 1)
            return self.box2box_transform.apply_deltas(deltas.flatten(0, 1).float(), repeated).view_as(deltas)

        return AnchorTargets(labels, anchors, box_losses, pred_boxes)

    def _box_losses(self, anchors: Tensor, deltas: Tensor, gt_boxes: Tensor, mask: Tensor) -> Tensor:
        """Return the (M,) box losses of the M anchors in the (N, R) ``mask``."""
        _, index = mask.nonzero(as_tuple=True)
        anchors, deltas, gt_boxes = anchors[index], deltas[mask].float(), gt_boxes[mask]
        if self.box_reg_loss_type == "smooth_l1":
            gt_deltas = self.box2box_transform.get_deltas(anchors, gt_boxes)
            return smooth_l1_loss(deltas, gt_deltas, beta=self.smooth_l1_beta, reduction="none").sum(dim=1)
        pred_boxes = self.box2box_transform.apply_deltas(deltas, anchors)
        return _IOU_LOSSES[self.box_reg_loss_type](pred_boxes, gt_boxes)

    def _normalizer(self, count: Tensor, running_mean: bool = False) -> Tensor:
        """Return what to divide a sum over ``count`` examples by: at least 1; or the running mean, moved on."""
        total = count.float()
        world_size = comm.get_world_size() if self.normalizer_sync else 1
        if world_size > 1:
            torch.distributed.all_reduce(total)
        total = total.clamp(min=1)
        if running_mean:
            total = 0.9 * self.loss_normalizer + 0.1 * total
            self.loss_normalizer.copy_(total)
        # DDP averages the workers' gradients, so the joint count is shared out among them.
        return total / world_size

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A stock or model-zoo checkpoint knows no normalizer: this model goes on from the value it has.
        state_dict.setdefault(prefix + "loss_normalizer", self.loss_normalizer)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
