"""A config on another number of workers: what is scaled, what is refused, warned of and said."""

import functools
import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch

from focal_plugin import get_config
from focal_plugin.engine import FocalTrainer
from focal_plugin.engine.launch import start_banner
from focal_plugin.engine.preflight import check_scale, learning_rate_warning, scale_to_workers

WORLDS = range(1, 17)
SGD = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
AS_WRITTEN = "SOLVER.REFERENCE_WORLD_SIZE 0"
read_once = functools.cache(get_config)


def config(opts="", name="retina_focal.yaml"):
    cfg = read_once(name).clone()
    cfg.merge_from_list(opts.split())
    return cfg


def scale(given, world):
    """Return it scaled: another config, if there is anything to scale. The given one is not changed, frozen or not."""
    before = given.dump()
    if world % 2:
        given.freeze()
    scaled = scale_to_workers(given, world)
    assert given.dump() == before and (scaled is given) == (given.SOLVER.REFERENCE_WORLD_SIZE in (0, world))
    assert given.is_frozen() == scaled.is_frozen() == scaled.SOLVER.is_frozen() == world % 2
    return scaled


@pytest.mark.parametrize("world", WORLDS)
def test_what_a_worker_gets_stays(world):
    base = config("TEST.EVAL_PERIOD 5000")
    cfg = scale(base, world)
    old, new = base.SOLVER, cfg.SOLVER
    assert new.IMS_PER_BATCH / world == old.IMS_PER_BATCH / 8
    assert math.isclose(new.BASE_LR / new.IMS_PER_BATCH, old.BASE_LR / old.IMS_PER_BATCH)
    pairs = [(old[key], new[key]) for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD")]
    for before, after in (*pairs, *zip(old.STEPS, new.STEPS), (5000, cfg.TEST.EVAL_PERIOD)):
        # In images, within half a step of rounding.
        assert abs(after * new.IMS_PER_BATCH - before * old.IMS_PER_BATCH) <= new.IMS_PER_BATCH / 2
    assert learning_rate_warning(cfg) == ""


@pytest.mark.parametrize("reference", [1, 3, 8])
@pytest.mark.parametrize("max_iter", [9, 10, 90])
def test_short_schedules_survive_rounding(reference, max_iter):
    opts = f"SOLVER.REFERENCE_WORLD_SIZE {reference} SOLVER.IMS_PER_BATCH 48 SOLVER.MAX_ITER {max_iter}"
    opts += " SOLVER.STEPS 1,2,4,7,8 SOLVER.CHECKPOINT_PERIOD 1 TEST.EVAL_PERIOD 1"
    for world in WORLDS:
        cfg = scale(config(opts), world)
        assert cfg.SOLVER.MAX_ITER >= 1 and cfg.SOLVER.CHECKPOINT_PERIOD >= 1 and cfg.TEST.EVAL_PERIOD >= 1
        steps = list(cfg.SOLVER.STEPS)
        assert steps == sorted(set(steps)) and all(0 < step < cfg.SOLVER.MAX_ITER for step in steps)
        FocalTrainer.build_lr_scheduler(cfg, SGD)


def test_decays_that_round_to_one_step_are_a_step_apart_or_dropped(caplog):
    cfg = config("SOLVER.REFERENCE_WORLD_SIZE 1 SOLVER.MAX_ITER 40 SOLVER.STEPS 16,17,38,39")
    assert scale(cfg.clone(), 1).SOLVER.STEPS == (16, 17, 38, 39) and not caplog.records
    with caplog.at_level(logging.WARNING, "focal_plugin.engine.preflight"):
        assert scale(cfg, 4).SOLVER.STEPS == (4, 5)
    assert "(16, 17, 38, 39), scaled to (4, 5, 10, 11): training ends after 10 steps, without (10, 11)" in caplog.text


@pytest.mark.parametrize("written, steps", [("80000,60000", (160000, 120000)), ("2,1", (4, 2)), ("1,1", (2, 2))])
def test_decays_that_were_wrong_before_are_left_to_detectron2(written, steps):
    cfg = scale(config(f"SOLVER.STEPS {written}"), 4)
    assert steps == cfg.SOLVER.STEPS
    with pytest.raises(ValueError):
        FocalTrainer.build_lr_scheduler(cfg, SGD)


@pytest.mark.parametrize("batch", [1, 4, 12, 16, 30])
@pytest.mark.parametrize("opts", [AS_WRITTEN, "", "SOLVER.OPTIMIZER ADAMW"])
def test_every_number_that_a_refusal_names_works(opts, batch):
    opts, refused = f"{opts} SOLVER.IMS_PER_BATCH {batch} ", 0
    for world in WORLDS:
        try:
            check_scale(config(opts), world)
        except ValueError as error:
            refused += 1
            ways = re.findall(r"SOLVER.REFERENCE_WORLD_SIZE 0 SOLVER.IMS_PER_BATCH \d+", str(error))
            if "ADAMW" not in opts or world == 8:
                batches = re.findall(r"write SOLVER.IMS_PER_BATCH (\d+) or (\d+)", str(error))
                ways += [f"SOLVER.IMS_PER_BATCH {number}" for pair in batches for number in pair]
            assert ways, error
            for way in ways:
                assert scale(config(opts + way), world).SOLVER.IMS_PER_BATCH % world == 0
    assert refused or (batch == 16 and "ADAMW" not in opts)


@pytest.mark.parametrize(
    "world, opts, message",
    [
        (3, "SIZE 0", "BATCH 4 cannot .* 3 workers: write .* 3 or 6, or train on 1 or 2$"),
        (8, "SIZE 8", "^SOLVER.IMS_PER_BATCH 4 cannot .* 8 workers: write SOLVER.IMS_PER_BATCH 8 or 16$"),
        (1, "SIZE 8", "BATCH 4 cannot .* 8 workers: .* 8 or 16. .* scaled to 1; .*SIZE 0 SOLVER.IMS_PER_BATCH 4$"),
        (2, "SIZE 8 SOLVER.OPTIMIZER ADAMW", "^SOLVER.OPTIMIZER ADAMW: .*SGD only.*SIZE 0"),
        (16, "SIZE 8 SOLVER.IMS_PER_BATCH 8 SOLVER.MAX_ITER 1", "MAX_ITER 1 would leave no step: write .* 2 or"),
        (1, "SIZE -1", "^SOLVER.REFERENCE_WORLD_SIZE -1: must be a number of workers"),
        (1, "SIZE 0 SOLVER.IMS_PER_BATCH 0", "BATCH 0 cannot .*: write .* 1 or 2$"),
    ],
)
def test_refused(world, opts, message):
    cfg = config(f"SOLVER.IMS_PER_BATCH 4 SOLVER.REFERENCE_WORLD_{opts}")
    for function in (check_scale, scale_to_workers):
        with pytest.raises(ValueError, match=message):
            function(cfg, world)


@pytest.mark.parametrize("batch", [1, 2, 3, 16, 40])
def test_a_learning_rate_for_a_larger_batch_is_warned_of(batch):
    """Users' need: the learning rate of 8 GPUs on one."""
    usual = 0.01 * batch / 16
    opts = f"SOLVER.IMS_PER_BATCH {batch} SOLVER.BASE_LR {8 * usual} "
    text = learning_rate_warning(config(opts))
    said = re.search(rf"is 8 times .*batch of {batch} .*set (SOLVER.BASE_LR \S+) or (SOLVER.CLIP\S+ True)", text)
    for way in (*said.groups(), f"SOLVER.BASE_LR {2 * usual}", "SOLVER.OPTIMIZER ADAMW"):
        assert learning_rate_warning(config(opts + way)) == ""


def banner(written, world, start_iter=0):
    """The banner's texts by their names, of a trainer whose loader is not ours."""
    trainer = SimpleNamespace(cfg=scale(written, world), unscaled_cfg=written, start_iter=start_iter)
    trainer.checkpointer = trainer.data_loader = None
    return dict(re.split("  +", line, maxsplit=1) for line in start_banner(trainer).split("\n"))


def test_banner_of_a_scaled_run():
    said = banner(config("TEST.EVAL_PERIOD 5000 OUTPUT_DIR runs/a"), 1, start_iter=1200)
    assert said.pop("SOLVER.REFERENCE_WORLD_SIZE").startswith("8 -> 1; ")
    del said["data"], said["loss"]
    assert said == {
        "start": "RESUMING after step 1200, from runs/a",
        "SOLVER.IMS_PER_BATCH": "16 -> 2",
        "SOLVER.BASE_LR": "0.01 -> 0.00125",
        "SOLVER.MAX_ITER": "90000 -> 720000",
        "SOLVER.WARMUP_ITERS": "1000 -> 8000",
        "SOLVER.STEPS": "(60000, 80000) -> (480000, 640000)",
        "SOLVER.CHECKPOINT_PERIOD": "5000 -> 40000",
        "TEST.EVAL_PERIOD": "5000 -> 40000",
        "schedule": "720000 steps of 2 images, ? epochs",
        "optimizer": "SGD, WarmupMultiStepLR of 0.00125, gradients not clipped, float32",
    }


def test_banner_of_a_run_as_written():
    said = banner(config(), 8)
    assert said == banner(config(AS_WRITTEN), 4)
    assert said.keys() == {"start", "data", "schedule", "optimizer", "loss"}
    assert said["schedule"].startswith("90000 steps of 16 images")
    assert said["data"] == "? images of coco_2017_train; tested on coco_2017_val"
    assert re.match(r"HEAD FocalHead, LOSS focal, .*FOCAL_LOSS_ALPHA 0\.25, FOCAL_LOSS_GAMMA 2\.0$", said["loss"])
    opts = "SOLVER.AMP.ENABLED True SOLVER.AMP.PRECISION bfloat16 DATASETS.TEST ()"
    said = banner(config(opts, "digits/focal.yaml"), 1)
    assert said["optimizer"] == "ADAMW, WarmupCosineLR of 0.003, gradients clipped (norm 1), bfloat16"
    assert said["data"] == "? images of digits_train; tested on nothing"
    ohem = banner(config(name="retina_ohem_1to3.yaml"), 8)["loss"]
    assert "FOCAL_LOSS_GAMMA 0.0, BATCH_SIZE 128, NMS_THRESH 0.5, NEG_POS_RATIO 3.0, " in ohem
    assert banner(config("MODEL.META_ARCHITECTURE RetinaNet"), 8)["loss"] == "that of RetinaNet"
