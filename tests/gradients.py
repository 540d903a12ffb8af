"""What most tests of a loss compare: its value and its gradient."""

import torch


def value_and_gradient(function, x, *args, weight=None, **kwargs):
    """Return the function of a copy of ``x``, and the gradient of its sum, or of its product with ``weight``."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(leaf, *args, **kwargs)
    (gradient,) = torch.autograd.grad(value.sum() if weight is None else value, leaf, weight)
    return value.detach(), gradient
