"""Classification losses on tensors; nothing in here knows Detectron2."""

from .focal import sigmoid_focal_loss, sigmoid_focal_loss_star
from .modules import SigmoidFocalLoss, SigmoidFocalLossStar, SoftmaxFocalLoss
from .softmax import softmax_focal_loss

__all__ = [
    "SigmoidFocalLoss",
    "SigmoidFocalLossStar",
    "SoftmaxFocalLoss",
    "sigmoid_focal_loss",
    "sigmoid_focal_loss_star",
    "softmax_focal_loss",
]
