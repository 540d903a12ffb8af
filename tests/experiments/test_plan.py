"""From a table and a profile to runs, and what --dry-run and --print-commands say of them."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from focal_plugin import get_config
from focal_plugin.config import config_dir
from focal_plugin.engine import argument_parser
from focal_plugin.experiments import plan
from focal_plugin.experiments.cli import main, parse_args
from focal_plugin.experiments.estimate import describe_plan
from focal_plugin.experiments.paper import BEST_OHEM, FL, TABLES
from focal_plugin.experiments.plan import choose_rows, load_profile, make_runs

TRAIN_NET = Path(plan.__file__).parents[2] / "tools" / "train_net.py"


@pytest.fixture
def runs_of(tmp_path):
    def make(table, name, *overrides, rows=(), seeds=(1,), **options):
        profile = load_profile(name, overrides=overrides)
        return make_runs(choose_rows(table, profile, rows), profile, seeds, tmp_path, TRAIN_NET, **options)

    return make


def config_of(run):
    """What train_net.py makes of a run's command line."""
    args = argument_parser().parse_args(run.command[2:])
    assert args.resume
    return get_config(args.config_file, args.opts)


def test_each_seed_comes_with_all_rows_before_the_next(runs_of):
    runs = runs_of("1d", "digits", seeds=[3, 1])
    assert [run.seed for run in runs] == [3] * 11 + [1] * 11
    assert len({run.folder for run in runs}) == 22 and len({run.fingerprint for run in runs}) == 22
    assert [run.title for run in runs[:11]][3] == "OHEM 32/.5" and runs[9].title == "FL (γ 2, α .25)"


@pytest.mark.parametrize("table", ["1a", "1b", "1c", "1d", "3", "extra"])
def test_a_run_trains_what_its_row_says(runs_of, table):
    for row, run in zip(TABLES[table], runs_of(table, "digits", seeds=[7])):
        cfg = config_of(run)
        assert cfg.SEED == 7 and run.max_iter == cfg.SOLVER.MAX_ITER and str(run.folder) == cfg.OUTPUT_DIR
        wanted = row.method.overrides(get_config("digits/Base-digits.yaml"))
        for key, value in wanted:
            node = cfg
            for part in key.split("."):
                node = node[part]
            assert node == value, key


def test_coco_rows_train_with_the_papers_configs(runs_of):
    (run,) = runs_of("1d", "coco", rows=[BEST_OHEM.key], num_gpus=8)
    assert run.config_file.name == "R-101-600_ohem_128_nms0.5.yaml" and run.command[5:7] == ["--num-gpus", "8"]
    assert config_of(run).MODEL.RESNETS.DEPTH == 101 and run.max_iter == 90000
    networks = [run.title for run in runs_of("1e", "coco")]
    assert networks[0] == "R-50-400 FL (γ 2, α .25)" and len(set(networks)) == 10


def test_steps_are_those_of_the_gpus_there_are(runs_of):
    """The configs are for 8; upstream scales batch and steps, and the plan counts what will be trained."""
    (run,) = runs_of("1d", "coco", rows=[BEST_OHEM.key], num_gpus=2)
    assert (run.max_iter, run.images_per_step) == (360000, 4)
    with pytest.raises(ValueError, match="IMS_PER_BATCH 12 cannot be shared out evenly among 8 workers"):
        runs_of("1d", "coco", "SOLVER.IMS_PER_BATCH", "12", rows=[BEST_OHEM.key])


def test_tables_share_the_runs_of_rows_they_share(runs_of):
    by_key = {run.method: run for table in ("1a", "1b", "1d", "3") for run in runs_of(table, "digits")}
    assert len(by_key) == 7 + 6 + 9 + 2
    (a,), (b,), (c,) = (runs_of(t, "coco", rows=[k]) for t, k in [("1b", FL.key), ("3", FL.key), ("1e", "R-50-600")])
    assert a.folder == b.folder == c.folder and a.fingerprint == b.fingerprint == c.fingerprint


def test_overrides_win_over_a_rows_own(runs_of):
    (run,) = runs_of("1d", "digits", "MODEL.OHEM.NMS_THRESH", "0.3", "SOLVER.MAX_ITER", "5", rows=[BEST_OHEM.key])
    assert config_of(run).MODEL.OHEM.NMS_THRESH == 0.3 and run.max_iter == 5


def test_the_fingerprint_is_of_all_that_decides(runs_of, tmp_path, monkeypatch):
    def one(*overrides, **options):
        return runs_of("1d", "digits", *overrides, rows=[FL.key], **options)[0].fingerprint

    assert one() == one()
    assert len({one(), one(seeds=[2]), one("SOLVER.MAX_ITER", "5"), one(num_gpus=2)}) == 4


