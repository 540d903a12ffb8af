"""The tables as data, and a config for each of their rows."""

import re

import pytest
import torch
import yaml
from detectron2.modeling import build_model

from focal_plugin import get_config
from focal_plugin.config import config_dir
from focal_plugin.experiments.paper import BEST_OHEM, CAPTIONS, CE, FL, TABLES, title_of

PAPER = config_dir() / "paper"
ROWS = [row for rows in TABLES.values() for row in rows]


@pytest.fixture(scope="module")
def configs():
    """(row, its config) of all tables."""
    loaded = {recipe: get_config(f"paper/{recipe}.yaml") for recipe in {row.recipe for row in ROWS}}
    return [(row, loaded[row.recipe]) for row in ROWS]


def test_every_table_is_whole():
    sizes = {"1a": 7, "1b": 7, "1c": 7, "1d": 11, "1e": 10, "3": 4, "extra": 5}  # 1d: the paper's 10, and CE
    assert {table: len(rows) for table, rows in TABLES.items()} == sizes and CAPTIONS.keys() == TABLES.keys()
    for table, rows in TABLES.items():
        assert len({row.key for row in rows}) == len({row.title for row in rows}) == len(rows)
        assert all(row.table == table and CAPTIONS[table].startswith(f"Table {table}:") for row in rows)
    ours = [row.key for row in ROWS if row.published is None]
    assert ours == [CE.key, "ohem1to3_128_nms0.5", "ssd", f"{FL.key}_iou", f"{FL.key}_giou"]
    for row in ROWS:
        if numbers := row.published:
            assert 0 <= numbers.AP <= numbers.AP75 <= numbers.AP50 <= 60
            assert (numbers.ms is None) == (numbers.APs is None) == (row.table != "1e")
            assert numbers.APs is None or numbers.APs < numbers.APm < numbers.APl


def test_what_the_paper_says_of_its_tables():
    """Sentences of its text, which are not where the numbers were read."""
    ap = {table: {row.key: row.published.AP for row in rows if row.published} for table, rows in TABLES.items()}
    assert ap["1b"][FL.key] - ap["1b"][CE.key] == pytest.approx(2.9)  # "+2.9 over alpha-balanced CE"
    assert ap["1d"][FL.key] - ap["1d"][BEST_OHEM.key] == pytest.approx(3.2)  # "a gap of 3.2 AP"
    assert max((a, k) for k, a in ap["1d"].items() if k != FL.key)[1] == BEST_OHEM.key
    assert max(ap["1c"].values()) == ap["1c"]["fl_gamma2_alpha0.25_anchors2x3"] == 34.2
    assert ap["1a"]["ce_alpha0.75"] - ap["1a"]["ce_alpha0.5"] == pytest.approx(0.9)
    (fl_600,) = (row.published for row in TABLES["1e"] if row.key == "R-101-600")
    assert fl_600.ms == 122 and ap["1d"][FL.key] == fl_600.AP == 36.0


def test_a_yaml_says_what_its_row_does_and_nothing_else(configs):
    base = get_config("paper/Base-paper.yaml")
    assert {path.stem for path in PAPER.glob("*.yaml")} == {*(row.recipe for row in ROWS), "Base-paper"}
    assert len({cfg.dump() for _, cfg in configs}) == 44  # one for each distinct recipe
    for row, cfg in configs:
        depth, size = map(int, row.network.split("-")[1:])
        settings = {"MODEL.WEIGHTS": f"detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl", **row.overrides(base)}
        settings |= {"MODEL.RESNETS.DEPTH": depth, "INPUT.MIN_SIZE_TRAIN": (size,), "INPUT.MIN_SIZE_TEST": size}
        settings |= {f"INPUT.MAX_SIZE_{split}": round(size * 1000 / 600) for split in ("TRAIN", "TEST")}
        expected = get_config("paper/Base-paper.yaml", [word for pair in settings.items() for word in pair])
        assert cfg == expected, f"configs/paper/{row.recipe}.yaml: to say on top of its base {settings}"


def test_solver_image_size_and_anchors_are_the_papers(configs):
    for row, cfg in configs:
        solver, sizes, anchors = cfg.SOLVER, cfg.INPUT, cfg.MODEL.ANCHOR_GENERATOR
        assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WARMUP_ITERS) == (16, 0.01, 500)
        assert (solver.MAX_ITER, solver.STEPS, solver.GAMMA) == (90000, (60000, 80000), 0.1)
        assert (solver.OPTIMIZER, solver.MOMENTUM, solver.WEIGHT_DECAY) == ("SGD", 0.9, 1e-4)
        assert pytest.approx(1 / 3) == solver.WARMUP_FACTOR and sizes.RANDOM_FLIP == "horizontal"

        depth, size = map(int, row.key.split("-")[1:]) if row.table == "1e" else (101 if row.table == "1d" else 50, 600)
        assert depth == cfg.MODEL.RESNETS.DEPTH and cfg.MODEL.WEIGHTS.endswith(f"MSRA/R-{depth}.pkl")
        assert ((size,), size) == (sizes.MIN_SIZE_TRAIN, sizes.MIN_SIZE_TEST)
        longest = {600: 1000, 800: 1333}.get(size, round(size / 0.6))
        assert sizes.MAX_SIZE_TRAIN == sizes.MAX_SIZE_TEST == longest

        scales, ratios = map(int, row.key[-3::2]) if row.table == "1c" else (3, 3)
        assert len(anchors.SIZES) == 5
        for level, sizes in enumerate(anchors.SIZES):
            assert sizes == pytest.approx([32 * 2**level * 2 ** (k / scales) for k in range(scales)])
        assert [[0.5, 1.0, 2.0] if ratios == 3 else [1.0]] == anchors.ASPECT_RATIOS


