"""tools/reproduce.py from the command line to the report, with real training on a few small scenes."""

import json

import pytest

from focal_plugin.config import config_dir
from focal_plugin.data import make_digits
from focal_plugin.experiments.paper import BEST_OHEM, FL
from focal_plugin.experiments.plan import TRAIN_NET


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The words of 4 steps of two rows of Table 1d on small scenes."""
    scenes = make_digits(tmp_path / "scenes", num_train=4, num_val=4, image_size=64)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TRAIN_NET.parents[1]))
    (tmp_path / "few.yaml").write_text(
        f"_BASE_: {config_dir()}/digits/Base-digits.yaml\n"
        "INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}\n"
        "DATASETS: {TRAIN: [few_train], TEST: [few_val]}\n"
        "SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 4, CHECKPOINT_PERIOD: 2, WARMUP_ITERS: 2}\n"
    )
    data = [word for s in ("train", "val") for word in ("--register", f"few_{s}={scenes}/{s}.json:{scenes}/{s}")]
    return ["--table", "1d", "--profile", "few.yaml", *data, "--rows", BEST_OHEM.key, FL.key]


def test_from_the_command_to_the_report_and_on(reproduce, command, tmp_path, capsys, restore_catalogs):
    assert reproduce["main"](command) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "FL (γ 2, α .25)" in out and "OHEM 32/.5" in out
    assert {"index.html", "report.md", "results.json"} <= {path.name for path in (tmp_path / "report").iterdir()}
    focal = tmp_path / "output" / "reproduce" / "few" / FL.key / "seed1"
    assert json.loads((focal / "result.json").read_text())["status"] == "done"

    # As if the power had gone in the last evaluation.
    (focal / "result.json").unlink()
    lines = (focal / "metrics.json").read_text().splitlines(keepends=True)
    (focal / "metrics.json").write_text("".join(line for line in lines if "bbox/AP" not in line))
    assert reproduce["main"]([*command, "--dry-run"]) == 0 and "1 of 2 runs to train" in capsys.readouterr().out
    assert reproduce["main"](command) == 0
    assert "OHEM 32/.5 seed 1: reused, done" in capsys.readouterr().err
    assert "Starting training from iteration 4" in (focal / "console.txt").read_text()
    saved = json.loads((focal / "result.json").read_text())
    assert saved["attempts"] == 2 and "bbox/AP" in saved["metrics"]
