"""The grid over background per object and budget, from fabricated outcomes."""

import json

import pytest
from PIL import Image

from focal_plugin.experiments.grid import Outcome, main, make_cells, outcome_of, write_grid
from focal_plugin.experiments.paper import BEST_OHEM, CE, FL

KEYS = (FL.key, CE.key, BEST_OHEM.key)


def make_outcome(steps, negatives, fl, ohem, ce=None):
    aps = {FL.key: fl, BEST_OHEM.key: ohem, CE.key: ce or ohem}
    return Outcome("digits", steps, negatives, {m: dict(enumerate(values, 1)) for m, values in aps.items()}, 1800)


def test_a_profiles_own_budget_shares_its_runs_with_the_table(tmp_path):
    cells = make_cells(
        ["digits:100", "digits:1500", "digits/dense.yaml:100", "digits/dense.yaml:1500"], KEYS, [1, 2], tmp_path
    )
    assert [(cell.profile.name, cell.steps, len(cell.runs)) for cell in cells] == [
        ("digits", 100, 6),
        ("digits", 1500, 6),
        ("dense", 100, 6),
        ("dense", 1500, 6),
    ]
    folders = [cell.runs[0].folder.relative_to(tmp_path).parts[0] for cell in cells]
    assert folders == ["digits_100steps", "digits", "dense_100steps", "dense"]
    assert [cell.runs[0].max_iter for cell in cells] == [100, 1500, 100, 1500]
    ohem = next(run for run in cells[2].runs if run.method == BEST_OHEM.key)
    assert ohem.title == "OHEM 128/.5"  # as many to a positive as 32 are in the sparser profile


def test_leads_are_paired_by_seed():
    outcome = Outcome("a", 1, 1.0, {FL.key: {1: 40.0, 2: 42.0, 3: 50.0}, CE.key: {3: 45.0, 1: 41.0, 9: 1.0}}, 0)
    assert outcome.lead(CE.key) == [-1.0, 5.0]
    assert outcome.lead(BEST_OHEM.key) == []


def test_background_per_object_is_measured(tmp_path):
    (cell,) = make_cells(["digits:1500"], [FL.key], [1], tmp_path)
    result = cell.runs[0].result()
    result.folder.mkdir(parents=True)
    lines = [{"iteration": i, "num_neg_anchors": n} for i, n in enumerate([1320, 1330])]
    (result.folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result.status, result.metrics = "done", {"bbox/AP": 30.0}
    outcome = outcome_of(cell, [result], objects_per_image=2.5)
    assert outcome.negatives_per_object == pytest.approx(530) and outcome.ap == {FL.key: {1: 30.0}}
    result.status = "failed"
    assert outcome_of(cell, [result], 2.5).negatives_per_object is None


def test_the_grid_is_written_down(tmp_path):
    outcomes = [
        make_outcome(500, 400, [10, 12, 14], [20, 20, 20]),
        make_outcome(1500, 400, [30, 31, 32], [29, 30, 31]),
        make_outcome(500, 1700, [10], [20]),
        Outcome("lost", 500, None, {}, 0),
    ]
    text = write_grid(outcomes, BEST_OHEM.key, 3, tmp_path, "tools/grid.py")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["digits", "500", "400", "12.0 ± 2.0", "20.0 ± 0.0", "20.0 ± 0.0", "-8.0 ± 2.0", "-8.0 ± 2.0"] in cells
    assert ["digits", "1,500", "400", "31.0 ± 1.0", "30.0 ± 1.0", "30.0 ± 1.0", "+1.0 ± 0.0", "+1.0 ± 0.0"] in cells
    assert ["lost", "500", "-", "-", "-", "-", "-", "-"] in cells
    assert "1.5 hours of processes" in text
    record = json.loads((tmp_path / "grid.json").read_text(), parse_constant=pytest.fail)
    assert record["cells"][0]["ap"][FL.key] == {"1": 10, "2": 12, "3": 14} and record["versions"]["torch"]
    with Image.open(tmp_path / "grid.png") as image:
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
    assert "6 of 6 runs to train, 900 steps" in capsys.readouterr().out
