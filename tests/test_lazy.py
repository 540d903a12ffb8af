"""The Python configs against their YAML forms: one model, one solver, one loader. And the script for them."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper
from detectron2.engine import hooks
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from focal_plugin import get_config
from focal_plugin.data import make_digits, register_coco_json
from focal_plugin.engine import FocalTrainer

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["retina_focal", "retina_ohem"]


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """(YAML config, its model, Python config, its model), R-50 and all, from the same seed."""
    cfg = get_config(f"{request.param}.yaml", ["MODEL.DEVICE", "cpu"])
    lazy = LazyConfig.load(str(ROOT / "configs" / "lazy" / f"{request.param}.py"))
    torch.manual_seed(0)
    model = build_model(cfg)
    torch.manual_seed(0)
    return cfg, model, lazy, instantiate(lazy.model)


# ------------------------------ the model


def plain(value):
    """Something comparable: what an attribute of a module holds, without the objects' addresses."""
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


def test_models_have_equal_parameters(pair):
    _, yaml_model, _, lazy_model = pair
    ours, theirs = lazy_model.state_dict(), yaml_model.state_dict()
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    trained = [[(n, p.requires_grad) for n, p in m.named_parameters()] for m in (lazy_model, yaml_model)]
    assert trained[0] == trained[1]
    assert not all(requires_grad for _, requires_grad in trained[0])  # the first stages are frozen


def test_models_have_equal_attributes(pair):
    """Of every module: anchors, matcher, thresholds, normalizer, pixel mean, the keys of OHEM, strides and paddings."""
    _, yaml_model, _, lazy_model = pair
    modules = list(zip(yaml_model.named_modules(), lazy_model.named_modules()))
    for (name, theirs), (same_name, ours) in modules:
        assert (name, type(theirs)) == (same_name, type(ours))
        hidden = vars(torch.nn.Module()).keys() | {"_forward_pre_hooks"}
        attributes = [{k: plain(v) for k, v in vars(m).items() if k not in hidden} for m in (theirs, ours)]
        assert attributes[0] == attributes[1], name
        buffers = [dict(m.named_buffers(recurse=False)) for m in (theirs, ours)]
        assert buffers[0].keys() == buffers[1].keys()
        assert all(torch.equal(buffers[0][key], buffers[1][key]) for key in buffers[0]), name
    assert {"test_nms_thresh", "anchor_matcher", "normalizer", "smooth_l1_beta"} <= vars(lazy_model).keys()


