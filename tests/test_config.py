"""Keys and loading: what is added, what is refused, and how the COCO configs differ from Detectron2's."""

import html
import re
import shlex
import subprocess
import sys
from pathlib import Path

import detectron2
import pytest
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from focal_plugin import add_focal_config, extend_config, get_config, load_config
from focal_plugin.config import config_dir, unknown_keys
from focal_plugin.config_yaml import all_keys, did_you_mean, lookup

ALL = sorted(p.relative_to(config_dir()).as_posix() for p in config_dir().rglob("*.yaml"))


def flat(cfg):
    return {key: lookup(cfg, key) for key in all_keys(cfg)}


def test_adding_twice_changes_nothing_and_upstreams_keys_stay():
    cfg, stock = get_cfg(), flat(get_cfg())
    add_focal_config(cfg)
    assert {k: v for k, v in flat(cfg).items() if k in stock} == stock
    cfg.MODEL.FOCAL.STAR_BETA = 0.5
    del cfg.MODEL.OHEM["SCOPE"]
    add_focal_config(cfg)
    assert cfg.MODEL.FOCAL.STAR_BETA == 0.5 and cfg.MODEL.OHEM.SCOPE == "image"


def test_every_key_has_a_comment_and_stands_in_the_docs():
    """With its default; the other keys of docs/config.md are Detectron2's."""
    stock, both = flat(get_cfg()), get_cfg()
    add_focal_config(both)
    root = Path(__file__).resolve().parents[1]
    source = (root / "focal_plugin" / "config.py").read_text(encoding="utf-8")
    body = source.partition("def add_focal_config")[2].partition("\ndef ")[0]
    comments = re.findall(r"# (.{4,})\n +[\w.]+\.setdefault\(\"(\w+)\"", body)
    added = {key: value for key, value in flat(both).items() if key not in stock}
    assert sorted(name for _, name in comments) == sorted(key.rpartition(".")[2] for key in added)
    page = (root / "docs" / "config.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z][\w.]+)` \| `(.*?)` \| (.{10,}) \|$", page, re.MULTILINE)
    documented = {key: default for key, default, _ in rows}
    assert {text for text, _ in comments} <= {html.unescape(text) for *_, text in rows}
    assert added.keys() <= documented.keys() and len(documented) > len(added)
    for key, default in documented.items():
        value = flat(both)[key]
        assert default == (f'"{value}"' if isinstance(value, str) else str(value)), key


# Every key in which a config for COCO differs from Detectron2's own and the plugin's defaults, and why.
META = {
    "MODEL.META_ARCHITECTURE": "FocalRetinaNet",  # the plugin's
    "SOLVER.REFERENCE_WORLD_SIZE": 8,  # Detectron2's recipe is for 8 GPUs, too, and does not say so
}
CE = {"MODEL.RETINANET.FOCAL_LOSS_GAMMA": 0.0}  # cross entropy
# Mining replaces weighting.
OHEM = {**META, **CE, "MODEL.RETINANET.FOCAL_LOSS_ALPHA": -1.0, "MODEL.FOCAL.HEAD": "OHEMHead"}
DIFFERENT = {
    "retina_focal.yaml": META,
    # The backbone; the schedule stays 1x, so that differ in one thing.
    "retina_focal_R_101.yaml": {
        **META,
        "MODEL.RESNETS.DEPTH": 101,
        "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-101.pkl",
    },
    "retina_ce.yaml": {**META, **CE, "MODEL.RETINANET.FOCAL_LOSS_ALPHA": 0.75},  # Table 1a's best
    "retina_ohem.yaml": OHEM,
    "retina_ohem_1to3.yaml": {**OHEM, "MODEL.OHEM.NEG_POS_RATIO": 3.0},
}


