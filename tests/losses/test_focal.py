"""The losses of sigmoids against their formulas in float64, finite differences, fvcore and torchvision; the modules."""

import shutil
from functools import partial
from itertools import product

import fvcore.nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from gradients import value_and_gradient
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from focal_plugin import losses
from focal_plugin.losses import sigmoid_focal_loss, sigmoid_focal_loss_star, softmax_focal_loss

GAMMAS = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
COMPILER = "inductor" if shutil.which("g++") else "aot_eager"
# The smallest normal float32: results below it are zero or denormal, where there are no digits to compare.
TINY = torch.finfo(torch.float32).tiny


def naive(x, labels, alpha, gamma):
    """Eq. (5) entry by entry, in float64 with p_t of the class that is absent or present."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for i, k in product(*map(range, x.shape)):
        x_t, a = (x[i, k].double(), alpha[k]) if k == labels[i] else (-x[i, k].double(), 1 - alpha[k])
        out[i, k] = -a * torch.sigmoid(-x_t) ** gamma * F.logsigmoid(x_t) if labels[i] >= 0 else 0
    return out


def loss_and_gradient(x, targets, dtype, gamma):
    value, gradient = value_and_gradient(sigmoid_focal_loss, x.to(dtype), targets, 0.25, gamma)
    return value.double(), gradient.double()


def assert_relative(got, want, tolerance):
    assert torch.isfinite(got).all()
    error = (got - want).abs() - TINY
    assert (error <= tolerance * want.abs()).all(), (error / want.abs().clamp(min=TINY)).max()


# Of two classes: the loss of the one that a label names is computed apart from that of the others. 2 is background.
of_two_classes = pytest.mark.parametrize("label", [0, 2], ids=["positive", "negative"])


@of_two_classes
@pytest.mark.parametrize("gamma", GAMMAS)
def test_float32_equals_float64_over_logits_of_200(gamma, label):
    x = torch.cat([torch.linspace(-200, 200, 20001), torch.linspace(-20, 20, 20001)])[:, None].expand(-1, 2)
    labels = torch.full((len(x),), label)
    results = (loss_and_gradient(x, labels, dtype, gamma) for dtype in (torch.float32, torch.float64))
    for got, want in zip(*results):
        assert_relative(got, want, 1e-5)


@of_two_classes
@pytest.mark.parametrize("gamma", GAMMAS)
def test_float64_equals_many_digits(gamma, label):
    """The closed form itself, against Python's arithmetic of 200 digits."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 200

    def focal(x, is_class):
        x_t, a = (x, mpmath.mpf(0.25)) if is_class else (-x, mpmath.mpf(0.75))
        return a * (1 / (1 + mpmath.exp(x_t))) ** mpmath.mpf(gamma) * mpmath.log(1 + mpmath.exp(-x_t))

    logits = [-200.0, -37.5, -17.0, -4.6, -0.1, 0.0, 0.3, 5.0, 18.0, 20.5, 40.0, 200.0]
    x = torch.tensor(logits, dtype=torch.float64)[:, None].expand(-1, 2)
    dense = torch.tensor([label == 0, False]).expand_as(x).double()
    for targets, column in product((torch.full((len(x),), label), dense), (0, 1)):
        loss, gradient = (y[:, column] for y in loss_and_gradient(x, targets, torch.float64, gamma))
        exact = partial(focal, is_class=column == label)
        want, slope = ([float(f(mpmath.mpf(x))) for x in logits] for f in (exact, partial(mpmath.diff, exact)))
        assert_close(loss, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)
        assert_close(gradient, torch.tensor(slope, dtype=torch.float64), rtol=1e-11, atol=0)


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
    assert_close(sigmoid_focal_loss(x, labels, alpha, gamma).double(), want, rtol=1e-5, atol=1e-9)
    total = sigmoid_focal_loss(x, labels, alpha.tolist(), gamma, "sum")
    assert_close(total.double(), want.sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("theirs", [fvcore.nn.sigmoid_focal_loss, torchvision.ops.sigmoid_focal_loss])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2), (0.75, 0), (-1, 0), (-1, 3.0), (0.5, 1)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_drop_in_for_fvcore_and_torchvision(theirs, alpha, gamma, reduction):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7)
    for targets in (torch.randint(0, 2, x.shape).float(), torch.rand(x.shape)):
        got, want = (f(x, targets, alpha, gamma, reduction) for f in (sigmoid_focal_loss, theirs))
        assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_defaults_are_torchvisions_targets_get_no_gradient_and_scalars_are_taken():
    x, t = torch.randn(5, 3), torch.tensor([0.0, 1.0, 0.5]).expand(5, 3).clone().requires_grad_()
    assert_close(sigmoid_focal_loss(x, t), torchvision.ops.sigmoid_focal_loss(x, t), rtol=1e-5, atol=1e-7)
    assert not sigmoid_focal_loss(x, t).requires_grad
    x, t = torch.tensor(0.3), torch.tensor(1.0)
    for reduction in ("none", "sum", "mean"):
        want = torchvision.ops.sigmoid_focal_loss(x, t, 0.25, 2.0, reduction)
        assert_close(sigmoid_focal_loss(x, t, torch.tensor(0.25), 2.0, reduction), want)


