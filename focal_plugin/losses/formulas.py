"""Focal loss and FL* of one entry, as functions of ``s``, its logit of being wrong, and their derivatives.

``s = -x`` where the class is present and ``s = x`` where it is not, so that ``p_t = sigmoid(-s)``. With one class
against all others (softmax), ``s`` is the logsumexp of the others minus the logit of the class.

Every function takes two optional buffers of the shape of ``s`` to compute in, ``out`` for the result and ``scratch``;
with them ``s`` is overwritten, without them it is an ordinary differentiable function of ``s``.
"""

from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor


class Focal(NamedTuple):
    """FL, eq. (5) of Lin et al. 2017: ``(1 - p_t)**gamma * -log(p_t)``."""

    gamma: float

    def value(self, s: Tensor, out: Optional[Tensor] = None, scratch: Optional[Tensor] = None) -> Tensor:
        """``exp(gamma * log_sigmoid(s)) * softplus(s)``."""
        cross_entropy = softplus(s, out=scratch)
        weight = torch.sub(s, cross_entropy, out=out)  # log(1 - p_t)
        weight = torch.mul(weight, self.gamma, out=out)
        weight = torch.exp(weight, out=out)
        return torch.mul(weight, cross_entropy, out=out)

    def derivative(self, s: Tensor, out: Optional[Tensor] = None, scratch: Optional[Tensor] = None) -> Tensor:
        """``(1 - p_t)**gamma * (gamma * p_t * softplus(s) + 1 - p_t)``."""
        cross_entropy = softplus(s, out=out)
        log_wrong = torch.sub(s, cross_entropy, out=scratch)
        overwritten = None if scratch is None else s
        wrong = torch.sigmoid(s, out=overwritten)
        # p_t as 1 - wrong is exact enough: where few of its digits are left, wrong is 1 and outweighs the product.
        slope = torch.addcmul(cross_entropy, cross_entropy, wrong, value=-1, out=out)
        slope = torch.add(wrong, slope, alpha=self.gamma, out=out)
        weight = torch.mul(log_wrong, self.gamma, out=scratch)
        weight = torch.exp(weight, out=scratch)
        return torch.mul(weight, slope, out=out)


class FocalStar(NamedTuple):
    """FL*, appendix A of arXiv 1708.02002v2: ``-log(sigmoid(gamma * x_t + beta)) / gamma`` with ``x_t = -s``."""

    gamma: float
    beta: float

    def value(self, s: Tensor, out: Optional[Tensor] = None, scratch: Optional[Tensor] = None) -> Tensor:
        """``softplus(gamma * s - beta) / gamma``."""
        z = torch.mul(s, self.gamma, out=scratch)
        z = torch.sub(z, self.beta, out=scratch)
        return torch.div(softplus(z, out=out), self.gamma, out=out)

    def derivative(self, s: Tensor, out: Optional[Tensor] = None, scratch: Optional[Tensor] = None) -> Tensor:
        """``sigmoid(gamma * s - beta)``."""
        z = torch.mul(s, self.gamma, out=out)
        return torch.sigmoid(torch.sub(z, self.beta, out=out), out=out)


Formula = Union[Focal, FocalStar]


def softplus(s: Tensor, out: Optional[Tensor] = None) -> Tensor:
    """``log(1 + exp(s))``: log1p(exp(s)) up to where exp would overflow, and s from there, to the last digit."""
    # torch's own threshold of 20 costs float64 its last seven digits.
    threshold = 700 if s.dtype == torch.float64 else 80
    if out is None:
        return F.softplus(s, 1, threshold)
    # Four operations of torch that together take two thirds of the time of its softplus on a CPU. Where the logarithm
    # was cut off or rounded below s, s is the answer.
    torch.clamp_max(s, threshold, out=out).exp_().log1p_()
    return torch.maximum(out, s, out=out)
