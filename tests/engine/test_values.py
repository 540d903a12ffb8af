"""Configs with values that cannot be: refused before anything is built, by key."""

import pytest

from focal_plugin import get_config
from focal_plugin.config import config_dir
from focal_plugin.engine.values import _RULES, check_values

WRONG = [
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[], [["a"]], [5], [[-1.0]], [[]]]),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[], [[0.0]], [[float("inf")]]]),
    ("MODEL.RETINANET.IN_FEATURES", [[], [5]]),
    ("MODEL.RETINANET.NUM_CONVS", [-1, 1.5, True]),
    ("MODEL.RETINANET.NUM_CLASSES", [0, -3, None]),
    ("MODEL.RETINANET.IOU_THRESHOLDS", [[], ["a"], [0.5, 0.4], [0.0, 0.5], [0.4, 1.5]]),
    ("MODEL.RETINANET.IOU_LABELS", [[], [7, 8, 9], [0, 1]]),
    ("MODEL.PIXEL_MEAN", [["a", "b", "c"], []]),
    ("MODEL.PIXEL_STD", [[0.0, 0.0, 0.0], [1.0]]),
    ("MODEL.BACKBONE.NAME", ["nope", None]),
    ("MODEL.DEVICE", [None, "gpu", "meta", 3]),
    ("DATASETS.TRAIN", [(5,), None]),
    ("DATALOADER.NUM_WORKERS", [-1, None]),
    ("INPUT.MIN_SIZE_TRAIN", [(), (0,), ("a",)]),
    ("SOLVER.IMS_PER_BATCH", [0, -1, None]),
    ("SOLVER.BASE_LR", [None, 0, -1.0, float("nan"), float("inf")]),
    ("SOLVER.MAX_ITER", [0, -5, None]),
    ("SOLVER.STEPS", [("a",), (5, 3), (5, 5), None]),
    ("SOLVER.CHECKPOINT_PERIOD", [0, 2.5]),
    ("OUTPUT_DIR", [None, ""]),
    ("SEED", [None, 1.0]),
]


@pytest.mark.parametrize("key, value", [(key, value) for key, values in WRONG for value in values])
def test_a_wrong_value_is_refused_by_its_key(key, value):
    cfg = get_config("digits/focal.yaml")
    node = cfg
    for name in key.split(".")[:-1]:
        node = node[name]
    node[key.split(".")[-1]] = value
    with pytest.raises(ValueError, match=rf"^{key} .*must be|MODEL.PIXEL_MEAN and PIXEL_STD"):
        check_values(cfg)


def test_all_that_is_wrong_is_said_at_once():
    cfg = get_config("digits/focal.yaml", ["SOLVER.MAX_ITER", "0", "SOLVER.IMS_PER_BATCH", "0"])
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH 0: must be a whole .*\nSOLVER\.MAX_ITER 0: must be"):
        check_values(cfg)


@pytest.mark.parametrize("path", sorted(config_dir().rglob("*.yaml")), ids=lambda p: p.name)
def test_our_configs_are_right(path):
    check_values(get_config(str(path)))


def test_every_key_is_a_key():
    defaults = get_config("digits/focal.yaml")
    for key in _RULES:
        node = defaults
        for name in key.split("."):
            node = node[name]