def test_gamma_0_without_alpha_is_cross_entropy():
    x, labels = 5 * torch.randn(50, 6), torch.randint(0, 7, (50,))
    want = F.binary_cross_entropy_with_logits(x, F.one_hot(labels, 7)[:, :-1].float(), reduction="sum")
    assert_close(sigmoid_focal_loss(x, labels, -1, 0, "sum"), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradcheck(gamma):
    torch.manual_seed(1)
    labels, soft = torch.tensor([0, 2, 3, -1, 1, 3]), torch.rand(6, 3, dtype=torch.float64)
    soft[0], soft[1] = 0, 1
    per_class = [0.1, 0.4, 0.9, 0.5]
    cases = (sigmoid_focal_loss, labels, 3), (sigmoid_focal_loss, soft, 3), (softmax_focal_loss, labels, 4)
    for loss, targets, k in cases:
        x = torch.randn(6, k, dtype=torch.float64, requires_grad=True)
        assert gradcheck(partial(loss, targets=targets, alpha=per_class[:k], gamma=gamma), x)
        assert gradgradcheck(partial(loss, targets=targets, alpha=0.25, gamma=gamma), x)


@pytest.mark.parametrize("gamma, beta", [(2.0, 1.0), (4.0, 0.0), (0.5, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_star_equals_its_formula_and_derivative(gamma, beta, dtype):
    x, tolerance = torch.linspace(-200, 200, 4001, dtype=dtype)[:, None], 1e-5 if dtype == torch.float32 else 1e-12
    labels = torch.zeros(len(x), dtype=torch.long)  # the first of two classes
    loss, gradient = value_and_gradient(sigmoid_focal_loss_star, x.expand(-1, 2), labels, -1, gamma, beta=beta)
    y = torch.tensor([1, -1])
    z = gamma * y * x.double() + beta
    assert_relative(loss.double(), F.softplus(-z, threshold=1000) / gamma, tolerance)
    # eq. (11): y (p*_t - 1)
    assert_relative(gradient.double(), -y * torch.sigmoid(-z), tolerance)


def test_star_equals_fvcores_without_beta_and_refuses_gamma_0_and_infinite_beta():
    x, t = torch.randn(40, 3), torch.randint(0, 2, (40, 3)).float()
    want = fvcore.nn.sigmoid_focal_loss_star(x, t, alpha=0.3, gamma=3)
    assert_close(sigmoid_focal_loss_star(x, t, 0.3, 3, beta=0.0), want, rtol=1e-5, atol=1e-7)
    for wrong, message in (({"beta": float("inf")}, "beta must be a finite number"), ({"gamma": 0.0}, r"> 0 for FL\*")):
        with pytest.raises(ValueError, match=message):
            sigmoid_focal_loss_star(x, t, **wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_is_computed_in_float32(dtype):
    x, labels = (4 * torch.randn(30, 5)).to(dtype), torch.randint(-1, 6, (30,))
    results = (value_and_gradient(lambda x: 2.0**14 * sigmoid_focal_loss(x, labels), y) for y in (x, x.float()))
    (loss, gradient), (want, want_gradient) = results
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert_close((loss, gradient), (want, want_gradient.to(dtype)))
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
    assert_close(got, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("function, background", [(sigmoid_focal_loss, 3), (softmax_focal_loss, 2)])
def test_ignored_rows_give_nothing_not_even_nan_and_a_second_backward_the_same(function, background):
    x, labels = torch.randn(4, 3), torch.tensor([0, -1, background, -1])
    x[1] = float("nan")
    x.requires_grad_()
    results = [function(x, labels, reduction=reduction) for reduction in ("none", "sum", "mean")]
    for loss in results:
        first, second = (torch.autograd.grad(3 * loss.sum(), x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second) and torch.isfinite(first).all() and (first[[1, 3]] == 0).all()
    assert (results[0][[1, 3]] == 0).all()
    assert_close(results[2], results[0][[0, 2]].mean())


@pytest.mark.parametrize("function", [sigmoid_focal_loss, softmax_focal_loss])
@pytest.mark.parametrize("labels", [torch.full((5,), -1), torch.zeros(0, dtype=torch.long)], ids=["ignored", "empty"])
def test_nothing_to_learn_is_0_and_connected(labels, function):
    for reduction in ("sum", "mean"):
        loss, gradient = value_and_gradient(function, torch.randn(len(labels), 3), labels, reduction=reduction)
        assert loss == 0 and (gradient == 0).all()


def test_bad_arguments_are_named():
    for name, values, message in (
        ("alpha", (1.5, float("nan"), None, "0.25"), r"alpha must be (in \[0, 1\]|a number or one number a class)"),
        ("alpha", ([0.1, 0.2], torch.rand(2)), "one value a class: 3 expected, got 2"),
        ("alpha", ([0.1, 0.2, 2.0],), r"numbers in \[0, 1\]"),
        ("gamma", (-0.5, float("inf")), "gamma must be a finite number >= 0"),
        ("class_dim", (2, -3), "class_dim -?[23] is not among the dimensions"),
        ("reduction", ("avg",), "reduction must be"),
        *(("targets", (torch.tensor([0, 1, 2, y]),), r"labels must be in \[-1, 3\].* got values") for y in (4, -2)),
        ("targets", (torch.full((4, 3), 7),), r"must be in \[0, 1\]; got integers from 7 to 7"),
        ("targets", (torch.zeros(4, 3, dtype=torch.complex64),), "real numbers"),
        ("targets", (torch.rand(4), torch.zeros(5).long()), r"integer labels of shape|of shape \(5,\)"),
        ("inputs", (torch.zeros(4, 3).long(),), "floating-point logits"),
    ):
        for value in values:
            with pytest.raises(ValueError, match=message):
                sigmoid_focal_loss(**{"inputs": torch.randn(4, 3), "targets": torch.tensor([0, 1, 2, 3]), name: value})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    x, labels = torch.randn(20, 4), torch.randint(-1, 5, (20,))

    def loss(x, targets, enabled):
        with torch.autocast("cpu", dtype, enabled=enabled):
            return sigmoid_focal_loss(x, targets, reduction="mean")

    for y in (labels, torch.rand(20, 4)):
        results = (value_and_gradient(loss, x, y, enabled) for enabled in (False, True))
        assert_close(*results, rtol=0, atol=0)


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
    assert_close(got[1], gradient, rtol=5e-5, atol=1e-5)


def test_func_grad_equals_autograd():
    x, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, -1, 0])
    got = torch.func.grad(lambda x: sigmoid_focal_loss(x, labels, reduction="sum"))(x)
    _, want = value_and_gradient(sigmoid_focal_loss, x, labels)
    assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["labels", "dense", "star", "softmax"])
def test_torch_compile_makes_one_graph_of_it_and_follows_changing_shapes(kind):
    """As a detector's change at each step; that on a backend that needs no compiler."""
    function = {"star": sigmoid_focal_loss_star, "softmax": softmax_focal_loss}.get(kind, sigmoid_focal_loss)

    def loss(x, targets):
        return function(x, targets, 0.25, 2.0, "mean", class_dim=1)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend=COMPILER)
    dynamic = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 5, 4, 6), (2, 5, 7, 3), (3, 5, 2, 9)):
        x = 3 * torch.randn(size)
        targets = torch.rand(size) if kind == "dense" else torch.randint(-1, 5, (size[0], *size[2:]))
        for leaf in (x, x.contiguous(memory_format=torch.channels_last)):
            if kind != "star":
                assert_close(dynamic(leaf, targets), loss(leaf, targets))
            if size[0] == 2 and size[2] == 4 and (kind == "labels" or leaf is x):
                assert_close(*(value_and_gradient(f, leaf, targets) for f in (loss, compiled)), rtol=1e-5, atol=1e-8)


def test_alpha_keeps_all_digits_in_float64_may_be_numpys_and_may_change_after_the_forward_pass():
    x, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 3])
    want = naive(x, labels, torch.full((3,), 0.1, dtype=torch.float64), 2.0)
    for alpha in (0.1, np.float64(0.1), torch.tensor(0.1, dtype=torch.float64), [0.1, 0.1, 0.1]):
        assert_close(sigmoid_focal_loss(x, labels, alpha, 2.0), want, rtol=1e-13, atol=0)
    x, alpha = torch.randn(4, 3, requires_grad=True), torch.tensor([0.1, 0.5, 0.9])
    loss = sigmoid_focal_loss(x, torch.tensor([0, 1, 2, 3]), alpha, reduction="sum")
    (before,) = torch.autograd.grad(loss, x, retain_graph=True)
    alpha.fill_(0.7)
    assert torch.equal(torch.autograd.grad(loss, x)[0], before)


