"""How far focal losses and their gradients are from the truth, over every logit that training can produce."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GAMMAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ALPHA = 0.25
# Below this a relative error says nothing: float32, in which losses are computed, has no full precision there.
_SMALLEST = torch.finfo(torch.float32).tiny

LossFunction = Callable[[Tensor, Tensor, float, float], Tensor]
"""``f(logits, targets, alpha, gamma)``: unreduced, for (M,) logits and dense (M,) targets of their dtype."""


class Accuracy(NamedTuple):
    """Of one function at one dtype, the worst over the grid.

    Attributes:
        function: its name.
        dtype: of the logits, as "float32".
        loss_error, gradient_error: largest relative error of the finite values; NaN if there are none.
        loss_gamma, gradient_gamma: the gamma where that is.
        non_finite_losses, non_finite_gradients: values that are NaN or infinite.
        values: entries of the grid, over all gammas.
        non_finite_gammas: the gammas with any non-finite gradient.
    """

    function: str
    dtype: str
    loss_error: float
    loss_gamma: float
    gradient_error: float
    gradient_gamma: float
    non_finite_losses: int
    non_finite_gradients: int
    values: int
    non_finite_gammas: tuple[float, ...]


def grid(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(M,) logits from -200 to 200, finer between -20 and 20, rounded to ``dtype``, and targets: each as 0 and as 1."""
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-20, 20, 8001)])
    x = x.to(device=device, dtype=dtype)
    return x.repeat(2), torch.cat([torch.zeros_like(x), torch.ones_like(x)])


def reference(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Focal loss and its derivative for targets of 0 and 1, in float64, where the closed form is exact to 13 digits.

    It has neither the 1 - p_t that rounds to 0 nor the power of it that is infinite.
    """
    sign = 1 - 2 * targets.double()
    s = sign * logits.double()  # the logit of being wrong
    log_right, log_wrong = F.logsigmoid(-s), F.logsigmoid(s)
    weight = torch.where(targets == 1, alpha, 1 - alpha).double() * torch.exp(gamma * log_wrong)
    slope = torch.exp(log_wrong) - gamma * torch.exp(log_right) * log_right
    return weight * -log_right, sign * weight * slope


def measure_accuracy(functions: Mapping[str, LossFunction], device: torch.device) -> list[Accuracy]:
    """Each of ``functions``, by name, at every dtype of :data:`DTYPES`, over :data:`GAMMAS` and :func:`grid`.

    16-bit logits are compared at their rounded values. Relative errors leave out true values below the smallest
    normal float32, and true gradients below the smallest normal of the logits' dtype, which must hold them.
    """
    return [_measure(name, f, dtype, device) for dtype in DTYPES for name, f in functions.items()]


def _measure(name: str, function: LossFunction, dtype: torch.dtype, device: torch.device) -> Accuracy:
    logits, targets = grid(dtype, device)
    losses, gradients = [], []
    for gamma in GAMMAS:
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, targets, _ALPHA, gamma)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        true_loss, true_gradient = reference(logits, targets, _ALPHA, gamma)
        losses.append(_error(loss.detach(), true_loss, _SMALLEST))
        gradients.append(_error(gradient, true_gradient, max(_SMALLEST, torch.finfo(dtype).tiny)))
    loss_error, loss_gamma = _worst(losses)
    gradient_error, gradient_gamma = _worst(gradients)
    return Accuracy(
        function=name,
        dtype=str(dtype).replace("torch.", ""),
        loss_error=loss_error,
        loss_gamma=loss_gamma,
        gradient_error=gradient_error,
        gradient_gamma=gradient_gamma,
        non_finite_losses=sum(e.non_finite for e in losses),
        non_finite_gradients=sum(e.non_finite for e in gradients),
        values=logits.numel() * len(GAMMAS),
        non_finite_gammas=tuple(g for g, e in zip(GAMMAS, gradients) if e.non_finite),
    )


class _Error(NamedTuple):
    largest: float
    non_finite: int


def _error(value: Tensor, truth: Tensor, smallest: float) -> _Error:
    finite = value.isfinite()
    counted = finite & (truth.abs() >= smallest)
    relative = ((value.double() - truth) / truth)[counted].abs()
    return _Error(relative.max().item() if len(relative) else math.nan, int((~finite).sum()))


def _worst(errors: list[_Error]) -> tuple[float, float]:
    """The largest error over the gammas, and that gamma."""
    measured = [(e.largest, gamma) for e, gamma in zip(errors, GAMMAS) if not math.isnan(e.largest)]
    return max(measured, default=(math.nan, math.nan))
