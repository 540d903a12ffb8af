"""RetinaNet heads that own their classification loss, and the registry they are looked up in.

Shapes: N images, A anchors per position, K classes, levels of Hi x Wi; R = sum(Hi * Wi * A) anchors per image, in
upstream's order (level, row, column, anchor). Logits stay as the convolution wrote them, (N, A * K, Hi, Wi).
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

from .losses.alpha import Weights, alpha_weights, check_alpha, check_class_alpha, check_gamma
from .losses.blocked import BlockedLoss, Layout
from .losses.buffers import Float32Buffers
from .losses.focal import LabelLoss, check_label_range, label_loss, label_loss_and_rows
from .losses.formulas import Focal, FocalStar
from .mining import mine_hard_examples
from .scalars import DeferredScalars

logger = logging.getLogger(__name__)

RETINANET_HEAD_REGISTRY = Registry("RETINANET_HEAD")
RETINANET_HEAD_REGISTRY.__doc__ = """
Heads of ``FocalRetinaNet``: ``RetinaNetHead`` subclasses with a method ``losses(pred_logits, targets)`` that returns
a :class:`HeadLosses`. Called as ``head(cfg, input_shape)`` with the list of the feature maps' ShapeSpecs.
"""


def build_retinanet_head(cfg: CfgNode, input_shape: list[ShapeSpec]) -> RetinaNetHead:
    """The head that ``MODEL.FOCAL.HEAD`` names.

    Raises:
        ValueError: no head of that name is registered.
    """
    name = cfg.MODEL.FOCAL.HEAD
    _check_choice("MODEL.FOCAL.HEAD", name, [k for k, _ in RETINANET_HEAD_REGISTRY])
    return RETINANET_HEAD_REGISTRY.get(name)(cfg, input_shape)


@dataclass
class AnchorTargets:
    """What a head may know of the anchors when it computes its loss.

    Attributes:
        labels: (N, R) int64: a class in [0, K), K for background, -1 for ignored.
        anchors: (R, 4) XYXY in pixels.
        box_losses: returns the (N, R) box loss of every foreground anchor, 0 for the others; no gradient.
        pred_boxes: returns the (N, R, 4) predicted boxes, XYXY in pixels; no gradient.
    """

    labels: Tensor
    anchors: Tensor
    box_losses: Callable[[], Tensor]
    pred_boxes: Callable[[], Tensor]


class HeadLosses(NamedTuple):
    """What a head returns from ``losses``.

    Attributes:
        loss_cls: the sum of the classification loss over the examples trained on, a scalar.
        box_mask: (N, R) bool, the foreground anchors whose boxes are trained.
        num_examples: scalar tensor, what to divide ``loss_cls`` by; None: the model's normaliser, which counts all
            positives.
        num_boxes: the same for the box loss.
        loss_cls_pos: the foreground anchors' part of ``loss_cls``, without a gradient, for the log; None: not logged.
    """

    loss_cls: Tensor
    box_mask: Tensor
    num_examples: Optional[Tensor] = None
    num_boxes: Optional[Tensor] = None
    loss_cls_pos: Optional[Tensor] = None


def is_foreground(labels: Tensor, num_classes: int) -> Tensor:
    """Of labels in -1 to K those that are a class."""
    return (labels >= 0) & (labels < num_classes)


def by_level(pred_logits: list[Tensor], labels: Tensor, num_classes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Per level the logits as (N, A, K, Hi, Wi) and their labels as (N, A, Hi, Wi): views, nothing is copied.

    Args:
        pred_logits: one (N, A * K, Hi, Wi) per level.
        labels: (N, R), of all levels.
        num_classes: K, logits of an anchor.
    """
    start = 0
    for x in pred_logits:
        n, channels, height, width = x.shape
        num_anchors = channels // num_classes
        stop = start + num_anchors * height * width
        level = labels[:, start:stop].reshape(n, height, width, num_anchors).permute(0, 3, 1, 2)
        yield x.view(n, num_anchors, num_classes, height, width), level
        start = stop


