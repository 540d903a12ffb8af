import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator
from detectron2.structures import Boxes, pairwise_iou

from focal_plugin import get_config
from focal_plugin.data.anchors import anchor_generator, best_ious, check_coverage, resized_sizes


def config(*opts):
    return get_config("retina_focal.yaml", list(opts))


def brute_force(boxes, width, height, cfg):
    """The best IoU of each box over every anchor that Detectron2 makes for a padded image."""
    strides = [2 ** int(name[1]) for name in cfg.MODEL.RETINANET.IN_FEATURES]
    padded = [-(-side // 32) * 32 for side in (height, width)]
    features = [torch.zeros(1, 1, *(-(-side // stride) for side in padded)) for stride in strides]
    anchors = Boxes.cat(build_anchor_generator(cfg, [ShapeSpec(stride=stride) for stride in strides])(features))
    return pairwise_iou(Boxes(torch.tensor(boxes)), anchors).max(dim=1).values.numpy()


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"],
        ["MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 20.5]]", "MODEL.RETINANET.IN_FEATURES", '["p4", "p5"]'],
        ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.2], [1.0], [1.0], [3.0], [1.0]]"],
    ],
)
@pytest.mark.parametrize(("width", "height"), [(200, 131), (64, 300), (31, 33)])
def test_best_iou_is_that_of_brute_force(opts, width, height):
    cfg, rng = config(*opts), np.random.default_rng(0)
    corners = rng.uniform(0, 1, (300, 2, 2)) ** rng.uniform(0.3, 3, (300, 1, 2)) * (width, height)
    corners[:30, :, 0] = 0, width  # as wide as the image
    corners[30:60, 1] = width, height  # in its corner
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    best = best_ious(boxes, np.full((len(boxes), 2), (width, height)), anchor_generator(cfg))
    assert best.min() >= 0 and best.max() <= 1 and best.std() > 0.02
    np.testing.assert_allclose(best, brute_force(boxes, width, height, cfg), atol=2e-5)


def test_sizes_are_those_of_resize_shortest_edge():
    cfg, rng = config("INPUT.MAX_SIZE_TRAIN", "1000"), np.random.default_rng(0)
    sizes = rng.integers(1, 3000, (500, 2))
    for (width, height), (new_width, new_height) in zip(sizes.tolist(), resized_sizes(sizes, cfg)):
        expected = ResizeShortestEdge.get_output_shape(height, width, 720, 1000)
        assert (new_height, new_width) == tuple(max(side, 1) for side in expected)
    assert (resized_sizes(sizes, config("INPUT.MIN_SIZE_TRAIN", "(0,)")) == sizes).all()


def boxes_of(width, height, count=300, image=(800, 800)):
    xy = np.random.default_rng(0).uniform(0, 1, (count, 2)) * (image[0] - width, image[1] - height)
    return np.concatenate([xy, np.tile([width, height], (count, 1))], axis=1).astype(float), np.full((count, 2), image)


def coverage(boxes, *opts, max_boxes=None):
    cfg = config("INPUT.MIN_SIZE_TRAIN", "(800,)", "INPUT.MAX_SIZE_TRAIN", "1333", *opts)
    return check_coverage(*boxes, cfg, max_boxes)


def test_boxes_that_fit_need_no_hint_and_few_stand_for_many():
    result = coverage(boxes_of(100, 100))
    assert result["boxes"] == 300 and result["unmatched"] == 0 and result["share"] == 0
    assert result["hints"] == [] and result["sizes"] is None and result["unmatched_sizes"] is None
    result = coverage(boxes_of(14, 14, count=1000), max_boxes=50)
    assert result["boxes"] == 50 and result["share"] > 0.9
    assert coverage((np.zeros((0, 4)), np.zeros((0, 2)))) == {"boxes": 0}


def test_small_boxes_get_sizes_that_match_them():
    boxes = boxes_of(14, 14)
    result = coverage(boxes)
    assert result["share"] > 0.9 and result["unmatched_sizes"] == pytest.approx([14, 14, 14])
    (hint,) = result["hints"]
    assert "MODEL.ANCHOR_GENERATOR.SIZES" in hint and str(result["sizes"]) in hint
    key, _, pasted = hint[hint.index("MODEL.ANCHOR") :].partition(" ")
    better = coverage(boxes, key, pasted.strip('"'))
    assert better["share"] < 0.7 * result["share"] and f"would leave {better['share']:.1%} unmatched" in hint
    big = boxes_of(140, 140, image=(8000, 8000))  # scaled down first
    assert coverage(big)["unmatched_sizes"] == pytest.approx([14, 14, 14])


def test_no_size_helps_long_boxes():
    boxes = boxes_of(400, 40)
    result = coverage(boxes)
    assert result["share"] == 1 and result["sizes"] is None and result["hints"] == []
    assert coverage(boxes, "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.1, 1.0, 2.0]]")["share"] < 0.5


def test_anchors_that_cannot_be_compared():
    for key, value in (
        ("MODEL.RETINANET.IN_FEATURES", '["res4"]'),
        ("MODEL.RETINANET.IN_FEATURES", "[]"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32]]"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"),
        ("MODEL.ANCHOR_GENERATOR.NAME", "Nothing"),
        ("INPUT.MIN_SIZE_TRAIN", "()"),
    ):
        with pytest.raises(ValueError, match=r"^MODEL\.(RETINANET|ANCHOR)|^INPUT.MIN_SIZE_TRAIN is empty"):
            coverage(boxes_of(14, 14), key, value)
