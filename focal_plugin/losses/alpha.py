"""The weights of positives and negatives, and the checks of alpha and gamma."""

import numbers
from collections.abc import Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor

Alpha = Union[float, Sequence[float], Tensor]


class Weights(NamedTuple):
    """Weights of positives and negatives: two numbers, or two (K,) tensors on the logits' device.

    Numbers stay Python's: a tensor made of one would have to be copied to a GPU at each step.
    """

    pos: Union[float, Tensor]
    neg: Union[float, Tensor]

    def along(self, dim: int, num_dims: int) -> "Weights":
        """Both shaped to broadcast along ``dim`` of a tensor of ``num_dims`` dimensions."""
        shape = [-1 if d == dim else 1 for d in range(num_dims)]
        return Weights(*(w.view(shape) if isinstance(w, Tensor) and w.dim() else w for w in self))


def float_dtype(logits: Tensor) -> torch.dtype:
    """What a loss of ``logits`` is computed in: float64 for float64, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def alpha_weights(alpha: Alpha, num_classes: int, like: Tensor) -> Weights:
    """(alpha, 1 - alpha), or (1, 1) for a negative number.

    Args:
        alpha: a number, or K of them as a sequence or tensor. A one-element tensor of no dimension is a number.
        num_classes: K.
        like: the logits, which give dtype and device.

    Raises:
        ValueError: out of range, or not K values. The range of a tensor on a GPU is not looked at.
    """
    alpha = as_number(alpha)
    if isinstance(alpha, float):
        check_alpha(alpha)
        return Weights(1.0, 1.0) if alpha < 0 else Weights(alpha, 1.0 - alpha)
    if not isinstance(alpha, Tensor):
        check_class_alpha(alpha, num_classes)
    elif alpha.shape != (num_classes,):
        raise ValueError(f"alpha must have one value a class ({num_classes}), got shape {tuple(alpha.shape)}")
    elif alpha.device.type == "cpu" and not torch.compiler.is_compiling():
        check_class_alpha(alpha.tolist(), num_classes)
    # Cloned: what happens to the caller's tensor until the backward pass is not to change the gradient.
    weight = torch.as_tensor(alpha, dtype=float_dtype(like), device=like.device).detach().clone()
    return Weights(weight, 1.0 - weight)


def as_number(alpha: Alpha) -> Union[float, Sequence[float], Tensor]:
    """A float if alpha is one number, of Python, numpy or torch, else what it is.

    Raises:
        ValueError: it is neither a number nor a sequence.
    """
    if isinstance(alpha, Tensor):
        return alpha if alpha.dim() else float(alpha)
    if isinstance(alpha, numbers.Real):
        return float(alpha)
    if isinstance(alpha, str) or not hasattr(alpha, "__len__"):
        raise ValueError(f"alpha must be a number or one number a class, got {alpha!r}")
    return alpha


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
