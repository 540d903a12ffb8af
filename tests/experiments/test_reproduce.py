"""tools/reproduce.py from the command line to the report, with real training on a few small scenes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from focal_plugin.data import make_digits
from focal_plugin.experiments import cli
from focal_plugin.experiments.paper import CE, FL, ohem

ROOT = Path(cli.__file__).parents[2]
ROWS = [FL.key, ohem(128, 0.7).key]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("scenes"), num_train=8, num_val=6, image_size=64)


@pytest.fixture(scope="module")
def reproduce(scenes, tmp_path_factory):
    """reproduce("--seeds", "1", "KEY", "VALUE"): 6 steps of Table 1d on the scenes, in a folder of its own."""
    folder = tmp_path_factory.mktemp("reproduce")
    profile = folder / "scenes.yaml"
    profile.write_text(
        f"_BASE_: {ROOT}/configs/digits/Base-digits.yaml\n"
        "INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}\n"
        "DATASETS: {TRAIN: [few_train], TEST: [few_val]}\n"
        "SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 6, CHECKPOINT_PERIOD: 2, WARMUP_ITERS: 2}\n"
    )
    data = [word for s in ("train", "val") for word in ("--register", f"few_{s}={scenes}/{s}.json:{scenes}/{s}")]

    def call(*words):
        command = [
            sys.executable,
            ROOT / "tools" / "reproduce.py",
            "--table",
            "1d",
            "--profile",
            profile,
            *data,
            *words,
        ]
        env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
        return done, folder

    return call


def test_from_the_command_to_the_report_and_on(reproduce):
    done, folder = reproduce("--rows", *ROWS)
    assert done.returncode == 0, done.stderr
    for name in ("index.html", "report.md", "results.json"):
        assert (folder / "report" / name).is_file()
    assert "FL (γ 2, α .25)" in done.stdout and "OHEM 32/.7" in done.stdout
    first = folder / "output" / "reproduce" / "scenes" / FL.key / "seed1"
    assert json.loads((first / "result.json").read_text())["status"] == "done"

    # As if the power had gone in the last evaluation of the one, and while the other's last_checkpoint was written.
    second = first.parents[1] / ROWS[1] / "seed1"
    (first / "result.json").unlink()
    _drop_lines(first / "metrics.json", "bbox/AP")
    (second / "result.json").unlink()
    (second / "last_checkpoint").write_text("")
    done, _ = reproduce("--rows", *ROWS, CE.key)
    assert done.returncode == 0, done.stderr
    for folder_of_run in (first, second):
        assert "Starting training from iteration 6" in (folder_of_run / "console.txt").read_text()
    assert "names no checkpoint of that folder" in (second / "console.txt").read_text()
    assert json.loads((first / "result.json").read_text())["attempts"] == 2
    assert "bbox/AP" in json.loads((first / "result.json").read_text())["metrics"]

    done, _ = reproduce("--rows", *ROWS, CE.key)
    assert done.returncode == 0 and done.stderr.count(": reused, done") == 3


def test_a_diverging_row_is_told_and_the_table_goes_on(reproduce):
    # Without a norm, a clip or a warm-up the step is as long as it likes.
    wild = ["SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "1e30", "SOLVER.CLIP_GRADIENTS.ENABLED", "False"]
    done, folder = reproduce("--rows", FL.key, "--output", "wild", "--report", "wild_report", *wild)
    assert done.returncode == 1, done.stderr
    assert "DIVERGED at step" in done.stderr
    result = json.loads((folder / "wild" / FL.key / "seed1" / "result.json").read_text())
    assert result["status"] == "diverged" and 0 < result["step"] < 6
    page = (folder / "wild_report" / "index.html").read_text()
    assert "diverged" in page.lower() and f"step {result['step']}" in page


def _drop_lines(path, word):
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if word not in line))
