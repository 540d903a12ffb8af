"""softmax_focal_loss against its definition in float64 and cross entropy; what the losses share is in test_focal.py."""

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradient
from torch.testing import assert_close

from focal_plugin.losses import softmax_focal_loss


def naive(x, labels, weights, gamma):
    """Example by example, from the probabilities, in float64."""
    out = torch.zeros(len(x), dtype=torch.float64)
    for i, label in enumerate(labels.tolist()):
        p = torch.softmax(x[i].double(), 0)[label]
        out[i] = -weights[label] * (1 - p) ** gamma * torch.log(p) if label >= 0 else 0
    return out


@pytest.mark.parametrize("num_classes", [2, 3, 81])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_equals_the_definition(num_classes, gamma):
    torch.manual_seed(0)
    x, labels = 2 * torch.randn(40, num_classes), torch.randint(-1, num_classes, (40,))
    per_class = torch.rand(num_classes)
    with_background = [0.25] * (num_classes - 1) + [0.75]
    for alpha, weights in ((-1.0, [1.0] * num_classes), (0.25, with_background), (per_class, per_class.tolist())):
        want = naive(x, labels, weights, gamma)
        wants = {"none": want, "sum": want.sum(), "mean": want.sum() / (labels >= 0).sum()}
        got = {r: softmax_focal_loss(x, labels, alpha, gamma, r).double() for r in wants}
        assert_close(got, wants, rtol=2e-5, atol=1e-8)


def test_gamma_0_is_cross_entropy_and_torch_agrees_on_the_gradient():
    x, labels = 5 * torch.randn(2, 7, 3, 4), torch.randint(-1, 7, (2, 3, 4))
    options = {"gamma": 0.0, "reduction": "mean", "class_dim": 1, "background": False}
    got = value_and_gradient(softmax_focal_loss, x, labels, **options)
    want = value_and_gradient(F.cross_entropy, x, labels, ignore_index=-1)
    assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_logits_are_finite_and_exact(gamma, dtype):
    v = torch.linspace(-200, 200, 2001).to(dtype)
    x = torch.stack([v, torch.zeros_like(v), v / 3], dim=1)
    for label in range(3):
        arguments = torch.full((len(x),), label), -1.0, gamma
        loss, gradient = value_and_gradient(softmax_focal_loss, x, *arguments)
        want, want_gradient = value_and_gradient(softmax_focal_loss, x.double(), *arguments)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
        assert gradient.dtype == dtype and loss.dtype == torch.float32
        # A logsumexp of 200 is known to 1.5e-5, and gamma times that is what the weight may be off by.
        assert_close(loss.double(), want, rtol=1e-4, atol=1e-37)
        rtol = 1e-4 + 2 * torch.finfo(dtype).eps
        assert_close(gradient.double(), want_gradient.to(dtype).double(), rtol=rtol, atol=1e-7)


def test_bad_arguments_are_named():
    for kwargs, message in (
        ({"alpha": 0.25, "background": False}, "one value a class"),
        ({"alpha": [0.5, 0.5]}, "3 expected, got 2"),
        ({"inputs": torch.randn(4, 1)}, "2 classes or more"),
        ({"targets": torch.tensor([0, 1, 2, 3])}, r"labels must be in \[-1, 2\].*from 0 to 3"),
        ({"targets": torch.rand(4, 3)}, "integer labels of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            softmax_focal_loss(**{"inputs": torch.randn(4, 3), "targets": torch.tensor([0, 1, 2, -1]), **kwargs})
