"""softmax_focal_loss against its definition in float64, cross entropy, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from gradients import value_and_gradient
from torch.autograd import gradcheck, gradgradcheck

from focal_plugin.losses import sigmoid_focal_loss, softmax_focal_loss


def naive(x, labels, weights, gamma):
    """Example by example, from the probabilities, in float64."""
    out = []
    for row, label in zip(x.double(), labels.tolist()):
        p = torch.softmax(row, 0)
        loss = -weights[label] * (1 - p[label]) ** gamma * torch.log(p[label]) if label >= 0 else p[0] * 0
        out.append(loss)
    return torch.stack(out)


@pytest.mark.parametrize("num_classes", [2, 3, 81])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_equals_the_definition(num_classes, gamma):
    torch.manual_seed(0)
    x, labels = 2 * torch.randn(40, num_classes), torch.randint(-1, num_classes, (40,))
    per_class = torch.rand(num_classes)
    with_background = [0.25] * (num_classes - 1) + [0.75]
    for alpha, weights in ((-1.0, [1.0] * num_classes), (0.25, with_background), (per_class, per_class.tolist())):
        want = naive(x, labels, weights, gamma)
        got = [softmax_focal_loss(x, labels, alpha, gamma, r).double() for r in ("none", "sum", "mean")]
        torch.testing.assert_close(got[0], want, rtol=2e-5, atol=1e-8)
        torch.testing.assert_close(got[1], want.sum(), rtol=2e-5, atol=1e-8)
        torch.testing.assert_close(got[2], want.sum() / (labels >= 0).sum(), rtol=2e-5, atol=1e-8)


def test_gamma_0_is_cross_entropy_and_torch_agrees_on_the_gradient():
    x, labels = 5 * torch.randn(2, 7, 3, 4), torch.randint(-1, 7, (2, 3, 4))
    options = {"gamma": 0.0, "reduction": "mean", "class_dim": 1, "background": False}
    got = value_and_gradient(softmax_focal_loss, x, labels, **options)
    want = value_and_gradient(F.cross_entropy, x, labels, ignore_index=-1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


def test_two_classes_are_a_sigmoid_of_the_difference():
    x, labels = 4 * torch.randn(30, 2), torch.randint(0, 2, (30,))
    difference = (x[:, 0] - x[:, 1])[:, None]
    torch.testing.assert_close(
        softmax_focal_loss(x, labels, 0.25, 2.0), sigmoid_focal_loss(difference, labels, 0.25, 2.0)[:, 0]
    )


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
def test_gradcheck(gamma):
    torch.manual_seed(1)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 2, -1, 1, 3])
    assert gradcheck(lambda x: softmax_focal_loss(x, labels, [0.1, 0.4, 0.9, 0.5], gamma), x)
    assert gradgradcheck(lambda x: softmax_focal_loss(x, labels, 0.25, gamma), x)


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
        torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-37)
        rtol = 1e-4 + 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), want_gradient.to(dtype).double(), rtol=rtol, atol=1e-7)


def test_ignored_nan_empty_and_second_backward():
    x = torch.randn(4, 3)
    x[1] = float("nan")
    x.requires_grad_()
    loss = softmax_focal_loss(x, torch.tensor([0, -1, 2, -1]))
    (first,) = torch.autograd.grad(loss.sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(loss.sum(), x)
    assert torch.equal(first, second) and torch.isfinite(first).all()
    assert (loss[[1, 3]] == 0).all() and (first[[1, 3]] == 0).all()
    for y in (torch.zeros(0, dtype=torch.long), torch.full((5,), -1)):
        x = torch.randn(len(y), 3)
        loss, gradient = value_and_gradient(softmax_focal_loss, x, y, reduction="mean")
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"alpha": 2.0}, r"alpha must be in \[0, 1\]"),
        ({"alpha": 0.25, "background": False}, "one value a class"),
        ({"alpha": [0.5, 0.5]}, "3 expected, got 2"),
        ({"gamma": -1.0}, "gamma must be"),
        ({"reduction": "avg"}, "reduction must be"),
        ({"inputs": torch.randn(4, 1)}, "2 classes or more"),
        ({"targets": torch.tensor([0, 1, 2, 3])}, r"labels must be in \[-1, 2\].*from 0 to 3"),
        ({"targets": torch.rand(4, 3)}, "integer labels of shape"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        softmax_focal_loss(**{"inputs": torch.randn(4, 3), "targets": torch.tensor([0, 1, 2, -1]), **kwargs})
