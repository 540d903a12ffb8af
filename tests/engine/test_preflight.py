"""What is refused before a worker starts: values, data sets, and all of it in one message."""

import os
import re

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_plugin import get_config
from focal_plugin.config import config_dir
from focal_plugin.config_yaml import lookup
from focal_plugin.engine.preflight import _RULES, check_datasets, check_values

WRONG = [
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[], [["a"]], [5], [[-1.0]], [[]]]),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[], [[0.0]], [[float("inf")]]]),
    ("MODEL.RETINANET.IN_FEATURES", [[], [5]]),
    ("MODEL.RETINANET.IOU_THRESHOLDS", [[], ["a"], [0.5, 0.4], [0.0, 0.5], [0.4, 1.5]]),
    ("MODEL.RETINANET.IOU_LABELS", [[], [7, 8, 9], [0, 1]]),
    ("MODEL.PIXEL_MEAN", [["a", "b", "c"], [], [float("nan")] * 3, [True, 1.0, 1.0], [10**400, 1.0, 1.0]]),
    ("MODEL.PIXEL_STD", [[0.0, 0.0, 0.0], [1.0]]),
    ("MODEL.BACKBONE.NAME", ["nope", None]),
    ("MODEL.DEVICE", [None, "gpu", "meta"]),
    ("MODEL.META_ARCHITECTURE", ["Focal"]),
    ("SOLVER.AMP.PRECISION", ["fp8"]),
    ("SOLVER.OPTIMIZER", ["LAMB"]),
    ("DATASETS.TRAIN", [(5,), ("",), None]),
    ("INPUT.MIN_SIZE_TRAIN", [(), (0,), ("a",), (64.5,)]),
    ("SOLVER.BASE_LR", [None, 0, -1.0, float("nan"), float("inf")]),
    ("SOLVER.STEPS", [("a",), (5, 3), (5, 5), (2.5,), (True, 3), None]),
    ("OUTPUT_DIR", [None, ""]),
    *((f"MODEL.RETINANET.{name}", [0, -3, None]) for name in ("NUM_CLASSES", "NUM_CONVS")),
    *((f"SOLVER.{name}", [0, -1, None]) for name in ("IMS_PER_BATCH", "MAX_ITER", "CHECKPOINT_PERIOD")),
    *((key, [-2, None]) for key in ("INPUT.MIN_SIZE_TEST", "SOLVER.REFERENCE_WORLD_SIZE", "TEST.EARLY_STOP_PATIENCE")),
    *((key, [None]) for key in ("SEED", "TEST.EVAL_PERIOD", "SOLVER.WARMUP_ITERS")),
]
PATIENCE = r"^TEST\.EARLY_STOP_PATIENCE: needs TEST\.EVAL_PERIOD > 0 and a TEST\.BEST"


@pytest.fixture(autouse=True)
def data_sets(restore_catalogs):
    """Three data sets: of three classes, of twelve, and of classes unknown until it is loaded."""
    known = {"cells_train": ["red", "white", "flat"], "many": [f"class{i}" for i in range(12)], "unknown_classes": None}
    for name, classes in known.items():
        DatasetCatalog.register(name, list)
        if classes:
            MetadataCatalog.get(name).thing_classes = classes


def config(train=("cells_train",), test=(), num_classes=3):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST, cfg.MODEL.RETINANET.NUM_CLASSES = train, test, num_classes
    return cfg


def message(cfg):
    with pytest.raises(ValueError) as caught:
        check_datasets(cfg)
    return str(caught.value)


def test_what_fits_passes_but_not_nothing():
    check_datasets(config(("cells_train",), ("cells_train", "unknown_classes")))
    check_datasets(config(["cells_train"], []))
    check_datasets(config((), ("cells_train",)), splits=("TEST",))
    assert message(config(())) == "DATASETS.TRAIN is empty: there is nothing to train on"


@pytest.mark.skipif(os.path.exists(MetadataCatalog.get("coco_2017_train").json_file), reason="COCO is here")
def test_builtin_data_that_are_not_there():
    text = message(config(("coco_2017_train",), num_classes=80))
    assert "'coco_2017_train' has no " in text and "instances_train2017.json" in text and "DETECTRON2_DATASETS" in text


def test_registered_data_that_have_gone(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    MetadataCatalog.get("cells_train").set(json_file=str(tmp_path / "a.json"), image_root=str(tmp_path))
    check_datasets(config())
    MetadataCatalog.get("cells_train").__dict__["image_root"] = str(tmp_path / "images")
    assert f"'cells_train' has no {tmp_path / 'images'}" in message(config())


def test_unknown_name_and_all_problems_each_in_one_line():
    text = message(config(test=("cell_train",)))
    assert text.startswith("DATASETS.TEST: no data set 'cell_train'") and "Did you mean cells_train" in text
    assert "--register cell_train=annotations.json:image_dir" in text
    text = message(config(("qqqqqqqqqqqqqqqq", "cells_train"), ("cells_train", "many"), num_classes=4))
    assert [line.split("'")[1] for line in text.splitlines()] == ["qqqqqqqqqqqqqqqq", "cells_train", "many"]
    assert "Did you mean" not in text


def test_class_count():
    cfg = config(("cells_train",), num_classes=80)
    text = message(cfg)
    assert "'cells_train' has 3 classes ['red', 'white', 'flat'], but MODEL.RETINANET.NUM_CLASSES is 80" in text
    assert "set MODEL.RETINANET.NUM_CLASSES 3" in text and "ROI_HEADS" not in text
    assert re.search(r"has 12 classes \['class0', .*'class8', .{1,9}\.\.\., but", message(config(("many",)))), "cut"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    assert "does not read MODEL.ROI_HEADS.NUM_CLASSES" in message(cfg)


@pytest.mark.parametrize("key, values", WRONG, ids=[key for key, _ in WRONG])
def test_a_wrong_value_is_refused_by_its_key(key, values):
    for value in values:
        cfg = get_config("digits/focal.yaml")
        group, _, name = key.rpartition(".")
        (lookup(cfg, group) if group else cfg)[name] = value
        with pytest.raises(ValueError, match=rf"^{key}.* must be|MODEL.PIXEL_MEAN and PIXEL_STD"):
            check_values(cfg)


@pytest.mark.parametrize(
    "opts, text",
    [
        ("SOLVER.MAX_ITER 0 SOLVER.BASE_LR 0", r"BASE_LR 0\.0: must be a positive .*\nSOLVER\.MAX_ITER 0: must be"),
        ("TEST.EARLY_STOP_PATIENCE 3 TEST.EVAL_PERIOD 0", PATIENCE),
        ("TEST.EARLY_STOP_PATIENCE 3 TEST.EVAL_PERIOD 5 TEST.BEST_METRIC ''", PATIENCE),
    ],
)
def test_all_that_is_wrong_is_said_at_once(opts, text):
    with pytest.raises(ValueError, match=text):
        check_values(get_config("retina_focal.yaml", opts.split()))


def test_our_configs_are_right():
    for path in config_dir().rglob("*.yaml"):
        check_values(get_config(str(path)))
    assert all(lookup(get_config("digits/focal.yaml"), key) is not None for key in _RULES)
