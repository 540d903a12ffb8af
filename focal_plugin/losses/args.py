"""Check the arguments of the losses, and turn alpha into weights."""

import numbers
from collections.abc import Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor

Alpha = Union[float, Sequence[float], Tensor]

IGNORE = -1
"""Label of an anchor that takes no part in the loss."""


class Weights(NamedTuple):
    """Weights of positives and negatives: two numbers, or two (K, 1) tensors, which broadcast to (outer, K, inner).

    A number stays Python's: a tensor made of it would have to be copied to a GPU at each step.
    """

    pos: Union[float, Tensor]
    neg: Union[float, Tensor]


def float_dtype(logits: Tensor) -> torch.dtype:
    """Return what a loss of ``logits`` is computed in: float64 for float64, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def alpha_weights(alpha: Alpha, num_classes: int, like: Tensor) -> Weights:
    """Return (alpha, 1 - alpha), or (1, 1) for a negative number.

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
    # Cloned: the caller may change its tensor before the backward pass, and the gradient must not change with it.
    weight = torch.as_tensor(alpha, dtype=float_dtype(like), device=like.device).detach().clone()[:, None]
    return Weights(weight, 1.0 - weight)


def as_number(alpha: Alpha) -> Union[float, Sequence[float], Tensor]:
    """Return a float if alpha is one number, of Python, numpy or torch, else alpha itself.

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
    """Raise a ValueError that calls the value ``name`` unless it is finite and >= 0 (> 0 for FL*)."""
    if not (0 < gamma < float("inf") or (gamma == 0 and not star)):
        raise ValueError(f"{name} must be a finite number {'> 0 for FL*' if star else '>= 0'}, got {gamma}")


def check_alpha(alpha: float, *, name: str = "alpha") -> None:
    """Raise a ValueError that calls the value ``name`` unless it is at most 1."""
    if not -float("inf") < alpha <= 1:
        raise ValueError(f"{name} must be in [0, 1], or negative to switch the weighting off, got {alpha}")


def check_class_alpha(alpha: Sequence[float], num_classes: int, *, name: str = "alpha") -> None:
    """Raise a ValueError that calls the values ``name`` unless they are ``num_classes`` numbers in [0, 1]."""
    if len(alpha) != num_classes:
        raise ValueError(f"{name} must have one value a class: {num_classes} expected, got {len(alpha)}")
    if not all(0 <= a <= 1 for a in alpha):
        raise ValueError(f"{name} must hold numbers in [0, 1], got {list(alpha)}")


def check_reduction(reduction: str) -> None:
    """Raise a ValueError unless it is "none", "sum" or "mean"."""
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")


def check_call(inputs: Tensor, gamma: float, reduction: str, class_dim: int, *, star: bool = False) -> tuple[int, int]:
    """Check what every loss function takes; return ``class_dim`` counted from the first dimension, and K."""
    check_gamma(gamma, star=star)
    check_reduction(reduction)
    if not inputs.is_floating_point():
        raise ValueError(f"inputs must be floating-point logits, got {inputs.dtype}")
    num_dims = max(inputs.dim(), 1)
    if not -num_dims <= class_dim < num_dims:
        raise ValueError(f"class_dim {class_dim} is not among the dimensions of inputs of shape {tuple(inputs.shape)}")
    return class_dim % num_dims, inputs.shape[class_dim] if inputs.dim() else 1


def check_dense(targets: Tensor) -> None:
    """Raise a ValueError for complex numbers, and for integers other than 0 and 1; floats are not looked at."""
    if targets.is_complex():
        raise ValueError(f"dense targets must be real numbers in [0, 1], got {targets.dtype}")
    is_integer = not targets.is_floating_point() and targets.dtype != torch.bool
    if not is_integer or targets.device.type != "cpu" or targets.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(v) for v in targets.aminmax())
    if low < 0 or high > 1:
        raise ValueError(
            "targets of the shape of inputs are dense and must be in [0, 1]; got integers from "
            f"{low} to {high}. Labels have one dimension less, the classes'"
        )


def check_labels(labels: Tensor, shape: torch.Size, class_dim: int, max_label: int) -> None:
    """Raise a ValueError unless these are integer labels in [-1, max_label] for logits of ``shape``."""
    expected = shape[:class_dim] + shape[class_dim + 1 :]
    if len(shape) == 0 or labels.shape != expected or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"targets must be dense and of the shape {tuple(shape)} of inputs, or integer labels of shape "
            f"{tuple(expected)}; got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    check_label_range(labels, max_label)


def check_label_range(labels: Tensor, max_label: int) -> None:
    """Raise a ValueError for labels that are not in [-1, max_label].

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
