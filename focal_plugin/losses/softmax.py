"""Softmax focal loss, in the same closed form as the sigmoid one.

With ``s = logsumexp(x_j, j != y) - x_y``, the logit of being wrong, ``p_y = sigmoid(-s)`` exactly as for a sigmoid, so
that the formulas of :mod:`focal_plugin.losses.formulas` serve both. No ``1 - p_y`` is taken from rounded probabilities.
"""

from typing import Union

import torch
from torch import Tensor

from .args import IGNORE, Alpha, alpha_weights, check_alpha, check_call, check_gamma, check_labels, float_dtype
from .blockwise import BlockwiseLoss
from .formulas import Focal


def softmax_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = -1.0,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    class_dim: int = -1,
    background: bool = True,
) -> Tensor:
    """Eq. (5) of Lin et al. 2017, ``-alpha_y * (1 - p_y)**gamma * log(p_y)``, with ``p = softmax(inputs)``.

    gamma = 0 without alpha is ``torch.nn.functional.cross_entropy``. Finite for every gamma >= 0 and all logits whose
    differences are finite. Dtypes and gradients as in :func:`focal_plugin.losses.sigmoid_focal_loss`.

    Args:
        inputs: logits of C >= 2 classes along ``class_dim``, of any shape and memory layout. With ``background``, C is
            K + 1 and the last class is background, as in Detectron2's ROI heads; without, all C = K are alike.
        targets: integer labels of that shape without ``class_dim``: in [0, C), -1 to ignore.
        alpha: negative: no weighting. A number in [0, 1]: the weight of foreground, 1 - alpha that of background; needs
            ``background``. A sequence or tensor of C values: the weight of each class, background included.
        gamma: focusing parameter, >= 0.
        reduction: "none", "sum" or "mean". The mean is over the examples that are not ignored.
        class_dim: the dimension of ``inputs`` that runs over classes.
        background: whether the last class is background.

    Returns:
        The loss of each example, of the shape of ``targets`` (0 where ignored), else a scalar.

    Raises:
        ValueError: an argument is out of range (labels on a GPU: a device-side assertion).
    """
    check_gamma(gamma)
    class_dim, num_classes = check_call(inputs, reduction, class_dim)
    if num_classes < 2:
        raise ValueError(f"a softmax needs 2 classes or more along class_dim {class_dim}, got {num_classes}")
    weights = softmax_weights(alpha, num_classes, background, inputs)
    check_labels(targets, inputs.shape, class_dim, num_classes - 1)
    loss = SoftmaxLoss(Focal(float(gamma)), weights)(inputs, targets, class_dim)
    if reduction == "none":
        return loss
    return loss.sum() / (targets >= 0).sum().clamp(min=1) if reduction == "mean" else loss.sum()


def softmax_weights(alpha: Alpha, num_classes: int, background: bool, inputs: Tensor) -> Union[float, Tensor]:
    """Return one number for all classes, or (C,) weights."""
    alpha = check_alpha(alpha, num_classes)
    if not isinstance(alpha, float):
        return alpha_weights(alpha, num_classes, inputs).pos[:, 0]
    if alpha < 0:
        return 1.0
    if not background:
        hint = f"give one value a class ({num_classes}), or a negative number to switch the weighting off"
        raise ValueError(f"alpha {alpha} weighs foreground against background, and background=False: {hint}")
    weights = inputs.new_full((num_classes,), alpha, dtype=float_dtype(inputs))
    weights[-1] = 1.0 - alpha
    return weights


class SoftmaxLoss(BlockwiseLoss):
    """Softmax loss of integer labels: a class in [0, C), -1 ignored. An anchor has one loss, not one for each class."""

    def expression(self, x: Tensor, target: Tensor) -> Tensor:
        ignored = target == IGNORE
        index = target.clamp(min=0).long()
        # Ignored logits go before the formula, not after it: its derivative at a NaN, times 0, is a NaN.
        x = x.masked_fill(ignored, 0.0)
        present = torch.arange(x.shape[1], device=x.device)[:, None] == index
        others = x.masked_fill(present, -torch.inf).logsumexp(dim=1, keepdim=True)
        loss = self.formula.value(others - x.gather(1, index))
        weight = self.weights[index] if isinstance(self.weights, Tensor) else self.weights
        return (weight * loss).masked_fill(ignored, 0.0)