def test_unsigned_labels():
    x, labels = torch.randn(3, 300), torch.tensor([255, 255, 3])
    for function in (sigmoid_focal_loss, softmax_focal_loss):
        assert_close(*(function(x, y, reduction="mean") for y in (labels.to(torch.uint8), labels)))


@pytest.mark.parametrize("name", ["sigmoid_focal_loss", "sigmoid_focal_loss_star", "softmax_focal_loss"])
@pytest.mark.parametrize("alpha", [-1.0, 0.3, [0.1, 0.5, 0.9], torch.tensor([0.1, 0.5, 0.9])], ids=str)
def test_a_module_equals_its_function(name, alpha):
    function, module = getattr(losses, name), getattr(losses, name.title().replace("_", ""))
    x, labels = torch.randn(2, 3, 5), torch.randint(-1, 3, (2, 5))
    for reduction in ("none", "sum", "mean"):
        criterion = module(alpha, 1.5, reduction, class_dim=1)
        assert torch.equal(criterion(x, labels), function(x, labels, alpha, 1.5, reduction, class_dim=1))
    assert not list(criterion.parameters()) and not criterion.state_dict()
    assert "gamma=1.5" in repr(criterion)


def test_a_modules_alpha_moves_with_it_and_keeps_its_digits_and_bad_values_are_refused_when_it_is_made():
    assert losses.SigmoidFocalLoss([0.5, 0.5]).to("meta").class_alpha.is_meta
    module = losses.SigmoidFocalLoss(alpha := torch.tensor([0.1, 0.999])).bfloat16()
    alpha.fill_(0)
    assert torch.equal(module.class_alpha, torch.tensor([0.1, 0.999]))
    for name, value in (*(("alpha", a) for a in (3.0, [0.5, 2.0], None)), ("gamma", -1.0), ("reduction", "avg")):
        with pytest.raises(ValueError, match=name):
            losses.SoftmaxFocalLoss(**{name: value})
