"""The Python configs against their YAML forms: one model, one solver, one loader. And the script for them."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zygote
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.engine import hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from focal_plugin import get_config
from focal_plugin.data import register_coco_json
from focal_plugin.engine import FocalTrainer

NAMES = ["retina_focal", "retina_ohem"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """(YAML config, its model, Python config, its model), R-50 and all, from the same seed."""
    cfg = get_config(f"{request.param}.yaml", ["MODEL.DEVICE", "cpu"])
    lazy = LazyConfig.load(str(zygote.ROOT / "configs" / "lazy" / f"{request.param}.py"))
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.manual_seed(0)
    return cfg, model, lazy, instantiate(lazy.model)


def plain(value):
    """Return something comparable: what an attribute of a module holds, without the objects' addresses."""
    if isinstance(value, (str, int, float, type(None), torch.dtype, type)):
        return value
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, torch.nn.Module):
        return type(value)  # is looked at by itself
    if hasattr(value, "items"):
        return {key: plain(inner) for key, inner in value.items()}
    if hasattr(value, "__iter__"):
        return [plain(inner) for inner in value]
    if hasattr(value, "func"):
        return value.func.__qualname__, plain(value.args), plain(value.keywords)
    return type(value).__qualname__, plain(getattr(value, "__dict__", {}))


def test_models_are_equal(pair):
    """Of every module: anchors, matcher, thresholds, normalizer, pixel mean, the keys of OHEM, strides and paddings."""
    _, yaml_model, _, lazy_model = pair
    theirs, ours = yaml_model.state_dict(), lazy_model.state_dict()
    assert list(theirs) == list(ours) and all(torch.equal(theirs[name], ours[name]) for name in theirs)
    trained = [[(name, p.requires_grad) for name, p in m.named_parameters()] for m in (yaml_model, lazy_model)]
    assert trained[0] == trained[1] and len({is_trained for _, is_trained in trained[1]}) == 2  # some are frozen
    hidden = vars(torch.nn.Module()).keys() | {"_forward_pre_hooks"}
    for (name, theirs), (same_name, ours) in zip(yaml_model.named_modules(), lazy_model.named_modules()):
        assert (name, type(theirs)) == (same_name, type(ours))
        attributes = [{k: plain(v) for k, v in vars(m).items() if k not in hidden} for m in (theirs, ours)]
        assert attributes[0] == attributes[1], name
    assert {"test_nms_thresh", "anchor_matcher", "normalizer", "smooth_l1_beta"} <= vars(lazy_model).keys()


def test_optimizers_and_learning_rates_are_equal(pair):
    cfg, yaml_model, lazy, lazy_model = pair
    optimizer = copy.deepcopy(lazy.optimizer)
    optimizer.params.model = lazy_model
    theirs, ours = FocalTrainer.build_optimizer(cfg, yaml_model), instantiate(optimizer)
    settings, keys = [], ("lr", "weight_decay", "momentum", "nesterov", "dampening")
    for optimizer, model in ((theirs, yaml_model), (ours, lazy_model)):
        of = {p: [group[key] for key in keys] for group in optimizer.param_groups for p in group["params"]}
        settings.append({name: of.get(p) for name, p in model.named_parameters()})
    assert type(theirs) is type(ours) and settings[0] == settings[1]
    hook = hooks.LRScheduler(ours, instantiate(lazy.lr_multiplier))
    hook.trainer = SimpleNamespace(iter=0, max_iter=lazy.train.max_iter)
    hook.before_train()
    schedule = build_lr_scheduler(cfg, theirs)
    for step in (*range(0, 1010, 7), 999, 1000, *range(1010, 90000, 997), 59999, 60000, 79999, 80000, 89999):
        schedule.last_epoch = hook.scheduler.last_epoch = step
        assert hook.scheduler.get_lr() == pytest.approx(schedule.get_lr(), rel=1e-12), step