# The trained model, where Detectron2's own config has what it was trained from.
DIFFERENT |= {
    f"zoo/{path.name}": {**META, "MODEL.WEIGHTS": get_config(f"zoo/{path.name}").MODEL.WEIGHTS}
    for path in (config_dir() / "zoo").glob("*.yaml")
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_configs_for_coco_are_detectron2s_but_for_what_is_listed(name):
    path = name if "/" in name else "zoo/retinanet_R_50_FPN_1x.yaml"
    stock, ours = get_cfg(), flat(get_config(name))
    # It has a !!python tag; not through model_zoo, which wants an old setuptools.
    folder = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    stock.merge_from_file(str(folder / path.replace("zoo/", "COCO-Detection/")), allow_unsafe=True)
    want = {**flat(load_config("")), **flat(stock)}
    assert {key: ours[key] for key in want if ours[key] != want[key]} == DIFFERENT[name]


@pytest.mark.parametrize("name", ALL)
def test_every_config_is_plain_and_what_a_run_writes_down_of_it_can_be_loaded_again(name, tmp_path):
    """OUTPUT_DIR/config.yaml is cfg.dump(), which writes a list that stands in two places as an alias."""
    yaml.safe_load((config_dir() / name).read_text())
    cfg = load_config(config_dir() / name, ["MODEL.DEVICE", "cpu"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert load_config(tmp_path / "config.yaml").dump() == cfg.dump()
    if not re.search("Base|paper|zoo", name):  # those have a test of their own, with their models
        assert type(build_model(cfg)).__name__ == "FocalRetinaNet"


def test_the_way_out_of_aliases_works(tmp_path):
    """Detectron2's own trainers, and earlier versions of this plugin, have dumped them."""
    for name, cfg in (("old.yaml", get_cfg()), ("new.yaml", load_config(""))):
        cfg.SOLVER.MAX_ITER = 7
        (tmp_path / name).write_text(cfg.dump())
    with pytest.raises(ValueError, match=r"old.yaml: an alias or anchor, 'id\d+' \(line \d+\): write .*python -c") as e:
        load_config(tmp_path / "old.yaml")
    command = re.search(r"python -c .*", str(e.value))[0].replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command.replace("OLD", "old").replace("NEW", "again"), shell=True, cwd=tmp_path, check=True)
    assert load_config(tmp_path / "again.yaml") == load_config(tmp_path / "new.yaml")


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff_BASE_: one.yaml\nMODEL: {DEVICE: cpu}\n",
        "MODEL:\r\n  DEVICE: cpu\r\nSOLVER:\r\n  MAX_ITER: 90_000\r\n",
        "---\nSOLVER: {BASE_LR: 1e-3, NESTEROV: on, MAX_ITER: 0x10, STEPS: [0o10, 1:30], WEIGHT_DECAY: '1e-5'}\n...",
        "SOLVER: {BASE_LR: .inf, WEIGHT_DECAY: .5, WEIGHT_DECAY_BIAS: ~, NESTEROV: 'True'}\nOUTPUT_DIR: caf\u00e9",
        "DATASETS: {TRAIN: [a, b], TEST: '(\"a\",)'}\nMODEL: {FOCAL: {CLASS_ALPHA: '(.5, 1)'}}",
        "_BASE_: [one.yaml]\nSOLVER: {}",
        "_BASE_: []",
        "_BASE_: [one.yaml, two.yaml]\nMODEL: {RESNETS: {DEPTH: 18}}",
        "_BASE_: two.yaml\nSOLVER: {STEPS: '(3, 4)'}",
        "VERSION: 1\nMODEL: {WEIGHT: x.pkl, FPN: {NORM: GN}}",
        "VERSION: 2\nMODEL: {WEIGHTS: x.pkl}",
        "TEST: {AUG_ON: True}",
    ],
)
def test_files_are_read_and_merged_as_detectron2_does(tmp_path, content):
    (tmp_path / "one.yaml").write_text("MODEL: {FPN: {NORM: GN}}\nSOLVER: {MAX_ITER: 7, BASE_LR: 0.5}")
    (tmp_path / "two.yaml").write_text("_BASE_: one.yaml\nSOLVER: {BASE_LR: 0.25, STEPS: [1, 2]}")
    (tmp_path / "c.yaml").write_text(content, encoding="utf-8", newline="")
    theirs = get_cfg()
    add_focal_config(theirs)
    before = theirs.clone()
    theirs.merge_from_file(str(tmp_path / "c.yaml"), allow_unsafe=False)
    assert load_config(tmp_path / "c.yaml") == theirs
    assert (theirs != before) == (content != "_BASE_: []")


