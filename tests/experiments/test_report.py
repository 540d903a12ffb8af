"""The report, from fabricated runs."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import yaml
from headless import CHROMIUM, show
from PIL import Image

from focal_plugin.experiments import sections
from focal_plugin.experiments.naming import title_of
from focal_plugin.experiments.paper import BEST_OHEM, CE, FL, FL_R50, Published
from focal_plugin.experiments.report import Data, Line, Study, format_class_table, format_table, write_report
from focal_plugin.experiments.results import RunResult

BOX = [8, 8, 16, 16]
PAPER = {CE: None, BEST_OHEM: Published(32.8, 50.3, 35.1), FL: Published(36.0, 54.9, 38.7)}
HEADS = {CE: ("FocalHead", 0.0, 0.75), BEST_OHEM: ("OHEMHead", 0.0, -1.0), FL: ("FocalHead", 2.0, 0.25)}
CHARTS = ("ap", "differences", "precision_recall_50", "precision_recall_75", "loss_cls", "loss_box_reg")


def make_config(method):
    head, gamma, alpha = HEADS[method]
    return {
        "SEED": 1,
        "SOLVER": {"MAX_ITER": 40, "IMS_PER_BATCH": 16, "BASE_LR": float("inf")},
        "MODEL": {
            "FOCAL": {"HEAD": head, "LOSS": "focal", "STAR_BETA": 1.0},
            "OHEM": {"BATCH_SIZE": 32, "NMS_THRESH": 0.5, "NEG_POS_RATIO": 0.0},
            "RETINANET": {"FOCAL_LOSS_ALPHA": alpha, "FOCAL_LOSS_GAMMA": gamma},
        },
    }


def make_data(folder):
    truth = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 48, "height": 48} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": BOX, "area": 256, "iscrowd": 0} for i in (1, 2, 3)
        ],
    }
    for image in truth["images"]:
        Image.new("RGB", (48, 48)).save(folder / image["file_name"])
    (folder / "truth.json").write_text(json.dumps(truth))
    return Data(folder / "truth.json", folder / "truth.json", folder)


class Workshop:
    """Fabricates runs in a folder, and reports on them."""

    def __init__(self, folder):
        self.folder, self.data = folder, make_data(folder)

    def result(self, method, ap, seed=1, **changes):
        """A run that is done, with all that it leaves; `changes` are attributes of the result."""
        config = make_config(method)
        folder = self.folder / "runs" / method.key / f"seed{seed}"
        (folder / "inference").mkdir(parents=True)
        detections = [{"image_id": 1, "category_id": 1, "bbox": BOX, "score": 0.8}]
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in make_history(method)))
        metrics = {"bbox/AP": ap, "bbox/AP50": 61.5, "bbox/AP75": 33.25, "bbox/APs": 12.5, "bbox/AP-cat": 77.7}
        command = ["python", "train_net.py", "--config-file", "base.yaml", "--resume"]
        command += ["SEED", str(seed), "MODEL.FOCAL.HEAD", HEADS[method][0], "OUTPUT_DIR", str(folder)]
        result = RunResult(method.key, title_of(config), seed, folder, command, status="done", exit_code=0)
        result.metrics = {**metrics, "bbox/AP-dog": float("nan")}
        result.seconds, result.peak_memory, result.parallel = 90.0, 300 * 2**20, 2
        for name, value in changes.items():
            setattr(result, name, value)
        return result

    def study(self, results, **options):
        """What asked for these results."""
        titles = {method.key: title_of(make_config(method)) for method in PAPER}
        methods = [method for method in PAPER if method.key in {result.method for result in results}]
        lines = [Line(m.key, titles[m.key], PAPER[m], titles[m.key].replace("32/", "128/")) for m in methods]
        seeds = sorted({result.seed for result in results}) or [1]
        settings = {"profile": "digits", "is_coco": False, "lines": lines, "left_out": (), **options}
        return Study(table="1d", seeds=seeds, data=self.data, command="make demo", **settings)

    def write(self, results, **options):
        page = write_report(self.study(results, **options), results, self.folder / "report")
        assert page == self.folder / "report" / "index.html"
        return Written(page.parent)


def make_history(method):
    counts = {"num_pos_anchors": 21.5, "num_neg_anchors": 2931.0}
    if method == BEST_OHEM:
        counts.update({"ohem/num_pos": 9.5, "ohem/num_neg": 22.5})
    return [
        {"iteration": i, "loss_cls": 1 / i, "loss_box_reg": 1.0, "time": time, **counts}
        for i, time in ((19, 0.2), (39, 0.4), (40, 0.9))
    ]


@pytest.fixture
def shop(tmp_path):
    return Workshop(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of the time of a test that does not look at them."""

    def save_svg(figure, path):
        path.write_text("<svg/>")

    def draw_mosaic(truth, images, methods, path, **options):
        path.write_bytes(b"")

    monkeypatch.setattr(sections.figures, "save_svg", save_svg)
    monkeypatch.setattr(sections, "draw_mosaic", draw_mosaic)


