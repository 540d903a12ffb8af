"""The losses for MMDetection: importing this module registers ``FocalPluginLoss`` in mmdet's ``MODELS``.

In a config of MMDetection 3, as in configs/mmdet/retinanet_focal_plugin.py::

    custom_imports = dict(imports=["focal_plugin.mmdet"])
    model = dict(bbox_head=dict(loss_cls=dict(type="FocalPluginLoss", use_sigmoid=True, gamma=0.5, alpha=0.5)))

It needs Detectron2 as well as MMDetection, as ``import focal_plugin`` does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .losses.args import IGNORE, REDUCTIONS, Alpha, check_choice
from .losses.modules import SigmoidFocalLoss, SigmoidFocalLossStar, SoftmaxFocalLoss

try:
    from mmdet.registry import MODELS
except ModuleNotFoundError as e:
    if (e.name or "").partition(".")[0] != "mmdet":  # it is there, but something that it needs is not
        raise
    raise ImportError(
        "focal_plugin.mmdet needs MMDetection 3, and mmcv with its compiled operators. Install them with:\n"
        "  pip install openmim && mim install 'mmcv>=2.0.0,<2.2.0' mmdet"
    ) from None


@MODELS.register_module()
class FocalPluginLoss(nn.Module):
    """The focal losses of :mod:`focal_plugin.losses` behind the interface of mmdet's ``FocalLoss``.

    Finite, with finite gradients, for every gamma >= 0. What has weight 0 has loss 0 and gradient 0 whatever its logit
    is, NaN and infinity included. Give ``use_sigmoid`` in the config, where mmdet's heads read it: their default is
    softmax.

    Args:
        use_sigmoid: one sigmoid a class; else a softmax over the classes and background, which is the last.
        gamma: focusing parameter, >= 0 (> 0 for FL*). 0 is cross entropy.
        alpha: the weight of foreground, 1 - alpha that of background; negative: no weighting. Or one alpha for each
            of the C classes (softmax: C + 1 weights, that of background last).
        reduction: "none", "mean" or "sum".
        loss_weight: a factor for the result.
        activated: refused, as logits cannot be had back of probabilities.
        loss, beta: "focal", or "focal_star" for FL* (appendix A of arXiv 1708.02002v2), which has no softmax form.

    Raises:
        ValueError: a value out of range; the message names it.
    """

    def __init__(
        self,
        use_sigmoid: bool = True,
        gamma: float = 2.0,
        alpha: Alpha = 0.25,
        reduction: str = "mean",
        loss_weight: float = 1.0,
        activated: bool = False,
        loss: str = "focal",
        beta: float = 1.0,
    ):
        super().__init__()
        if activated:
            raise ValueError("activated=True: FocalPluginLoss needs logits, not probabilities; take mmdet's FocalLoss")
        if loss == "focal_star" and not use_sigmoid:
            raise ValueError("loss='focal_star' needs use_sigmoid=True: FL* has no softmax form")
        check_choice("loss", loss, ["focal", "focal_star"])
        check_choice("reduction", reduction, REDUCTIONS)
        self.use_sigmoid, self.reduction, self.loss_weight = use_sigmoid, reduction, loss_weight
        if loss == "focal_star":
            self.loss = SigmoidFocalLossStar(alpha, gamma, "none", beta=beta)
        else:
            self.loss = (SigmoidFocalLoss if use_sigmoid else SoftmaxFocalLoss)(alpha, gamma, "none")

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Return the loss of N examples: a scalar; for "none" the shape of ``pred``, with a softmax (N,).

        Args:
            pred: logits, (N, C); with a softmax (N, C + 1). float16 and bfloat16 are computed in float32.
            target: integer labels (N,): in [0, C), C for background, -1 to ignore; or, with sigmoids, dense targets in
                [0, 1] of the shape of ``pred``. A label of weight 0 may be anything.
            weight: (N,) or (N, 1); with sigmoids also one an entry, (N, C) or flattened.
            avg_factor: divides the sum of "mean" in place of the number of entries; "none" ignores, "sum" refuses it.
            reduction_override: in place of ``reduction``.

        Raises:
            ValueError: an argument is none of these (labels on a GPU: a device-side assertion).
        """
        reduction = reduction_override or self.reduction
        check_choice("reduction", reduction, REDUCTIONS)
        if avg_factor is not None and reduction == "sum":
            raise ValueError('avg_factor cannot be used with reduction="sum"')
        if pred.dim() != 2 or target.shape not in (pred.shape, pred.shape[:1]) or target.dtype == torch.bool:
            got = f"{tuple(pred.shape)} and target of {target.dtype} and shape {tuple(target.shape)}"
            allowed = "labels (N,) or, with sigmoids, dense targets (N, C)"
            raise ValueError(f"pred must be logits (N, C), and target {allowed}; got pred of shape {got}")
        if weight is None:
            loss = self.loss(pred, target)
        else:
            per_entry = self.use_sigmoid and weight.numel() == pred.numel()
            if not per_entry and weight.numel() != len(pred):
                size = f"{len(pred)} values (or, with sigmoids, one for each of the {pred.numel()} entries of pred)"
                raise ValueError(f"weight must have {size}, got shape {tuple(weight.shape)}")
            weight = weight.reshape(pred.shape if per_entry else (len(pred), 1))
            ignored = weight == 0
            if target.dim() == 1:  # labels say it themselves, and no logits are copied
                target = target.long().masked_fill(ignored.all(dim=1), IGNORE)
            if target.dim() == 2 or per_entry:
                pred = pred.masked_fill(ignored, 0.0)
            loss = self.loss(pred, target) * (weight if self.use_sigmoid else weight[:, 0])
        # mmdet's weight_reduce_loss, which cannot be imported without mmcv's compiled operators.
        if reduction == "mean":
            eps = torch.finfo(torch.float32).eps
            loss = loss.sum() / (max(loss.numel(), 1) if avg_factor is None else avg_factor + eps)
        elif reduction == "sum":
            loss = loss.sum()
        return self.loss_weight * loss
