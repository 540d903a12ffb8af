"""RetinaNet heads that own their classification loss, and the registry they are looked up in.

Shapes: N images, A anchors per position, K classes, levels of Hi x Wi; R = sum(Hi * Wi * A) anchors per image, in
Detectron2's order (level, row, column, anchor). Logits stay as the convolution wrote them, (N, A * K, Hi, Wi).
"""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Callable, NamedTuple, Optional

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from fvcore.common.registry import Registry
from torch import Tensor

from .losses.args import IGNORE, alpha_weights, check, check_alpha, check_choice, check_gamma, check_label_range
from .losses.blockwise import Layout
from .losses.focal import LabelLoss
from .losses.formulas import Focal, FocalStar
from .losses.modules import Float32Buffers
from .mining import mine_hard_examples
from .scalars import DeferredScalars

logger = logging.getLogger(__name__)

RETINANET_HEAD_REGISTRY = Registry("RETINANET_HEAD")
RETINANET_HEAD_REGISTRY.__doc__ = """
Heads of ``FocalRetinaNet``: ``RetinaNetHead`` subclasses with a method ``losses(pred_logits, targets)`` that returns
a :class:`HeadLosses`. Called as ``head(cfg, input_shape)`` with the list of the feature maps' ShapeSpecs.
"""


def build_retinanet_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> RetinaNetHead:
    """Build the head that ``MODEL.FOCAL.HEAD`` names; a ValueError lists those that there are."""
    name = cfg.MODEL.FOCAL.HEAD
    check_choice("MODEL.FOCAL.HEAD", name, [k for k, _ in RETINANET_HEAD_REGISTRY])
    return RETINANET_HEAD_REGISTRY.get(name)(cfg, input_shape)


@dataclass
class AnchorTargets:
    """What a head may know of the anchors when it computes its loss; what is called has no gradient."""

    labels: Tensor  # (N, R) int64: a class in [0, K), K for background, -1 for ignored
    anchors: Tensor  # (R, 4) XYXY in pixels
    box_losses: Callable[[], Tensor]  # (N, R), the box loss of every foreground anchor, 0 for the others
    pred_boxes: Callable[[], Tensor]  # (N, R, 4), the predicted boxes, XYXY in pixels


class HeadLosses(NamedTuple):
    """What a head returns from ``losses``."""

    loss_cls: Tensor  # the sum of the classification loss over the examples trained on, a scalar
    box_mask: Tensor  # (N, R) bool, the foreground anchors whose boxes are trained
    num_examples: Optional[Tensor] = None  # divides loss_cls; None: the model's normalizer, which counts all positives
    num_boxes: Optional[Tensor] = None  # the same for the box loss
    loss_cls_pos: Optional[Tensor] = None  # the foreground's part of loss_cls, without a gradient, to be logged


def is_foreground(labels: Tensor, num_classes: int) -> Tensor:
    """Return which of the labels, in -1 to K, are a class."""
    return (labels >= 0) & (labels < num_classes)


# With no more logits than this, copying all levels into one costs less than a call for the loss of each.
_FEW_LOGITS = 2**17


