"""tools/analyze_loss.py on a tiny data set and an untrained model, and its error messages."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model

from focal_plugin import get_config
from focal_plugin.analysis.loss_collect import Collected, OhemCount
from focal_plugin.analysis.loss_distribution import LossDistribution
from focal_plugin.analysis.loss_figures import draw_figure1, draw_figure4
from focal_plugin.analysis.loss_report import format_tables, summarize, write_report
from focal_plugin.data import make_digits

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "analyze_loss.py"
WRITTEN = {f"figure{n}.{suffix}" for n in (1, 4) for suffix in ("png", "svg")}
WRITTEN |= {"loss_distribution.md", "loss_distribution.json"}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return make_digits(tmp_path_factory.mktemp("digits"), num_train=1, num_val=6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.manual_seed(0)
    torch.save({"model": build_model(get_config("digits/focal.yaml")).state_dict()}, path)
    return path


@pytest.fixture
def tool(monkeypatch, capsys):
    """tool(words): the exit code and what went to stderr, in this process."""
    spec = importlib.util.spec_from_file_location("analyze_loss", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["analyze_loss.py", *map(str, words)])
        try:
            code = module.main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    return run


def flags(digits):
    register = f"analyze_val={digits / 'val.json'}:{digits / 'val'}"
    return ["--config-file", "digits/focal.yaml", "--register", register, "--dataset", "analyze_val"]


def test_a_model_on_a_data_set(digits, weights, tmp_path):
    command = [sys.executable, str(TOOL), *flags(digits), "--num-images", "4", "--output", "out"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "MODEL.WEIGHTS", str(weights)], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == WRITTEN
    report = (tmp_path / "out" / "loss_distribution.md").read_text(encoding="utf-8")
    assert "hardest 20 %" in done.stdout and "| negative, γ 2" in report and "![figure4](figure4.png)" in report
    assert "analyze_val" in report and str(weights) in report

    numbers = json.loads((tmp_path / "out" / "loss_distribution.json").read_text(encoding="utf-8"))
    assert {"command", "date", "machine", "versions", "weights", "data sets"} <= set(numbers["environment"])
    assert numbers["images"] == 4
    anchors, windows = numbers["anchors"], numbers["windows"]
    assert windows["positive"] == anchors["positive"] > 0
    assert windows["positive"] + windows["negative"] == 10 * (anchors["positive"] + anchors["negative"])
    assert windows["negative"] == sum(numbers["histogram"]["negative"]["windows"])
    # An untrained model gives every window about p = .01, and each about the same loss.
    assert numbers["hardest_share"]["negative"]["0"]["0.2"] == pytest.approx(0.2, abs=0.1)
    totals = numbers["total_loss"]["0"]
    assert totals["negative"] / windows["negative"] == pytest.approx(-np.log(0.99), rel=0.5)
    assert totals["ratio_with_alpha"] == pytest.approx(totals["ratio"] * 3)
    kept = numbers["ohem"]["anchors_per_image"]
    assert kept["positive"] + kept["negative"] == pytest.approx(32)


@pytest.mark.parametrize("words", [[], ["--figure", "1"], ["--figure", "1", "--gammas", "0", "3"]])
def test_figure_1_needs_no_model(tool, tmp_path, words):
    assert tool(*words, "--output", tmp_path / "new" / "out") == (0, "")
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"figure1.png", "figure1.svg"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["MODEL.WEIGHTS", "w.pth"], "no config: give --config-file"),
        (["--figure", "4"], "no config: give --config-file"),
        (["--config-file", "nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["FLAGS"], "add MODEL.WEIGHTS path/to"),
        (["FLAGS", "MODEL.WEIGHTS", "nowhere.pth"], "MODEL.WEIGHTS: there is no file 'nowhere.pth'"),
        (["FLAGS", "MODEL.WEIGHTS", "DAMAGED"], "is refused: it is damaged"),
        (["FLAGS", "MODEL.WEIGHTS", "FOREIGN"], "is no trained model of this config"),
        (["FLAGS", "MODEL.WEIGHT", "w.pth"], "did you mean MODEL.WEIGHTS"),
        (["FLAGS", "--dataset", "nowhere"], "no data set 'nowhere' is registered"),
        (["FLAGS", "MODEL.RETINANET.NUM_CLASSES", "7"], "set MODEL.RETINANET.NUM_CLASSES 10"),
        (["--output", "FILE"], "File exists"),
        (["--gammas", "-1", "--figure", "1"], "-1 is not a finite number >= 0"),
        (["--gammas", "0", "2", "MODEL.WEIGHTS"], "'MODEL.WEIGHTS' is no number"),
        (["--num-images", "0"], "invalid positive_number value: '0'"),
    ],
)
def test_bad_input_is_one_message(tool, digits, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    files = {name: tmp_path / f"{name.lower()}.pth" for name in ("DAMAGED", "FOREIGN", "FILE")}
    torch.save({"model": {"weight": torch.zeros(3)}}, files["FOREIGN"])
    files["DAMAGED"].write_bytes(b"no checkpoint")
    files["FILE"].write_bytes(b"")
    words = [w for word in words for w in (flags(digits) if word == "FLAGS" else [files.get(word, word)])]
    code, error = tool(*words)
    assert code == 2 and message in error and "Traceback" not in error


def counted_of(logits, labels):
    counted = Collected(LossDistribution([0, 2]), OhemCount(LossDistribution([0, 2]), LossDistribution([0, 2])), 1)
    counted.losses.update(logits, labels)
    counted.ohem.kept.update(logits[:3], labels[:3])
    counted.ohem.hardest.update(logits[:3], labels[:3])
    return counted


def test_report_without_a_positive(tiny_config, tmp_path):
    """Dashes and nulls instead of divisions by zero, and the figure still has its background."""
    counted = counted_of(torch.randn(30, 3), torch.full((30,), 3))
    summary = summarize(counted, tiny_config())
    (row,) = [row for row in format_tables(summary).splitlines() if row.startswith("| positive, γ 2")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["-", "-", "-"]
    figures = draw_figure1([0, 2], tmp_path) + draw_figure4(counted, tmp_path)
    _, numbers = write_report(summary, {"command": "this"}, figures, tmp_path)
    assert json.loads(numbers.read_text())["total_loss"]["0"]["ratio"] is None


@pytest.mark.parametrize(
    "opts, factor",
    [
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "0.25"], 3),
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "-1"], 1),
        (["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "0"], None),
        (["MODEL.FOCAL.CLASS_ALPHA", "[0.1, 0.2, 0.3]"], None),
    ],
)
def test_ratio_with_the_configs_alpha(tiny_config, opts, factor):
    torch.manual_seed(0)
    totals = summarize(counted_of(torch.randn(30, 3), torch.arange(30) % 4), tiny_config(*opts))["total_loss"]["2"]
    assert totals["ratio"] == pytest.approx(totals["negative"] / totals["positive"])
    assert totals["ratio_with_alpha"] == (None if factor is None else pytest.approx(factor * totals["ratio"]))
