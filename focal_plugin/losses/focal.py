"""Sigmoid focal loss and FL*, in the closed form that is finite for every gamma and every logit.

With ``s = -x`` where the class is present and ``s = x`` where it is not (``s`` is the logit of being wrong),
the focal loss of Lin et al. 2017, eq. (5), and its derivative are::

    FL(s)    = a * exp(-gamma * softplus(-s)) * softplus(s)
    dFL/ds   = a * exp(-gamma * softplus(-s)) * (gamma * sigmoid(-s) * softplus(s) + sigmoid(s))

There is no ``1 - p_t`` that rounds to zero and no ``pow(., gamma - 1)`` of that zero, which is where the usual
forms return NaN gradients for 0 < gamma < 1 as soon as one easy logit passes |x| = 17.
"""

from collections.abc import Sequence
from typing import NamedTuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

Alpha = Union[float, Sequence[float], Tensor]

IGNORE = -1
"""Label of an anchor that takes no part in the loss."""


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
    inputs are computed in, and returned as, float32. No gradient flows to the targets.

    Args:
        inputs: logits, of any shape (..., K).
        targets: either dense targets in [0, 1] of the same shape as ``inputs`` (soft ones included), or integer
            labels of that shape without ``class_dim``: a class in [0, K), K for background, -1 to ignore.
        alpha: weight of positives, 1 - alpha that of negatives; at most 1. Negative: no weighting. A sequence or
            tensor of length K gives one alpha a class.
        gamma: focusing parameter, >= 0. 0 is cross entropy.
        reduction: "none", "sum" or "mean". The mean is over the entries that are not ignored.
        class_dim: the dimension of ``inputs`` that runs over classes.

    Returns:
        The loss, of the shape of ``inputs`` for "none" (0 where ignored), else a scalar.

    Raises:
        ValueError: for an alpha, gamma, reduction, shape or label out of range.
    """
    check_gamma(gamma)
    return _apply(_Focal(float(gamma)), inputs, targets, alpha, reduction, class_dim)


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
    return _apply(_FocalStar(float(gamma), float(beta)), inputs, targets, alpha, reduction, class_dim)


def check_gamma(gamma: float, *, star: bool = False, name: str = "gamma") -> None:
    """Raises a ValueError that calls the value ``name`` unless it is finite and >= 0 (> 0 for FL*)."""
    if not (0 < gamma < float("inf") or (gamma == 0 and not star)):
        raise ValueError(f"{name} must be a finite number {'> 0 for FL*' if star else '>= 0'}, got {gamma}")


def check_alpha(alpha: float, *, name: str = "alpha") -> None:
    """Raises a ValueError that calls the value ``name`` unless it is at most 1."""
    if not -float("inf") < alpha <= 1:
        raise ValueError(f"{name} must be in [0, 1], or negative to switch the weighting off, got {alpha}")


def check_class_alpha(alpha: Sequence[float], num_classes: int, *, name: str = "alpha") -> None:
    """Raises a ValueError that calls the values ``name`` unless they are ``num_classes`` numbers in [0, 1]."""
    if len(alpha) != num_classes:
        raise ValueError(f"{name} must have one value a class: {num_classes} expected, got {len(alpha)}")
    if not all(0 <= a <= 1 for a in alpha):
        raise ValueError(f"{name} must hold numbers in [0, 1], got {list(alpha)}")


class _Focal(NamedTuple):
    """FL (eq. 5) as a function of s, the logit of being wrong."""

    gamma: float

    def value(self, s: Tensor) -> Tensor:
        return torch.exp(self.gamma * F.logsigmoid(s)) * -F.logsigmoid(-s)

    def derivative(self, s: Tensor) -> Tensor:
        log_wrong = F.logsigmoid(s)
        slope = self.gamma * torch.sigmoid(-s) * -F.logsigmoid(-s) + log_wrong.exp()
        return slope * torch.exp(self.gamma * log_wrong)


class _FocalStar(NamedTuple):
    """FL* (appendix A of arXiv 1708.02002v2): ``-log(sigmoid(gamma * x_t + beta)) / gamma`` with x_t = -s."""

    gamma: float
    beta: float

    def value(self, s: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta - self.gamma * s) / self.gamma

    def derivative(self, s: Tensor) -> Tensor:
        return torch.sigmoid(self.gamma * s - self.beta)


class _LabelLoss(torch.autograd.Function):
    """Unreduced loss for integer labels, with the gradient recomputed in the backward pass.

    Only logits and labels are kept between the two passes, and no one-hot target is made: every entry is treated
    as "class absent", then the one entry a row that is its class is put right with a gather and a scatter.
    """

    @staticmethod
    def forward(ctx, logits, labels, pos_weight, neg_weight, formula, class_dim):
        ctx.save_for_backward(logits, labels, pos_weight, neg_weight)
        ctx.formula, ctx.class_dim = formula, class_dim
        value = formula.value
        return _assemble(_upcast(logits), labels, pos_weight, neg_weight, value, value, class_dim)

    @staticmethod
    def backward(ctx, grad_output):
        logits, *rest = ctx.saved_tensors
        derivative = ctx.formula.derivative
        # The chain rule at the entry of the class itself: d/dx value(-x) = -derivative(-x).
        grad = _assemble(_upcast(logits), *rest, derivative, lambda s: -derivative(s), ctx.class_dim)
        # Scaled before it is rounded to the logits' dtype: a loss scaler's factor keeps fp16 from underflowing.
        return (grad * grad_output).to(logits.dtype), None, None, None, None, None


def _upcast(x: Tensor) -> Tensor:
    """float16 and bfloat16 are computed in float32; float32 and float64 in themselves."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _assemble(x, labels, pos_weight, neg_weight, absent, present, class_dim):
    """``neg_weight * absent(x)`` everywhere, ``pos_weight * present(-x)`` at each row's class, 0 where ignored."""
    num_classes = x.shape[class_dim]
    labels = labels.unsqueeze(class_dim)
    index = labels.clamp(0, num_classes - 1).long()
    out = absent(x) * neg_weight
    at_class = present(-x.gather(class_dim, index))
    at_class = at_class * (pos_weight if pos_weight.dim() == 0 else pos_weight.flatten()[index])
    is_foreground = (labels >= 0) & (labels < num_classes)
    out = out.scatter(class_dim, index, torch.where(is_foreground, at_class, out.gather(class_dim, index)))
    # A fill, not a product: a NaN under an ignored anchor must not come through.
    return out.masked_fill(labels == IGNORE, 0.0)


