"""Measure how far focal losses and their gradients are from the truth, over every logit that training can produce."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from focal_plugin.losses import sigmoid_focal_loss

from .baselines import ALPHA, FUNCTIONS

GAMMAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below this a relative error says nothing: float32, in which losses are computed, has no full precision there.
_SMALLEST = torch.finfo(torch.float32).tiny

# f(logits, targets, alpha, gamma): unreduced, for (M,) logits and dense (M,) targets of their dtype.
LossFunction = Callable[[Tensor, Tensor, float, float], Tensor]


def grid(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (M,) logits from -200 to 200, finer between -20 and 20, in ``dtype``, each for a target of 0 and of 1."""
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-20, 20, 8001)]).to(device=device, dtype=dtype)
    return x.repeat(2), torch.cat([torch.zeros_like(x), torch.ones_like(x)])


def reference(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Return loss and derivative for targets of 0 and 1, in float64, where the closed form is exact to 13 digits.

    It has neither the 1 - p_t that rounds to 0 nor the power of it that is infinite.
    """
    sign = 1 - 2 * targets.double()
    s = sign * logits.double()  # the logit of being wrong
    log_right, log_wrong = F.logsigmoid(-s), F.logsigmoid(s)
    weight = torch.where(targets == 1, alpha, 1 - alpha).double() * torch.exp(gamma * log_wrong)
    slope = torch.exp(log_wrong) - gamma * torch.exp(log_right) * log_right
    return weight * -log_right, sign * weight * slope


def _labels_loss(logits: Tensor, targets: Tensor, alpha: float, gamma: float) -> Tensor:
    labels = 1 - targets.long()  # of the one class there is: 0 present, 1 background
    return sigmoid_focal_loss(logits[:, None], labels, alpha, gamma).squeeze(1)


def measure_accuracy(device: torch.device, functions: dict[str, LossFunction] | None = None) -> list[dict]:
    """Compare losses and gradients with :func:`reference` at every dtype and gamma, over :func:`grid`.

    16-bit logits are compared at their rounded values. Relative errors leave out true values below the smallest
    normal float32, and true gradients below the smallest normal of the logits' dtype, which must hold them.
    ``functions`` are by default ours, with integer labels and dense, and the baselines'.

    Returns:
        For each function and dtype: the largest relative errors of finite values and the gammas where they are (None if
        none is finite), how many of how many values are NaN or infinite, and the gammas where gradients are.
    """
    functions = functions or {"focal_plugin": _labels_loss, **FUNCTIONS}
    return [
        {"function": name, "dtype": str(dtype).removeprefix("torch."), **_measure(function, dtype, device)}
        for dtype in DTYPES
        for name, function in functions.items()
    ]


def _measure(function: LossFunction, dtype: torch.dtype, device: torch.device) -> dict:
    logits, targets = grid(dtype, device)
    # Of each kind: below which the truth says nothing, the largest errors with their gammas, and what is not finite.
    least = {"loss": _SMALLEST, "gradient": max(_SMALLEST, torch.finfo(dtype).tiny)}
    errors, non_finite = {kind: [] for kind in least}, {kind: {} for kind in least}
    for gamma in GAMMAS:
        leaf = logits.clone().requires_grad_()
        loss = function(leaf, targets, ALPHA, gamma)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        truth = reference(logits, targets, ALPHA, gamma)
        for kind, value, true in zip(least, (loss.detach(), gradient), truth):
            is_finite = value.isfinite()
            error = ((value.double() - true) / true)[is_finite & (true.abs() >= least[kind])].abs()
            errors[kind] += [(error.max().item(), gamma)] if len(error) else []
            non_finite[kind][gamma] = int((~is_finite).sum())
    row, counts = {}, non_finite["gradient"]
    for kind in least:
        row[f"{kind}_error"], row[f"{kind}_gamma"] = max(errors[kind], default=(None, None))
    row |= {"non_finite_losses": sum(non_finite["loss"].values()), "non_finite_gradients": sum(counts.values())}
    gammas = [gamma for gamma, count in counts.items() if count]
    return {**row, "non_finite_gammas": gammas, "values": logits.numel() * len(GAMMAS)}