def test_models_give_equal_losses_and_gradients(pair, make_batch):
    results = []
    for model in (copy.deepcopy(pair[1]), copy.deepcopy(pair[3])):
        model.train()
        for module in model.modules():  # random weights under frozen norms would overflow
            if type(module).__name__ == "FrozenBatchNorm2d":
                module.weight.fill_(0.5)
        losses = model(make_batch([2, 0], size=(64, 64), num_classes=80))
        sum(losses.values()).backward()
        results.append((losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (losses, grads), (lazy_losses, lazy_grads) = results
    assert all(torch.isfinite(loss) and loss > 0 for loss in losses.values())
    assert losses.keys() == lazy_losses.keys() and all(torch.equal(losses[k], lazy_losses[k]) for k in losses)
    assert grads.keys() == lazy_grads.keys() and all(torch.equal(grads[k], lazy_grads[k]) for k in grads)


# ------------------------------ the solver


def optimizers(pair):
    cfg, yaml_model, lazy, lazy_model = pair
    lazy = copy.deepcopy(lazy)
    lazy.optimizer.params.model = lazy_model
    return FocalTrainer.build_optimizer(cfg, yaml_model), instantiate(lazy.optimizer)


def by_parameter(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    keys = ("lr", "weight_decay", "momentum", "nesterov", "dampening")
    groups = optimizer.param_groups
    return {names[id(p)]: {key: group[key] for key in keys} for group in groups for p in group["params"]}


def test_optimizers_are_equal(pair):
    theirs, ours = optimizers(pair)
    assert isinstance(ours, torch.optim.SGD) and isinstance(theirs, torch.optim.SGD)
    settings = by_parameter(ours, pair[3])
    assert settings == by_parameter(theirs, pair[1])
    assert settings.keys() == {name for name, p in pair[3].named_parameters() if p.requires_grad}


def test_learning_rates_are_equal_at_every_step(pair):
    cfg, _, lazy, _ = pair
    theirs, ours = optimizers(pair)
    assert lazy.train.max_iter == cfg.SOLVER.MAX_ITER
    schedule = build_lr_scheduler(cfg, theirs)
    hook = hooks.LRScheduler(ours, instantiate(lazy.lr_multiplier))
    hook.trainer = SimpleNamespace(iter=0, max_iter=lazy.train.max_iter)
    hook.before_train()
    steps = [*range(0, 1010, 7), *range(1010, 90000, 997), 999, 1000, 59999, 60000, 79999, 80000, 89999]
    for step in sorted(steps):
        rates = []
        for scheduler in (schedule, hook.scheduler):
            scheduler.last_epoch = step
            rates.append(scheduler.get_lr())
        assert rates[1] == pytest.approx(rates[0], rel=1e-12), step


# ------------------------------ data, evaluation, the rest of the run


@pytest.mark.parametrize("is_train", [True, False])
def test_mappers_are_equal(pair, is_train):
    cfg, _, lazy, _ = pair
    theirs, ours = DatasetMapper(cfg, is_train), instantiate(lazy.dataloader["train" if is_train else "test"].mapper)
    assert plain(theirs) == plain(ours)
    assert "ResizeShortestEdge" in str(plain(ours))


def test_evaluators_are_equal(pair, tmp_path, restore_catalogs):
    cfg, _, lazy, _ = pair
    scenes = make_digits(tmp_path / "scenes", num_train=1, num_val=1, image_size=64)
    register_coco_json("lazy_val", str(scenes / "val.json"), str(scenes / "val"))
    lazy = copy.deepcopy(lazy)
    lazy.dataloader.test.dataset.names = "lazy_val"
    ours = instantiate(lazy.dataloader.evaluator)
    theirs = FocalTrainer.build_evaluator(cfg, "lazy_val")
    assert isinstance(theirs, type(ours))
    assert list(ours._tasks) == list(theirs._tasks)
    assert Path(ours._output_dir) == Path(theirs._output_dir)


def test_the_rest_of_the_run_is_equal(pair):
    cfg, _, lazy, _ = pair
    train, data, loader = lazy.train, lazy.dataloader, cfg.DATALOADER
    assert (data.train.dataset.names,) == cfg.DATASETS.TRAIN
    assert (data.test.dataset.names,) == cfg.DATASETS.TEST
    assert data.train.total_batch_size == cfg.SOLVER.IMS_PER_BATCH
    assert data.train.num_workers == data.test.num_workers == loader.NUM_WORKERS
    assert data.train.dataset.get("filter_empty", True) == loader.FILTER_EMPTY_ANNOTATIONS
    assert data.train.get("aspect_ratio_grouping", True) == loader.ASPECT_RATIO_GROUPING
    assert train.init_checkpoint == cfg.MODEL.WEIGHTS and train.seed == cfg.SEED
    assert train.eval_period == cfg.TEST.EVAL_PERIOD
    assert (train.checkpointer.period, train.amp.enabled) == (cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.AMP.ENABLED)
    assert Path(train.output_dir) == Path(cfg.OUTPUT_DIR)
    assert not train.ddp.broadcast_buffers and not cfg.SOLVER.CLIP_GRADIENTS.ENABLED


# ------------------------------ the script

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
def test_script_trains_on_two_cpu_workers_resumes_and_evaluates(tmp_path):
    scenes, out = make_digits(tmp_path / "scenes", num_train=4, num_val=2, image_size=64), tmp_path / "out"
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text((ROOT / "configs" / "lazy" / f"{name}.py").read_text())
    (tmp_path / "small.py").write_text(SMALL)
    command = [sys.executable, str(ROOT / "tools" / "lazyconfig_train_net.py"), "--config-file", "small.py"]
    for split in ("train", "val"):
        command += ["--register", f"lazy_{split}={scenes / f'{split}.json'}:{scenes / split}"]
    names = ["dataloader.train.dataset.names=lazy_train", "dataloader.test.dataset.names=lazy_val"]

    def run(*flags_and_overrides):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *flags_and_overrides], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("--num-gpus", "2", *names, "train.output_dir=out", "train.max_iter=2", "train.eval_period=1")
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert {"loss_cls", "loss_box_reg", "lr", "loss_normalizer", "ohem/num_pos", "bbox/AP"} <= set().union(*metrics)
    before = torch.load(out / "model_final.pth", weights_only=True)
    assert before["iteration"] == 1 and before["model"]["loss_normalizer"] != 100

    run("--resume", *names, "train.output_dir=out", "train.max_iter=3")
    metrics = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    steps = [line["iteration"] for line in metrics if "total_loss" in line]
    assert steps.count(0) == 1 and sorted(set(steps)) == [0, 1, 2]  # and not from 0 again
    weights = out / "model_final.pth"
    assert "AP50" in run("--eval-only", *names, "train.output_dir=evaluated", f"train.init_checkpoint={weights}")
