"""What is said about a comparison, and before it."""

from pathlib import Path

import pytest

from focal_plugin.experiments.naming import kind_of, title_of
from focal_plugin.experiments.notes import notes
from focal_plugin.experiments.paper import BEST_OHEM, CE, FL, TABLES, ohem
from focal_plugin.experiments.report import Data, Line, Study
from focal_plugin.experiments.results import RunResult
from focal_plugin.experiments.study import best, featured, outcomes, reference
from focal_plugin.experiments.verdict import compare, verdict

OTHER_OHEM = ohem(256, 0.5)


def make_config(head="FocalHead", gamma=2.0, alpha=0.25, ratio=0.0, loss="focal", steps=40):
    return {
        "SEED": 7,
        "SOLVER": {"MAX_ITER": steps, "IMS_PER_BATCH": 16},
        "MODEL": {
            "FOCAL": {"HEAD": head, "LOSS": loss, "STAR_BETA": 1.0},
            "OHEM": {"BATCH_SIZE": 32, "NMS_THRESH": 0.5, "NEG_POS_RATIO": ratio},
            "RETINANET": {"FOCAL_LOSS_ALPHA": alpha, "FOCAL_LOSS_GAMMA": gamma},
        },
    }


@pytest.mark.parametrize(
    ("config", "kind", "title"),
    [
        (make_config(), "FL", "FL (γ 2, α .25)"),
        (make_config(gamma=0.5, alpha=-1), "FL", "FL (γ 0.5, no α)"),
        (make_config(loss="focal_star"), "FL*", "FL* (γ 2, β 1)"),
        (make_config(gamma=0.0, alpha=0.75), "CE", "CE (α .75)"),
        (make_config("OHEMHead"), "OHEM", "OHEM 32/.5"),
        (make_config("OHEMHead", ratio=3.0), "OHEM", "OHEM 1:3 32/.5"),
    ],
)
def test_methods_are_named_by_their_configuration(config, kind, title):
    assert (kind_of(config), title_of(config)) == (kind, title)


class Trained:
    """A study whose runs left nothing but their AP: `aps` by the paper's method, one number per seed."""

    def __init__(self, table, aps, is_coco=False, config=None):
        published = {row.method: row.published for row in TABLES[table]}
        self.lines = [Line(method.key, method.key.upper(), published.get(method), method.key) for method in aps]
        self.seeds = list(range(1, 1 + max(map(len, aps.values()))))
        data = Data(Path(), Path(), Path())
        self.study = Study(table, "coco" if is_coco else "digits", is_coco, self.lines, self.seeds, data, "make it")
        self.results = [
            self._run(method, seed, ap, config) for method, values in aps.items() for seed, ap in enumerate(values, 1)
        ]

    def _run(self, method, seed, ap, config):
        run = RunResult(method.key, method.key.upper(), seed, Path("nowhere"), ["python", "train_net.py"])
        if ap is not None:
            run.status, run.metrics = "done", {"bbox/AP": ap}
        if config:
            run.config = lambda: config
        return run

    @property
    def found(self):
        return outcomes(self.study, self.results)

    @property
    def words(self):
        return "\n".join(verdict(self.study, self.found, compare(self.found, reference(self.found))))

    @property
    def remarks(self):
        return "\n".join(f"{note.lead} {note.text} {note.code}" for note in notes(self.study, self.found))


def test_fl_is_compared_with_the_best_ohem_seed_by_seed():
    trained = Trained("1d", {BEST_OHEM: [30, 31, 31], OTHER_OHEM: [30, 30, 30], FL: [31, 33, 34], CE: [29, 29, 32]})
    against_ohem, against_ce = compare(trained.found, reference(trained.found))
    assert against_ohem.rival.line.method == BEST_OHEM.key and against_ohem.picked_of == 2
    assert against_ohem.paired.by_seed == {1: 1, 2: 2, 3: 3} and against_ohem.paper.lead == 3.2
    assert against_ce.rival.line.method == CE.key and against_ce.paper.lead == 2.9
    text = trained.words
    assert "best of 2" in text and "favours it" in text and "2.0 AP ahead here" in text
    assert "per seed +1.0, +2.0, +3.0" in text and "−0.5 to +4.5, includes 0" in text
    assert "3.2 AP ahead (36.0 against 32.8" in text and "the same order" in text and "scale of COCO" in text


