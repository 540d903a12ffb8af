"""Classification losses on tensors; nothing in here knows Detectron2."""

from .focal import sigmoid_focal_loss, sigmoid_focal_loss_star

__all__ = ["sigmoid_focal_loss", "sigmoid_focal_loss_star"]
