"""The sigmoid losses of dense targets, which fvcore's and torchvision's functions take; detectors have labels."""

import torch
from torch import Tensor

from .blockwise import BlockwiseLoss
from .formulas import FocalStar, softplus


class DenseLoss(BlockwiseLoss):
    """Sigmoid loss of dense targets in [0, 1], (outer, K, inner) as the logits.

    With ``s`` the logit of the less likely of the two classes and ``u`` its probability by the target, ``u <= .5``::

        1 - p_t        = q = u + (1 - 2 u) * sigmoid(s)
        cross entropy  = softplus(s) - u * s
        d loss / ds    = a * q**gamma * (gamma * ce * (1 - 2 u) * sigmoid(s) * sigmoid(-s) / q + sigmoid(s) - u)
    """

    has_labels = False

    def expression(self, x: Tensor, target: Tensor) -> Tensor:
        t = target.to(x.dtype)
        if isinstance(self.formula, FocalStar):
            return self._alpha(t) * self.formula.value((1 - 2 * t) * x)
        cross_entropy, weight, *_ = self._terms(x, t)
        return self._alpha(t) * weight * cross_entropy

    def block_loss(self, x: Tensor, buffers: list[Tensor], target: Tensor) -> Tensor:
        return self.expression(x, buffers[0].copy_(target))  # the only time that the targets are read

    def block_gradient(self, x: Tensor, buffers: list[Tensor], target: Tensor, grad: Tensor) -> Tensor:
        t = buffers[0].copy_(target)
        if isinstance(self.formula, FocalStar):
            return super().block_gradient(x, buffers, t, grad)
        cross_entropy, weight, q, wrong, u, flip = self._terms(x, t)
        # For a hard target q is sigmoid(s), which may have underflowed: the quotient is known.
        share = torch.where(u == 0, 1 - wrong, (1 - 2 * u) * wrong * (1 - wrong) / q)
        slope = share.mul_(cross_entropy).mul_(self.formula.gamma).add_(wrong).sub_(u).mul_(weight)
        return torch.where(flip, -slope, slope).mul_(self._alpha(t)).mul_(grad)

    def _terms(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Return cross entropy, q**gamma, q, sigmoid(s), u and whether s is -x, from differentiable operations only."""
        flip = t > 0.5
        s, u = torch.where(flip, -x, x), torch.where(flip, 1 - t, t)
        wrong = torch.sigmoid(s)
        hard = softplus(s, None if torch.is_grad_enabled() else torch.empty_like(s))
        q = torch.addcmul(u, 1 - 2 * u, wrong)
        # For a hard target q may have underflowed, its logarithm is known; and log(0), even unused, has no derivative.
        is_hard = u == 0
        log_q = torch.where(is_hard, s - hard, torch.log(q.masked_fill(is_hard, 1.0)))
        return hard - u * s, torch.exp(self.formula.gamma * log_q), q, wrong, u, flip

    def _alpha(self, t: Tensor) -> Tensor:
        return self.weights.pos * t + self.weights.neg * (1 - t)
