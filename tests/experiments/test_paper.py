"""The tables as data, and a config for each of their rows."""

import pytest
import torch
import yaml
from detectron2.modeling import build_model

from focal_plugin import get_config
from focal_plugin.config import config_dir
from focal_plugin.experiments.paper import (
    BEST_OHEM,
    CAPTIONS,
    CE,
    FL,
    TABLES,
    anchor_settings,
    config_texts,
    focal,
    ohem,
    write_configs,
)

PAPER = config_dir() / "paper"
ROWS = [pytest.param(row, id=f"{table}-{row.key}") for table, rows in TABLES.items() for row in rows]


def row_of(table, key):
    return next(row for row in TABLES[table] if row.key == key)


# --- the data ---


def test_every_table_is_whole():
    assert {table: len(rows) for table, rows in TABLES.items()} == {
        "1a": 7,
        "1b": 7,
        "1c": 7,
        "1d": 11,  # the paper's 10, and cross entropy
        "1e": 10,
        "3": 4,
        "extra": 5,  # ours
    }
    assert CAPTIONS.keys() == TABLES.keys()
    for table, rows in TABLES.items():
        assert len({row.key for row in rows}) == len({row.title for row in rows}) == len(rows)
        assert all(row.table == table for row in rows)
    ours = [row.key for rows in TABLES.values() for row in rows if row.published is None]
    assert ours == [CE.key, ohem(128, 0.5, ratio=3).key, "ssd", f"{FL.key}_iou", f"{FL.key}_giou"]


@pytest.mark.parametrize("row", [p for p in ROWS if p.values[0].published])
def test_numbers_are_aps(row):
    numbers = row.published
    assert 0 <= numbers.AP <= numbers.AP75 <= numbers.AP50 <= 60
    assert (numbers.ms is None) == (numbers.APs is None) == (row.table != "1e")
    if numbers.APs:
        assert numbers.APs < numbers.APm < numbers.APl


def test_what_the_paper_says_of_its_tables():
    """Sentences of its text, which are not where the numbers were read."""
    ap = {table: {row.key: row.published.AP for row in rows if row.published} for table, rows in TABLES.items()}
    assert ap["1b"][FL.key] - ap["1b"][CE.key] == pytest.approx(2.9)  # "+2.9 over alpha-balanced CE"
    assert ap["1d"][FL.key] - ap["1d"][BEST_OHEM.key] == pytest.approx(3.2)  # "a gap of 3.2 AP"
    assert max((a, k) for k, a in ap["1d"].items() if k != FL.key)[1] == BEST_OHEM.key
    assert max(ap["1c"].values()) == ap["1c"]["fl_gamma2_alpha0.25_anchors2x3"] == 34.2
    assert ap["1a"]["ce_alpha0.75"] - ap["1a"]["ce_alpha0.5"] == pytest.approx(0.9)
    assert row_of("1e", "R-101-600").published.ms == 122
    assert row_of("1d", FL.key).published.AP == row_of("1e", "R-101-600").published.AP == 36.0


# --- the configs ---


def test_the_yamls_are_those_of_the_tables():
    texts = config_texts()
    assert {path.name for path in PAPER.glob("*.yaml")} == {*texts, "Base-paper.yaml"}
    for name, text in texts.items():
        assert (PAPER / name).read_text() == text, f"{name}: run python -m focal_plugin.experiments.paper"


def test_one_yaml_per_distinct_recipe():
    contents = [yaml.safe_dump(yaml.safe_load(text)) for text in config_texts().values()]
    assert len(set(contents)) == len(contents) == 44


def test_writing_removes_what_is_no_row(tmp_path):
    for name in ("R-50-600_gone.yaml", "Base-paper.yaml", "mine.yaml"):
        (tmp_path / name).write_text("")
    assert len(write_configs(tmp_path)) == 44
    assert {"Base-paper.yaml", "mine.yaml"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "R-50-600_gone.yaml").exists()


@pytest.mark.parametrize("row", ROWS)
def test_solver_and_image_size_are_the_papers(row):
    cfg = get_config(f"paper/{row.recipe}.yaml")
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.STEPS, solver.MAX_ITER) == (16, 0.01, (60000, 80000), 90000)
    assert (solver.OPTIMIZER, solver.MOMENTUM, solver.WEIGHT_DECAY, solver.GAMMA) == ("SGD", 0.9, 1e-4, 0.1)
    assert (500, pytest.approx(1 / 3)) == (solver.WARMUP_ITERS, solver.WARMUP_FACTOR)
    size = int(row.key.split("-")[2]) if row.table == "1e" else 600
    assert (size,) == cfg.INPUT.MIN_SIZE_TRAIN and size == cfg.INPUT.MIN_SIZE_TEST
    assert cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST == {600: 1000, 800: 1333}.get(size, round(size / 0.6))
    assert cfg.INPUT.RANDOM_FLIP == "horizontal"
    depth = {"1d": 101, "1e": int(row.key.split("-")[1]) if row.table == "1e" else 0}.get(row.table, 50)
    assert depth == cfg.MODEL.RESNETS.DEPTH and cfg.MODEL.WEIGHTS.endswith(f"MSRA/R-{depth}.pkl")