def test_editing_what_no_training_loads_trains_nothing_again(runs_of, tmp_path, monkeypatch):
    copy = shutil.copytree(plan._PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(plan, "_PACKAGE", copy)

    def after_editing(name):
        with (copy / name).open("a") as file:
            file.write("# a typo mended\n")
        return runs_of("1d", "digits", rows=[FL.key])[0].fingerprint

    before = runs_of("1d", "digits", rows=[FL.key])[0].fingerprint
    for name in ("doctor.py", "mmdet.py", "experiments/report.py", "deploy/export.py", "analysis/detections.py"):
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


def test_corrected_boxes_are_trained_on_again(tmp_path):
    (tmp_path / "images").mkdir()
    hashes = []
    for name, boxes in [("a", [[1, 1, 9, 9]]), ("b", [[1, 1, 9, 8]])]:
        path = tmp_path / f"{name}.json"
        annotations = [{"id": i, "image_id": 1, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)]
        content = {"images": [{"id": 1}], "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
        path.write_text(json.dumps(content))
        overrides = ["DATASETS.TRAIN", f'("plan_{name}",)', "DATASETS.TEST", f'("plan_{name}",)']
        profile = load_profile("digits", [f"plan_{name}={path}:{tmp_path / 'images'}"], overrides)
        hashes.append(plan._files_digest(profile.config()))
    weights = tmp_path / "weights.pth"
    for content in ("1", "2"):
        weights.write_text(content)
        hashes.append(plan._files_digest(load_profile("digits", overrides=["MODEL.WEIGHTS", str(weights)]).config()))
    assert len(set(hashes)) == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--table", "1d", "--profile", "digits", "--rows", "focal"],
            "--rows focal: not in table 1d, which has ohem_128",
        ),
        (["--table", "1e", "--profile", "digits"], "use --profile coco"),
        (["--table", "1d", "--profile", "digits", "SOLVER.MAX_ITER"], "odd number of words"),
        (["--table", "1d", "--profile", "no.yaml"], "no config file 'no.yaml'"),
        (["--table", "1d", "--profile", "digits", "--seeds", "1", "1"], "the same seed twice"),
        (["--table", "1d", "--profile", "digits", "SEED", "4"], "--seeds"),
        (["--table", "1d", "--profile", "digits", "OUTPUT_DIR", "x"], "--output"),
        (["--table", "1d", "--profile", "digits", "SOLVER.MAXITER", "4"], "did you mean SOLVER.MAX_ITER"),
        (["--table", "1d", "--profile", "digits", "--num-gpus", "0"], "--num-gpus 0"),
        (["--table", "1d", "--profile", "digits", "--executor", "local", "--executor-args", "x"], "KEY=VALUE"),
        (["--table", "1d", "--profile", "digits", "DATASETS.TEST", '("cells",)'], "'cells' is not registered"),
        (["--table", "1d", "--profile", "coco"], "coco_2017_train': there is no"),
        (["--table", "1d", "--profile", "digits", "DATASETS.TEST", "()"], "one data set to evaluate on"),
        (["--table", "1d", "--profile", "digits", "DATASETS.TEST", '("a", "b")'], "one data set to evaluate on"),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "output").exists()


def test_overrides_come_last_whatever_flag_is_before_them():
    words = ["--table", "1d", "--profile", "MINE", "--seeds", "1", "2", "SOLVER.MAX_ITER", "5", "DATASETS.TEST", "(1,)"]
    args = parse_args(words)
    assert (args.profile, args.seeds, args.overrides) == ("MINE", [1, 2], words[-4:])
    args = parse_args([*words[:4], "--dry-run", "SOLVER.MAX_ITER", "5"])
    assert args.dry_run and args.overrides == ["SOLVER.MAX_ITER", "5"]
    args = parse_args([*words[:4], "--rows", "a", "b", "SOLVER.BASE_LR", "-1"])
    assert (args.rows, args.overrides) == (["a", "b"], ["SOLVER.BASE_LR", "-1"])
    with pytest.raises(SystemExit):
        parse_args([*words[:4], "solver.max_iter", "5"])


def test_print_commands_prints_a_line_for_each_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--table", "1b", "--profile", "coco", "--num-gpus", "4", "--print-commands"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 7 and all(line[0] == "python" and line[1].endswith("tools/train_net.py") for line in lines)
    assert lines[5][-1] == "output/reproduce/coco/R-50-600_fl_gamma2_alpha0.25/seed1"
    assert not list(tmp_path.iterdir())


def test_a_plan_with_an_estimate_and_its_source(runs_of):
    text = describe_plan(runs_of("1d", "coco", num_gpus=8), load_profile("coco"), parallel=1)
    assert "R-101-600_ohem_128_nms0.5/seed1" in text and "90,000" in text
    # 11 runs of 90,000 steps at the zoo's .291 s for R-101
    assert "11 of 11 runs to train, 990,000 steps" in text and "80 h 01" in text and "model zoo" in text


def test_a_config_of_your_own_is_not_the_papers_whatever_its_name(tmp_path):
    for name in ("coco.yaml", "digits.yaml", "mine.yaml"):
        (tmp_path / name).write_text(f"_BASE_: {config_dir()}/digits/Base-digits.yaml\n")
    profiles = [load_profile(str(tmp_path / name)) for name in ("coco.yaml", "digits.yaml", "mine.yaml")]
    assert [(p.name, p.is_coco) for p in profiles] == [("coco.yaml", False), ("digits.yaml", False), ("mine", False)]
    assert load_profile("coco").is_coco


def test_an_estimate_learns_from_what_has_run(runs_of):
    runs = runs_of("1d", "digits", rows=[FL.key, BEST_OHEM.key])
    profile = load_profile("digits")
    assert "No estimate" in describe_plan(runs, profile, 2)
    folder = runs[0].folder
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text('{"iteration": 0, "time": 0.5}\n{"iteration": 1, "time": 0.1}\n')
    (folder / "model_0000499.pth").touch()
    assert "goes on" not in describe_plan(runs, profile, 2)  # it was another run that left this
    (folder / "run.json").write_text(json.dumps({"fingerprint": runs[0].fingerprint}))
    text = describe_plan(runs, profile, 2)
    steps = sum(run.max_iter for run in runs) - 500
    assert "goes on at 500" in text and f"{steps:,} steps" in text and "0.3 s per step (the median of 1 runs" in text
