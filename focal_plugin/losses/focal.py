"""Sigmoid focal loss and FL* in the closed form that is finite for every gamma and every logit.

With ``s = -x`` where the class is present and ``s = x`` where it is not (``s`` is the logit of being wrong),
the focal loss of Lin et al. 2017, eq. (5), and its derivative are::

    FL(s)    = a * exp(-gamma * softplus(-s)) * softplus(s)
    dFL/ds   = a * exp(-gamma * softplus(-s)) * (gamma * sigmoid(-s) * softplus(s) + sigmoid(s))

There is no ``1 - p_t`` that rounds to zero and no ``pow(., gamma - 1)`` of that zero, which is where the usual
forms return NaN gradients for 0 < gamma < 1 as soon as one easy logit passes |x| = 17.
"""

import math
from typing import Optional, Union

import torch
from torch import Tensor

from . import focal_triton
from .alpha import Alpha, Weights, alpha_weights, check_gamma
from .blocked import IGNORE, BlockedLoss, Layout, upcast
from .formulas import Focal, FocalStar, softplus

Formula = Union[Focal, FocalStar]


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
    inputs are computed in, and returned as, float32; their gradient is rounded after it was multiplied by the
    upstream one, so that a loss scaler keeps it from underflowing. No gradient flows to targets and alpha. Forward and
    backward each read the logits once; only they and the targets are kept in between.

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
        ValueError: for an alpha, gamma, reduction, shape or label out of range (labels on a GPU: a device-side
            assertion, since reading them would make the host wait).
    """
    check_gamma(gamma)
    return _apply(Focal(float(gamma)), inputs, targets, alpha, reduction, class_dim)


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
    if not math.isfinite(beta):
        raise ValueError(f"beta must be a finite number, got {beta}")
    return _apply(FocalStar(float(gamma), float(beta)), inputs, targets, alpha, reduction, class_dim)


def _apply(formula: Formula, inputs, targets, alpha, reduction, class_dim) -> Tensor:
    check_reduction(reduction)
    class_dim = check_inputs(inputs, class_dim)
    num_classes = inputs.shape[class_dim] if inputs.dim() else 1
    weights = alpha_weights(alpha, num_classes, inputs)
    if targets.shape == inputs.shape:
        check_dense(targets)
        loss = dense_loss(formula, inputs, targets, weights, reduction, class_dim)
        return loss / max(inputs.numel(), 1) if reduction == "mean" else loss
    check_labels(targets, inputs.shape, class_dim, num_classes)
    loss = label_loss(LabelLoss(formula, weights), inputs, targets, reduction, class_dim)
    if reduction != "mean":
        return loss
    # With nothing to average the mean is 0 and still connected to the inputs, not 0/0.
    return loss / ((targets >= 0).sum() * num_classes).clamp(min=1)


def dense_loss(
    formula: Formula, inputs: Tensor, targets: Tensor, weights: Weights, reduction: str, class_dim: int
) -> Tensor:
    """:func:`sigmoid_focal_loss` for dense targets, without its checks; a sum where that has a mean."""
    if not inputs.dim():
        return dense_loss(formula, inputs[None], targets[None], weights, reduction, 0).reshape(inputs.shape)
    layout = Layout.of(inputs, class_dim)
    target = layout.flat(targets.detach())
    loss = _DenseLoss(formula, weights)(layout.flat(inputs), target, reduce=reduction != "none")
    return layout.unflat(loss) if reduction == "none" else loss


def label_loss(op: BlockedLoss, inputs: Tensor, labels: Tensor, reduction: str, class_dim: int) -> Tensor:
    """A loss of integer labels that are known to be in range; a sum where the public functions have a mean.

    ``reduction`` "rows" sums over the classes only, for a ranking: of the shape of ``labels``, without a gradient.
    """
    layout, x, target = _flat(inputs, labels, class_dim)
    if reduction == "rows":
        return layout.unflat_rows(op.rows(x.detach(), target))
    loss = op(x, target, reduce=reduction != "none")
    if reduction != "none":
        return loss
    return layout.unflat(loss) if op.per_entry else layout.unflat_rows(loss)


def label_loss_and_rows(op: BlockedLoss, inputs: Tensor, labels: Tensor, class_dim: int) -> tuple[Tensor, Tensor]:
    """The sum of :func:`label_loss`, and its "rows"."""
    layout, x, target = _flat(inputs, labels, class_dim)
    total, rows = op.sum_and_rows(x, target)
    return total, layout.unflat_rows(rows)


def _flat(inputs: Tensor, labels: Tensor, class_dim: int) -> tuple[Layout, Tensor, Tensor]:
    layout = Layout.of(inputs, class_dim)
    return layout, layout.flat(inputs), small_labels(layout.flat_rows(labels), inputs.shape[class_dim])


def small_labels(labels: Tensor, num_classes: int) -> Tensor:
    """The labels in the smallest type that holds -1 to K: they are read again in each pass."""
    dtype = torch.int8 if num_classes < 2**7 else torch.int16 if num_classes < 2**15 else torch.int32
    return labels.to(dtype)


def check_reduction(reduction: str) -> None:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")


def check_inputs(inputs: Tensor, class_dim: int) -> int:
    """Raises a ValueError unless these are logits that have such a dimension; returns it counted from the first."""
    if not inputs.is_floating_point():
        raise ValueError(f"inputs must be floating-point logits, got {inputs.dtype}")
    num_dims = max(inputs.dim(), 1)
    if not -num_dims <= class_dim < num_dims:
        raise ValueError(f"class_dim {class_dim} is not among the dimensions of inputs of shape {tuple(inputs.shape)}")
    return class_dim % num_dims


def check_dense(targets: Tensor) -> None:
    """Raises a ValueError for complex numbers, and for integers other than 0 and 1; floats are not looked at."""
    if targets.is_complex():
        raise ValueError(f"dense targets must be real numbers in [0, 1], got {targets.dtype}")
    is_integer = not targets.is_floating_point() and targets.dtype != torch.bool
    if not is_integer or targets.device.type != "cpu" or targets.numel() == 0 or torch.compiler.is_compiling():
        return
    if int(targets.min()) < 0 or int(targets.max()) > 1:
        raise ValueError(
            "targets of the shape of inputs are dense and must be in [0, 1]; got integers from "
            f"{int(targets.min())} to {int(targets.max())}. Labels have one dimension less, the classes'"
        )


def check_labels(labels: Tensor, shape: torch.Size, class_dim: int, max_label: int) -> None:
    """Raises a ValueError unless these are integer labels in [-1, max_label] for logits of ``shape``."""
    expected = shape[:class_dim] + shape[class_dim + 1 :]
    if len(shape) == 0 or labels.shape != expected or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"targets must be dense and of the shape {tuple(shape)} of inputs, or integer labels of shape "
            f"{tuple(expected)}; got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    check_label_range(labels, max_label)


def check_label_range(labels: Tensor, max_label: int) -> None:
    """Raises a ValueError for labels that are not in [-1, max_label].

    On a GPU it is a device-side assertion instead: to read the labels here would make the host wait.
    """
    if labels.numel() == 0 or torch.compiler.is_compiling():
        return
    message = f"labels must be in [-1, {max_label}] (-1: ignored)"
    if labels.is_cuda:
        torch._assert_async(((labels >= IGNORE) & (labels <= max_label)).all(), message)
    elif labels.device.type == "cpu":
        low, high = (int(v) for v in labels.aminmax())
        if low < IGNORE or high > max_label:
            raise ValueError(f"{message}; got values from {low} to {high}")


class LabelLoss(BlockedLoss):
    """Sigmoid loss of integer labels: a class in [0, K), K for background, -1 ignored.

    No one-hot target is made: every entry of a block is treated as "class absent", then one entry a row, that of its
    class, is overwritten.
    """

    def __init__(self, entry: Formula, weights: Weights):
        self.entry, self.weights = entry, weights

    def formula(self, x: Tensor, target: Tensor) -> Tensor:
        present = target == torch.arange(x.shape[1], device=x.device)[:, None]
        pos, neg = self.weights.along(1, 3)
        # Ignored logits go before the formula, not after it: its derivative at a NaN, times 0, is a NaN.
        s = torch.where(present, -x, x).masked_fill(target == IGNORE, 0.0)
        loss = self.entry.value(s)
        return torch.where(present, pos * loss, neg * loss).masked_fill(target == IGNORE, 0.0)

    def prepare(self, x: Tensor, target: Tensor, for_gradient: bool) -> tuple[Tensor, ...]:
        # An index that is valid for background and ignored rows as well; these overwrite an entry with what it is.
        index = target.clamp(0, x.shape[1] - 1).long()
        present = (target >= 0) & (target < x.shape[1])
        logit = upcast(x.gather(1, index))
        s = torch.where(present, -logit, logit)
        at_class = self.entry.derivative(s) if for_gradient else self.entry.value(s)
        pos, neg = (w[index] if isinstance(w, Tensor) and w.dim() else w for w in self.weights)
        # The chain rule at the entry of the class itself: d/dx value(-x) = -derivative(-x).
        pos = -pos if for_gradient else pos
        return target == IGNORE, index, torch.where(present, pos * at_class, neg * at_class)

    def block_loss(self, x: Tensor, targets: tuple[Tensor, ...], buffers: list[Tensor]) -> Tensor:
        ignored, *at_class = targets
        return _clear(self._finish(self.entry.value(x, *buffers), *at_class), ignored)

    def block_rows(self, x: Tensor, targets: tuple[Tensor, ...], buffers: list[Tensor], out: Tensor) -> None:
        ignored, *at_class = targets
        torch.sum(self._finish(self.entry.value(x, *buffers), *at_class), dim=1, keepdim=True, out=out)
        out.masked_fill_(ignored, 0.0)

    def block_gradient(
        self, x: Tensor, targets: tuple[Tensor, ...], grad_loss: Optional[Tensor], buffers: list[Tensor]
    ) -> Tensor:
        ignored, *at_class = targets
        grad = _clear(self._finish(self.entry.derivative(x, *buffers), *at_class), ignored)
        return grad if grad_loss is None else grad.mul_(grad_loss)

    def rows(self, x: Tensor, target: Tensor) -> Tensor:
        if focal_triton.is_usable(x, self.entry):
            return focal_triton.rows(x, target, self.entry, self.weights)
        return super().rows(x, target)

    def gradient(self, x: Tensor, target: Tensor, grad_loss: Tensor) -> Tensor:
        if grad_loss.dim():
            return super().gradient(x, target, grad_loss)
        if focal_triton.is_usable(x, self.entry):
            return focal_triton.gradient(x, target, self.entry, self.weights, grad_loss)
        # One factor for all goes into the weights.
        scaled = LabelLoss(self.entry, Weights(*(w * grad_loss for w in self.weights)))
        return super(LabelLoss, scaled).gradient(x, target, None)

    def _finish(self, absent: Tensor, index: Tensor, at_class: Tensor) -> Tensor:
        """``absent`` weighted as negatives, with ``at_class`` at each row's class."""
        return absent.mul_(self.weights.along(1, 3).neg).scatter_(1, index, at_class)


