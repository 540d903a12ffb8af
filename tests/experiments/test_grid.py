"""The grid over background per object and budget, from fabricated runs."""

import json

import pandas as pd
import pytest
from PIL import Image

from focal_plugin.experiments.grid import main, make_cell, tabulate_cell, write_grid
from focal_plugin.experiments.paper import BEST_OHEM, CE, FL
from focal_plugin.experiments.results import Data, Study

KEYS = (FL.method, CE.method, BEST_OHEM.method)


def fabricate(folder, cell, background, *aps):
    """The table of a cell's runs, on two images with 5 objects, of APs by method and seed; None: failed."""
    truth, seeds = folder / "train.json", list(range(len(aps[0])))
    truth.write_text(json.dumps({"images": [{}, {}], "annotations": [{}] * 5}))
    profile, rows, runs = make_cell(cell, KEYS, seeds, folder)
    results = [run.result() for run in runs]
    for result in results:
        ap = aps[KEYS.index(result.method)][result.seed]
        result.folder.mkdir(parents=True)
        (result.folder / "metrics.json").write_text(json.dumps({"iteration": 0, "num_neg_anchors": background}))
        result.seconds, result.status = 600, "failed" if ap is None else "done"
        result.metrics = {} if ap is None else {"bbox/AP": ap}
    study = Study("1d", profile.name, profile.is_coco, rows, seeds, Data(truth, truth, folder), "tools/grid.py")
    return tabulate_cell(study, results, runs[0].max_iter)


def test_a_profiles_own_budget_shares_its_runs_with_the_table(tmp_path):
    names = ["digits:100", "digits:1500", "digits/dense.yaml:100", "digits/dense.yaml:1500"]
    cells = [make_cell(name, KEYS, [1, 2], tmp_path) for name in names]
    found = [(profile.name, runs[0].folder.parts[-3], len(runs), runs[0].max_iter) for profile, _, runs in cells]
    assert found[:2] == [("digits", "digits_100steps", 6, 100), ("digits", "digits", 6, 1500)]
    assert found[2:] == [("dense", "dense_100steps", 6, 100), ("dense", "dense", 6, 1500)]
    ohem = next(run for run in cells[2][2] if run.method == BEST_OHEM.method)
    assert ohem.title == "OHEM 128/.5"  # as many to a positive as 32 are in the sparser profile


def test_the_grid_is_written_down(tmp_path):
    sparse = fabricate(tmp_path, "digits:500", 1000, [10, 12, 14], [20, 20, 20], [20, 20, 20])
    long = fabricate(tmp_path, "digits:1500", 1000, [30, 31, 32], [29, 30, 31], [29, None, 31])  # leads: seed by seed
    cells = [sparse, long, fabricate(tmp_path, "digits/dense.yaml:500", 1330, [None], [None], [None])]
    text = write_grid(pd.concat(cells), BEST_OHEM.method, tmp_path / "report", "tools/grid.py")
    for line in (
        "digits | 500 | 400 | 12.0 ± 2.0 | 20.0 ± 0.0 | 20.0 ± 0.0 | −8.0 ± 2.0 | −8.0 ± 2.0",
        "digits | 1,500 | 400 | 31.0 ± 1.0 | 30.0 ± 1.0 | 30.0 ± 1.4 | +1.0 ± 0.0 | +1.0 ± 0.0",
        "dense | 500 | – | – | – | – | – | –",
        "3 seeds, 3.5 hours of processes",
    ):
        assert line in " ".join(text.split())
    record = json.loads((tmp_path / "report" / "grid.json").read_text(), parse_constant=pytest.fail)
    found = [(cell["ap"][FL.method], cell["negatives_per_object"]) for cell in record["cells"]]
    assert found[::2] == [({"0": 10, "1": 12, "2": 14}, 400), ({}, None)] and record["versions"]["torch"]
    with Image.open(tmp_path / "report" / "grid.png") as image:
        assert image.width > 800


def test_wrong_words_are_refused_and_a_dry_run_counts_the_steps(capsys, tmp_path):
    for words, message in {
        "digits:5 --ohem ohem": "--rows ohem: not in table 1d",
        "digits": "--cells digits: not of the form PROFILE:STEPS",
        "digits:0": "--cells digits:0: not of the form",
        "no.yaml:5": "no config file 'no.yaml'",
    }.items():
        assert main(["--cells", *words.split()]) == 2 and message in capsys.readouterr().err
    assert main(["--cells", "digits:100", "digits:200", "--output", str(tmp_path), "--dry-run"]) == 0
    assert "6 of 6 runs to train: 900 steps" in capsys.readouterr().out
