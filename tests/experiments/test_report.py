"""From the results of runs to the report, from fabricated runs and from those of docs/results."""

import functools
import itertools
import json
import math
import re
import statistics
import xml.etree.ElementTree as ET
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from headless import CHROMIUM, show
from PIL import Image
from scipy import stats

from focal_plugin import get_config
from focal_plugin.experiments import figures, report
from focal_plugin.experiments.paper import BEST_OHEM as OHEM
from focal_plugin.experiments.paper import TABLES, title_of
from focal_plugin.experiments.results import Data, RunResult, Study, compare, read_results, reference, tabulate_runs

DOCS = Path(__file__).parents[2] / "docs" / "results" / "digits_extra"
ROWS = {row.key: row for row in TABLES["1d"]}
FL, CE, OTHER_OHEM = ROWS["fl_gamma2_alpha0.25"], ROWS["ce_alpha0.75"], ROWS["ohem_256_nms0.5"]
BOX = {"image_id": 1, "category_id": 1, "bbox": [8, 8, 16, 16]}


@functools.cache
def make_config(row, steps):
    """A row's configuration on the digits."""
    settings = row.overrides(get_config("digits/Base-digits.yaml"))
    return get_config("digits/Base-digits.yaml", ["SOLVER.MAX_ITER", steps, *itertools.chain(*settings.items())])


