"""LowQualityMatcher against Detectron2's Matcher."""

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou

from focal_plugin.retinanet import LowQualityMatcher


def test_low_quality_floor():
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [100, 100, 104, 104], [500, 500, 510, 510]]))
    anchors = Boxes(torch.tensor([[0.0, 0, 10, 11], [98, 98, 108, 108], [0, 3, 10, 13], [300, 300, 310, 310]]))
    iou = pairwise_iou(boxes, anchors)
    assert iou[1, 1] == pytest.approx(0.16)
    _, stock = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)(iou)
    # The third box touches no anchor: upstream then makes a match of every anchor of IoU 0.
    assert stock.tolist() == [1, 1, 1, 1]
    assert LowQualityMatcher([0.4, 0.5], [0, -1, 1])(iou)[1].tolist() == [1, 1, 1, 0]
    assert LowQualityMatcher([0.4, 0.5], [0, -1, 1], 0.4)(iou)[1].tolist() == [1, 0, 1, 0]


def test_matcher_equals_upstream_at_the_default():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        xy = 80 * torch.rand(60, 2, generator=generator)
        boxes = Boxes(torch.cat([xy, xy + 5 + 30 * torch.rand(60, 2, generator=generator)], dim=1))
        iou = pairwise_iou(boxes[:6], boxes)
        want = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)(iou)
        got = LowQualityMatcher([0.4, 0.5], [0, -1, 1])(iou)
        assert all(torch.equal(a, b) for a, b in zip(got, want))