def test_where_the_order_differs_from_the_papers_it_is_said():
    text = Trained("1d", {BEST_OHEM: [45.6, 45.4], FL: [40.0, 40.0], CE: [40.1, 39.9]}).words
    assert "5.5 AP behind here" in text and "order here differs" in text and "excludes 0" in text
    assert "FL is level with it here" in text


def test_one_seed_has_no_interval():
    text = Trained("1d", {BEST_OHEM: [30], FL: [31]}).words
    assert "no interval" in text and "One seed (1)" in text and "t interval" not in text


def test_no_seed_in_common():
    text = Trained("1d", {BEST_OHEM: [30, None], FL: [None, 31]}).words
    assert "no paired difference" in text and "t interval" not in text


@pytest.mark.parametrize("aps", [{CE: []}, {CE: [None], FL: [None]}])
def test_nothing_done(aps):
    assert "nothing to compare" in Trained("1d", aps).words


def test_a_focal_loss_that_is_not_done_is_missed():
    assert "No run of FL is done" in Trained("1d", {BEST_OHEM: [30], FL: [None]}).words


def test_what_learned_nothing_is_not_compared():
    text = Trained("1d", {BEST_OHEM: [0.2], FL: [0.2]}).words
    assert "the order means nothing" in text and "In the paper" not in text


def test_coco_is_held_against_the_papers_difference():
    aps = {BEST_OHEM: [32.8, 32.6], FL: [36.0, 35.9]}
    assert "lies inside this interval" in Trained("1d", aps, is_coco=True).words
    far = {BEST_OHEM: [32.8, 32.6], FL: [33.0, 32.9]}
    assert "lies outside this interval" in Trained("1d", far, is_coco=True).words
    assert "this interval" not in Trained("1d", aps).words


@pytest.mark.parametrize("table", ["1a", "1b", "1c", "3"])
def test_every_table_has_a_reference_and_a_verdict(table):
    trained = Trained(table, {row.method: [30.0, 31.0] for row in TABLES[table]})
    expected = {"1a": CE.key, "1c": f"{FL.key}_anchors3x3"}.get(table, FL.key)
    assert reference(trained.found).line.method == expected
    assert "By AP" in trained.words and ("cross entropy" in trained.words) == (table in ("1b", "3"))
    assert len({o.kind for o in trained.found}) == {"1a": 1, "1b": 2, "1c": 1, "3": 3}[table]


def test_a_few_lines_stand_for_many():
    aps = {row.method: [10.0 + place] for place, row in enumerate(TABLES["1d"])}
    shown = [o.line.method for o in featured(Trained("1d", aps).found, 4)]
    assert shown == [ohem(256, 0.5, 3).key, ohem(512, 0.5, 3).key, FL.key, CE.key]
    assert best([]) is None and featured([], 4) == []


def test_notes_on_the_budget():
    trained = Trained("1d", {BEST_OHEM: [30], FL: [31]}, is_coco=True, config=make_config())
    assert "Trained on 640 images; the paper's schedule sees 1,440,000" in trained.remarks
    trained = Trained("1d", {BEST_OHEM: [30, 31], FL: [31, 32]}, config=make_config())
    trained.results[0].config = lambda: make_config("OHEMHead", steps=20)
    assert "3 of 4 runs were trained on 640 images; 320 images: OHEM_128_NMS0.5 seed 1." in trained.remarks
    assert Trained("1d", {FL: [31]}, is_coco=True, config=make_config(steps=90_000)).remarks == ""


def test_lines_of_one_title_are_told_apart():
    trained = Trained("1d", {BEST_OHEM: [30], OTHER_OHEM: [31]})
    lines = [Line(line.method, "OHEM 1/.5", None, "") for line in trained.lines]
    study = Study("1d", "tiny", False, lines, [1], trained.study.data, "")
    assert len({o.title for o in outcomes(study, trained.results)}) == 2