class Study1d:
    """Fabricates runs of a table in a folder, and reports on them."""

    def __init__(self, folder=Path("nowhere"), **options):
        self.folder, self.results = folder, []
        self.options = {"table": "1d", "profile": "digits", "is_coco": False, "command": "make demo"}
        self.options |= {"data": Data(folder / "train.json", folder / "val.json", folder), **options}

    def add(self, row, *aps, first=1, steps=40, **changes):
        """Runs of the seeds from `first` on that are done and have left nothing but their AP; None: missing."""
        for seed, ap in enumerate(aps, first):
            method = row.recipe if self.options["is_coco"] else row.method
            config, folder = make_config(row, steps), self.folder / method / f"seed{seed}"
            result = RunResult(method, title_of(config), seed, folder, ["python", "train_net.py"])
            result.config = lambda config=config: config
            if ap is not None:
                vars(result).update(status="done", exit_code=0, metrics={"bbox/AP": ap})
            vars(result).update(changes)
            self.results.append(result)
        return self

    def train(self, row, ap, seed=1, **changes):
        """A run that is done, with all that it leaves in its folder."""
        result = self.add(row, ap, first=seed, seconds=90.0, peak_memory=300 * 2**20, parallel=2).results[-1]
        config = result.config().clone()
        config.SOLVER.BASE_LR = float("inf")
        result.command += ["--config-file", "base.yaml", "--resume", "SEED", str(seed)]
        result.command += ["MODEL.FOCAL.HEAD", config.MODEL.FOCAL.HEAD, "OUTPUT_DIR", "here"]
        result.metrics |= {"bbox/AP50": 61.5, "bbox/AP75": 33.25, "bbox/APs": 12.5}
        result.metrics |= {"bbox/AP-cat": 77.7, "bbox/AP-dog": float("nan")}
        del result.config  # from the file
        result.detections.parent.mkdir(parents=True)
        result.detections.write_text(json.dumps([{**BOX, "score": 0.8}]))
        (result.folder / "config.yaml").write_text(config.dump())
        counts = {"num_pos_anchors": 21.5, "num_neg_anchors": 2931.0}
        counts |= {"ohem/num_pos": 9.5, "ohem/num_neg": 22.5} if row == OHEM else {}
        times = {19: 0.2, 39: 0.4, 40: 0.9}
        history = [{"iteration": i, "loss_cls": 1 / i, "time": times[i], **counts} for i in times]
        (result.folder / "metrics.json").write_text("\n".join(map(json.dumps, history)))
        vars(result).update(changes)
        return self

    @property
    def table(self):
        """The study, and the table of its runs."""
        methods, seeds = {result.method for result in self.results}, {result.seed for result in self.results}
        rows = [row for row in TABLES[self.options["table"]] if {row.method, row.recipe} & methods]
        study = Study(rows=rows, seeds=sorted(seeds), **self.options)
        return study, tabulate_runs(study, self.results)

    @property
    def words(self):
        """The verdict, and the notes."""
        notes = [" ".join(note.values()) for note in report.notes(*self.table)]
        return "\n".join([*report.verdict(*self.table), *notes])

    def write(self):
        truth = {"images": [{"id": 1, "file_name": "1.png", "width": 48, "height": 48}]}
        truth["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        Image.new("RGB", (48, 48)).save(self.folder / "1.png")
        for path, count in ((self.options["data"].val_json, 3), (self.options["data"].train_json, 4)):
            truth["annotations"] = [{"id": i, **BOX, "area": 256, "iscrowd": 0} for i in range(1, count + 1)]
            path.write_text(json.dumps(truth))
        return read(report.write_report(self.table[0], self.results, self.folder / "report").parent)


def read(folder):
    """A report, read back: its texts, the lines of its tables as cells, and the attributes of its HTML by tag."""
    names = ("index.html", "report.md", "results.json")
    html, md, record = ((folder / name).read_text(encoding="utf-8") for name in names)
    record = json.loads(record, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in md.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if line]
    tops = md[: md.index("| method")], html[: html.index("<table")]
    tags, parser = defaultdict(list), HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags[tag].append(dict(attributes))
    parser.feed(html)
    return SimpleNamespace(folder=folder, html=html, md=md, record=record, cells=cells, tops=tops, tags=tags)


def test_where_nothing_can_be_found_there_is_a_page(tmp_path):
    study = Study1d(tmp_path).train(CE, math.nan).train(FL, math.nan)
    assert "the order means nothing" in study.write().md


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report on a run of each kind that is done, and one of each kind that is not."""
    error = "RuntimeError: CUDA\nout of memory in /" + "long" * 100
    study = Study1d(tmp_path_factory.mktemp("page"), left_out=["OHEM 64/.7"])
    study.train(CE, 30.0).train(OHEM, 45.6).train(FL, 40.1, attempts=2)
    study.train(ROWS["ohem_512_nms0.5"], 1.0, status="missing", metrics={})
    study.train(OTHER_OHEM, 1.0, status="failed", exit_code=1, error=error, metrics={})
    return study.train(FL, 1.0, seed=2, status="diverged", step=37, metrics={}).write()


def compare_in(study):
    return compare(study.table[1], FL.method, OHEM.method)


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_paired_interval_is_the_t_interval_of_the_differences(seeds):
    ours, theirs = np.random.default_rng(seeds).normal(35, 3, (2, seeds))
    found = compare_in(Study1d().add(FL, *ours).add(OHEM, *theirs))
    differences = [a - b for a, b in zip(ours, theirs)]
    margin = stats.t.ppf(0.975, seeds - 1) * statistics.stdev(differences) / math.sqrt(seeds)
    assert found.mean == pytest.approx(statistics.fmean(differences))
    assert found.interval_95 == pytest.approx((found.mean - margin, found.mean + margin))
    assert found.excludes_zero == (abs(found.mean) > margin)
    assert found.interval_holds_paper_difference == (abs(3.2 - found.mean) <= margin)


def test_only_seeds_that_both_have_done_are_compared():
    found = compare_in(Study1d().add(FL, 10.0, 20.0, 30.0).add(OHEM, None, None, 25.0, 0.0))
    assert found.difference_by_seed == {3: 5.0} and found.mean == 5.0
    assert found.interval_95 is found.excludes_zero is found.interval_holds_paper_difference is None
    found = compare_in(Study1d().add(FL, 10.0, None).add(OHEM, None, 10.0))
    assert found.difference_by_seed == {} and math.isnan(found.mean)
    found = compare_in(Study1d().add(FL, 2.0, 3.0).add(OHEM, 1.0, 2.0))
    assert (found.interval_95, found.excludes_zero) == ((1.0, 1.0), True) and report.number(-0.04, "+.1f") == "0.0"


def test_a_committed_study_comes_out_again_in_every_number(tmp_path, monkeypatch):
    """And its means and deviations are those of its runs, by other means."""
    old = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    made = {name: old[name] for name in ("command", "date", "machine", "versions")}
    monkeypatch.setattr(report, "draw", lambda *args: [])
    report.write_table(*read_results(DOCS / "results.json"), pd.DataFrame(old["objects"]).T, made, tmp_path)
    new = read(tmp_path)
    for part in ("runs", "lines", "comparisons"):
        pd.testing.assert_frame_equal(pd.DataFrame(new.record[part]), pd.DataFrame(old[part]), rtol=1e-9)
    committed = (DOCS / "report.md").read_text(encoding="utf-8").splitlines()
    assert {line for line in committed if line[:1] == "|"} <= set(new.md.splitlines())
    for line, (name, found) in ((own, item) for own in new.record["lines"] for item in own["metrics"].items()):
        values = [run["metrics"][name] for run in old["runs"] if run["method"] == line["method"]]
        values = [value for value in values if value is not None]
        expected = [statistics.fmean(values), statistics.stdev(values)] if values else [None, None]
        assert [found["mean"], found["deviation"]] == pytest.approx(expected) and found["count"] == len(values)


AHEAD = "FL (γ 2, α .25) is 2.0 AP ahead of the best OHEM, OHEM 32/.5 (95 % t interval −0.5 to +4.5, includes 0"
BY_SEED = "best of 2 / favours it / +1.0 (seed 1), +2.0 (seed 2), +3.0 (seed 3) / the same order"
IN_PAPER = "3.2 AP ahead (36.0 against 32.8 / cross entropy, CE (α .75) / 2.9 AP ahead ("
THREE_SEEDS = Study1d().add(OHEM, 30, 31, 31).add(OTHER_OHEM, 30, 30, 30).add(FL, 31, 33, 34).add(CE, 29, 29, 32)
LOST = "5.5 AP behind the best OHEM / order here differs / excludes 0 / level with cross entropy"
ONE_SEED = "ahead of / no interval / One seed (1) / nothing about chance / All have one learning rate, 0.003"
OUTSIDE = "lies outside this interval / Trained on 160 images; the paper's schedule sees 1,440,000"
UNEQUAL = "3 of 4 runs were trained on 160 images; 80 images: OHEM 32/.5 seed 1."


@pytest.mark.parametrize(
    ("study", "said", "unsaid"),
    [
        (THREE_SEEDS, f"{AHEAD} / {BY_SEED} / {IN_PAPER}", "Incomplete"),
        (Study1d().add(OHEM, 45.6, 45.4).add(FL, 40.0, 40.0).add(CE, 40.1, 39.9), LOST, "ahead of"),
        (Study1d().add(OHEM, 30).add(FL, 31), ONE_SEED, "t interval"),
        (Study1d().add(OHEM, 30).add(FL, 31), ONE_SEED, "The paper's difference"),
        (Study1d().add(FL, 10.0, None).add(OHEM, None, 10.0), "no paired difference / Incomplete", "t interval"),
        (Study1d().add(CE, None), "nothing to compare", "In the paper"),
        (Study1d().add(OHEM, 30).add(FL, None), "No run of FL is done", "In the paper"),
        (Study1d().add(OHEM, 0.2).add(FL, 0.2), "the order means nothing", "In the paper"),
        (Study1d().add(CE, 30).add(OHEM, 31), "OHEM 32/.5 has the highest AP, 31.0;", "In the paper"),
        (Study1d(is_coco=True).add(OHEM, 32.8, 32.6).add(FL, 33.0, 32.9), OUTSIDE, "Not the paper's setting"),
        (Study1d(is_coco=True).add(FL, 31, steps=360_000), "FL (γ 2, α .25)", "Trained on"),
        (Study1d().add(OHEM, 30, steps=20).add(FL, 31, 32, 33), UNEQUAL, "the paper's schedule"),
    ],
)
def test_the_words_say_what_the_numbers_do_and_no_more(study, said, unsaid):
    assert all(text in study.words for text in said.split(" / ")) and unsaid not in study.words


@pytest.mark.parametrize("table", ["1a", "1b", "1c", "3"])
def test_every_table_has_a_reference_and_a_verdict(table):
    study = Study1d(table=table)
    for row in TABLES[table]:
        study.add(row, 30.0, 31.0)
    (_, runs), words = study.table, study.words
    expected = {"1a": CE.method, "1c": f"{FL.method}_anchors3x3"}.get(table, FL.method)
    assert reference(runs) == expected and runs.title.nunique() == len(TABLES[table])
    assert "By AP" in words and ("cross entropy" in words) == (table in ("1b", "3"))
    assert runs.kind.nunique() == {"1a": 1, "1b": 2, "1c": 1, "3": 3}[table]
    styles = figures.method_styles(runs, expected)
    assert len({(s["color"], s["linestyle"]) for s in styles.values()}) == len(TABLES[table])


def test_a_few_curves_stand_for_many_and_the_focal_loss_comes_first(tmp_path, monkeypatch):
    study, drawn = Study1d(data=None), {}
    for place, row in enumerate(TABLES["1d"]):
        study.add(row, 10.0 + place)
    for name in ("draw_ap", "draw_precision_recall", "save_svg"):
        monkeypatch.setattr(figures, name, lambda runs, methods, *args, name=name: drawn.update({name: methods}))
    figures.draw(*study.table, tmp_path)
    assert drawn["draw_ap"] == [FL.method, *(row.method for row in TABLES["1d"] if row != FL)]
    # The reference, the best of each kind, then the next best, in the table's order.
    ohem = [f"ohem1to3_{examples}_nms0.5" for examples in (128, 256, 512)]
    assert drawn["draw_precision_recall"] == [FL.method, *ohem, CE.method]


def test_the_page_holds_the_numbers_it_was_given(page):
    for line in (
        "OHEM 32/.5 | 45.6 | 61.5 | 33.2 | +5.5 | OHEM 128/.5 | 32.8 | 50.3 | 35.1 | −3.2 | 1",
        "OHEM 32/.5 | 0.400 | 1.5 | 300 | 9.5 | 22.5 | 160",
        "FL (γ 2, α .25) | 0.400 | 1.5 | 300 | 21.5 | 2,931 | 160",
        "cat | 4 | 3 | 77.7 | 77.7 | 77.7",
        "dog | 0 | 0 | – | – | –",
        "FL (γ 2, α .25) | 12.5",  # without a column for each size that no object has
    ):
        assert line.split(" | ") in page.cells
    for text in ("45.6", "−3.2", "2,931", "2 at a time with 1 thread each", "make demo"):
        assert text in page.html and text in page.md
    assert "in training set" in page.md and "IMS_PER_BATCH: 4" in page.html

    done = {run["method"]: run for run in page.record["runs"] if run["status"] == "done"}
    ohem, focal = done[OHEM.method], done[FL.method]
    assert ohem["metrics"]["bbox/AP"] == 45.6 and ohem["metrics"]["bbox/AP-dog"] is None
    assert ohem["negatives_per_image"] == 22.5 and focal["negatives_per_image"] == 2931
    assert focal["images_seen"] == 160 and len(focal["precision_at_recall"]["0.5"]) == 101
    line = next(line for line in page.record["lines"] if line["method"] == FL.method)
    assert line["config"]["SOLVER"]["BASE_LR"] is None and line["published"]["AP"] == 36
    assert line["overrides"] == {"MODEL.FOCAL.HEAD": "FocalHead"} and line["config_file"] == "base.yaml"
    assert page.record["command"] == "make demo" and page.record["versions"]["torch"]


def test_pictures_are_drawn_described_and_inside_the_page(page):
    for name in ("ap", "differences", "precision_recall_50", "loss_cls"):
        assert f"({name}.svg)" in page.md
        assert ET.parse(page.folder / f"{name}.svg").getroot().tag.endswith("svg")
    with Image.open(page.folder / "detections.jpg") as image:
        assert image.width > 500
    tags = page.tags
    assert len(tags["img"]) == 5 and all(len(image["alt"]) > 30 for image in tags["img"])
    assert all(image["src"].startswith(("data:image/svg+xml;base64,", "data:image/jpeg")) for image in tags["img"])
    ids = {f"#{attributes.get('id')}" for found in tags.values() for attributes in found}
    assert tags["a"] and {a["href"] for a in tags["a"]} <= ids
    assert not tags["script"] and [link["href"] for link in tags["link"]] == ["data:,"]
    assert all(cell.get("scope") in ("col", "row", "colgroup") for cell in tags["th"])
    assert tags["html"] == [{"lang": "en"}] and len(page.html) < 6e6


def test_the_verdict_comes_first_then_what_failed_then_the_picture_then_the_table(page):
    first = page.record["verdict"][0]
    assert first.startswith(
        "Incomplete, 3 of 6 runs are done: FL (γ 2, α .25) is 5.5 AP behind the best OHEM, OHEM 32/.5"
    )
    for text, picture, table in ((page.md, "ap.svg", "| method"), (page.html, "<img", "<table")):
        assert text.index(first.partition(" (")[0]) < text.index(picture) < text.index(table)
        assert "Not the paper's setting" in text.replace("&#39;", "'") and text.count("scale of COCO") == 1
        assert not re.search(r"\breproduc(ed|es|tion)\b", text) and "here − paper" not in text.lower()
    stated = ["3 of 6 runs are done", "OHEM 128/.5, seed 1: missing", "OHEM 64/.5, seed 1: failed", "exit code 1"]
    stated += ["RuntimeError: CUDA", "FL (γ 2, α .25), seed 2: diverged", "at step 37", "Stopped and resumed"]
    for text in (*stated, "not asked for: OHEM 64/.7"):
        assert all(text in top for top in page.tops), text
    table = {line[0]: line for line in reversed(page.cells)}
    assert table["OHEM 128/.5"][1:4] == ["missing", "–", "–"] and table["OHEM 128/.5"][-1] == "0 of 1 (1 missing)"
    assert table["OHEM 64/.5"][1] == "failed" and table["FL (γ 2, α .25)"][-1] == "1 of 2 (1 diverged)"
    assert {run["status"] for run in page.record["runs"]} == {"missing", "failed", "done", "diverged"}


def test_coco_is_held_against_the_paper(tmp_path):
    study = Study1d(tmp_path, is_coco=True, profile="coco")
    for seed in (1, 2):
        study.train(OHEM, 32.0, seed).train(FL, 35.0 + seed, seed)
    page = study.write()
    line = next(line for line in page.cells if line[0] == "OHEM 32/.5")
    assert line[-4:-1] == ["−0.8", "+11.2", "−1.9"]  # 33.25 less 35.1 is 1.85 under it
    assert "Not the paper's budget" in page.tops[0] and "160 images" in page.tops[0]
    assert "lies inside this interval" in page.md and "Not the paper's setting" not in page.md


def test_a_report_of_nothing(tmp_path):
    page = Study1d(tmp_path).add(FL, None, status="failed", error="ValueError: no", config=dict).write()
    assert "nothing to compare" in page.md and page.record["comparisons"] == []
    assert "<img" not in page.html and "No run has written its full configuration" in page.html
    assert "Time, memory" not in page.html


def test_runs_of_one_title_that_left_no_history_and_no_config(tmp_path):
    study = Study1d(tmp_path).train(OHEM, 40.1, title="OHEM").train(OTHER_OHEM, 40.1, title="OHEM")
    for result in study.results:
        (result.folder / "metrics.json").unlink()
        (result.folder / "config.yaml").unlink()
    record = study.write().record
    assert record["runs"][0]["step_seconds"] is None and record["lines"][0]["kind"] == "OHEM"
    assert record["lines"][0]["title"] != record["lines"][1]["title"]


def test_hostile_titles_and_errors_stay_text(tmp_path):
    bad = '<script>alert("x")</script> | `a` $\\frac$ \x1b[31m'
    study = Study1d(tmp_path, left_out=[bad], profile=bad).train(FL, 40.1, title=bad)
    study.train(FL, 0, seed=2, status="failed", error=bad, metrics={}, title=bad)
    study.results[1].command.append(bad)
    page = study.write()
    assert not page.tags["script"] and "&lt;script&gt;" in page.html and "\x1b" not in page.html
    assert "<script" not in page.md and "\x1b" not in page.md
    table = [line for line in page.cells if "paper AP" in line or "40.1" in line]
    assert len(table) == 2 and len(table[0]) == len(table[1])
    assert page.record["runs"][1]["error"] == bad and "\x1b" not in report.format_table(study.table[0], study.results)
    for picture in page.folder.glob("*.svg"):
        ET.parse(picture)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_a_phone_and_uses_a_wide_screen(page, tmp_path, width):
    shown = show(page.html, width, tmp_path)
    assert shown.width == width and shown.page_width <= width
    assert shown.images == shown.decoded == page.html.count("<img") == 5
    assert shown.errors == 0 and "CONSOLE" not in shown.log