def _apply(formula, inputs, targets, alpha, reduction, class_dim) -> Tensor:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
    if not inputs.is_floating_point():
        raise ValueError(f"inputs must be floating-point logits, got {inputs.dtype}")
    class_dim = class_dim % max(inputs.dim(), 1)
    weights = _alpha_weights(alpha, inputs, class_dim)
    if targets.shape == inputs.shape:
        loss = _dense_loss(formula, _upcast(inputs), targets, *weights)
        count = loss.numel()
    else:
        _check_labels(inputs, targets, class_dim)
        loss = _LabelLoss.apply(inputs, targets, *weights, formula, class_dim)
        count = (targets != IGNORE).sum() * inputs.shape[class_dim]
    if reduction == "mean":
        # With nothing to average the mean is 0 and still connected to the inputs, not 0/0.
        return loss.sum() / torch.as_tensor(count, device=loss.device).clamp(min=1)
    return loss.sum() if reduction == "sum" else loss


def _alpha_weights(alpha: Alpha, inputs: Tensor, class_dim: int) -> tuple[Tensor, Tensor]:
    """The weights of positives and negatives: two scalars, or two tensors that broadcast along ``class_dim``."""
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    if isinstance(alpha, Tensor) and alpha.dim() == 0:
        alpha = alpha.item()
    if isinstance(alpha, (int, float)):
        check_alpha(alpha)
        pos, neg = (1.0, 1.0) if alpha < 0 else (alpha, 1.0 - alpha)
        return inputs.new_tensor(pos, dtype=dtype), inputs.new_tensor(neg, dtype=dtype)
    num_classes = inputs.shape[class_dim] if inputs.dim() else 0
    if not isinstance(alpha, Tensor):
        check_class_alpha(alpha, num_classes)
    weight = torch.as_tensor(alpha, dtype=dtype, device=inputs.device).detach()
    if weight.shape != (num_classes,):
        raise ValueError(f"alpha must have one value a class ({num_classes}), got shape {tuple(weight.shape)}")
    weight = weight.reshape([-1] + [1] * (inputs.dim() - 1 - class_dim))
    return weight, 1.0 - weight


def _check_labels(inputs: Tensor, labels: Tensor, class_dim: int) -> None:
    expected = inputs.shape[:class_dim] + inputs.shape[class_dim + 1 :]
    if inputs.dim() == 0 or labels.shape != expected or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"targets must be dense and of the shape {tuple(inputs.shape)} of inputs, or integer labels of shape "
            f"{tuple(expected)}; got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    # On a GPU reading the range would make the host wait for the device; there it is up to the caller.
    if labels.device.type == "cpu" and labels.numel():
        num_classes = inputs.shape[class_dim]
        low, high = (int(v) for v in labels.aminmax())
        if low < IGNORE or high > num_classes:
            raise ValueError(
                f"labels must be in [-1, {num_classes}] (-1 ignored, {num_classes} background); "
                f"got values from {low} to {high}"
            )


def _dense_loss(formula, x: Tensor, targets: Tensor, pos_weight: Tensor, neg_weight: Tensor) -> Tensor:
    t = targets.detach().to(x.dtype)
    weight = pos_weight * t + neg_weight * (1 - t)
    if isinstance(formula, _FocalStar):
        return weight * formula.value((1 - 2 * t) * x)
    cross_entropy = -(t * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x))
    # log(1 - p_t) = log(p (1 - t) + (1 - p) t), in log space: exact for t of 0 and 1, finite in between.
    log_wrong = torch.logaddexp(F.logsigmoid(x) + torch.log1p(-t), F.logsigmoid(-x) + torch.log(t))
    return weight * torch.exp(formula.gamma * log_wrong) * cross_entropy
