"""A config on another number of workers: what is scaled, what is refused, warned of and said."""

from __future__ import annotations

import functools
import logging
import math
import re
from itertools import product

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler

from focal_plugin import get_config
from focal_plugin.config import unknown_keys
from focal_plugin.engine.auto_scale import check_scale, learning_rate_warning, scale_to_workers, start_banner

WORLDS = range(1, 17)


read_once = functools.cache(get_config)


def config(*opts, name="retina_focal.yaml"):
    cfg = read_once(name).clone()
    cfg.merge_from_list(list(map(str, opts)))
    return cfg


def multi_step(cfg):
    """Upstream's scheduler, which raises on STEPS that it cannot follow."""
    return build_lr_scheduler(cfg, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR))


# ------------------------------ scaling


def test_the_coco_config_on_one_worker():
    cfg = scale_to_workers(config(), 1)
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (2, 0.00125, 720_000)
    assert (solver.STEPS, solver.WARMUP_ITERS, solver.CHECKPOINT_PERIOD) == ((480_000, 640_000), 8000, 40_000)
    assert cfg.TEST.EVAL_PERIOD == 0 and solver.REFERENCE_WORLD_SIZE == 1 and scale_to_workers(cfg, 1) is cfg


@pytest.mark.parametrize("name", ["digits/focal.yaml", "digits/dense_192px.yaml", "examples/cells.yaml"])
def test_configs_for_one_worker_are_never_scaled(name):
    for world in (1, 2, 4):
        cfg = config(name=name)
        before = cfg.dump()
        assert scale_to_workers(cfg, world) is cfg and cfg.dump() == before


@pytest.mark.parametrize("world", WORLDS)
def test_what_a_worker_gets_stays(world):
    base = config("TEST.EVAL_PERIOD", 5000)
    cfg = scale_to_workers(base, world)
    old, new = base.SOLVER, cfg.SOLVER
    check_scale(cfg, world)
    assert new.IMS_PER_BATCH / world == old.IMS_PER_BATCH / 8
    assert math.isclose(new.BASE_LR / new.IMS_PER_BATCH, old.BASE_LR / old.IMS_PER_BATCH)
    pairs = [(old[key], new[key]) for key in ("MAX_ITER", "WARMUP_ITERS", "CHECKPOINT_PERIOD")]
    pairs += [*zip(old.STEPS, new.STEPS), (base.TEST.EVAL_PERIOD, cfg.TEST.EVAL_PERIOD)]
    for before, after in pairs:
        # In images, within half a step of rounding.
        assert abs(after * new.IMS_PER_BATCH - before * old.IMS_PER_BATCH) <= new.IMS_PER_BATCH / 2
    assert learning_rate_warning(cfg) == ""


@pytest.mark.parametrize("reference", [1, 3, 8])
@pytest.mark.parametrize("max_iter", [9, 10, 90])
def test_short_schedules_survive_rounding(reference, max_iter):
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", reference, "SOLVER.IMS_PER_BATCH", 48, "SOLVER.MAX_ITER", max_iter]
    opts += ["SOLVER.STEPS", "(1, 2, 4, 7, 8)", "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1]
    for world in WORLDS:
        cfg = scale_to_workers(config(*opts), world)
        solver = cfg.SOLVER
        assert solver.MAX_ITER >= 1 and solver.CHECKPOINT_PERIOD >= 1 and cfg.TEST.EVAL_PERIOD >= 1
        steps = list(solver.STEPS)
        assert steps == sorted(set(steps)) and all(0 < step < solver.MAX_ITER for step in steps)
        multi_step(cfg)


def test_decays_that_round_to_one_step_are_a_step_apart_or_dropped(caplog):
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.MAX_ITER", 40, "SOLVER.STEPS", "(16, 17, 38, 39)"]
    assert scale_to_workers(config(*opts), 1).SOLVER.STEPS == (16, 17, 38, 39)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "focal_plugin.engine.auto_scale"):
        assert scale_to_workers(config(*opts), 4).SOLVER.STEPS == (4, 5)
    assert "(16, 17, 38, 39), scaled to (4, 4, 10, 10): training ends after 10 steps" in caplog.text


