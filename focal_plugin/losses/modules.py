"""The losses as modules, for those who keep their criterion in one."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .args import Alpha, as_number, check_alpha, check_class_alpha, check_gamma, check_reduction
from .focal import sigmoid_focal_loss, sigmoid_focal_loss_star
from .softmax import softmax_focal_loss


class Float32Buffers:
    """A mixin of ``nn.Module``: the buffers in ``float32_buffers`` keep their dtype when the module is cast."""

    float32_buffers: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        before = {name: getattr(self, name) for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and not buffer.is_meta:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class _Loss(Float32Buffers, nn.Module):
    """Call ``function`` with what the constructor was given; one alpha a class moves with the module."""

    function: Callable[..., Tensor]
    float32_buffers = ("class_alpha",)

    def __init__(self, alpha: Alpha = 0.25, gamma: float = 2.0, reduction: str = "mean", **options):
        super().__init__()
        function = type(self).function
        inspect.signature(function).bind(None, None, **options)  # or an unknown option would be found in the first call
        check_gamma(gamma, star=function is sigmoid_focal_loss_star)
        check_reduction(reduction)
        alpha = as_number(alpha)
        self.options = {"gamma": gamma, "reduction": reduction, **options}
        self.alpha = class_alpha = None
        if isinstance(alpha, float):
            check_alpha(alpha)
            self.alpha = alpha
        else:
            class_alpha = torch.as_tensor(alpha, dtype=torch.float32).detach().clone()
            check_class_alpha(class_alpha.tolist(), len(class_alpha))
        # Not persistent: it is an argument, not something that was learned.
        self.register_buffer("class_alpha", class_alpha, persistent=False)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        alpha = self.alpha if self.class_alpha is None else self.class_alpha
        return type(self).function(inputs, targets, alpha, **self.options)

    def extra_repr(self) -> str:
        alpha = self.alpha if self.class_alpha is None else self.class_alpha.tolist()
        return ", ".join(f"{k}={v!r}" for k, v in {"alpha": alpha, **self.options}.items())


class SigmoidFocalLoss(_Loss):
    """:func:`focal_plugin.losses.sigmoid_focal_loss`; its arguments but for ``inputs`` and ``targets``."""

    function = staticmethod(sigmoid_focal_loss)


class SigmoidFocalLossStar(_Loss):
    """:func:`focal_plugin.losses.sigmoid_focal_loss_star`; its arguments but for ``inputs`` and ``targets``."""

    function = staticmethod(sigmoid_focal_loss_star)


class SoftmaxFocalLoss(_Loss):
    """:func:`focal_plugin.losses.softmax_focal_loss`; its arguments but for ``inputs`` and ``targets``."""

    function = staticmethod(softmax_focal_loss)

    def __init__(self, alpha: Alpha = -1.0, gamma: float = 2.0, reduction: str = "mean", **options):
        super().__init__(alpha, gamma, reduction, **options)
