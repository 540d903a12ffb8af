"""sigmoid_focal_loss and FL* against their formulas in float64, finite differences, fvcore and torchvision."""

import shutil

import fvcore.nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from gradients import value_and_gradient
from torch.autograd import gradcheck, gradgradcheck

from focal_plugin.losses import sigmoid_focal_loss, sigmoid_focal_loss_star, softmax_focal_loss

GAMMAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
# The smallest normal float32: results below it are zero or denormal, where there are no digits to compare.
TINY = torch.finfo(torch.float32).tiny


def naive(x, labels, alpha, gamma):
    """Eq. (5) entry by entry, in float64 with p_t of the class that is absent or present."""
    x = x.double()
    out = torch.zeros_like(x)
    for i, label in enumerate(labels.tolist()):
        for k in range(x.shape[1]):
            if label == -1:
                continue
            x_t, a = (x[i, k], alpha[k]) if k == label else (-x[i, k], 1 - alpha[k])
            out[i, k] = -a * torch.sigmoid(-x_t) ** gamma * F.logsigmoid(x_t)
    return out


def loss_and_gradient(x, targets, dtype, gamma):
    value, gradient = value_and_gradient(sigmoid_focal_loss, x.to(dtype), targets, 0.25, gamma)
    return value.double(), gradient.double()


def assert_relative(got, want, tolerance):
    assert torch.isfinite(got).all()
    error = (got - want).abs() - TINY
    assert (error <= tolerance * want.abs()).all(), (error / want.abs().clamp(min=TINY)).max()


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("label", [0, 1], ids=["positive", "negative"])
def test_float32_equals_float64_over_logits_of_200(gamma, label):
    x = torch.cat([torch.linspace(-200, 200, 20001), torch.linspace(-20, 20, 20001)])[:, None]
    labels = torch.full((len(x),), label)
    got = loss_and_gradient(x, labels, torch.float32, gamma)
    want = loss_and_gradient(x, labels, torch.float64, gamma)
    for g, w in zip(got, want):
        assert_relative(g, w, 1e-5)


