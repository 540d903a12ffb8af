import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_loss

from benchmark import loss_accuracy
from benchmark.loss_accuracy import GAMMAS, grid, measure_accuracy, reference
from benchmark.loss_benchmark import accuracy_functions

CPU = torch.device("cpu")


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 2.0, 5.0])
def test_reference_against_arbitrary_precision(gamma):
    mpmath = pytest.importorskip("mpmath")
    logits = [-200.0, -40.0, -17.5, -4.6, -0.3, 0.0, 1.7, 9.0, 17.5, 40.0, 200.0]
    for target in (0.0, 1.0):
        x = torch.tensor(logits, dtype=torch.float64)
        loss, gradient = reference(x, torch.full_like(x, target), 0.25, gamma)
        with mpmath.workdps(300):  # 1 - p at x = 200 alone takes 90 digits

            def exact(z, target=target):
                p = 1 / (1 + mpmath.exp(-z))
                p, alpha = (p, 0.25) if target else (1 - p, 0.75)
                return -alpha * (1 - p) ** mpmath.mpf(gamma) * mpmath.log(p)

            for z, value, slope in zip(logits, loss.tolist(), gradient.tolist()):
                z = mpmath.mpf(z)
                assert value == pytest.approx(float(exact(z)), rel=1e-12, abs=1e-300)
                assert slope == pytest.approx(float(mpmath.diff(exact, z)), rel=1e-12, abs=1e-300)


def test_grid():
    x, targets = grid(torch.float16, CPU)
    assert x.dtype == targets.dtype == torch.float16
    assert x.min() == -200
    assert x.max() == 200
    assert targets.unique().tolist() == [0, 1]
    assert x[targets == 0].equal(x[targets == 1])
    assert (x.abs() < 20).sum() > len(x) / 2


def test_a_function_of_known_error():
    def off_by_a_percent(logits, targets, alpha, gamma):
        loss, _ = reference(logits.detach(), targets, alpha, gamma)
        return (1.01 * loss).float() + 0 * logits  # with a gradient of 0

    rows = measure_accuracy({"off": off_by_a_percent}, CPU)
    assert [r.dtype for r in rows] == ["float32", "bfloat16", "float16"]
    row = rows[0]
    assert row.function == "off"
    assert row.loss_error == pytest.approx(0.01, rel=1e-3)
    assert row.gradient_error == pytest.approx(1)
    assert row.non_finite_losses == row.non_finite_gradients == 0
    assert row.values == len(GAMMAS) * len(grid(torch.float32, CPU)[0])


def test_the_usual_form_has_nan_gradients_and_is_found_out():
    (row,) = [r for r in measure_accuracy({"torchvision": torchvision_loss}, CPU) if r.dtype == "float32"]
    assert row.non_finite_gradients > 1000
    assert row.non_finite_gammas == (0.1, 0.2, 0.5)
    assert row.non_finite_losses == 0


def test_a_function_without_any_finite_value(monkeypatch):
    monkeypatch.setattr(loss_accuracy, "DTYPES", (torch.float32,))
    (row,) = measure_accuracy({"nan": lambda x, t, a, g: x * math.nan}, CPU)
    assert math.isnan(row.loss_error)
    assert row.non_finite_losses == row.values


def test_functions_of_the_benchmark():
    functions = accuracy_functions()
    x, targets = torch.linspace(-5, 5, 20), (torch.arange(20) % 2).float()
    truth, _ = reference(x, targets, 0.25, 2.0)
    cross_entropy = 0.5 * F.binary_cross_entropy_with_logits(x, targets, reduction="none")
    for function in functions.values():
        torch.testing.assert_close(function(x, targets, 0.25, 2.0), truth.float())
        torch.testing.assert_close(function(x, targets, 0.5, 0.0), cross_entropy)
