"""Detectron2's model zoo: its configs but for what is listed, its checkpoints key for key and bit for bit."""

import os
import pickle
import warnings
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common import file_io

from focal_plugin import get_config
from focal_plugin.config import config_dir
from focal_plugin.engine.checkpoint import SafeCheckpointer

ZOO = sorted(path.stem for path in (config_dir() / "zoo").glob("*.yaml"))
THEIRS = Path(detectron2.__file__).parent / "model_zoo" / "configs" / "COCO-Detection"
NARROW = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "16", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.RETINANET.NUM_CONVS", "1"),
]


def stock_config(name, opts=()):
    cfg = get_cfg()
    # Its own file with a !!python tag; not through model_zoo, which wants an old setuptools.
    cfg.merge_from_file(str(THEIRS / f"{name}.yaml"), allow_unsafe=True)
    cfg.merge_from_list(list(opts))
    return cfg


def ours(name, opts=()):
    return get_config(f"zoo/{name}.yaml", opts)


def url(cfg):
    return cfg.MODEL.WEIGHTS.replace("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A dict of URL to bytes that stands for the network; ``fetched`` is what was asked of it."""
    files, fetched = {}, []

    def download(url, folder, *, filename):
        fetched.append(url)
        os.makedirs(folder, exist_ok=True)
        Path(folder, filename).write_bytes(files[url])
        return os.path.join(folder, filename)

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_io, "download", download)
    # What Detectron2 remembers of earlier downloads, for the rest of the process.
    monkeypatch.setattr(PathManager._path_handlers["https://"], "cache_map", {})
    return files, fetched


def stock(name):
    """Detectron2's RetinaNet of that name, narrow, with weights as if trained."""
    torch.manual_seed(0)
    model = build_model(stock_config(name, NARROW)).eval()
    for key, value in model.state_dict().items():
        if "norm" in key and key.endswith(("weight", "running_var")):
            # What is added at each of 33 blocks is kept small, as training does: not every score is to be 1.
            value.uniform_(0.5, 1.5).mul_(0.2 if "conv3.norm.weight" in key else 1)
        elif key.endswith(("bias", "running_mean")):
            value.normal_(std=0.1)  # the prior's bias as well: there is something to detect
    return model


def zoo_file(model, more=()):
    """What Detectron2's zoo has of a model: names to arrays, pickled."""
    arrays = {name: value.numpy() for name, value in {**model.state_dict(), **dict(more)}.items()}
    return pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, 4)


def test_every_retinanet_of_the_zoo_is_there_with_its_url():
    # Detectron2's .py of the 1x schedule is the same model in its other config language.
    assert sorted(path.stem for path in THEIRS.glob("retinanet_*.yaml")) == ZOO
    pytest.importorskip("pkg_resources", reason="detectron2.model_zoo wants setuptools<81")
    from detectron2.model_zoo import get_checkpoint_url

    assert [url(ours(name)) for name in ZOO] == [get_checkpoint_url(f"COCO-Detection/{name}.yaml") for name in ZOO]


@pytest.mark.parametrize("name", ZOO)
def test_names_and_shapes_are_detectron2s(name):
    theirs, mine = (
        {k: tuple(v.shape) for k, v in build_model(make(name, ["MODEL.DEVICE", "meta"])).state_dict().items()}
        for make in (stock_config, ours)
    )
    assert mine.pop("loss_normalizer") == ()  # a file without it leaves it as it is
    assert mine == theirs


@pytest.mark.parametrize("more", [{}, {"anchor_generator.cell_anchors.0": torch.zeros(9, 4)}], ids=["now", "2020"])
@pytest.mark.parametrize("name", ZOO)
def test_a_checkpoint_is_fetched_when_it_is_loaded_and_gives_detectron2s_detections(name, more, server, caplog):
    files, fetched = server
    theirs = stock(name)
    cfg = ours(name, NARROW)
    files[url(cfg)] = zoo_file(theirs, more)
    mine = build_model(cfg).eval()
    assert not fetched
    caplog.clear()  # of Detectron2's warning of its !!python tag

    checkpointer = SafeCheckpointer(mine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest = checkpointer.load(cfg.MODEL.WEIGHTS)
    assert fetched == [url(cfg)]
    assert rest["__author__"] == "Detectron2 Model Zoo" and "matching_heuristics" not in rest
    assert checkpointer.skipped == [] and not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")]
    assert all(torch.equal(mine.state_dict()[key], value) for key, value in theirs.state_dict().items())

    image = torch.randint(0, 256, (3, 96, 128), generator=torch.Generator().manual_seed(1)).float()
    with torch.no_grad():
        (a,), (b,) = (model([{"image": image, "height": 192, "width": 256}]) for model in (theirs, mine))
    a, b = a["instances"], b["instances"]
    assert len(a) > 10 and a.scores.isfinite().all() and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)

    checkpointer.load(cfg.MODEL.WEIGHTS)
    assert len(fetched) == 1  # it is in Detectron2's cache


def test_a_fetched_file_is_trusted_no_more_than_a_local_one(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, _ = server
    cfg = ours(ZOO[0], NARROW)
    files[url(cfg)] = b"cos\nmkdir\n(S'ran'\ntR."
    with pytest.raises(ValueError, match=r"model_final_\w+\.pkl is refused: .* would run code"):
        SafeCheckpointer(build_model(cfg)).load(cfg.MODEL.WEIGHTS)
    assert not (tmp_path / "ran").exists()
