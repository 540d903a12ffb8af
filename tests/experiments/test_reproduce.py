"""tools/reproduce.py from the command line to the report, with real training on a few small scenes."""

import json
import os
import runpy
import shlex
from dataclasses import astuple
from pathlib import Path

import pytest

from focal_plugin.config import config_dir
from focal_plugin.data import make_digits
from focal_plugin.experiments.paper import BEST_OHEM, FL, TABLES
from focal_plugin.experiments.plan import TRAIN_NET, training_sources

TOOL = runpy.run_path(str(TRAIN_NET.with_name("reproduce.py")))


@pytest.fixture
def reproduce(tmp_path, monkeypatch, capsys):
    """reproduce("words of a command"): exit code, stdout and stderr, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda words: (TOOL["main"](words.split()), *capsys.readouterr())


def test_what_cannot_be_is_refused_before_training(reproduce, tmp_path):
    for words, message in {
        "1d digits --rows focal": "--rows focal: not in table 1d, which has ohem_128",
        "1e digits": "use --profile coco",
        "1d digits SOLVER.MAX_ITER": "odd number of words",
        "1d no.yaml": "no config file 'no.yaml'",
        "1d digits --seeds 1 1": "the same seed twice",
        "1d digits SEED 4": "--seeds",
        "1d digits OUTPUT_DIR x": "--output",
        "1d digits SOLVER.MAXITER 4": "did you mean SOLVER.MAX_ITER",
        "1d digits --num-gpus 0": "--num-gpus 0",
        "1d digits --executor local --executor-args x": "KEY=VALUE",
        "1d digits DATASETS.TEST ('cells',)": "--register cells=",
        "1d coco": "set DETECTRON2_DATASETS to the folder",
        "1d digits DATASETS.TEST ()": "one data set to evaluate on",
        "1d digits DATASETS.TEST ('a','b')": "one data set to evaluate on",
    }.items():
        code, _, error = reproduce(f"--table {words.replace(' ', ' --profile ', 1)}")
        assert code == 2 and error.startswith("error: ") and message in error, words
    assert not (tmp_path / "output").exists()


def test_overrides_come_last_whatever_flag_is_before_them():
    keys = ["SOLVER.MAX_ITER", "5", "DATASETS.TEST", "(1,)", "SOLVER.BASE_LR", "-1"]
    flags = {"--seeds 1 2": ("seeds", [1, 2]), "--dry-run": ("dry_run", True), "--rows a b": ("rows", ["a", "b"])}
    for words, (name, value) in flags.items():
        args = TOOL["parse_args"](["--table", "1d", "--profile", "MINE", *words.split(), *keys])
        assert (args.profile, args.overrides, getattr(args, name)) == ("MINE", keys, value)
    with pytest.raises(SystemExit):
        TOOL["parse_args"](["--table", "1d", "--profile", "MINE", "solver.max_iter", "5"])


def test_print_commands_and_dry_run_train_nothing(reproduce, tmp_path):
    code, out, _ = reproduce("--table 1b --profile coco --num-gpus 4 --print-commands")
    lines = [shlex.split(line) for line in out.splitlines()]
    assert code == 0 and len(lines) == 7 and {line[0] for line in lines} == {"python"}
    assert all(line[1].endswith("tools/train_net.py") for line in lines)
    assert lines[5][-1] == "output/reproduce/coco/R-50-600_fl_gamma2_alpha0.25/seed1"

    code, out, _ = reproduce("--table 1d --profile coco --num-gpus 8 --dry-run")
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    for row in TABLES["1d"]:
        numbers = map(str, astuple(row.published)[:3]) if row.published else "---"
        assert [*numbers, "90,000", "16", "to", "train"] == rows[row.key][-7:]
    assert code == 0 and "11 of 11 runs to train: 990,000 steps, 15,840,000 images" in out
    assert "About" not in out and "How long that takes is known once" in out  # no time that nobody measured
    assert not list(tmp_path.iterdir())


def test_from_the_command_to_the_report_and_on(reproduce, tmp_path, monkeypatch, restore_catalogs):
    scenes = make_digits(tmp_path / "scenes", num_train=4, num_val=4, image_size=64)
    Path("few.yaml").write_text(
        f"_BASE_: {config_dir()}/digits/Base-digits.yaml\n"
        "INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}\n"
        "DATASETS: {TRAIN: [few_train], TEST: [few_val]}\n"
        "SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 4, CHECKPOINT_PERIOD: 2, WARMUP_ITERS: 2}\n"
    )
    # Every process says at its end what it has loaded.
    said = "print(*(getattr(m, '__file__', '') for m in sys.modules.values()), sep='\\n', file=open('loaded', 'a'))"
    Path("sitecustomize.py").write_text(f"import atexit, sys\natexit.register(lambda: {said})\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{TRAIN_NET.parents[1]}")
    command = f"--table 1d --profile few.yaml --rows {BEST_OHEM.key} {FL.key}"
    for part in ("train", "val"):
        command += f" --register few_{part}={scenes}/{part}.json:{scenes}/{part}"
    code, out, error = reproduce(command)
    assert code == 0, error
    assert "FL (γ 2, α .25)" in out and "OHEM 32/.5" in out
    assert {"index.html", "report.md", "results.json"} <= {path.name for path in (tmp_path / "report").iterdir()}
    focal = tmp_path / "output" / "reproduce" / "few" / FL.key / "seed1"
    assert json.loads((focal / "result.json").read_text())["status"] == "done"
    loaded = {Path(line) for line in Path("loaded").read_text().splitlines()}
    loaded = {path for path in loaded if TRAIN_NET.parents[1] / "focal_plugin" in path.parents}
    assert len(loaded) > 30 and loaded <= set(training_sources())

    # As if the power had gone in the last evaluation.
    (focal / "result.json").unlink()
    lines = (focal / "metrics.json").read_text().splitlines(keepends=True)
    (focal / "metrics.json").write_text("".join(line for line in lines if "bbox/AP" not in line))
    code, out, _ = reproduce(f"{command} --dry-run")
    assert code == 0 and "1 of 2 runs to train" in out
    code, _, error = reproduce(command)
    assert code == 0 and "OHEM 32/.5 seed 1: reused, done" in error
    assert "Starting training from iteration 4" in (focal / "console.txt").read_text()
    saved = json.loads((focal / "result.json").read_text())
    assert saved["attempts"] == 2 and "bbox/AP" in saved["metrics"]