def make_three(shop):
    return [shop.result(CE, 30.0), shop.result(BEST_OHEM, 45.6), shop.result(FL, 40.1)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The report on one run of each kind."""
    shop = Workshop(tmp_path_factory.mktemp("three"))
    return shop.write(make_three(shop))


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """The report on runs of which one is done."""
    shop = Workshop(tmp_path_factory.mktemp("troubled"))
    error = "RuntimeError: CUDA\nout of memory in /" + "long" * 100
    results = [
        shop.result(CE, 1.0, status="missing", metrics={}),
        shop.result(BEST_OHEM, 1.0, status="failed", exit_code=1, error=error, metrics={}),
        shop.result(FL, 40.1, attempts=2),
        shop.result(FL, 1.0, seed=2, status="diverged", step=37, metrics={}),
    ]
    return shop.write(results, left_out=["OHEM 64/.7"])


class Written:
    """A report, read back."""

    def __init__(self, folder):
        self.folder = folder
        self.html = (folder / "index.html").read_text(encoding="utf-8")
        self.markdown = (folder / "report.md").read_text(encoding="utf-8")

        def refuse(constant):
            raise ValueError(f"{constant} is not JSON")

        self.record = json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)

    @property
    def cells(self):
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in self.markdown.splitlines()]

    @property
    def tops(self):
        """Both texts before the first table."""
        return self.markdown[: self.markdown.index("| method")], self.html[: self.html.index("<table")]


class Tags(HTMLParser):
    """Every tag and its attributes."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def named(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


def test_report_holds_the_numbers_it_was_given(three):
    report = three
    ohem = ["OHEM 32/.5", "OHEM 128/.5", "32.8", "50.3", "35.1", "−3.2", "45.6", "61.5", "33.2", "+5.5", "1"]
    focal = ["FL (γ 2, α .25)", "FL (γ 2, α .25)", "36.0", "54.9", "38.7", "–", "40.1", "61.5", "33.2", "–", "1"]
    assert ohem in report.cells and focal in report.cells
    assert ["OHEM 32/.5", "0.400", "1.5", "300", "9.5", "22.5", "640"] in report.cells
    assert ["FL (γ 2, α .25)", "0.400", "1.5", "300", "21.5", "2,931", "640"] in report.cells
    assert ["cat", "3", "77.7", "77.7", "77.7"] in report.cells and ["dog", "0", "–", "–", "–"] in report.cells
    assert ["FL (γ 2, α .25)", "12.5", "–", "–"] in report.cells
    assert "make demo" in report.markdown and "Incomplete" not in report.markdown
    assert "2 at a time with 1 thread each" in report.markdown
    for text in ("45.6", "−3.2", "2,931", "2 at a time with 1 thread each", "make demo", "IMS_PER_BATCH: 16"):
        assert text in report.html

    runs = {run["method"]: run for run in report.record["runs"]}
    assert runs[BEST_OHEM.key]["metrics"]["bbox/AP"] == 45.6 and runs[BEST_OHEM.key]["metrics"]["bbox/AP-dog"] is None
    assert runs[BEST_OHEM.key]["negatives_per_image"] == 22.5 and runs[CE.key]["negatives_per_image"] == 2931
    assert runs[FL.key]["images_seen"] == 640 and len(runs[FL.key]["precision_at_recall"]["0.5"]) == 101
    lines = {line["method"]: line for line in report.record["lines"]}
    assert lines[FL.key]["config"]["SOLVER"]["BASE_LR"] is None and lines[FL.key]["published"]["AP"] == 36
    assert lines[FL.key]["overrides"] == {"MODEL.FOCAL.HEAD": "FocalHead"}
    assert report.record["command"] == "make demo" and report.record["versions"]["torch"]


def test_means_deviations_and_the_paired_interval(shop, undrawn):
    results = [shop.result(BEST_OHEM, ap, seed) for seed, ap in enumerate((30.0, 31.0, 31.0), 1)]
    results += [shop.result(FL, ap, seed) for seed, ap in enumerate((31.0, 33.0, 34.0), 1)]
    report = shop.write(results)
    assert any("32.7 ± 1.5" in line and line[-1] == "3" for line in report.cells)
    (comparison,) = report.record["comparisons"]
    assert comparison["difference_by_seed"] == {"1": 1, "2": 2, "3": 3} and comparison["excludes_zero"] is False
    assert comparison["interval_95"] == pytest.approx([-0.484, 4.484], abs=1e-3)
    for text in (report.markdown, report.html):
        assert "−0.5 to +4.5" in text and "standard deviation" in text


def test_pictures_are_drawn_described_and_inside_the_page(three):
    report = three
    for name in (*CHARTS, "examples_positives", "examples_negatives"):
        assert f"({name}.svg)" in report.markdown
        assert ET.parse(report.folder / f"{name}.svg").getroot().tag.endswith("svg")
    with Image.open(report.folder / "detections.jpg") as image:
        assert image.width > 500
    tags = Tags(report.html)
    assert len(tags.named("img")) == 9 and all(len(image["alt"]) > 30 for image in tags.named("img"))
    assert all(
        image["src"].startswith(("data:image/svg+xml;base64,", "data:image/jpeg")) for image in tags.named("img")
    )
    links = [a["href"] for a in tags.named("a")]
    ids = {attributes["id"] for _, attributes in tags.tags if "id" in attributes}
    assert links and {link.removeprefix("#") for link in links} <= ids
    assert not tags.named("script") and [link["href"] for link in tags.named("link")] == ["data:,"]
    assert all(cell.get("scope") in ("col", "row", "colgroup") for cell in tags.named("th"))
    assert tags.named("html") == [{"lang": "en"}] and len(report.html) < 6e6


def test_what_is_missing_failed_or_diverged_is_stated_before_any_number(troubled):
    report = troubled
    for top in report.tops:
        for text in (
            "1 of 4 runs are done",
            "CE (α .75), seed 1: missing",
            "OHEM 32/.5, seed 1: failed",
            "exit code 1",
            "RuntimeError: CUDA",
            "FL (γ 2, α .25), seed 2: diverged",
            "at step 37",
            "not asked for: OHEM 64/.7",
            "Stopped and resumed",
        ):
            assert text in top, text
    table = format_table_cells(report.markdown)
    assert table["CE (α .75)"][-5:] == ["missing", "–", "–", "–", "0 of 1 (1 missing)"]
    assert table["OHEM 32/.5"][-5] == "failed" and table["FL (γ 2, α .25)"][-1] == "1 of 2 (1 diverged)"
    assert {run["status"] for run in report.record["runs"]} == {"missing", "failed", "done", "diverged"}


def format_table_cells(markdown):
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line[:1] == "|"]
    return {line[0]: line for line in reversed(lines)}


