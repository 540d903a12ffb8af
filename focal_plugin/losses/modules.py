"""The losses as modules, for those who keep their criterion in one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .args import Alpha, check_alpha
from .focal import sigmoid_focal_loss, sigmoid_focal_loss_star
from .softmax import softmax_focal_loss


class Float32Buffers:
    """A mixin of ``nn.Module``: the buffers in ``float32_buffers`` keep their dtype when the module is cast."""

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
        self.options = {"gamma": gamma, "reduction": reduction, **options}
        self.alpha, class_alpha, num_classes = check_alpha(alpha), None, 2
        if not isinstance(self.alpha, float):
            class_alpha = torch.as_tensor(alpha, dtype=torch.float32).detach().clone()
            self.alpha, num_classes = class_alpha.tolist(), len(class_alpha)
        # Not persistent: it is an argument, not something that was learned.
        self.register_buffer("class_alpha", class_alpha, persistent=False)
        # Try it on no anchor, so that a bad value is refused here and not in the first call.
        no_logits, no_labels = torch.zeros(0, num_classes), torch.zeros(0, dtype=torch.long)
        type(self).function(no_logits, no_labels, self.alpha, **{**self.options, "class_dim": -1})

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        alpha = self.alpha if self.class_alpha is None else self.class_alpha
        return type(self).function(inputs, targets, alpha, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in {"alpha": self.alpha, **self.options}.items())


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
