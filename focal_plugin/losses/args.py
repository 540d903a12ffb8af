"""Check the arguments of the losses, and turn alpha into weights."""

import math
import numbers
from collections.abc import Sequence
from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

Alpha = Union[float, Sequence[float], Tensor]

REDUCTIONS = ("none", "sum", "mean")
IGNORE = -1  # label of an anchor that takes no part in the loss


class Weights(NamedTuple):
    """Weights of positives and negatives: two numbers, or two (K, 1) tensors, which broadcast to (outer, K, inner)."""

    # A number stays Python's: a tensor made of it would have to be copied to a GPU at each step.
    pos: Union[float, Tensor]
    neg: Union[float, Tensor]


def float_dtype(logits: Tensor) -> torch.dtype:
    """Return what a loss of ``logits`` is computed in: float64 for float64, float32 for all others."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def alpha_weights(alpha: Alpha, num_classes: int, like: Tensor) -> Weights:
    """Return (alpha, 1 - alpha), or (1, 1) for a negative number, for the logits ``like``; checks alpha."""
    alpha = check_alpha(alpha, num_classes)
    if isinstance(alpha, float):
        return Weights(1.0, 1.0) if alpha < 0 else Weights(alpha, 1.0 - alpha)
    # Cloned: the caller may change its tensor before the backward pass, and the gradient must not change with it.
    weight = torch.as_tensor(alpha, dtype=float_dtype(like), device=like.device).detach().clone()[:, None]
    return Weights(weight, 1.0 - weight)


def check(is_valid: bool, name: str, allowed: str, value: object) -> None:
    """Raise a ValueError, ``{name} must be {allowed}, got {value}``, unless the value is valid."""
    if not is_valid:
        raise ValueError(f"{name} must be {allowed}, got {value}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that calls the value ``name`` unless it is among the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_alpha(alpha: Alpha, num_classes: Optional[int] = None, *, name: str = "alpha") -> Alpha:
    """Return a float if alpha is one number, of Python, numpy or torch, else alpha itself, one number a class.

    Raise a ValueError, which calls it ``name``, unless it is a number <= 1, or ``num_classes`` (None: any number of)
    numbers in [0, 1]. The range of a tensor on a GPU is not looked at.
    """
    is_tensor = isinstance(alpha, Tensor)
    if isinstance(alpha, numbers.Real) or (is_tensor and alpha.dim() == 0):
        alpha = float(alpha)
        check(-math.inf < alpha <= 1, name, "in [0, 1], or negative to switch the weighting off", alpha)
        return alpha
    if isinstance(alpha, str) or not hasattr(alpha, "__len__"):
        raise ValueError(f"{name} must be a number or one number a class, got {alpha!r}")
    shape = tuple(alpha.shape) if is_tensor else (len(alpha),)
    num_classes = shape[0] if num_classes is None else num_classes
    if shape != (num_classes,):
        got = " x ".join(map(str, shape))
        raise ValueError(f"{name} must have one value a class: {num_classes} expected, got {got}")
    if not is_tensor or (alpha.device.type == "cpu" and not torch.compiler.is_compiling()):
        values = alpha.tolist() if is_tensor else list(alpha)
        if not all(0 <= a <= 1 for a in values):
            raise ValueError(f"{name} must hold numbers in [0, 1], got {values}")
    return alpha


def check_gamma(gamma: float, *, star: bool = False, name: str = "gamma") -> None:
    """Raise a ValueError that calls the value ``name`` unless it is finite and >= 0 (> 0 for FL*)."""
    is_valid = 0 < gamma < math.inf or (gamma == 0 and not star)
    check(is_valid, name, f"a finite number {'> 0 for FL*' if star else '>= 0'}", gamma)


def check_call(inputs: Tensor, reduction: str, class_dim: int) -> tuple[int, int]:
    """Check what every loss function takes; return ``class_dim`` counted from the first dimension, and K."""
    check_choice("reduction", reduction, REDUCTIONS)
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
    if not targets.is_floating_point():
        meant = "targets of the shape of inputs are dense (labels have one dimension less, the classes')"
        _check_range(targets, 0, 1, f"{meant} and must be in [0, 1]; got integers")


def check_labels(labels: Tensor, shape: torch.Size, class_dim: int, max_label: int) -> None:
    """Raise a ValueError unless these are integer labels in [-1, max_label] for logits of ``shape``."""
    expected = shape[:class_dim] + shape[class_dim + 1 :]
    if len(shape) == 0 or labels.shape != expected or labels.is_floating_point() or labels.is_complex():
        allowed = f"integer labels of shape {tuple(expected)} or, for a sigmoid, dense of inputs' shape {tuple(shape)}"
        raise ValueError(f"targets must be {allowed}; got {labels.dtype} of shape {tuple(labels.shape)}")
    check_label_range(labels, max_label)


def check_label_range(labels: Tensor, max_label: int) -> None:
    """Raise a ValueError for labels that are not in [-1, max_label]."""
    _check_range(labels, IGNORE, max_label, f"labels must be in [-1, {max_label}] (-1: ignored); got values")


def _check_range(values: Tensor, lowest: int, highest: int, message: str) -> None:
    """Raise a ValueError for values out of range; on a GPU a device-side assertion, or the host would have to wait."""
    if values.numel() == 0 or torch.compiler.is_compiling():
        return
    if values.is_cuda:
        torch._assert_async(((values >= lowest) & (values <= highest)).all(), message)
    elif values.device.type == "cpu":
        low, high = (int(v) for v in values.aminmax())
        if low < lowest or high > highest:
            raise ValueError(f"{message} from {low} to {high}")
