"""From a table and a profile to runs, and what --dry-run, --print-commands and wrong words say."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import astuple

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
    assert len({run.folder for run in runs}) == 22 and len({run.fingerprint for run in runs}) == 22
    assert [run.title for run in runs[:11]][3] == "OHEM 32/.5" and runs[9].title == "FL (γ 2, α .25)"
    by_key = {run.method: run for table in ("1a", "1b", "1d", "3") for run in runs_of(table, "digits")}
    assert len(by_key) == 7 + 6 + 9 + 2
    (a,), (b,), (c,) = (runs_of(t, "coco", rows=[k]) for t, k in [("1b", FL.key), ("3", FL.key), ("1e", "R-50-600")])
    assert a.folder == b.folder == c.folder and a.fingerprint == b.fingerprint == c.fingerprint


# --- the fingerprint ---


def test_the_fingerprint_is_of_config_seed_workers_data_and_weights(runs_of, tmp_path, restore_catalogs):
    def one(*overrides, **options):
        return runs_of("1d", "digits", *overrides, rows=[FL.key], **options)[0].fingerprint

    assert one() == one()
    fingerprints = [one(), one(seeds=[2]), one("SOLVER.MAX_ITER", "5"), one(num_gpus=2)]
    weights, truth = tmp_path / "weights.pth", tmp_path / "truth.json"
    for content in ("1", "2"):
        weights.write_text(content)
        fingerprints.append(one("MODEL.WEIGHTS", str(weights)))
        coco = {"categories": [{"id": 1, "name": content}], "images": [], "annotations": []}
        truth.write_text(json.dumps(coco))
        load_profile("digits", [f"corrected={truth}:{tmp_path}"])
        fingerprints.append(one("DATASETS.TRAIN", '("corrected",)'))
    assert len(set(fingerprints)) == 8


def test_editing_what_no_training_loads_trains_nothing_again(runs_of, tmp_path, monkeypatch):
    copy = shutil.copytree(plan._PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(plan, "_PACKAGE", copy)

    def after_editing(name):
        with (copy / name).open("a") as file:
            file.write("# a typo mended\n")
        return runs_of("1d", "digits", rows=[FL.key])[0].fingerprint

    before = runs_of("1d", "digits", rows=[FL.key])[0].fingerprint
    for name in ("doctor.py", "mmdet.py", "experiments/report.py", "deploy/__init__.py", "eval/page.py"):
        assert after_editing(name) == before, name
    seen = [before, *map(after_editing, ("heads.py", "losses/focal.py", "engine/guard.py", "data/loader.py"))]
    assert len(set(seen)) == 5


def test_the_sources_of_a_training_are_those_that_python_loads():
    code = "import sys, focal_plugin.engine\nfor name in sys.modules: print(name)"
    env = {**os.environ, "PYTHONPATH": str(plan._PACKAGE.parent)}
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env).stdout.split()
    loaded = [plan._PACKAGE.parent / name.replace(".", "/") for name in names if name.startswith("focal_plugin")]
    loaded = {path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in loaded}
    assert len(loaded) > 30 and loaded <= set(plan.training_sources())


# --- the command line ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("1d digits --rows focal", "--rows focal: not in table 1d, which has ohem_128"),
        ("1e digits", "use --profile coco"),
        ("1d digits SOLVER.MAX_ITER", "odd number of words"),
        ("1d no.yaml", "no config file 'no.yaml'"),
        ("1d digits --seeds 1 1", "the same seed twice"),
        ("1d digits SEED 4", "--seeds"),
        ("1d digits OUTPUT_DIR x", "--output"),
        ("1d digits SOLVER.MAXITER 4", "did you mean SOLVER.MAX_ITER"),
        ("1d digits --num-gpus 0", "--num-gpus 0"),
        ("1d digits --executor local --executor-args x", "KEY=VALUE"),
        ("1d digits DATASETS.TEST ('cells',)", "--register cells="),
        ("1d coco", "set DETECTRON2_DATASETS to the folder"),
        ("1d digits DATASETS.TEST ()", "one data set to evaluate on"),
        ("1d digits DATASETS.TEST ('a','b')", "one data set to evaluate on"),
    ],
)
def test_what_cannot_be_is_refused_before_training(reproduce, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    table, profile, *words = words.split()
    assert reproduce["main"](["--table", table, "--profile", profile, *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "output").exists()


def test_overrides_come_last_whatever_flag_is_before_them(reproduce):
    parse, words = reproduce["parse_args"], ["--table", "1d", "--profile", "MINE"]
    args = parse([*words, "--seeds", "1", "2", "SOLVER.MAX_ITER", "5", "DATASETS.TEST", "(1,)"])
    assert (args.profile, args.seeds) == ("MINE", [1, 2])
    assert args.overrides == ["SOLVER.MAX_ITER", "5", "DATASETS.TEST", "(1,)"]
    args = parse([*words, "--dry-run", "SOLVER.MAX_ITER", "5"])
    assert args.dry_run and args.overrides == ["SOLVER.MAX_ITER", "5"]
    args = parse([*words, "--rows", "a", "b", "SOLVER.BASE_LR", "-1"])
    assert (args.rows, args.overrides) == (["a", "b"], ["SOLVER.BASE_LR", "-1"])
    with pytest.raises(SystemExit):
        parse([*words, "solver.max_iter", "5"])


def test_print_commands_prints_a_line_for_each_run(reproduce, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert reproduce["main"](["--table", "1b", "--profile", "coco", "--num-gpus", "4", "--print-commands"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 7 and all(line[0] == "python" and line[1].endswith("tools/train_net.py") for line in lines)
    assert lines[5][-1] == "output/reproduce/coco/R-50-600_fl_gamma2_alpha0.25/seed1"
    assert not list(tmp_path.iterdir())


def test_a_dry_run_has_the_papers_numbers_and_no_time_that_nobody_measured(reproduce, capsys, tmp_path):
    words = ["--table", "1d", "--profile", "coco", "--num-gpus", "8", "--output", str(tmp_path), "--dry-run"]
    assert reproduce["main"](words) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    for row in TABLES["1d"]:
        numbers = map(str, astuple(row.published)[:3]) if row.published else "---"
        assert [*numbers, "90,000", "16", "to", "train"] == rows[row.key][-7:]
    assert "11 of 11 runs to train: 990,000 steps, 15,840,000 images" in text
    assert "About" not in text and "How long that takes is known once" in text


def test_a_plan_learns_from_what_has_run(runs_of):
    runs = runs_of("1d", "digits", rows=[FL.key, BEST_OHEM.key])
    folder = runs[0].folder
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"iteration": 519, "total_loss": 1.0, "time": 0.3}\n{"iteration": 539, "to')
    (folder / "model_0000499.pth").touch()
    text = describe_plan(runs, 2)
    assert "goes on" not in text and "refused" in text and "no earlier run" in text and "About" not in text
    (folder / "run.json").write_text(json.dumps({"fingerprint": "another", "attempts": 1}))
    text = describe_plan(runs, 2)
    assert "goes on" not in text and "--fresh trains it again" in text and "About" not in text
    (folder / "run.json").write_text(json.dumps({"fingerprint": runs[0].fingerprint, "attempts": 1}))
    text, steps = describe_plan(runs, 2), sum(run.max_iter for run in runs) - 500
    assert "goes on at 500" in text and f"{steps:,} steps" in text
    assert f"About {steps * 0.3 / 2 / 60:.1f} min, at 0.3 s a step (the median of 1 runs" in text


def test_a_config_of_your_own_is_not_the_papers_whatever_its_name(tmp_path):
    for name in ("coco.yaml", "digits.yaml", "mine.yaml"):
        (tmp_path / name).write_text(f"_BASE_: {config_dir()}/digits/Base-digits.yaml\n")
    profiles = [load_profile(str(tmp_path / name)) for name in ("coco.yaml", "digits.yaml", "mine.yaml")]
    assert [(p.name, p.is_coco) for p in profiles] == [("coco.yaml", False), ("digits.yaml", False), ("mine", False)]
    assert load_profile("coco").is_coco
