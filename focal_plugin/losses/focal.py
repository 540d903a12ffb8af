"""Sigmoid focal loss and FL* in the closed form that is finite for every gamma and every logit.

With ``s = -x`` where the class is present and ``s = x`` where it is not (``s`` is the logit of being wrong),
the focal loss of Lin et al. 2017, eq. (5), and its derivative are::

    FL(s)    = a * exp(-gamma * softplus(-s)) * softplus(s)
    dFL/ds   = a * exp(-gamma * softplus(-s)) * (gamma * sigmoid(-s) * softplus(s) + sigmoid(s))

There is no ``1 - p_t`` that rounds to zero and no ``pow(., gamma - 1)`` of that zero, which is where the usual
forms return NaN gradients for 0 < gamma < 1 as soon as one easy logit passes |x| = 17. In seven lines, which the rest
of this file evaluates without the temporaries and for all kinds of targets::

    def focal_loss(x, labels, alpha, gamma):  # (R, K) logits; (R,) labels in 0 to K, K for background
        present = labels[:, None] == torch.arange(x.shape[1])
        s = torch.where(present, -x, x)
        cross_entropy = F.softplus(s)
        log_wrong = s - cross_entropy  # log(1 - p_t)
        weight = torch.where(present, alpha, 1 - alpha)
        return weight * torch.exp(gamma * log_wrong) * cross_entropy
"""

import math
from typing import Optional

import torch
from torch import Tensor

from . import triton_kernels
from .args import IGNORE, Alpha, alpha_weights, check, check_call, check_dense, check_gamma, check_labels, float_dtype
from .blockwise import BlockwiseLoss
from .dense import DenseLoss
from .formulas import Focal, FocalStar, Formula


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    class_dim: int = -1,
) -> Tensor:
    """Focal loss, eq. (5) of Lin et al. 2017: ``-alpha_t * (1 - p_t)**gamma * log(p_t)`` with ``p = sigmoid(inputs)``.

    A drop-in for ``fvcore.nn.sigmoid_focal_loss`` and ``torchvision.ops.sigmoid_focal_loss``, finite for every
    gamma >= 0 and every finite logit. The defaults are torchvision's; fvcore's alpha is -1. float16 and bfloat16
    inputs are computed in, and returned as, float32; their gradient is rounded last, so that a loss scaler keeps it
    from underflowing. No gradient flows to targets and alpha.

    Args:
        inputs: logits, of any shape (..., K) and memory layout.
        targets: either dense targets in [0, 1] of the same shape as ``inputs`` (soft ones included; of floats the
            range is not checked), or integer labels of that shape without ``class_dim``: a class in [0, K), K for
            background, -1 to ignore.
        alpha: weight of positives, 1 - alpha that of negatives; at most 1. Negative: no weighting. A sequence or
            tensor of length K gives one alpha a class.
        gamma: focusing parameter, >= 0. 0 is cross entropy.
        reduction: "none", "sum" or "mean". The mean is over the entries that are not ignored.
        class_dim: the dimension of ``inputs`` that runs over classes.

    Returns:
        The loss, of the shape of ``inputs`` for "none" (0 where ignored), else a scalar.

    Raises:
        ValueError: an argument is out of range (labels on a GPU: a device-side assertion).
    """
    check_gamma(gamma)
    return _sigmoid_loss(Focal(float(gamma)), inputs, targets, alpha, reduction, class_dim)


def sigmoid_focal_loss_star(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    beta: float = 1.0,
    class_dim: int = -1,
) -> Tensor:
    """FL*, appendix A of arXiv 1708.02002v2: ``-alpha_t * log(sigmoid(gamma * x_t + beta)) / gamma``.

    ``x_t`` is the logit where the class is present and minus the logit where it is not. fvcore's function of this
    name has no beta. Arguments, result and errors as :func:`sigmoid_focal_loss`, but gamma must be > 0 and dense
    targets should be 0 or 1: between them FL* is taken at ``x_t = (2 t - 1) x``.
    """
    check_gamma(gamma, star=True)
    check(math.isfinite(beta), "beta", "a finite number", beta)
    return _sigmoid_loss(FocalStar(float(gamma), float(beta)), inputs, targets, alpha, reduction, class_dim)


