import os

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_plugin.data.check import check_datasets


@pytest.fixture(autouse=True)
def data_sets():
    """Three data sets: of three classes, of twelve, and of classes unknown until it is loaded."""
    before = dict(DatasetCatalog), dict(MetadataCatalog)
    known = {"cells_train": ["red", "white", "flat"], "many": [f"c{i}" for i in range(12)]}
    for name, classes in known.items():
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).thing_classes = classes
    DatasetCatalog.register("unknown_classes", list)
    yield
    for catalog, entries in zip((DatasetCatalog, MetadataCatalog), before):
        catalog.data = entries


def config(train=("cells_train",), test=(), num_classes=3):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    return cfg


def message(cfg):
    with pytest.raises(ValueError) as caught:
        check_datasets(cfg)
    return str(caught.value)


def test_what_fits_passes():
    check_datasets(config(("cells_train",), ("cells_train", "unknown_classes")))
    check_datasets(config(["cells_train"], []))
    check_datasets(config((), ("cells_train",)), splits=("TEST",))


def test_nothing_to_train_on():
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


@pytest.mark.parametrize("key", ["TRAIN", "TEST"])
def test_unknown_name(key):
    text = message(config(**{key.lower(): ("cell_train",)}))
    assert text.startswith(f"DATASETS.{key}: no data set 'cell_train'")
    assert "Did you mean cells_train" in text
    assert "--register cell_train=annotations.json:image_dir" in text
    assert "Did you mean" not in message(config(("qqqqqqqqqqqqqqqq",)))


def test_string_in_place_of_a_tuple():
    assert 'write ("cells_train",)' in message(config("cells_train"))


def test_class_count():
    text = message(config(("cells_train",), num_classes=80))
    assert "'cells_train' has 3 classes (red, white, flat), but MODEL.RETINANET.NUM_CLASSES is 80" in text
    assert "set MODEL.RETINANET.NUM_CLASSES 3" in text
    assert "ROI_HEADS" not in text


def test_long_lists_of_classes_are_cut():
    text = message(config(("many",)))
    assert "has 12 classes (c0, " in text and "c9, ...)" in text and "c10" not in text


def test_classes_set_on_the_wrong_key():
    cfg = config(("cells_train",), num_classes=80)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    assert "does not read MODEL.ROI_HEADS.NUM_CLASSES" in message(cfg)


def test_all_problems_at_once_each_in_one_line():
    text = message(config(("nowhere", "cells_train"), ("cells_train", "many"), num_classes=4))
    assert [line.split("'")[1] for line in text.splitlines()] == ["nowhere", "cells_train", "many"]