def test_decays_that_were_wrong_before_are_left_to_upstream():
    cfg = scale_to_workers(config("SOLVER.STEPS", "(80000, 60000)"), 4)
    assert cfg.SOLVER.STEPS == (160_000, 120_000)
    with pytest.raises(ValueError):
        multi_step(cfg)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("world", [1, 8])
def test_the_config_given_is_not_changed(frozen, world):
    cfg = config()
    if frozen:
        cfg.freeze()
    before = cfg.dump()
    scaled = scale_to_workers(cfg, world)
    assert cfg.dump() == before
    assert cfg.is_frozen() == scaled.is_frozen() == scaled.SOLVER.is_frozen() == frozen


# ------------------------------ refused, with numbers that work


def suggestions(message):
    """(overrides, workers) for each way out that a message names."""
    pairs = re.findall(r"(SOLVER\.REFERENCE_WORLD_SIZE 0(?: SOLVER\.IMS_PER_BATCH \d+)?)", message)
    found = [(pair.split(), None) for pair in pairs]
    for numbers in re.findall(r"write SOLVER\.IMS_PER_BATCH (\d+) or (\d+)", message):
        found += [(["SOLVER.IMS_PER_BATCH", n], None) for n in numbers]
    for numbers in re.findall(r"write the batch of \d+ workers \((\d+), (\d+), \.\.\.\)", message):
        found += [(["SOLVER.IMS_PER_BATCH", n], None) for n in numbers]
    for least in re.findall(r"write SOLVER\.MAX_ITER (\d+) or more", message):
        found.append((["SOLVER.MAX_ITER", least], None))
    for numbers in re.findall(r"or train on ([\d or]+)$", message):
        found += [([], int(n)) for n in re.findall(r"\d+", numbers)]
    return found


def refusals():
    """Each kind of refusal on each number of workers: the kind, the number, its overrides, the message."""
    kinds = {
        "batch": ["SOLVER.REFERENCE_WORLD_SIZE", 0],
        "reference": ["SOLVER.REFERENCE_WORLD_SIZE", 8],
        "adamw": ["SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.OPTIMIZER", "ADAMW"],
        "negative": ["SOLVER.REFERENCE_WORLD_SIZE", -2],
        "no step": ["SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.MAX_ITER", 1],
    }
    for (kind, opts), world, batch in product(kinds.items(), WORLDS, (0, 1, 4, 12, 16, 30)):
        if kind == "no step" and batch == 0:
            continue  # two faults; a message is about one
        opts = [*opts, "SOLVER.IMS_PER_BATCH", batch]
        try:
            check_scale(config(*opts), world)
        except ValueError as error:
            yield kind, world, opts, str(error)


def test_every_number_that_a_refusal_names_works():
    seen = {}
    for kind, world, opts, message in refusals():
        ways = suggestions(message)
        assert ways, message
        seen[kind] = seen.get(kind, 0) + 1
        for more, workers in ways:
            cfg = config(*opts, *more)
            if more[:1] == ["SOLVER.MAX_ITER"]:
                with pytest.raises(ValueError):
                    check_scale(config(*opts, "SOLVER.MAX_ITER", int(more[1]) - 1), world)
            scaled = scale_to_workers(cfg, workers or world).SOLVER
            assert scaled.IMS_PER_BATCH % (workers or world) == 0 and scaled.MAX_ITER > 0
    assert seen.keys() == {"batch", "reference", "adamw", "negative", "no step"}