def test_nothing_is_claimed_off_coco(three):
    for text in (three.markdown, three.html):
        assert "Not the paper's setting" in text.replace("&#39;", "'") and "scale of COCO" in text
        assert not re.search(r"\breproduc(ed|es|tion)\b", text) and "here − paper" not in text.lower()


def test_coco_is_held_against_the_paper(shop, undrawn):
    results = [
        shop.result(method, ap, seed) for seed in (1, 2) for method, ap in ((BEST_OHEM, 32.0), (FL, 35.0 + seed))
    ]
    report = shop.write(results, profile="coco", is_coco=True)
    line = format_table_cells(report.markdown)["OHEM 32/.5"]
    assert line[-4:-1] == ["−0.8", "+11.2", "−1.9"]  # 33.25 less 35.1 is 1.85 under it
    assert "Not the paper's budget" in report.tops[0] and "640 images" in report.tops[0]
    assert "lies inside this interval" in report.markdown and "Not the paper's setting" not in report.markdown


def test_a_report_of_nothing(shop):
    failed = shop.result(FL, 0.0, status="failed", metrics={}, error="ValueError: no", exit_code=None)
    shutil.rmtree(failed.folder)
    report = shop.write([failed])
    assert "nothing to compare" in report.markdown and report.record["comparisons"] == []
    assert "<img" not in report.html and "No run has written its full configuration" in report.html
    empty = shop.write([], lines=[Line(FL.key, "FL", FL_R50, "FL")])
    assert "FL: missing" in empty.tops[0] and empty.record["runs"] == []


