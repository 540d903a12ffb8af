"""A model small enough to train in a test, batches for it, and the tools as functions."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from focal_plugin import get_config
from focal_plugin.data import make_digits


@pytest.fixture(autouse=True)
def datasets_folder(tmp_path, monkeypatch):
    """No test writes into, or trusts, the data sets of the person who runs it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))


@pytest.fixture
def restore_catalogs():
    """What a test registers is forgotten after it."""
    before = dict(DatasetCatalog), dict(MetadataCatalog)
    yield
    for catalog, entries in zip((DatasetCatalog, MetadataCatalog), before):
        catalog.data = entries


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder with 14 images to train on and 4 to evaluate, of 64 to 96 pixels."""
    return make_digits(tmp_path_factory.mktemp("scenes"), num_train=14, num_val=4, image_size=96)


@pytest.fixture
def tiny_config():
    """tiny_config("KEY", "VALUE", ...): the recipe of the digits, 3 classes, on the CPU."""

    def make(*opts):
        return get_config("digits/focal.yaml", ["MODEL.RETINANET.NUM_CLASSES", "3", *opts])

    return make


@pytest.fixture
def make_model(tiny_config, tmp_path):
    """make_model("KEY", "VALUE", stored={"thing_classes": ...}): its config and itself, with a checkpoint.

    It finds something in noise: its weights are random, with scores that lie far apart, so that no rounding matters.
    """

    def make(*opts, spread=16.0, stored=()):
        cfg = tiny_config("MODEL.RETINANET.SCORE_THRESH_TEST", "0.2", "INPUT.MIN_SIZE_TEST", "96", *opts)
        cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
        torch.manual_seed(0)
        model = build_model(cfg).eval()
        with torch.no_grad():
            model.head.cls_score.weight *= spread
            model.head.bbox_pred.weight *= 10
        torch.save({"model": model.state_dict(), **dict(stored)}, cfg.MODEL.WEIGHTS)
        return cfg, model

    return make


@pytest.fixture
def refused(tiny_config):
    """refused("message", "KEY", "VALUE", ...): building the model of such a config fails, and says why."""

    def check(message, *opts):
        with pytest.raises(ValueError, match=message):
            build_model(tiny_config(*opts))

    return check


@pytest.fixture(params=[0, 2**17], ids=["level by level", "levels as one"])
def levels(request, monkeypatch):
    """Computes the loss of each level by itself, as for large images, and of all levels at once, as for small ones."""
    monkeypatch.setattr("focal_plugin.heads._FEW_LOGITS", request.param)


@pytest.fixture
def make_batch():
    """make_batch([2, 0]): inputs of a model in training, with 2 objects in the first image and none in the second."""

    def make(num_objects, size=(96, 128), num_classes=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        batch = []
        for num in num_objects:
            xy = torch.rand(num, 2, generator=generator) * 60
            wh = 10 + torch.rand(num, 2, generator=generator) * 30
            instances = Instances(size)
            instances.gt_boxes = Boxes(torch.cat([xy, xy + wh], dim=1))
            instances.gt_classes = torch.randint(0, num_classes, (num,), generator=generator)
            image = torch.randint(0, 256, (3, *size), generator=generator).float()
            batch.append({"image": image, "instances": instances, "height": size[0], "width": size[1]})
        return batch

    return make


@pytest.fixture
def call_tool(monkeypatch, capfd):
    """call_tool("predict", "a.png", ...) runs a tool in this process: its exit code, stdout and stderr."""

    def run(name, *words):
        path = Path(__file__).resolve().parents[1] / "tools" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"tool_{name}", path)
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr(sys, "argv", [path.name, *map(str, words)])
        try:
            code = tool.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run