def test_losses_are_the_papers(configs):
    """What a row's key says, spelled out."""
    for row, cfg in configs:
        retinanet, focal, ohem = cfg.MODEL.RETINANET, cfg.MODEL.FOCAL, cfg.MODEL.OHEM
        key = FL.key if row.table == "1e" else row.key
        numbers = {name: float(number) for name, number in re.findall(r"(gamma|alpha|beta|nms)([\d.]+)", key)}
        loss = (focal.HEAD, focal.LOSS, retinanet.FOCAL_LOSS_ALPHA, retinanet.FOCAL_LOSS_GAMMA)
        if key.startswith("ohem"):
            assert loss == ("OHEMHead", "focal", -1.0, 0.0)
            assert (int(key.split("_")[1]), numbers["nms"]) == (ohem.BATCH_SIZE, ohem.NMS_THRESH)
            assert (3 if key.startswith("ohem1to3") else 0) == ohem.NEG_POS_RATIO
        elif key == "ssd":
            assert loss == ("SSDHead", "focal", -1.0, 0.0) and cfg.MODEL.SSD.NEG_POS_RATIO == 3
            assert retinanet.BBOX_REG_WEIGHTS == (10, 10, 5, 5)
        elif key.startswith("flstar"):
            assert loss == ("FocalHead", "focal_star", 0.25, numbers["gamma"]) and numbers["beta"] == focal.STAR_BETA
        else:
            assert loss == ("FocalHead", "focal", numbers["alpha"], numbers.get("gamma", 0))
        box_loss = re.search(r"_(g?iou)$", key)
        assert (box_loss[1] if box_loss else "smooth_l1") == retinanet.BBOX_REG_LOSS_TYPE
        assert focal.NORMALIZER == "batch" and focal.MIN_LOW_QUALITY_IOU == 0.4 and retinanet.PRIOR_PROB == 0.01
        assert (1.0 if key == "ssd" else 0.11) == retinanet.SMOOTH_L1_LOSS_BETA
        assert retinanet.IOU_THRESHOLDS == [0.4, 0.5] and retinanet.IOU_LABELS == [0, -1, 1]
        assert (retinanet.SCORE_THRESH_TEST, retinanet.NMS_THRESH_TEST) == (0.05, 0.5)
        if row.table not in ("1c", "1e"):  # whose titles are what they vary
            assert title_of(cfg) == row.title


def test_every_model_builds(configs):
    """On a device without memory or numbers; rows that differ in images or solver alone have one model."""
    for cfg in {cfg.MODEL.dump(): cfg for _, cfg in configs}.values():
        cfg = cfg.clone()
        cfg.MODEL.DEVICE = "meta"
        with torch.device("meta"):
            model = build_model(cfg)
        anchors = len(cfg.MODEL.ANCHOR_GENERATOR.SIZES[0]) * len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0])
        assert model.head.cls_score.out_channels == (81 if cfg.MODEL.FOCAL.HEAD == "SSDHead" else 80) * anchors
        assert type(model.head).__name__ == cfg.MODEL.FOCAL.HEAD


def test_on_another_profile_titles_examples_and_anchors_are_to_its_own():
    cfg = get_config("digits/ohem.yaml", ["MODEL.OHEM.NMS_THRESH", "0.0", "MODEL.OHEM.NEG_POS_RATIO", "3.0"])
    assert title_of(cfg) == "OHEM 1:3 32/no NMS" == title_of(yaml.safe_load(cfg.dump()))
    boxes = ["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "-1", "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", "diou"]
    assert title_of(get_config("digits/focal.yaml", boxes)) == "FL (γ 2, no α), DIoU"
    base = get_config("digits/Base-digits.yaml")
    examples = {row.key: row.overrides(base).get("MODEL.OHEM.BATCH_SIZE") for row in TABLES["1d"]}
    assert [examples[f"ohem_{batch}_nms0.5"] for batch in (128, 256, 512)] == [32, 64, 128]
    (settings,) = (row.overrides(base) for row in TABLES["1c"] if row.anchors == (2, 3))
    assert settings["MODEL.ANCHOR_GENERATOR.SIZES"][0] == pytest.approx([12, 12 * 2**0.5])
    assert settings["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [[0.5, 1.0, 2.0]]
    assert not [key for key in FL.overrides(base) if "ANCHOR" in key]