@pytest.mark.parametrize(
    "key, meant",
    [
        ("MODEL.FOCAL.HED", "MODEL.FOCAL.HEAD"),
        ("MODEL.ROI_HEDS.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("MODEL.RETINANET.NMS_THRESH", "MODEL.RETINANET.NMS_THRESH_TEST"),  # and not MODEL.OHEM's
        ("solver.base_lr", "SOLVER.BASE_LR"),
        ("FPN.NORM", "MODEL.FPN.NORM"),
        ("GAMMA", "MODEL.RETINANET.FOCAL_LOSS_GAMMA"),  # and not the schedule's
        ("BASE_LR", "SOLVER.BASE_LR"),
        ("MODEL.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"),
        ("MODEL.FOCAL.ALPHA", "MODEL.RETINANET.FOCAL_LOSS_ALPHA"),
        ("SOLVER.LR", "SOLVER.BASE_LR"),
        *((key, None) for key in ("SOLVER.BATCH_SIZE", "DATASETS.VAL", "SOLVER.EPOCHS", "MODEL.NAME", "MODEL..", "")),
    ],
)
def test_a_wrong_hint_is_worse_than_none(key, meant):
    assert did_you_mean(key, all_keys(load_config(""))) == (f"; did you mean {meant}?" if meant else "")


def test_keys_that_nobody_reads():
    cfg = load_config("")
    cfg.base_lr = cfg.QUX = cfg.MODEL.OHEM.NMS_TRESH = 1
    for key, hint in (("base_lr", "SOLVER.BASE_LR"), ("MODEL.OHEM.NMS_TRESH", "MODEL.OHEM.NMS_THRESH"), ("QUX", None)):
        (line,) = (line for line in unknown_keys(cfg) if line.startswith(f"{key}: no such key "))
        assert line.endswith(f"; did you mean {hint}?") if hint else "did you mean" not in line
    assert len(unknown_keys(cfg)) == 3


def test_our_own_keys_and_other_projects_nodes_are_known():
    for name in ("retina_ohem.yaml", "digits/dense.yaml", "paper/Base-paper.yaml"):
        cfg = get_config(name)
        cfg.COMPUTED_SIZE = 3
        cfg.OTHER, cfg.MODEL.OTHER = CfgNode({"BASE_LR": 1}), CfgNode({"BASE_LR": 1})
        assert unknown_keys(cfg) == []


@pytest.mark.parametrize(
    "name, message",
    [
        ("retina_fokal.yaml", "no config file 'retina_fokal.yaml'; .*did you mean retina_focal.yaml"),
        ("q", "no config file 'q'; .*has Base-Focal"),
        ("lazy/retina_focal.py", "retina_focal.py is a Python config, which tools/lazyconfig_train_net.py"),
    ],
)
def test_what_is_no_config_file(name, message):
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        get_config(name)


def test_keys_of_ones_own(monkeypatch):
    monkeypatch.setattr("focal_plugin.config._EXTENSIONS", [])

    @extend_config
    def add_keys(cfg):
        cfg.MODEL.FOCAL.MINE = 1.0

    assert extend_config(add_keys) is add_keys  # twice is once
    assert get_config("digits/focal.yaml").MODEL.FOCAL.MINE == 1.0
    assert repr(get_config("digits/focal.yaml", ["MODEL.FOCAL.MINE", "2"]).MODEL.FOCAL.MINE) == "2.0"
    with pytest.raises(ValueError, match=r"did you mean MODEL\.FOCAL\.MINE"):
        get_config("digits/focal.yaml", ["MODEL.FOCAL.MIN", "2"])


def test_import_registers_and_touches_nothing_else(tmp_path):
    code = (
        "import sys; import focal_plugin as f\n"
        "from detectron2.modeling import META_ARCH_REGISTRY as m\n"
        "from detectron2.data import DatasetCatalog as d\n"
        "assert m.get('FocalRetinaNet') is f.FocalRetinaNet and 'digits_train' in d\n"
        "assert 'sklearn' not in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    env = {"PYTHONPATH": str(config_dir().parent)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, check=True)
    assert not list(tmp_path.iterdir())
