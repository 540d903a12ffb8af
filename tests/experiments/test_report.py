"""The report, from fabricated runs."""

import json

import pytest
import yaml
from PIL import Image

from focal_plugin.experiments.report import Data, format_table, write_report
from focal_plugin.experiments.results import RunResult
from focal_plugin.experiments.runner import Row
from focal_plugin.experiments.verdict import kind_of, title_of

BOX = [8, 8, 16, 16]


def make_config(head="FocalHead", gamma=2.0, alpha=0.25, ratio=0.0):
    return {
        "SEED": 7,
        "SOLVER": {"MAX_ITER": 40},
        "MODEL": {
            "FOCAL": {"HEAD": head},
            "OHEM": {"BATCH_SIZE": 32, "NMS_THRESH": 0.5, "NEG_POS_RATIO": ratio},
            "RETINANET": {"FOCAL_LOSS_ALPHA": alpha, "FOCAL_LOSS_GAMMA": gamma},
        },
    }


CONFIGS = {"ce": make_config(gamma=0.0, alpha=0.75), "ohem": make_config("OHEMHead"), "focal": make_config()}


@pytest.fixture
def data(tmp_path):
    truth = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 48, "height": 48} for i in (1, 2)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": BOX, "area": 256, "iscrowd": 0} for i in (1, 2, 3)
        ],
    }
    for image in truth["images"]:
        Image.new("RGB", (48, 48)).save(tmp_path / image["file_name"])
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    return Data(tmp_path / "truth.json", tmp_path / "truth.json", tmp_path)


@pytest.fixture
def make_result(tmp_path):
    def make(key, ap, error=""):
        config = CONFIGS[key]
        folder = tmp_path / "out" / key
        (folder / "inference").mkdir(parents=True)
        detections = [{"image_id": 1, "category_id": 1, "bbox": BOX, "score": 0.8}]
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        counts = {"num_pos_anchors": 21.5, "num_neg_anchors": 2931.0}
        if key == "ohem":
            counts.update({"ohem/num_pos": 9.5, "ohem/num_neg": 22.5})
        lines = [
            {"iteration": i, "loss_cls": 1 / i, "loss_box_reg": 1.0, "time": time, **counts}
            for i, time in ((19, 0.2), (39, 0.4), (40, 0.9))
        ]
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics = {"bbox/AP": ap, "bbox/AP50": 61.5, "bbox/AP75": 33.25, "bbox/AP-cat": 77.7}
        return RunResult(
            key=key,
            title=title_of(config),
            folder=folder,
            command=["python", "train_net.py", key],
            fingerprint="",
            threads=1,
            parallel=2,
            seconds=90.0,
            exit_code=int(bool(error)),
            error=error,
            metrics={**metrics, "bbox/AP-dog": float("nan")},
        )

    return make


@pytest.fixture
def write(data, tmp_path):
    def write(results, **options):
        path = write_report(results, tmp_path / "out", data=data, command="make demo", **options)
        return path.read_text(), json.loads((tmp_path / "out" / "results.json").read_text())

    return write


@pytest.mark.parametrize(
    ("config", "kind", "title"),
    [
        (make_config(), "FL", "FL (γ 2, α .25)"),
        (make_config(gamma=0.5, alpha=-1), "FL", "FL (γ 0.5, no α)"),
        (make_config(gamma=0.0, alpha=0.75), "CE", "CE (α .75)"),
        (make_config("OHEMHead"), "OHEM", "OHEM 32/.5"),
        (make_config("OHEMHead", ratio=3.0), "OHEM", "OHEM 1:3 32/.5"),
    ],
)
def test_methods_are_named_by_their_configuration(config, kind, title):
    assert (kind_of(config), title_of(config)) == (kind, title)


def test_report_holds_the_numbers_it_was_given(make_result, write, tmp_path):
    results = [make_result("ce", 30.0), make_result("ohem", 45.6), make_result("focal", 40.1)]
    text, record = write(results)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["OHEM 32/.5", "45.6", "61.5", "33.2", "0.400", "1.5", "9.5", "22.5"] in cells
    assert ["FL (γ 2, α .25)", "40.1", "61.5", "33.2", "0.400", "1.5", "21.5", "2,931"] in cells
    assert ["cat", "3", "77.7", "77.7", "77.7"] in cells and ["dog", "0", "-", "-", "-"] in cells
    assert "make demo" in text and "incomplete" not in text
    for name in ("precision_recall", "training_curves", "detections"):
        assert f"({name}.png)" in text
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert image.width > 500

    rows = {row["key"]: row for row in record["rows"]}
    assert rows["ohem"]["metrics"]["bbox/AP"] == 45.6 and rows["ohem"]["metrics"]["bbox/AP-dog"] is None
    assert rows["ohem"]["negatives_per_image"] == 22.5 and rows["ce"]["negatives_per_image"] == 2931
    assert rows["focal"]["seed"] == 7 and rows["focal"]["config"]["MODEL.RETINANET"]["FOCAL_LOSS_GAMMA"] == 2
    assert record["command"] == "make demo" and record["versions"]["torch"] and record["missing"] == []


def test_verdict_says_where_the_order_differs_from_the_papers(make_result, write):
    text, _ = write([make_result("ce", 30.0), make_result("ohem", 45.6), make_result("focal", 40.1)])
    ohem, ce = (s for s in text.replace("\n", " ").split(". ") if s.startswith("FL is"))
    assert "5.5 AP behind the best OHEM" in ohem and "36.0 against 32.8" in ohem and "differs" in ohem
    assert "10.1 AP ahead of cross entropy" in ce and "34.0 against 31.1" in ce and "the same order" in ce
    assert "One seed (7), small synthetic scenes, 40 steps" in text and "reproduce" not in text


def test_verdict_on_runs_that_learned_nothing(make_result, write):
    text, _ = write([make_result("ohem", 0.2), make_result("focal", 0.2)])
    assert "the order means nothing" in text and "the paper" not in text


def test_verdict_on_a_draw(make_result, write):
    text, _ = write([make_result("ohem", 40.2), make_result("focal", 40.2)])
    assert "FL is level with the best OHEM, OHEM 32/.5, here" in text and "differs" in text


def test_failed_and_missing_rows_are_stated_at_the_top(make_result, write, tmp_path):
    expected = [Row("ce", "CE (α .75)", tmp_path), Row("ohem", "OHEM 32/.5", tmp_path)]
    failed = make_result("ohem", 0.0, error="FloatingPointError: Loss became infinite")
    text, record = write([failed, make_result("focal", 40.1)], expected=expected)
    top = text[: text.index("| method")]
    assert "incomplete" in top and "CE (α .75) is missing" in top
    assert "OHEM 32/.5 failed" in top and "Loss became infinite" in top
    assert record["missing"] == ["ce"] and [row["ok"] for row in record["rows"]] == [False, True]
    assert "failed" in format_table([failed])


def test_a_report_of_nothing(write, tmp_path):
    text, record = write([], expected=[Row("ce", "CE", tmp_path)])
    assert "CE is missing" in text and "nothing to compare" in text and record["rows"] == []