@pytest.mark.parametrize("row", ROWS)
def test_anchors_are_the_papers(row):
    cfg = get_config(f"paper/{row.recipe}.yaml").MODEL.ANCHOR_GENERATOR
    scales, ratios = map(int, row.key[-3::2]) if row.table == "1c" else (3, 3)
    assert [len(sizes) for sizes in cfg.SIZES] == [scales] * 5
    for level, sizes in enumerate(cfg.SIZES):
        assert sizes == pytest.approx([32 * 2**level * 2 ** (k / scales) for k in range(scales)])
    assert [[0.5, 1.0, 2.0] if ratios == 3 else [1.0]] == cfg.ASPECT_RATIOS


@pytest.mark.parametrize("row", ROWS)
def test_losses_are_the_papers(row):
    model = get_config(f"paper/{row.recipe}.yaml").MODEL
    loss = (model.FOCAL.HEAD, model.FOCAL.LOSS, model.RETINANET.FOCAL_LOSS_ALPHA, model.RETINANET.FOCAL_LOSS_GAMMA)
    words = dict(word.split("=") for word in _spell_out(row.key if row.table != "1e" else FL.key))
    if "ohem" in words:
        assert loss == ("OHEMHead", "focal", -1.0, 0.0)
        assert int(words["ohem"]) == model.OHEM.BATCH_SIZE and float(words["nms"]) == model.OHEM.NMS_THRESH
        assert float(words["ratio"]) == model.OHEM.NEG_POS_RATIO
    elif row.key == "ssd":
        assert loss == ("SSDHead", "focal", -1.0, 0.0) and model.SSD.NEG_POS_RATIO == 3
        assert model.RETINANET.BBOX_REG_WEIGHTS == (10, 10, 5, 5)
    elif "beta" in words:
        assert loss == ("FocalHead", "focal_star", 0.25, float(words["gamma"]))
        assert float(words["beta"]) == model.FOCAL.STAR_BETA
    else:
        assert loss == ("FocalHead", "focal", float(words["alpha"]), float(words.get("gamma", 0)))
    assert model.FOCAL.NORMALIZER == "batch" and model.FOCAL.MIN_LOW_QUALITY_IOU == 0.4
    assert model.RETINANET.PRIOR_PROB == 0.01
    assert (1.0 if row.key == "ssd" else 0.11) == model.RETINANET.SMOOTH_L1_LOSS_BETA
    assert words.get("box", "smooth_l1") == model.RETINANET.BBOX_REG_LOSS_TYPE
    assert model.RETINANET.IOU_THRESHOLDS == [0.4, 0.5] and model.RETINANET.IOU_LABELS == [0, -1, 1]
    assert (model.RETINANET.SCORE_THRESH_TEST, model.RETINANET.NMS_THRESH_TEST) == (0.05, 0.5)


def _spell_out(key):
    """`ohem1to3_128_nms0.5` in words that a test can compare."""
    kind, *rest = key.split("_")
    if kind.startswith("ohem"):
        batch, nms = rest
        return [f"ohem={batch}", f"nms={nms.removeprefix('nms')}", f"ratio={3 if '1to3' in kind else 0}"]
    box = [f"box={word}" for word in rest if word in ("iou", "giou")]
    return box + [
        f"{name}={word.removeprefix(name)}" for word in rest for name in ("alpha", "gamma", "beta") if name in word
    ]


@pytest.mark.parametrize("recipe", [name.removesuffix(".yaml") for name in config_texts()])
def test_every_recipe_builds(recipe):
    """On a device without memory or numbers: 40 ResNets in seconds."""
    cfg = get_config(f"paper/{recipe}.yaml", ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    anchors = len(cfg.MODEL.ANCHOR_GENERATOR.SIZES[0]) * len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0])
    assert model.head.cls_score.out_channels == (81 if recipe.endswith("ssd") else 80) * anchors
    assert type(model.head).__name__ == cfg.MODEL.FOCAL.HEAD


# --- on another profile ---


def test_ohem_batches_are_to_the_profiles_as_the_papers_to_128():
    base = get_config("digits/Base-digits.yaml")
    assert base.MODEL.OHEM.BATCH_SIZE == 32
    batches = [dict(ohem(batch, 0.5).overrides(base))["MODEL.OHEM.BATCH_SIZE"] for batch in (128, 256, 512)]
    assert batches == [32, 64, 128]


def test_anchors_start_from_the_profiles_first_size():
    base = get_config("digits/Base-digits.yaml")
    settings = dict(focal(2, 0.25, (2, 3)).overrides(base))
    assert settings["MODEL.ANCHOR_GENERATOR.SIZES"][0] == pytest.approx([12, 12 * 2**0.5])
    assert settings["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [[0.5, 1.0, 2.0]]
    assert not [key for key, _ in FL.overrides(base) if "ANCHOR" in key]
    with pytest.raises(ValueError, match="1 or 3"):
        anchor_settings(1, 2, [32])