@pytest.mark.parametrize("gamma", (0.1, 0.5, 2.0))
@pytest.mark.parametrize("label", [0, 1])
def test_float64_equals_many_digits(gamma, label):
    """The closed form itself, against Python's arithmetic of 50 digits."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 50

    def focal(x):
        x_t, a = (x, mpmath.mpf(0.25)) if label == 0 else (-x, mpmath.mpf(0.75))
        p_t = 1 / (1 + mpmath.exp(-x_t))
        return -a * (1 / (1 + mpmath.exp(x_t))) ** mpmath.mpf(gamma) * mpmath.log(p_t)

    logits = [-200.0, -37.5, -17.0, -4.6, -0.1, 0.0, 0.3, 5.0, 16.7, 18.0, 40.0, 200.0]
    mpmath.mp.dps = 200
    want_loss = torch.tensor([float(focal(mpmath.mpf(x))) for x in logits], dtype=torch.float64)
    want_gradient = torch.tensor([float(mpmath.diff(focal, mpmath.mpf(x))) for x in logits], dtype=torch.float64)
    x = torch.tensor(logits, dtype=torch.float64)[:, None]
    loss, gradient = loss_and_gradient(x, torch.full((len(x),), label), torch.float64, gamma)
    torch.testing.assert_close(loss[:, 0], want_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[:, 0], want_gradient, rtol=1e-11, atol=0)


def test_upstream_is_not_finite_where_this_is():
    x, t = torch.tensor([[-18.0], [18.0]]), torch.tensor([[0.0], [1.0]])
    for theirs in (fvcore.nn.sigmoid_focal_loss, torchvision.ops.sigmoid_focal_loss):
        assert not torch.isfinite(value_and_gradient(theirs, x, t, alpha=0.25, gamma=0.5)[1]).all()
    for targets in (t, torch.tensor([1, 0])):
        assert torch.isfinite(value_and_gradient(sigmoid_focal_loss, x, targets, 0.25, 0.5)[1]).all()


@pytest.mark.parametrize("num_classes", [1, 2, 80])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_labels_equal_the_naive_loop(num_classes, gamma):
    torch.manual_seed(num_classes)
    x = 4 * torch.randn(20, num_classes)
    labels = torch.randint(-1, num_classes + 1, (20,))
    alpha = torch.rand(num_classes)
    want = naive(x, labels, alpha.double(), gamma)
    torch.testing.assert_close(sigmoid_focal_loss(x, labels, alpha, gamma).double(), want, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        sigmoid_focal_loss(x, labels, alpha.tolist(), gamma, "sum").double(), want.sum(), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("theirs", [fvcore.nn.sigmoid_focal_loss, torchvision.ops.sigmoid_focal_loss])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2), (0.75, 0), (-1, 0), (-1, 3.0), (0.5, 1)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_drop_in_for_fvcore_and_torchvision(theirs, alpha, gamma, reduction):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7)
    for targets in (torch.randint(0, 2, x.shape).float(), torch.rand(x.shape)):
        got, want = (f(x, targets, alpha, gamma, reduction) for f in (sigmoid_focal_loss, theirs))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_dense_targets_equal_labels(gamma):
    x = torch.linspace(-200, 200, 4001, dtype=torch.float64)[:, None]
    for label in (0, 1):
        targets = torch.full((len(x),), label), torch.full_like(x, 1 - label)
        of_labels, of_dense = (loss_and_gradient(x, y, torch.float64, gamma) for y in targets)
        torch.testing.assert_close(of_labels, of_dense, rtol=1e-12, atol=1e-300)


def test_defaults_are_torchvisions_and_targets_get_no_gradient():
    x, t = torch.randn(5, 3), torch.tensor([0.0, 1.0, 0.5]).expand(5, 3).clone().requires_grad_()
    torch.testing.assert_close(sigmoid_focal_loss(x, t), torchvision.ops.sigmoid_focal_loss(x, t), rtol=1e-5, atol=1e-7)
    assert not sigmoid_focal_loss(x, t).requires_grad


def test_gamma_0_without_alpha_is_cross_entropy():
    x, labels = 5 * torch.randn(50, 6), torch.randint(0, 7, (50,))
    want = F.binary_cross_entropy_with_logits(x, F.one_hot(labels, 7)[:, :-1].float(), reduction="sum")
    torch.testing.assert_close(sigmoid_focal_loss(x, labels, -1, 0, "sum"), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradcheck(gamma):
    torch.manual_seed(1)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    labels, soft = torch.tensor([0, 2, 3, -1, 1, 3]), torch.rand(6, 3, dtype=torch.float64)
    soft[0], soft[1] = 0, 1
    for targets in (labels, soft):
        assert gradcheck(lambda x, t=targets: sigmoid_focal_loss(x, t, [0.1, 0.4, 0.9], gamma), x)
        assert gradgradcheck(lambda x, t=targets: sigmoid_focal_loss(x, t, 0.25, gamma), x)


@pytest.mark.parametrize("gamma, beta", [(2.0, 1.0), (4.0, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_star_equals_its_formula_and_derivative(gamma, beta, dtype):
    x = torch.linspace(-200, 200, 4001, dtype=dtype)[:, None]
    for label, y in ((0, 1), (1, -1)):
        labels = torch.full((len(x),), label)
        loss, gradient = value_and_gradient(sigmoid_focal_loss_star, x, labels, -1, gamma, beta=beta)
        z = gamma * y * x.double() + beta
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        assert_relative(loss.double(), F.softplus(-z, threshold=1000) / gamma, tolerance)
        # eq. (11): y (p*_t - 1)
        assert_relative(gradient.double(), -y * torch.sigmoid(-z), tolerance)


def test_star_equals_fvcores_without_beta():
    x, t = torch.randn(40, 3), torch.randint(0, 2, (40, 3)).float()
    want = fvcore.nn.sigmoid_focal_loss_star(x, t, alpha=0.3, gamma=3)
    torch.testing.assert_close(sigmoid_focal_loss_star(x, t, 0.3, 3, beta=0.0), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(dtype):
    x, labels = (4 * torch.randn(30, 5)).to(dtype), torch.randint(-1, 6, (30,))
    (loss, gradient), (want, want_gradient) = (
        value_and_gradient(lambda x: 2.0**14 * sigmoid_focal_loss(x, labels), y) for y in (x, x.float())
    )
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close((loss, gradient), (want, want_gradient.to(dtype)))
    # The gradient of a confident anchor at the prior, times a loss scaler's factor, is far from fp16's underflow;
    # rounded to fp16 before that factor it would be 0.
    prior = torch.full((1, 1), -6.5, dtype=torch.float16)
    assert value_and_gradient(lambda x: 65536 * sigmoid_focal_loss(x, torch.tensor([1]), 0.25, 2.0), prior)[1] > 0


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_class_dim_reads_the_layout_of_the_convolution(memory_format):
    torch.manual_seed(2)
    n, a, k, h, w = 2, 3, 4, 5, 6
    x = torch.randn(n, a * k, h, w).to(memory_format=memory_format)
    labels = torch.randint(-1, k + 1, (n, a, h, w))

    def transposed(x):
        last = x.view(n, a, k, h, w).permute(0, 1, 3, 4, 2).reshape(-1, k)
        return sigmoid_focal_loss(last, labels.reshape(-1), reduction="sum")

    _, got = value_and_gradient(lambda x: sigmoid_focal_loss(x.view(n, a, k, h, w), labels, class_dim=2), x)
    _, want = value_and_gradient(transposed, x.contiguous())
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_ignored_rows_give_nothing_not_even_nan():
    x, labels = torch.randn(4, 3), torch.tensor([0, -1, 3, 2])
    x[1] = float("nan")
    loss, gradient = value_and_gradient(sigmoid_focal_loss, x, labels)
    assert (loss[1] == 0).all() and (gradient[1] == 0).all() and torch.isfinite(gradient).all()
    torch.testing.assert_close(sigmoid_focal_loss(x, labels, reduction="mean"), loss[[0, 2, 3]].mean())


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("labels", [torch.full((5,), -1), torch.zeros(0, dtype=torch.long)], ids=["ignored", "empty"])
def test_nothing_to_learn_is_0_and_connected(labels, reduction):
    x = torch.randn(len(labels), 3)
    loss, gradient = value_and_gradient(sigmoid_focal_loss, x, labels, reduction=reduction)
    assert loss == 0 and (gradient == 0).all()


def test_second_backward_gives_the_same():
    x = torch.randn(4, 3, requires_grad=True)
    loss = sigmoid_focal_loss(x, torch.tensor([0, 1, 3, -1]), reduction="sum")
    (first,) = torch.autograd.grad(3 * loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"alpha": float("nan")}, "alpha must be"),
        ({"alpha": [0.1, 0.2]}, "3 expected, got 2"),
        ({"alpha": [0.1, 0.2, 2.0]}, r"numbers in \[0, 1\]"),
        ({"alpha": torch.rand(2)}, "one value a class"),
        ({"alpha": None}, "alpha must be a number or one number a class"),
        ({"alpha": "0.25"}, "alpha must be a number or one number a class"),
        ({"class_dim": 2}, "class_dim 2 is not among the dimensions"),
        ({"class_dim": -3}, "class_dim -3 is not among the dimensions"),
        ({"targets": torch.full((4, 3), 7)}, r"must be in \[0, 1\]; got integers from 7 to 7"),
        ({"targets": torch.zeros(4, 3, dtype=torch.complex64)}, "real numbers"),
        ({"gamma": -0.5}, "gamma must be a finite number >= 0"),
        ({"gamma": float("inf")}, "gamma must be"),
        ({"reduction": "avg"}, "reduction must be"),
        ({"targets": torch.tensor([0, 1, 2, 4])}, r"labels must be in \[-1, 3\].* got values from 0 to 4"),
        ({"targets": torch.tensor([0, 1, 2, -2])}, "labels must be in"),
        ({"targets": torch.rand(4)}, "integer labels of shape"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, r"of shape \(5,\)"),
        ({"inputs": torch.zeros(4, 3, dtype=torch.long)}, "floating-point logits"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sigmoid_focal_loss(**{"inputs": torch.randn(4, 3), "targets": torch.tensor([0, 1, 2, 3]), **kwargs})


def test_star_refuses_gamma_0_and_infinite_beta():
    with pytest.raises(ValueError, match="beta must be a finite number"):
        sigmoid_focal_loss_star(torch.randn(2, 2), torch.tensor([0, 1]), beta=float("inf"))
    with pytest.raises(ValueError, match=r"> 0 for FL\*"):
        sigmoid_focal_loss_star(torch.randn(2, 2), torch.tensor([0, 1]), gamma=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    x, labels = torch.randn(20, 4), torch.randint(-1, 5, (20,))

    def loss(x, targets, enabled):
        with torch.autocast("cpu", dtype, enabled=enabled):
            return sigmoid_focal_loss(x, targets, reduction="mean")

    for y in (labels, torch.rand(20, 4)):
        results = (value_and_gradient(loss, x, y, enabled) for enabled in (False, True))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_soft_targets_in_float32_equal_float64(gamma):
    """The closed form in blocks against autograd of the definition in log space."""
    targets = torch.tensor([0.0, 1e-30, 1e-6, 0.1, 0.4999, 0.5, 0.7, 1 - 2**-20, 1.0])
    x = torch.cat([torch.linspace(-200, 200, 801), torch.linspace(-20, 20, 801)])[:, None].expand(-1, len(targets))
    t = targets.expand_as(x)
    got = loss_and_gradient(x, t, torch.float32, gamma)
    t = t.double()

    def definition(x):
        right, wrong = F.logsigmoid(x), F.logsigmoid(-x)
        weight = torch.exp(gamma * torch.logaddexp(right + torch.log1p(-t), wrong + torch.log(t)))
        return -(0.25 * t + 0.75 * (1 - t)) * weight * (t * right + (1 - t) * wrong)

    want, gradient = value_and_gradient(definition, x.double())
    assert_relative(got[0], want, 2e-5)
    # Between 0 and 1 the gradient has a zero, where only its absolute size has digits.
    assert torch.isfinite(got[1]).all()
    torch.testing.assert_close(got[1], gradient, rtol=5e-5, atol=1e-5)


def test_number_tensors_and_scalars():
    """A 0-dim alpha, and 0-dim logits with a dense target, as torchvision takes them."""
    x, t = torch.tensor(0.3), torch.tensor(1.0)
    for reduction in ("none", "sum", "mean"):
        want = torchvision.ops.sigmoid_focal_loss(x, t, 0.25, 2.0, reduction)
        torch.testing.assert_close(sigmoid_focal_loss(x, t, torch.tensor(0.25), 2.0, reduction), want)


def test_func_grad_equals_autograd():
    x, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, -1, 0])
    got = torch.func.grad(lambda x: sigmoid_focal_loss(x, labels, reduction="sum"))(x)
    _, want = value_and_gradient(sigmoid_focal_loss, x, labels)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile wants a C++ compiler")
@pytest.mark.parametrize("kind", ["labels", "channels_last", "dense", "star", "softmax"])
def test_torch_compile_makes_one_graph_of_it(kind):
    torch.manual_seed(0)
    x, labels = 3 * torch.randn(2, 5, 4, 6), torch.randint(-1, 5, (2, 4, 6))
    if kind == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    function = {"star": sigmoid_focal_loss_star, "softmax": softmax_focal_loss}.get(kind, sigmoid_focal_loss)
    targets = torch.rand(x.shape) if kind == "dense" else labels

    def loss(x, targets):
        return function(x, targets, 0.25, 2.0, "mean", class_dim=1)

    compiled = torch.compile(loss, fullgraph=True, dynamic=False)
    results = (value_and_gradient(f, x, targets) for f in (loss, compiled))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("function", [sigmoid_focal_loss, softmax_focal_loss])
def test_torch_compile_follows_changing_shapes(function):
    """As a detector's change at each step; on a backend that needs no compiler."""
    compiled = torch.compile(
        lambda x, y: function(x, y, 0.25, 2.0, "sum", class_dim=1), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for size in ((2, 5, 4, 6), (2, 5, 7, 3), (3, 5, 2, 9)):
        x, labels = torch.randn(size), torch.randint(-1, 5, (size[0], *size[2:]))
        for leaf in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(compiled(leaf, labels), function(leaf, labels, 0.25, 2.0, "sum", class_dim=1))


def test_float64_keeps_all_digits_of_alpha_and_numpys_numbers_are_numbers():
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3])
    want = naive(x, labels, torch.full((3,), 0.1, dtype=torch.float64), 2.0)
    for alpha in (0.1, np.float64(0.1), torch.tensor(0.1, dtype=torch.float64), [0.1, 0.1, 0.1]):
        torch.testing.assert_close(sigmoid_focal_loss(x, labels, alpha, 2.0), want, rtol=1e-13, atol=0)


def test_alpha_may_change_after_the_forward_pass():
    x, alpha = torch.randn(4, 3, requires_grad=True), torch.tensor([0.1, 0.5, 0.9])
    loss = sigmoid_focal_loss(x, torch.tensor([0, 1, 2, 3]), alpha, reduction="sum")
    (before,) = torch.autograd.grad(loss, x, retain_graph=True)
    alpha.fill_(0.7)
    assert torch.equal(torch.autograd.grad(loss, x)[0], before)


def test_unsigned_labels():
    x, labels = torch.randn(3, 300), torch.tensor([255, 255, 3])
    for function in (sigmoid_focal_loss, softmax_focal_loss):
        torch.testing.assert_close(
            function(x, labels.to(torch.uint8), reduction="mean"), function(x, labels, reduction="mean")
        )
