"""LowQualityMatcher against Detectron2's Matcher; the plain IoU loss against counting pixels, and GIoU."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou
from fvcore.nn import giou_loss
from torch.autograd import gradcheck

from focal_plugin.retinanet import LowQualityMatcher, iou_loss

THRESHOLDS = [0.4, 0.5], [0, -1, 1]


def test_low_quality_floor():
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [100, 100, 104, 104], [500, 500, 510, 510]]))
    anchors = Boxes(torch.tensor([[0.0, 0, 10, 11], [98, 98, 108, 108], [0, 3, 10, 13], [300, 300, 310, 310]]))
    iou = pairwise_iou(boxes, anchors)
    assert iou[1, 1] == pytest.approx(0.16)
    # The third box touches no anchor: Detectron2 then makes a match of every anchor of IoU 0.
    assert Matcher(*THRESHOLDS, allow_low_quality_matches=True)(iou)[1].tolist() == [1, 1, 1, 1]
    assert LowQualityMatcher(*THRESHOLDS)(iou)[1].tolist() == [1, 1, 1, 0]
    assert LowQualityMatcher(*THRESHOLDS, 0.4)(iou)[1].tolist() == [1, 0, 1, 0]


def test_matcher_equals_detectron2s_at_the_default():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        xy = 80 * torch.rand(60, 2, generator=generator)
        boxes = Boxes(torch.cat([xy, xy + 5 + 30 * torch.rand(60, 2, generator=generator)], dim=1))
        iou = pairwise_iou(boxes[:6], boxes)
        want = Matcher(*THRESHOLDS, allow_low_quality_matches=True)(iou)
        assert all(torch.equal(a, b) for a, b in zip(LowQualityMatcher(*THRESHOLDS)(iou), want))


def make_boxes(num, seed, size=12):
    g = torch.Generator().manual_seed(seed)
    xy = torch.randint(0, size, (num, 2), generator=g)
    return torch.cat([xy, xy + torch.randint(1, size, (num, 2), generator=g)], dim=1).double()


def test_iou_loss_equals_counting_pixels_and_finite_differences():
    a, b = make_boxes(50, 0), make_boxes(50, 1)
    for x, y, loss in zip(a.int().tolist(), b.int().tolist(), iou_loss(a, b, eps=0.0)):
        pixels = [{(i, j) for i in range(x0, x1) for j in range(y0, y1)} for x0, y0, x1, y1 in (x, y)]
        assert loss.item() == pytest.approx(1 - len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1]), abs=1e-12)
    a, b = make_boxes(20, 2), make_boxes(20, 3) + 0.5  # half pixels apart, where no edge meets another
    assert gradcheck(iou_loss, (a.requires_grad_(), b.requires_grad_()))


def test_iou_loss_equals_giou_where_the_union_is_a_box():
    a = make_boxes(20, 4)
    inside = torch.stack([a[:, 0], a[:, 1], (a[:, 0] + a[:, 2]) / 2, a[:, 3]], dim=1)
    torch.testing.assert_close(iou_loss(inside, a), giou_loss(inside, a))


def test_iou_loss_of_no_boxes_and_degenerate_boxes():
    none = torch.zeros(0, 4, requires_grad=True)
    assert iou_loss(none, none).shape == (0,)
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0]], requires_grad=True)
    loss = iou_loss(point, torch.tensor([[2.0, 2.0, 2.0, 2.0]])).sum()
    loss.backward()
    assert loss == 1 and torch.isfinite(point.grad).all()
