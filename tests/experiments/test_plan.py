"""From a table and a profile to runs."""

import json
import shutil

import pytest

from focal_plugin import get_config
from focal_plugin.config import config_dir
from focal_plugin.config_yaml import lookup
from focal_plugin.engine import argument_parser
from focal_plugin.experiments import plan
from focal_plugin.experiments.paper import BEST_OHEM, FL, TABLES
from focal_plugin.experiments.plan import choose_rows, describe_plan, load_profile, make_runs


@pytest.fixture
def runs_of(tmp_path):
    def make(table, name, *overrides, rows=(), seeds=(1,), **options):
        profile = load_profile(name, overrides=overrides)
        return make_runs(choose_rows(table, profile, rows), profile, seeds, tmp_path, **options)

    return make


def config_of(run):
    """What train_net.py makes of a run's command line."""
    args = argument_parser().parse_args(run.command[2:])
    assert args.resume
    return get_config(args.config_file, args.opts)


def test_a_run_trains_what_its_row_says(runs_of):
    base = get_config("digits/Base-digits.yaml")
    for table in TABLES.keys() - {"1e"}:
        for row, run in zip(TABLES[table], runs_of(table, "digits", seeds=[7])):
            cfg = config_of(run)
            assert cfg.SEED == 7 and run.max_iter == cfg.SOLVER.MAX_ITER and str(run.folder) == cfg.OUTPUT_DIR
            assert {key: lookup(cfg, key) for key in row.overrides(base)} == row.overrides(base)
    (run,) = runs_of("1d", "digits", "MODEL.OHEM.NMS_THRESH", "0.3", "SOLVER.MAX_ITER", "5", rows=[BEST_OHEM.key])
    assert config_of(run).MODEL.OHEM.NMS_THRESH == 0.3 and run.max_iter == 5  # what is typed wins


def test_coco_rows_train_with_the_papers_configs_on_the_gpus_there_are(runs_of):
    (run,) = runs_of("1d", "coco", rows=[BEST_OHEM.key], num_gpus=8)
    assert run.command[3].endswith("R-101-600_ohem_128_nms0.5.yaml") and run.command[5:7] == ("--num-gpus", "8")
    assert config_of(run).MODEL.RESNETS.DEPTH == 101 and run.max_iter == 90000
    networks = [run.title for run in runs_of("1e", "coco")]
    assert networks[0] == "R-50-400 FL (γ 2, α .25)" and len(set(networks)) == 10
    assert runs_of("1c", "coco")[0].title == "FL (γ 2, α .25) anchors 1x1"
    # The configs are for 8; Detectron2 scales batch and steps, and the plan counts what will be trained.
    (run,) = runs_of("1d", "coco", rows=[BEST_OHEM.key], num_gpus=2)
    assert (run.max_iter, run.images_per_step) == (360000, 4)
    with pytest.raises(ValueError, match="IMS_PER_BATCH 12 cannot be shared out evenly among 8 workers"):
        runs_of("1d", "coco", "SOLVER.IMS_PER_BATCH", "12", rows=[BEST_OHEM.key])


def test_each_seed_comes_whole_and_tables_share_the_runs_of_rows_they_share(runs_of):
    runs = runs_of("1d", "digits", seeds=[3, 1])
    assert [run.seed for run in runs] == [3] * 11 + [1] * 11
    assert len({run.folder for run in runs}) == len({run.fingerprint for run in runs}) == 22
    assert (runs[3].title, runs[9].title) == ("OHEM 32/.5", "FL (γ 2, α .25)")
    assert len({run.method for table in ("1a", "1b", "1d", "3") for run in runs_of(table, "digits")}) == 7 + 6 + 9 + 2
    same = [runs_of(t, "coco", rows=[k])[0] for t, k in [("1b", FL.key), ("3", FL.key), ("1e", "R-50-600")]]
    assert len({(run.folder, run.fingerprint) for run in same}) == 1


def test_a_fingerprint_is_of_config_seed_workers_data_weights_and_code_that_trains(
    runs_of, tmp_path, monkeypatch, restore_catalogs
):
    copy = shutil.copytree(plan._PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(plan, "_PACKAGE", copy)
    weights, truth = tmp_path / "weights.pth", tmp_path / "truth.json"

    def one(*overrides, edit=None, **options):
        if edit:
            (copy / edit).write_text((copy / edit).read_text() + "# a typo mended\n")
        return runs_of("1d", "digits", *overrides, rows=[FL.key], **options)[0].fingerprint

    fingerprints = [one(), one(seeds=[2]), one("SOLVER.MAX_ITER", "5"), one(num_gpus=2)]
    for content in ("1", "2"):
        weights.write_text(content)
        fingerprints.append(one("MODEL.WEIGHTS", str(weights)))
        coco = {"categories": [{"id": 1, "name": content}], "images": [], "annotations": []}
        truth.write_text(json.dumps(coco))
        load_profile("digits", [f"corrected={truth}:{tmp_path}"])
        fingerprints.append(one("DATASETS.TRAIN", '("corrected",)'))
    for name in ("doctor.py", "mmdet.py", "experiments/report.py", "deploy/__init__.py", "eval/page.py"):
        assert one(edit=name) == fingerprints[0], name
    for name in ("heads.py", "losses/focal.py", "engine/guard.py", "data/loader.py"):
        fingerprints.append(one(edit=name))
    assert len(set(fingerprints)) == 12


def test_a_plan_learns_from_what_has_run(runs_of):
    runs = runs_of("1d", "digits", rows=[FL.key, BEST_OHEM.key])
    folder = runs[0].folder
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"iteration": 519, "total_loss": 1.0, "time": 0.3}\n{"iteration": 539, "to')
    (folder / "model_0000499.pth").touch()
    for known, state in ((None, "no earlier run"), ("another", "--fresh trains it again"), (runs[0].fingerprint, "")):
        if known:
            (folder / "run.json").write_text(json.dumps({"fingerprint": known, "attempts": 1}))
        text = describe_plan(runs, 2)
        assert state in text and ("refused" in text) == ("About" not in text) == ("goes on" not in text) == bool(state)
    steps = sum(run.max_iter for run in runs) - 500
    assert "goes on at 500" in text and f"{steps:,} steps" in text
    assert f"About {steps * 0.3 / 2 / 60:.1f} min, at 0.3 s a step (the median of 1 runs" in text


def test_a_config_of_your_own_is_not_the_papers_whatever_its_name(tmp_path):
    for name, title in (("coco.yaml", "coco.yaml"), ("digits.yaml", "digits.yaml"), ("mine.yaml", "mine")):
        (tmp_path / name).write_text(f"_BASE_: {config_dir()}/digits/Base-digits.yaml\n")
        profile = load_profile(str(tmp_path / name))
        assert (profile.name, profile.is_coco) == (title, False)