def test_without_a_focal_loss(shop, undrawn):
    report = shop.write([shop.result(CE, 30.0), shop.result(BEST_OHEM, 31.0)])
    assert report.record["comparisons"] == [] and "By AP" in report.markdown and "FL is" not in report.markdown


def test_a_run_that_left_no_history_and_no_config(shop):
    result = shop.result(FL, 40.1)
    (result.folder / "metrics.json").unlink()
    (result.folder / "config.yaml").unlink()
    report = shop.write([result])
    assert report.record["runs"][0]["step_seconds"] is None and report.record["lines"][0]["kind"] == "FL"


def test_hostile_titles_and_errors_stay_text(shop):
    bad = '<script>alert("x")</script> | `a` $\\frac$ \x1b[31m'
    results = [shop.result(FL, 40.1), shop.result(FL, 0, seed=2, status="failed", error=bad, metrics={})]
    results[1].command.append(bad)
    report = shop.write(results, lines=[Line(FL.key, bad, PAPER[FL], bad)], left_out=[bad], profile=bad)
    assert not Tags(report.html).named("script") and "&lt;script&gt;" in report.html and "\x1b" not in report.html
    assert "<script" not in report.markdown.partition("The runs:")[0]  # they stand in a block of code
    table = [line for line in report.markdown.splitlines() if "paper AP" in line or " 40.1 |" in line]
    assert len(table) == 2 and len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
    assert report.record["runs"][1]["error"] == bad
    for picture in report.folder.glob("*.svg"):
        ET.parse(picture)


def test_tables_for_the_terminal(shop):
    results = make_three(shop)
    study = shop.study(results)
    table, classes = format_table(study, results), format_class_table(study, results)
    assert "paper AP" in table and "here AP" in table and "| 45.6 |" in re.sub(" +", " ", table)
    assert "instances" in classes and "77.7" in classes


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_a_phone_shows_the_page_without_scrolling_sideways(troubled, tmp_path):
    shown = show(troubled.html, 360, tmp_path)
    assert shown.width == 360 and shown.page_width <= 360
    assert shown.images == shown.decoded == troubled.html.count("<img") > 5
    assert shown.errors == 0 and "CONSOLE" not in shown.log
