"""The grid over background per object and budget, from fabricated runs."""

import json

import pandas as pd
import pytest
from PIL import Image

from focal_plugin.experiments.grid import main, make_cell, tabulate_cell, write_grid
from focal_plugin.experiments.paper import BEST_OHEM, CE, FL
from focal_plugin.experiments.results import Data, Study

KEYS = (FL.method, CE.method, BEST_OHEM.method)


@pytest.fixture
def table(tmp_path):
    """table(cell, background per image, APs by method): the table of its runs on two images with 5 objects."""
    truth = tmp_path / "train.json"
    truth.write_text(json.dumps({"images": [{}, {}], "annotations": [{}] * 5}))

    def make(cell, background, aps):
        seeds = list(range(1, 1 + max(map(len, aps))))
        profile, rows, runs = make_cell(cell, KEYS, seeds, tmp_path)
        results = []
        for run in runs:
            result = run.result()
            ap = dict(enumerate(aps[KEYS.index(run.method)], 1)).get(run.seed)
            result.folder.mkdir(parents=True)
            record = {"iteration": 0, "num_neg_anchors": background}
            (result.folder / "metrics.json").write_text(json.dumps(record) + "\n")
            result.seconds, result.status = 600, "failed" if ap is None else "done"
            result.metrics = {} if ap is None else {"bbox/AP": ap}
            results.append(result)
        study = Study("1d", profile.name, profile.is_coco, rows, seeds, Data(truth, truth, tmp_path), "tools/grid.py")
        return tabulate_cell(study, results, runs[0].max_iter)

    return make


def test_a_profiles_own_budget_shares_its_runs_with_the_table(tmp_path):
    names = ["digits:100", "digits:1500", "digits/dense.yaml:100", "digits/dense.yaml:1500"]
    cells = [make_cell(name, KEYS, [1, 2], tmp_path) for name in names]
    folders = [runs[0].folder.relative_to(tmp_path).parts[0] for _, _, runs in cells]
    assert folders == ["digits_100steps", "digits", "dense_100steps", "dense"]
    assert [(profile.name, len(runs), runs[0].max_iter) for profile, _, runs in cells] == [
        ("digits", 6, 100),
        ("digits", 6, 1500),
        ("dense", 6, 100),
        ("dense", 6, 1500),
    ]
    ohem = next(run for run in cells[2][2] if run.method == BEST_OHEM.method)
    assert ohem.title == "OHEM 128/.5"  # as many to a positive as 32 are in the sparser profile


def test_the_grid_is_written_down(tmp_path, table):
    cells = [
        table("digits:500", 1000, ([10, 12, 14], [20, 20, 20], [20, 20, 20])),
        table("digits:1500", 1000, ([30, 31, 32], [29, 30, 31], [29, None, 31])),  # leads are paired by seed
        table("digits/dense.yaml:500", 1330, ([None], [None], [None])),
    ]
    text = write_grid(pd.concat(cells), BEST_OHEM.method, tmp_path / "report", "tools/grid.py")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["digits", "500", "400", "12.0 ± 2.0", "20.0 ± 0.0", "20.0 ± 0.0", "−8.0 ± 2.0", "−8.0 ± 2.0"] in cells
    assert ["digits", "1,500", "400", "31.0 ± 1.0", "30.0 ± 1.0", "30.0 ± 1.4", "+1.0 ± 0.0", "+1.0 ± 0.0"] in cells
    assert ["dense", "500", "–", "–", "–", "–", "–", "–"] in cells
    assert "3 seeds, 3.5 hours of processes" in text
    record = json.loads((tmp_path / "report" / "grid.json").read_text(), parse_constant=pytest.fail)
    first, _, lost = record["cells"]
    assert first["ap"][FL.method] == {"1": 10, "2": 12, "3": 14} and record["versions"]["torch"]
    assert first["negatives_per_object"] == 400 and lost["negatives_per_object"] is None and lost["ap"][FL.method] == {}
    with Image.open(tmp_path / "report" / "grid.png") as image:
        assert image.width > 800


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cells", "digits:5", "--ohem", "ohem"], "--rows ohem: not in table 1d"),
        (["--cells", "digits"], "--cells digits: not of the form PROFILE:STEPS"),
        (["--cells", "digits:0"], "--cells digits:0: not of the form"),
        (["--cells", "no.yaml:5"], "no config file 'no.yaml'"),
    ],
)
def test_wrong_words_are_refused(capsys, words, message):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_counts_the_steps(capsys, tmp_path):
    assert main(["--cells", "digits:100", "digits:200", "--output", str(tmp_path), "--dry-run"]) == 0
    assert "6 of 6 runs to train: 900 steps" in capsys.readouterr().out
