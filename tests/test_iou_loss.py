"""The plain IoU loss against counting pixels, finite differences, and GIoU."""

import pytest
import torch
from fvcore.nn import giou_loss
from torch.autograd import gradcheck

from focal_plugin.retinanet import iou_loss


def boxes(num, seed, size=12):
    g = torch.Generator().manual_seed(seed)
    xy = torch.randint(0, size, (num, 2), generator=g)
    return torch.cat([xy, xy + torch.randint(1, size, (num, 2), generator=g)], dim=1).double()


def test_equals_counting_pixels():
    a, b = boxes(50, 0), boxes(50, 1)
    for x, y, loss in zip(a.int().tolist(), b.int().tolist(), iou_loss(a, b, eps=0.0)):
        pixels = [{(i, j) for i in range(x0, x1) for j in range(y0, y1)} for x0, y0, x1, y1 in (x, y)]
        want = 1 - len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1])
        assert loss.item() == pytest.approx(want, abs=1e-12)


def test_gradient_equals_finite_differences():
    # Half pixels apart, where no edge meets another.
    a, b = boxes(20, 2), boxes(20, 3) + 0.5
    assert gradcheck(iou_loss, (a.requires_grad_(), b.requires_grad_()))


def test_equals_giou_where_the_union_is_a_box():
    a = boxes(20, 4)
    inside = torch.stack([a[:, 0], a[:, 1], (a[:, 0] + a[:, 2]) / 2, a[:, 3]], dim=1)
    torch.testing.assert_close(iou_loss(inside, a), giou_loss(inside, a))


def test_no_boxes_and_degenerate_boxes():
    none = torch.zeros(0, 4, requires_grad=True)
    assert iou_loss(none, none).shape == (0,)
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    loss = iou_loss(point, torch.tensor([[2.0, 2.0, 2.0, 2.0]])).sum()
    loss.backward()
    assert loss == 1 and torch.isfinite(point.grad).all()