def test_data_evaluation_and_the_rest_of_the_run_are_equal(pair, scenes, restore_catalogs):
    cfg, _, lazy, _ = pair
    train, data, solver, loader = lazy.train, copy.deepcopy(lazy.dataloader), cfg.SOLVER, cfg.DATALOADER
    for split in ("train", "test"):
        theirs, ours = plain(DatasetMapper(cfg, split == "train")), plain(instantiate(data[split].mapper))
        assert theirs == ours and "ResizeShortestEdge" in str(ours)
        assert (data[split].dataset.names,) == cfg.DATASETS[split.upper()]
        assert data[split].num_workers == loader.NUM_WORKERS
    kept = (data.train.dataset.get("filter_empty", True), data.train.get("aspect_ratio_grouping", True))
    assert kept == (loader.FILTER_EMPTY_ANNOTATIONS, loader.ASPECT_RATIO_GROUPING)
    assert (train.init_checkpoint, train.seed) == (cfg.MODEL.WEIGHTS, cfg.SEED)
    assert (train.max_iter, train.eval_period) == (solver.MAX_ITER, cfg.TEST.EVAL_PERIOD)
    assert (train.checkpointer.period, train.amp.enabled) == (solver.CHECKPOINT_PERIOD, solver.AMP.ENABLED)
    assert (data.train.total_batch_size, Path(train.output_dir)) == (solver.IMS_PER_BATCH, Path(cfg.OUTPUT_DIR))
    assert not train.ddp.broadcast_buffers and not solver.CLIP_GRADIENTS.ENABLED

    register_coco_json("lazy_val", str(scenes / "val.json"), str(scenes / "val"))
    data.test.dataset.names = "lazy_val"
    theirs, ours = FocalTrainer.build_evaluator(cfg, "lazy_val"), instantiate(data.evaluator)
    assert isinstance(theirs, type(ours)) and list(ours._tasks) == list(theirs._tasks)
    assert Path(ours._output_dir) == Path(theirs._output_dir)


SMALL = """
from detectron2.layers import ShapeSpec

from .retina_ohem import dataloader, lr_multiplier, model, optimizer, train

# A quarter as wide, with norms for random weights, on images of 64 pixels.
model.num_classes = 10
model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "BN"
model.backbone.out_channels = 16
model.head.input_shape = [ShapeSpec(channels=16)] * 5
model.head.conv_dims = [16]
for _loader in (dataloader.train, dataloader.test):
    _loader.mapper.augmentations[0].short_edge_length = [64]
    _loader.num_workers = 0
dataloader.train.total_batch_size = 2
train.init_checkpoint, train.log_period, train.amp.enabled = "", 1, True
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="trains on the CPU")
def test_script_trains_on_two_cpu_workers_resumes_and_evaluates(tmp_path, scenes):
    for name in NAMES:
        shutil.copy(zygote.ROOT / "configs" / "lazy" / f"{name}.py", tmp_path)
    (tmp_path / "small.py").write_text(SMALL)
    final, console = tmp_path / "out" / "model_final.pth", tmp_path / "console.txt"
    common = ["--config-file", "small.py"]
    for split in ("train", "val"):
        common += ["--register", f"lazy_{split}={scenes / split}.json:{scenes / split}"]
    common += ["dataloader.train.dataset.names=lazy_train", "dataloader.test.dataset.names=lazy_val"]

    def run(flags, **train):
        argv = [*flags.split(), *common, *(f"train.{k}={v}" for k, v in {"output_dir": "out", **train}.items())]
        code = zygote.run(argv, console, script="lazyconfig_train_net.py", folder=tmp_path)
        assert code == 0, console.read_text()
        return [json.loads(line) for line in (final.parent / "metrics.json").open()]

    metrics = run("--num-gpus 2 --dist-url auto", max_iter=2, eval_period=1)
    assert {"loss_cls", "loss_box_reg", "lr", "loss_normalizer", "ohem/num_pos", "bbox/AP"} <= set().union(*metrics)
    before = torch.load(final, weights_only=True)
    assert before["iteration"] == 1 and before["model"]["loss_normalizer"] != 100

    steps = [line["iteration"] for line in run("--resume", max_iter=3) if "total_loss" in line]
    assert steps.count(0) == 1 and sorted(set(steps)) == [0, 1, 2]  # and not from 0 again
    console.unlink()
    run("--eval-only", output_dir="evaluated", init_checkpoint=final)
    assert "AP50" in console.read_text()