@RETINANET_HEAD_REGISTRY.register()
class FocalHead(Float32Buffers, RetinaNetHead):
    """Upstream's RetinaNet head with the focal loss over all anchors that are not ignored."""

    float32_buffers = ("class_alpha",)
    background_outputs = 0
    """Logits of an anchor beyond its K classes: 1 if the last is background's."""

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
        **kwargs,
    ):
        """
        Args:
            num_classes: K.
            loss: "focal" or "focal_star".
            alpha: weight of positives, 1 - alpha that of negatives; < 0: no weighting.
            gamma: focusing parameter; 0 is cross entropy.
            star_beta: beta of FL*.
            class_alpha: one alpha a class; empty: ``alpha`` for all.
            kwargs: of upstream's ``RetinaNetHead``: input_shape, num_anchors, conv_dims, norm, prior_prob.

        Raises:
            ValueError: a value out of range; the message names its config key.
        """
        _check_choice("MODEL.FOCAL.LOSS", loss, ["focal", "focal_star"])
        check_alpha(alpha, name="MODEL.RETINANET.FOCAL_LOSS_ALPHA")
        check_gamma(gamma, star=loss == "focal_star", name="MODEL.RETINANET.FOCAL_LOSS_GAMMA")
        if len(class_alpha):
            check_class_alpha(class_alpha, num_classes, name="MODEL.FOCAL.CLASS_ALPHA")
        if not math.isfinite(star_beta):
            raise ValueError(f"MODEL.FOCAL.STAR_BETA must be a finite number, got {star_beta}")
        prior_prob = kwargs.get("prior_prob", 0.01)
        if not 0 < prior_prob < 1:
            raise ValueError(f"MODEL.RETINANET.PRIOR_PROB must be between 0 and 1, got {prior_prob}")
        super().__init__(num_classes=num_classes + self.background_outputs, **kwargs)
        self.num_classes = num_classes
        self.loss, self.alpha, self.gamma, self.star_beta = loss, alpha, gamma, star_beta
        # Not persistent: a stock checkpoint must load key for key.
        self.register_buffer("class_alpha", torch.tensor(class_alpha) if len(class_alpha) else None, False)

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

    def classification_loss(self, logits: Tensor, labels: Tensor, reduction: str, class_dim: int) -> Tensor:
        """The loss that the config names, of labels that are known to be in range.

        Args:
            logits: any shape that has K classes along ``class_dim``, in any memory layout.
            labels: the same shape without ``class_dim``.
            reduction: "none" or "sum".
            class_dim: where the classes are.
        """
        return label_loss(self.loss_op(logits), logits, labels, reduction, class_dim)

    def row_losses(self, logits: Tensor, labels: Tensor, class_dim: int) -> Tensor:
        """:meth:`classification_loss` summed over the classes, of the shape of ``labels``, without a gradient."""
        if self._has_own_loss():
            return self.classification_loss(logits, labels, "none", class_dim).detach().sum(dim=class_dim)
        return label_loss(self.loss_op(logits), logits, labels, "rows", class_dim)

    def loss_sum(self, logits: Tensor, labels: Tensor, class_dim: int) -> tuple[Tensor, Optional[Tensor]]:
        """The sum of :meth:`classification_loss`, and the foreground's part of it, without a gradient.

        The part is None for a subclass with a ``classification_loss`` of its own, which would have to be computed
        twice for it.
        """
        if self._has_own_loss():
            return self.classification_loss(logits, labels, "sum", class_dim), None
        total, rows = label_loss_and_rows(self.loss_op(logits), logits, labels, class_dim)
        return total, torch.where(is_foreground(labels, self.num_classes), rows, 0).sum()

    def loss_op(self, logits: Tensor) -> BlockedLoss:
        """The loss as the engine of :mod:`focal_plugin.losses.blocked` takes it, for ``logits`` such as these."""
        formula = Focal(self.gamma) if self.loss == "focal" else FocalStar(self.gamma, self.star_beta)
        return LabelLoss(formula, self._weights(logits))

    def _has_own_loss(self) -> bool:
        return type(self).classification_loss is not FocalHead.classification_loss

    def _weights(self, logits: Tensor) -> Weights:
        return alpha_weights(self.alpha if self.class_alpha is None else self.class_alpha, self.num_classes, logits)

    def losses(self, pred_logits: list[Tensor], targets: AnchorTargets) -> HeadLosses:
        """
        Args:
            pred_logits: one (N, A * K, Hi, Wi) per level.
            targets: of the N images.
        """
        labels = targets.labels
        check_label_range(labels, self.num_classes)
        sums = [self.loss_sum(x, y, class_dim=2) for x, y in self.by_level(pred_logits, labels)]
        positive = None if sums[0][1] is None else sum(part for _, part in sums)
        box_mask = is_foreground(labels, self.num_classes)
        return HeadLosses(sum(total for total, _ in sums), box_mask, loss_cls_pos=positive)

    def by_level(self, pred_logits: list[Tensor], labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See :func:`by_level`."""
        return by_level(pred_logits, labels, self.num_classes + self.background_outputs)


@RETINANET_HEAD_REGISTRY.register()
class OHEMHead(FocalHead):
    """The same head trained on the hardest examples only: see :func:`focal_plugin.mining.mine_hard_examples`.

    Every anchor is scored by its loss without a graph; only the rows kept are differentiated. The loss itself is
    FocalHead's, so cross entropy is gamma = 0. Which choices the paper leaves open: see ``MODEL.OHEM`` in the config.
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
            ohem_batch_size: examples kept, per image or per batch (``scope``).
            nms_thresh: IoU over which a harder example removes another; <= 0: off.
            neg_pos_ratio: negatives per positive; 0: they compete.
            scope: "image" or "batch", the batch being that of one worker.
            rank_by: "cls" or "cls+box".
            nms_boxes: "anchors" or "predicted".
            nms_per_label: suppress only examples of the same label.
            normalizer: "selected" (the examples kept) or "positives" (the model's normaliser, as for FocalHead), what
                divides the classification loss.
            box_loss_on: "selected" (those kept) or "positives" (all), whose boxes are trained; the box loss is divided
                by the number of the former, or by the model's normaliser.
            gamma: as in FocalHead; here cross entropy by default.
            alpha: as in FocalHead; here no weighting by default.
            kwargs: of :class:`FocalHead`.

        Raises:
            ValueError: a value out of range; the message names its config key.
        """
        _check_choice("MODEL.OHEM.SCOPE", scope, ["image", "batch"])
        _check_choice("MODEL.OHEM.RANK_BY", rank_by, ["cls", "cls+box"])
        _check_choice("MODEL.OHEM.NMS_BOXES", nms_boxes, ["anchors", "predicted"])
        _check_choice("MODEL.OHEM.NORMALIZER", normalizer, ["selected", "positives"])
        _check_choice("MODEL.OHEM.BOX_LOSS_ON", box_loss_on, ["selected", "positives"])
        if ohem_batch_size < 1:
            raise ValueError(f"MODEL.OHEM.BATCH_SIZE must be at least 1, got {ohem_batch_size}")
        if not nms_thresh <= 1:
            raise ValueError(f"MODEL.OHEM.NMS_THRESH must be an IoU in (0, 1], or <= 0 for off, got {nms_thresh}")
        if not 0 <= neg_pos_ratio < float("inf"):
            raise ValueError(f"MODEL.OHEM.NEG_POS_RATIO must be a finite number >= 0, got {neg_pos_ratio}")
        super().__init__(gamma=gamma, alpha=alpha, **kwargs)
        if gamma > 0:
            logger.warning(
                f"OHEM mines on a focal loss with gamma = {gamma}. The paper's OHEM uses cross entropy: set "
                "MODEL.RETINANET.FOCAL_LOSS_GAMMA 0.0 unless both at once is what you want."
            )
        self.scope, self.rank_by, self.nms_boxes = scope, rank_by, nms_boxes
        self.normalizer, self.box_loss_on = normalizer, box_loss_on
        self._scalars = DeferredScalars()
        self._mine = partial(
            mine_hard_examples,
            num_classes=self.num_classes,
            batch_size=ohem_batch_size,
            nms_thresh=nms_thresh,
            neg_pos_ratio=neg_pos_ratio,
            per_label=nms_per_label,
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: list[ShapeSpec]) -> dict:
        ohem = cfg.MODEL.OHEM
        return {
            **super().from_config(cfg, input_shape),
            "ohem_batch_size": ohem.BATCH_SIZE,
            "nms_thresh": ohem.NMS_THRESH,
            "neg_pos_ratio": ohem.NEG_POS_RATIO,
            "scope": ohem.SCOPE,
            "rank_by": ohem.RANK_BY,
            "nms_boxes": ohem.NMS_BOXES,
            "nms_per_label": ohem.NMS_PER_LABEL,
            "normalizer": ohem.NORMALIZER,
            "box_loss_on": ohem.BOX_LOSS_ON,
        }

    def losses(self, pred_logits: list[Tensor], targets: AnchorTargets) -> HeadLosses:
        """As :meth:`FocalHead.losses`, over the mined examples. Logs what it kept to the event storage."""
        labels = targets.labels
        check_label_range(labels, self.num_classes)
        with torch.no_grad():
            ranks, kept = self.select(pred_logits, targets)
            self._log(ranks, labels, kept)
        loss_cls, positive = self.loss_sum(*self.kept_rows(pred_logits, labels, kept), class_dim=-1)
        num_examples = kept.sum() if self.normalizer == "selected" else None
        box_mask = is_foreground(labels, self.num_classes)
        num_boxes = None
        if self.box_loss_on == "selected":
            box_mask = box_mask & kept
            num_boxes = box_mask.sum()
        return HeadLosses(loss_cls, box_mask, num_examples, num_boxes, positive)

    def _scores(self, pred_logits: list[Tensor], labels: Tensor) -> Tensor:
        """(N, R) classification loss of each anchor, summed over classes."""
        scores = [
            self.row_losses(x, y, class_dim=2).permute(0, 2, 3, 1).flatten(1)
            for x, y in self.by_level(pred_logits, labels)
        ]
        return torch.cat(scores, dim=1)

    @torch.no_grad()
    def select(self, pred_logits: list[Tensor], targets: AnchorTargets) -> tuple[Tensor, Tensor]:
        """What each anchor is ranked by, (N, R), and which are kept, (N, R) bool."""
        ranks = self._scores(pred_logits, targets.labels)
        if self.rank_by == "cls+box":
            ranks = ranks + targets.box_losses()
        return ranks, self._keep(ranks, targets)

    def _keep(self, ranks: Tensor, targets: AnchorTargets) -> Tensor:
        labels = targets.labels
        boxes = targets.anchors.expand(len(labels), -1, -1)
        if self.nms_boxes == "predicted":
            boxes = targets.pred_boxes()
        kept = torch.zeros_like(labels, dtype=torch.bool)
        if self.scope == "image":
            for i in range(len(labels)):
                kept[i, self._mine(ranks[i], boxes[i], labels[i])] = True
        else:
            image = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
            pooled = self._mine(ranks.flatten(), boxes.flatten(0, 1), labels.flatten(), groups=image.flatten())
            kept.view(-1)[pooled] = True
        return kept

    def kept_rows(self, pred_logits: list[Tensor], labels: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """(M, K) logits and (M,) labels of the kept anchors.

        Every level takes part, if only with no row, so that each parameter of the head has a gradient under DDP.
        """
        rows, row_labels = [], []
        for (x, y), (_, k) in zip(self.by_level(pred_logits, labels), self.by_level(pred_logits, kept)):
            # In the order in which the logits lie in memory, so that their gradient is written in it, too.
            layout = Layout.of(x, class_dim=2)
            outer, _, inner = layout.flat_rows(k).nonzero(as_tuple=True)
            rows.append(layout.flat(x)[outer, :, inner])
            row_labels.append(layout.flat_rows(y)[outer, 0, inner])
        return torch.cat(rows), torch.cat(row_labels)

    def _log(self, scores: Tensor, labels: Tensor, kept: Tensor) -> None:
        """Examples kept per image, and the mean score of those kept and those dropped."""
        num_images = max(len(labels), 1)
        dropped = (labels >= 0) & ~kept
        positive = kept & (labels < self.num_classes)
        self._scalars.put(
            {
                "ohem/num_pos": positive.sum() / num_images,
                "ohem/num_neg": (kept & ~positive).sum() / num_images,
                "ohem/loss_kept": torch.where(kept, scores, 0).sum() / kept.sum().clamp(min=1),
                "ohem/loss_dropped": torch.where(dropped, scores, 0).sum() / dropped.sum().clamp(min=1),
            }
        )


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}; got {value!r}")