def per_level_views(pred_logits: list[Tensor], labels: Tensor, num_outputs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits as (N, Hi, Wi, A, num_outputs) beside their labels as (N, Hi, Wi, A), level by level, uncopied.

    Of each level ``pred_logits`` has (N, A * num_outputs, Hi, Wi); the ``labels`` of all levels are (N, R).
    """
    start = 0
    for x in pred_logits:
        n, channels, height, width = x.shape
        num_anchors = channels // num_outputs
        stop = start + num_anchors * height * width
        logits = x.view(n, num_anchors, num_outputs, height, width).permute(0, 3, 4, 1, 2)
        yield logits, labels[:, start:stop].reshape(n, height, width, num_anchors)
        start = stop


@RETINANET_HEAD_REGISTRY.register()
class FocalHead(Float32Buffers, RetinaNetHead):
    """Detectron2's RetinaNet head with the focal loss over all anchors that are not ignored.

    A head with a loss of its own overrides :meth:`classification_loss`; what is summed, mined and logged follows.
    """

    float32_buffers = ("class_alpha",)

    @configurable
    def __init__(
        self,
        *,
        num_classes: int,
        loss: str = "focal",
        alpha: float = 0.25,
        gamma: float = 2.0,
        star_beta: float = 1.0,
        class_alpha: Sequence[float] = (),
        num_outputs: Optional[int] = None,
        **kwargs,
    ):
        """
        Args:
            loss: "focal" or "focal_star".
            alpha: weight of positives, 1 - alpha that of negatives; < 0: no weighting.
            gamma: focusing parameter; 0 is cross entropy.
            star_beta: beta of FL*.
            class_alpha: one alpha a class; empty: ``alpha`` for all.
            num_outputs: logits of an anchor; None: one a class.
            kwargs: of Detectron2's ``RetinaNetHead``: input_shape, num_anchors, conv_dims, norm, prior_prob.

        Raises:
            ValueError: a value out of range; the message names its config key.
        """
        check_choice("MODEL.FOCAL.LOSS", loss, ["focal", "focal_star"])
        check_alpha(alpha, name="MODEL.RETINANET.FOCAL_LOSS_ALPHA")
        check_gamma(gamma, star=loss == "focal_star", name="MODEL.RETINANET.FOCAL_LOSS_GAMMA")
        if len(class_alpha):
            check_alpha(class_alpha, num_classes, name="MODEL.FOCAL.CLASS_ALPHA")
        check(math.isfinite(star_beta), "MODEL.FOCAL.STAR_BETA", "a finite number", star_beta)
        prior_prob = kwargs.get("prior_prob", 0.01)
        check(0 < prior_prob < 1, "MODEL.RETINANET.PRIOR_PROB", "between 0 and 1", prior_prob)
        num_outputs = num_outputs or num_classes
        super().__init__(num_classes=num_outputs, **kwargs)
        self.num_classes, self.num_outputs = num_classes, num_outputs
        self.loss, self.alpha, self.gamma, self.star_beta = loss, alpha, gamma, star_beta
        per_class = torch.tensor(class_alpha, dtype=torch.float32) if len(class_alpha) else None
        # Not persistent: a stock checkpoint must load key for key.
        self.register_buffer("class_alpha", per_class, persistent=False)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        return {
            **super().from_config(cfg, input_shape),
            "loss": cfg.MODEL.FOCAL.LOSS,
            "alpha": cfg.MODEL.RETINANET.FOCAL_LOSS_ALPHA,
            "gamma": cfg.MODEL.RETINANET.FOCAL_LOSS_GAMMA,
            "star_beta": cfg.MODEL.FOCAL.STAR_BETA,
            "class_alpha": cfg.MODEL.FOCAL.CLASS_ALPHA,
        }

    def classification_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each anchor, summed over its classes, 0 where it is ignored: of the shape of ``labels``.

        Args:
            logits: (..., num_outputs), in any memory layout.
            labels: (...) int64, known to be in range: a class in [0, K), K for background, -1 for ignored.
        """
        formula = Focal(self.gamma) if self.loss == "focal" else FocalStar(self.gamma, self.star_beta)
        alpha = self.alpha if self.class_alpha is None else self.class_alpha
        return LabelLoss(formula, alpha_weights(alpha, self.num_classes, logits))(logits, labels)

    def losses(self, pred_logits: list[Tensor], targets: AnchorTargets) -> HeadLosses:
        """Return the loss of all anchors that are not ignored, from (N, A * num_outputs, Hi, Wi) logits per level."""
        loss = self.anchor_losses(pred_logits, targets.labels)
        foreground = is_foreground(targets.labels, self.num_classes)
        return HeadLosses(loss.sum(), foreground, loss_cls_pos=torch.where(foreground, loss.detach(), 0).sum())

    def anchor_losses(self, pred_logits: list[Tensor], labels: Tensor) -> Tensor:
        """Return the (N, R) :meth:`classification_loss` of all levels; refuse (N, R) labels that are out of range."""
        check_label_range(labels, self.num_classes)
        if sum(x.numel() for x in pred_logits) <= _FEW_LOGITS:
            pred_logits = [torch.cat([x.flatten(2) for x in pred_logits], dim=2)[..., None]]
        views = per_level_views(pred_logits, labels, self.num_outputs)
        return torch.cat([self.classification_loss(x, y).flatten(1) for x, y in views], dim=1)


class HardExampleHead(FocalHead):
    """The same head trained on its hardest anchors: see :func:`focal_plugin.mining.mine_hard_examples`.

    Every anchor is scored by its loss without a graph; only those sampled are differentiated.
    """

    @configurable
    def __init__(
        self,
        *,
        ohem_batch_size: int = 128,
        nms_thresh: float = 0.5,
        neg_pos_ratio: float = 0.0,
        scope: str = "image",
        rank_by: str = "cls",
        nms_boxes: str = "anchors",
        nms_per_label: bool = True,
        normalizer: str = "selected",
        box_loss_on: str = "selected",
        gamma: float = 0.0,
        alpha: float = -1.0,
        **kwargs,
    ):
        """
        Args:
            ohem_batch_size: ``MODEL.OHEM.BATCH_SIZE``; as the next eight, described under the key of its name in
                ``config.py`` and docs/config.md.
            gamma, alpha: as in FocalHead; here cross entropy without weighting by default.
            kwargs: of :class:`FocalHead`, as the errors are.
        """
        check_choice("MODEL.OHEM.SCOPE", scope, ["image", "batch"])
        check_choice("MODEL.OHEM.RANK_BY", rank_by, ["cls", "cls+box"])
        check_choice("MODEL.OHEM.NMS_BOXES", nms_boxes, ["anchors", "predicted"])
        check_choice("MODEL.OHEM.NORMALIZER", normalizer, ["selected", "positives"])
        check_choice("MODEL.OHEM.BOX_LOSS_ON", box_loss_on, ["selected", "positives"])
        check(ohem_batch_size >= 1, "MODEL.OHEM.BATCH_SIZE", "at least 1", ohem_batch_size)
        check(nms_thresh <= 1, "MODEL.OHEM.NMS_THRESH", "an IoU in (0, 1], or <= 0 for off", nms_thresh)
        check(0 <= neg_pos_ratio < math.inf, "MODEL.OHEM.NEG_POS_RATIO", "a finite number >= 0", neg_pos_ratio)
        super().__init__(gamma=gamma, alpha=alpha, **kwargs)
        if gamma > 0:
            hint = "set MODEL.RETINANET.FOCAL_LOSS_GAMMA 0.0, as in the paper, unless both at once is what you want"
            logger.warning(f"{type(self).__name__} mines on a focal loss with gamma = {gamma}: {hint}")
        self.scope, self.rank_by, self.nms_boxes = scope, rank_by, nms_boxes
        self.normalizer, self.box_loss_on = normalizer, box_loss_on
        limits = {"batch_size": ohem_batch_size, "nms_thresh": nms_thresh, "neg_pos_ratio": neg_pos_ratio}
        self._mine = partial(mine_hard_examples, num_classes=self.num_classes, per_label=nms_per_label, **limits)
        self._scalars = DeferredScalars()

    def losses(self, pred_logits: list[Tensor], targets: AnchorTargets) -> HeadLosses:
        """Return the loss of the sampled anchors; log how many an image has, and mean scores of sampled and dropped."""
        scores, sampled = self.sample(pred_logits, targets)
        foreground = is_foreground(targets.labels, self.num_classes)
        positive, dropped = sampled & foreground, ~sampled & (targets.labels >= 0)
        num_images = max(len(sampled), 1)
        self._scalars.put(
            {
                "ohem/num_pos": positive.sum() / num_images,
                "ohem/num_neg": (sampled & ~positive).sum() / num_images,
                "ohem/loss_kept": torch.where(sampled, scores, 0).sum() / sampled.sum().clamp(min=1),
                "ohem/loss_dropped": torch.where(dropped, scores, 0).sum() / dropped.sum().clamp(min=1),
            }
        )
        logits, labels = self.gather_anchors(pred_logits, targets.labels, sampled)
        loss = self.classification_loss(logits, labels)
        return HeadLosses(
            loss.sum(),
            box_mask=positive if self.box_loss_on == "selected" else foreground,
            num_examples=sampled.sum() if self.normalizer == "selected" else None,
            num_boxes=positive.sum() if self.box_loss_on == "selected" else None,
            loss_cls_pos=torch.where(labels < self.num_classes, loss.detach(), 0).sum(),
        )

    @torch.no_grad()
    def sample(self, pred_logits: list[Tensor], targets: AnchorTargets) -> tuple[Tensor, Tensor]:
        """Return what each anchor is ranked by, (N, R), and which are sampled, (N, R) bool."""
        labels = targets.labels
        scores = self.anchor_losses(pred_logits, labels)
        if self.rank_by == "cls+box":
            scores = scores + targets.box_losses()
        boxes = targets.pred_boxes() if self.nms_boxes == "predicted" else targets.anchors.expand(len(labels), -1, -1)
        sampled = torch.zeros_like(labels, dtype=torch.bool)
        if self.scope == "image":
            for mask, *examples in zip(sampled, scores, boxes, labels):
                mask[self._mine(*examples)] = True
        else:
            image = torch.arange(len(labels), device=labels.device).repeat_interleave(labels.shape[1])
            hardest = self._mine(scores.flatten(), boxes.flatten(0, 1), labels.flatten(), groups=image)
            sampled.view(-1)[hardest] = True
        return scores, sampled

    def gather_anchors(self, pred_logits: list[Tensor], labels: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (M, num_outputs) logits and (M,) labels of the sampled anchors.

        Every level takes part, if only with no anchor, so that each parameter of the head has a gradient under DDP.
        """
        logits, gathered = [], []
        for x, y in per_level_views(pred_logits, labels.masked_fill(~sampled, IGNORE), self.num_outputs):
            # In the order in which the logits lie in memory, so that their gradient is written in it, too.
            layout = Layout(x, class_dim=-1)
            flat_labels = layout.flat(y[..., None])
            outer, _, inner = (flat_labels != IGNORE).nonzero(as_tuple=True)
            logits.append(layout.flat(x)[outer, :, inner])
            gathered.append(flat_labels[outer, 0, inner])
        return torch.cat(logits), torch.cat(gathered)


@RETINANET_HEAD_REGISTRY.register()
class OHEMHead(HardExampleHead):
    """Mine the hardest anchors by FocalHead's loss (cross entropy with gamma = 0), as ``MODEL.OHEM`` says."""

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        keys = ["NMS_THRESH", "NEG_POS_RATIO", "SCOPE", "RANK_BY", "NMS_BOXES", "NMS_PER_LABEL", "NORMALIZER"]
        ohem = {key.lower(): cfg.MODEL.OHEM[key] for key in [*keys, "BOX_LOSS_ON"]}
        return {**super().from_config(cfg, input_shape), "ohem_batch_size": cfg.MODEL.OHEM.BATCH_SIZE, **ohem}
