"""The plain IoU loss of matched boxes; GIoU, DIoU and CIoU are fvcore's and Detectron2's."""

import torch
from torch import Tensor

from .focal import check_reduction


def iou_loss(boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7) -> Tensor:
    """``1 - IoU`` of each pair (L_IoU of Rezatofighi et al., CVPR 2019), with the arguments of ``fvcore.nn.giou_loss``.

    Where boxes do not touch it is 1 and has no gradient, which is what its successors change.

    Args:
        boxes1, boxes2: (M, 4) XYXY, x2 >= x1 and y2 >= y1.
        reduction: "none", "sum" or "mean"; the mean of no boxes is 0.
        eps: keeps the quotient of two empty boxes finite.

    Returns:
        (M,) losses, else a scalar.
    """
    check_reduction(reduction)
    top_left = torch.maximum(boxes1[:, :2], boxes2[:, :2])
    bottom_right = torch.minimum(boxes1[:, 2:], boxes2[:, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=1)
    area1, area2 = ((boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (boxes1, boxes2))
    loss = 1 - intersection / (area1 + area2 - intersection + eps)
    if reduction == "none":
        return loss
    return loss.sum() / max(len(loss), 1) if reduction == "mean" else loss.sum()
