"""The entry formulas: buffers change nothing but where the numbers are, and the derivative is the derivative."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from focal_plugin.losses.formulas import Focal, FocalStar, softplus

FORMULAS = [Focal(g) for g in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0)] + [FocalStar(2.0, 1.0), FocalStar(0.5, 0.0)]


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
@pytest.mark.parametrize("name", ["value", "derivative"])
def test_buffers_hold_the_same_numbers(formula, name):
    s = torch.cat([torch.linspace(-200, 200, 1001), 8 * torch.randn(1000)])
    function = getattr(formula, name)
    want, out, scratch = function(s), torch.empty_like(s), torch.empty_like(s)
    got = function(s.clone(), out, scratch)
    assert got.data_ptr() == out.data_ptr()
    assert_close(got, want, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_derivative_is_that_of_the_value(formula):
    s = torch.linspace(-150, 150, 301, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(formula.value(s).sum(), s)
    assert_close(formula.derivative(s.detach()), gradient, rtol=1e-10, atol=1e-300)
    near = torch.linspace(-9, 9, 19, dtype=torch.float64, requires_grad=True)
    assert gradcheck(formula.value, near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_keeps_all_digits(dtype):
    """Python's own log1p and exp, number by number; torch's default threshold is 2e-10 off at 20."""
    s = torch.tensor([-300.0, -50.0, -1.0, 0.0, 1.0, 19.9, 20.1, 30.0, 79.0, 81.0, 690.0, 710.0], dtype=dtype)
    want = torch.tensor([math.log1p(math.exp(v)) if v < 700 else v for v in s.tolist()], dtype=dtype)
    for out in (None, torch.empty_like(s)):
        assert_close(softplus(s, out), want, rtol=3 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)