def _sigmoid_loss(formula: Formula, inputs: Tensor, targets: Tensor, alpha: Alpha, reduction: str, class_dim: int):
    class_dim, num_classes = check_call(inputs, reduction, class_dim)
    weights = alpha_weights(alpha, num_classes, inputs)
    if targets.shape == inputs.shape:
        check_dense(targets)
        criterion, num_averaged = DenseLoss(formula, weights), max(inputs.numel(), 1)
    else:
        check_labels(targets, inputs.shape, class_dim, num_classes)
        criterion = LabelLoss(formula, weights)
        # With nothing to average the mean is 0 and still connected to the inputs, not 0/0.
        num_averaged = ((targets >= 0).sum() * num_classes).clamp(min=1) if reduction == "mean" else None
    x, target = (inputs, targets) if inputs.dim() else (inputs[None], targets[None])
    if reduction == "none":
        return criterion(x, target, class_dim, sum_classes=False).reshape(inputs.shape)
    loss = criterion(x, target, class_dim).sum()
    return loss / num_averaged if reduction == "mean" else loss


class LabelLoss(BlockwiseLoss):
    """Sigmoid loss of integer labels: a class in [0, K), K for background, -1 ignored.

    No one-hot target is made: every logit of a block is treated as "class absent", then one logit of each anchor, that
    of its class, is overwritten.
    """

    def expression(self, x: Tensor, target: Tensor) -> Tensor:
        present = target == torch.arange(x.shape[1], device=x.device)[:, None]
        # Ignored logits go before the formula, not after it: its derivative at a NaN, times 0, is a NaN.
        s = torch.where(present, -x, x).masked_fill(target == IGNORE, 0.0)
        loss = self.formula.value(s)
        weighted = torch.where(present, self.weights.pos * loss, self.weights.neg * loss)
        return weighted.masked_fill(target == IGNORE, 0.0)

    def prepare(self, x: Tensor, target: Tensor, for_gradient: bool) -> tuple[Tensor, ...]:
        # An index that is valid for background and ignored anchors as well; these overwrite a logit with what it is.
        index = target.clamp(0, x.shape[1] - 1).long()
        present = (target >= 0) & (target < x.shape[1])
        logit = x.gather(1, index).to(float_dtype(x))
        s = torch.where(present, -logit, logit)
        at_class = self.formula.derivative(s) if for_gradient else self.formula.value(s)
        pos, neg = (w[index, 0] if isinstance(w, Tensor) and w.dim() else w for w in self.weights)
        # The chain rule at the logit of the class itself: d/dx value(-x) = -derivative(-x).
        pos = -pos if for_gradient else pos
        return index, torch.where(present, pos * at_class, neg * at_class)

    def block_loss(self, x: Tensor, buffers: list[Tensor], index: Tensor, at_class: Tensor) -> Tensor:
        return self.formula.value(x, *buffers).mul_(self.weights.neg).scatter_(1, index, at_class)

    def block_gradient(
        self, x: Tensor, buffers: list[Tensor], index: Tensor, at_class: Tensor, grad: Optional[Tensor] = None
    ) -> Tensor:
        gradient = self.formula.derivative(x, *buffers).mul_(self.weights.neg).scatter_(1, index, at_class)
        return gradient if grad is None else gradient.mul_(grad)

    def loss(self, x: Tensor, target: Tensor, sum_classes: bool) -> Tensor:
        if sum_classes and triton_kernels.is_usable(x, self.formula):
            return triton_kernels.run(x, target, self.formula, self.weights)
        return super().loss(x, target, sum_classes)

    def gradient(self, x: Tensor, target: Tensor, grad: Tensor) -> Tensor:
        # The gradient of a sum is one number, repeated by strides of 0: to know that asks for no value.
        is_repeated = all(n == 1 or stride == 0 for n, stride in zip(grad.shape, grad.stride()))
        if grad.numel() == 0 or grad.shape[1] > 1 or not is_repeated:
            return super().gradient(x, target, grad)
        factor = grad[0, 0, 0]
        if triton_kernels.is_usable(x, self.formula):
            return triton_kernels.run(x, target, self.formula, self.weights, factor)
        # One factor for all goes into the weights, which saves a pass over each block.
        scaled = LabelLoss(self.formula, self.weights._make(w * factor for w in self.weights))
        return scaled._fill(torch.empty_like(x), x, target, True)