@pytest.mark.parametrize(
    "world, opts, message",
    [
        (
            3,
            ["SOLVER.REFERENCE_WORLD_SIZE", 0],
            "4 cannot be shared out evenly among 3 .* 3 or 6, or train on 1 or 2 or 4$",
        ),
        (
            8,
            [],
            "^SOLVER.IMS_PER_BATCH 4 cannot be shared out evenly among 8 workers: write SOLVER.IMS_PER_BATCH 8 or 16$",
        ),
        (
            1,
            [],
            r"^SOLVER.IMS_PER_BATCH 4 is for the 8 workers .*\(8, 16, ...\), which is scaled x 1/8 .*WORLD_SIZE 0 to",
        ),
        (2, ["SOLVER.OPTIMIZER", "ADAMW"], "^SOLVER.OPTIMIZER ADAMW .*rule for SGD only; .*REFERENCE_WORLD_SIZE 0 to"),
        (1, ["SOLVER.REFERENCE_WORLD_SIZE", -8], "^SOLVER.REFERENCE_WORLD_SIZE -8 is no number of workers"),
        (
            64,
            ["SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 4],
            "^SOLVER.MAX_ITER 4, .*x 1/8.*SOLVER.MAX_ITER 5 or more",
        ),
        (0, [], "^0 workers"),
    ],
)
def test_refused(world, opts, message):
    cfg = config("SOLVER.IMS_PER_BATCH", 4, *opts)
    for function in (check_scale, scale_to_workers):
        with pytest.raises(ValueError, match=message):
            function(cfg, world)


def test_adamw_is_not_refused_where_nothing_is_scaled():
    cfg = config("SOLVER.OPTIMIZER", "ADAMW")
    assert scale_to_workers(cfg, 8) is cfg


# ------------------------------ warned of


def test_a_learning_rate_for_a_larger_batch_is_warned_of():
    """Need 6: one of 8 GPUs on one."""
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", 0, "SOLVER.IMS_PER_BATCH", 2]
    warning = learning_rate_warning(config(*opts))
    assert re.search(
        r"SOLVER.BASE_LR 0.01 is 8 times .*batch of 2 .*set SOLVER.BASE_LR 0.00125 or SOLVER.CLIP", warning
    )
    (better,) = re.findall(r"set SOLVER.BASE_LR (\S+)", warning)
    assert learning_rate_warning(config(*opts, "SOLVER.BASE_LR", better)) == ""
    assert learning_rate_warning(config(*opts, "SOLVER.CLIP_GRADIENTS.ENABLED", True)) == ""
    assert learning_rate_warning(config(*opts, "SOLVER.OPTIMIZER", "ADAMW")) == ""


@pytest.mark.parametrize("batch", [1, 2, 3, 16, 40])
def test_twice_the_usual_learning_rate_is_not_warned_of(batch):
    usual = 0.01 * batch / 16
    opts = ["SOLVER.IMS_PER_BATCH", batch, "SOLVER.BASE_LR"]
    assert learning_rate_warning(config(*opts, 2 * usual)) == ""
    assert learning_rate_warning(config(*opts, 2.01 * usual)) != ""


@pytest.mark.parametrize(
    "key, meant",
    [
        ("BASE_LR", "SOLVER.BASE_LR"),
        ("base_lr", "SOLVER.BASE_LR"),
        ("MODEL.OHEM.NMS_TRESH", "MODEL.OHEM.NMS_THRESH"),
        ("SOLVER.MAXITER", "SOLVER.MAX_ITER"),
        ("INPUT.MIN_SIZE_TRIAN", "INPUT.MIN_SIZE_TRAIN"),
        ("QUX", None),
    ],
)
def test_keys_that_nobody_reads(key, meant):
    cfg = config()
    node = cfg
    *parents, name = key.split(".")
    for parent in parents:
        node = node[parent]
    setattr(node, name, 1)
    (line,) = unknown_keys(cfg)
    assert line.startswith(f"{key}: no such key ")
    assert line.endswith(f"; did you mean {meant}?") if meant else "did you mean" not in line


@pytest.mark.parametrize("name", ["retina_ohem.yaml", "digits/dense.yaml", "paper/Base-paper.yaml"])
def test_our_own_keys_and_other_projects_nodes_are_known(name):
    cfg = config(name=name)
    cfg.COMPUTED_SIZE = 3
    cfg.OTHER = CfgNode({"BASE_LR": 1})
    cfg.MODEL.OTHER = CfgNode({"BASE_LR": 1})
    assert unknown_keys(cfg) == []


# ------------------------------ said


def banner(base, world, start="FRESH", sizes=None, classes=("a", "b")):
    """The banner's lines by their names, after a look at the alignment."""
    sizes = {"coco_2017_train": 117_266, "coco_2017_val": 5000} if sizes is None else sizes
    text = start_banner(base, scale_to_workers(base, world), world, start=start, sizes=sizes, classes=classes)
    lines = text.split("\n")
    width = max(len(line.split("  ")[0]) for line in lines) + 2
    assert all(line[width - 1] == " " and line[width] != " " for line in lines)
    return {line[:width].rstrip(): line[width:] for line in lines}


def test_banner_of_a_scaled_run():
    said = banner(config("TEST.EVAL_PERIOD", 5000), 1, start="RESUMING at step 1200 from x.pth")
    assert said["start"] == "RESUMING at step 1200 from x.pth"
    assert said["workers"] == f"1 on {config().MODEL.DEVICE}"
    assert said["SOLVER.IMS_PER_BATCH"] == "16 -> 2"
    assert said["SOLVER.BASE_LR"] == "0.01 -> 0.00125"
    assert said["SOLVER.MAX_ITER"] == "90000 -> 720000" and said["epochs"] == "12.3"
    assert said["SOLVER.WARMUP_ITERS"] == "1000 -> 8000"
    assert said["SOLVER.STEPS"] == "(60000, 80000) -> (480000, 640000)"
    assert said["SOLVER.CHECKPOINT_PERIOD"] == "5000 -> 40000" and said["TEST.EVAL_PERIOD"] == "5000 -> 40000"
    assert said["optimizer"] == "SGD, WarmupMultiStepLR, gradients not clipped"
    assert said["train on"] == "coco_2017_train (117266 images)" and said["test on"] == "coco_2017_val (5000 images)"
    assert "overrides on the command line as well" in said["scaled"]
    assert said["scaled"].startswith("from SOLVER.REFERENCE_WORLD_SIZE 8 to 1 worker(s)")


@pytest.mark.parametrize("base, world", [(config(), 8), (config("SOLVER.REFERENCE_WORLD_SIZE", 0), 4)])
def test_banner_of_a_run_as_written(base, world):
    said = banner(base, world)
    assert "scaled" not in said and not any("->" in text for text in said.values())
    assert said["SOLVER.IMS_PER_BATCH"] == "16" and said["SOLVER.MAX_ITER"] == "90000" and said["epochs"] == "12.3"


def test_banner_of_the_digits():
    classes = [str(n) for n in range(10)]
    said = banner(config(name="digits/focal.yaml"), 1, sizes={"digits_test": 3}, classes=classes)
    assert said["SOLVER.BASE_LR"] == "0.003"
    assert said["optimizer"] == "ADAMW, WarmupCosineLR, gradients clipped (norm 1)"
    assert said["epochs"] == "?" and said["train on"] == "digits_train (? images)"
    assert said["classes"] == "10: 0, 1, 2, 3, 4, 5, ..."
    assert banner(config(), 8, classes=["x"])["classes"] == "1: x"
    # No epoch of no images.
    assert banner(config(), 8, sizes={"coco_2017_train": 0})["epochs"] == "?"


@pytest.mark.parametrize(
    "name, opts, loss",
    [
        (
            "retina_focal.yaml",
            ["MODEL.FOCAL.LOSS", "focal_star", "MODEL.FOCAL.CLASS_ALPHA", [0.1, 0.2]],
            "HEAD FocalHead, LOSS focal_star, STAR_BETA 1.0, CLASS_ALPHA [0.1, 0.2], NORMALIZER ema, "
            "NORMALIZER_SYNC False, MIN_LOW_QUALITY_IOU 0.0, FOCAL_LOSS_ALPHA 0.25, FOCAL_LOSS_GAMMA 2.0",
        ),
        (
            "retina_ohem_1to3.yaml",
            [],
            "FOCAL_LOSS_ALPHA -1.0, FOCAL_LOSS_GAMMA 0.0, BATCH_SIZE 128, NMS_THRESH 0.5, NEG_POS_RATIO 3.0, ",
        ),
        ("retina_focal.yaml", ["MODEL.META_ARCHITECTURE", "RetinaNet"], "that of RetinaNet"),
    ],
)
def test_banner_says_which_loss(name, opts, loss):
    assert loss in banner(config(*opts, name=name), 8)["loss"]


@pytest.mark.parametrize("enabled, precision, said", [(False, "float16", "off"), (True, "bfloat16", "bfloat16")])
def test_banner_says_which_precision(enabled, precision, said):
    assert banner(config("SOLVER.AMP.ENABLED", enabled, "SOLVER.AMP.PRECISION", precision), 8)["AMP"] == said