def _clear(x: Tensor, ignored: Tensor) -> Tensor:
    """0 where ignored; not by a product, which would leave a NaN a NaN."""
    # Most blocks have nothing to clear. A CPU may look; a GPU would have to be waited for.
    return x if ignored.device.type == "cpu" and not ignored.any() else x.masked_fill_(ignored, 0.0)


class _DenseLoss(BlockedLoss):
    """Sigmoid loss of dense targets in [0, 1], (outer, K, inner) as the logits.

    With ``s`` the logit of the less likely of the two classes and ``u`` its probability by the target, ``u <= .5``::

        1 - p_t        = q = u + (1 - 2 u) * sigmoid(s)
        cross entropy  = softplus(s) - u * s
        d loss / ds    = a * q**gamma * (gamma * ce * (1 - 2 u) * sigmoid(s) * sigmoid(-s) / q + sigmoid(s) - u)
    """

    def __init__(self, entry: Formula, weights: Weights):
        self.entry, self.weights = entry, weights

    def formula(self, x: Tensor, target: Tensor) -> Tensor:
        t = target.to(x.dtype)
        if isinstance(self.entry, FocalStar):
            return self._alpha(t) * self.entry.value((1 - 2 * t) * x)
        _, _, _, _, cross_entropy, weight = self._terms(x, t)
        return self._alpha(t) * weight * cross_entropy

    def block_loss(self, x, targets, buffers):
        # The only time that the targets are read.
        return self.formula(x, buffers[0].copy_(targets[0]))

    def block_gradient(self, x, targets, grad_loss, buffers):
        t = buffers[0].copy_(targets[0])
        if isinstance(self.entry, FocalStar):
            return super().block_gradient(x, (t,), grad_loss, buffers)
        flip, u, q, wrong, cross_entropy, weight = self._terms(x, t)
        # For a hard target q is sigmoid(s), which may have underflowed: the quotient is known.
        share = torch.where(u == 0, 1 - wrong, (1 - 2 * u) * wrong * (1 - wrong) / q)
        slope = share.mul_(cross_entropy).mul_(self.entry.gamma).add_(wrong).sub_(u).mul_(weight)
        return torch.where(flip, -slope, slope).mul_(self._alpha(t)).mul_(grad_loss)

    def _terms(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Whether s is -x, u, q, sigmoid(s), cross entropy and q**gamma, from differentiable operations only."""
        flip = t > 0.5
        s, u = torch.where(flip, -x, x), torch.where(flip, 1 - t, t)
        wrong = torch.sigmoid(s)
        hard = softplus(s, None if torch.is_grad_enabled() else torch.empty_like(s))
        q = torch.addcmul(u, 1 - 2 * u, wrong)
        # For a hard target q may have underflowed, its logarithm is known; and log(0), even unused, has no derivative.
        is_hard = u == 0
        log_q = torch.where(is_hard, s - hard, torch.log(q.masked_fill(is_hard, 1.0)))
        return flip, u, q, wrong, hard - u * s, torch.exp(self.entry.gamma * log_q)

    def _alpha(self, t: Tensor) -> Tensor:
        pos, neg = self.weights.along(1, 3)
        return pos * t + neg * (1 - t)
