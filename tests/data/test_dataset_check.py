import contextlib
import json
import logging
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from coco_files import content, found
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from focal_plugin import get_config
from focal_plugin.data.dataset_check import check_coco
from focal_plugin.files import printable

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_dataset.py"


def test_a_good_data_set_has_no_findings_and_its_boxes_are_counted_by_class_and_image(check):
    report = check(content(), cfg=get_config("retina_focal.yaml", ["INPUT.MIN_SIZE_TRAIN", "(480,)"]))
    assert report.findings == [] and not report.errors and not report.fatal and report.to_dict()["ok"] is True
    summary, text = report.summary, report.to_text()
    counts = {"images": 4, "annotations": 8, "categories": 2, "images_with_objects": 4, "images_looked_at": 4}
    assert counts.items() <= summary.items() and summary["box_sizes"]["min"] == pytest.approx(20)
    assert summary["anchors"]["boxes"] == 8 and summary["anchors"]["unmatched"] == 0
    assert "4 images (4 with objects; 4 files looked at), 8 annotations" in text and text.endswith("Nothing found.")
    data = content()
    data["annotations"] = [{**data["annotations"][0], "id": i + 1, "image_id": i % 2} for i in range(5)]
    report = check(data)
    by_name = {entry["name"]: (entry["boxes"], entry["images"]) for entry in report.summary["classes"]}
    assert by_name == {"three": (5, 2), "seven": (0, 0)}
    table = ["id  class  boxes   share  images", " 3  three      5  100.0%       2", " 7  seven      0    0.0%       0"]
    assert "\n".join(table) in report.to_text()


KEYS = {"images": ("id", "file_name", "width", "height"), "annotations": ("id", "image_id", "category_id", "bbox")}
KEYS["categories"] = "id", "name"
REMOVED, NAN, INF = object(), float("nan"), float("inf")


def edit(section, **values):
    """Return a function that sets keys of the first element of a section, or removes them."""

    def apply(data):
        element = {**data[section][0], **values}
        data[section][0] = {key: value for key, value in element.items() if value is not REMOVED}

    return apply


def each(level, code, section, key, *values):
    """Return a case for each value of a key, of one finding."""
    return [(level, code, 1, edit(section, **{key: value})) for value in values]


FINDINGS = [
    ("fatal", "duplicate_image_ids", 1, lambda data: data["images"].extend(data["images"][:1] * 2)),
    ("fatal", "duplicate_annotation_ids", 1, edit("annotations", id=2)),
    ("fatal", "duplicate_category_ids", 2, lambda data: data["categories"].extend(data["categories"])),
    ("fatal", "unknown_image_ids", 2, lambda data: data["images"].pop()),
    ("fatal", "unknown_category_ids", 4, lambda data: data["categories"].pop()),
    ("fatal", "no_images", 1, lambda data: data["images"].clear()),
    ("fatal", "no_categories", 1, lambda data: data["categories"].clear()),
    ("fatal", "no_coco", 1, lambda data: data.update(images={})),
    ("fatal", "no_coco", 2, lambda data: (data.pop("annotations"), data.pop("categories"))),
    *each("fatal", "nonfinite_boxes", "annotations", "bbox", [1, 1, NAN, 2], [1, 1, INF, 2], [1, 1, 10**400, 2]),
    *(("fatal", "missing_key", 1, edit(section, **{key: REMOVED})) for section in KEYS for key in KEYS[section]),
    *each("fatal", "wrong_type", "images", "width", True, "64", None, 0, -3, 2**31, 64.5, 1e300),
    *each("fatal", "wrong_type", "images", "file_name", None, 3, "", ["2.png"]),
    *each("fatal", "wrong_type", "annotations", "id", True, "1", [1], 2**63, 1.5, NAN),
    *each("fatal", "wrong_type", "annotations", "bbox", [], [1, 2, 3], [1, 2, 3, True], "1234", {}, None),
    *each("fatal", "wrong_type", "annotations", "iscrowd", "0", None, 2, 0.5, [], {}),
    *each("fatal", "wrong_type", "annotations", "ignore", 1, None, ""),
    *each("fatal", "wrong_type", "categories", "id", 7.0, False, None),
    *each("fatal", "wrong_type", "categories", "name", None),
    ("fatal", "wrong_type", 1, lambda data: data["annotations"].append(["not", "an", "object"])),
    *each("fatal", "not_loadable", "annotations", "segmentation", [1, 2, 3], 7, True, [[1, 2, 3, 4, 5, 6], None]),
    *each("fatal", "not_loadable", "annotations", "segmentation", {"size": [2, 2]}, {"counts": [1, 2], "size": 4}),
    *each("fatal", "not_loadable", "annotations", "keypoints", "123", {"a": 1}, 3, [1, "a", 2], [10**400] * 3),
    *each("error", "zero_boxes", "annotations", "bbox", [4, 4, 0, 3], [4, 4, 1e-6, 3]),
    *each("error", "negative_boxes", "annotations", "bbox", [14, 4, -5, 3]),
    *each("error", "boxes_outside", "annotations", "bbox", [64, 4, 5, 3]),
    ("error", "no_annotations", 1, lambda data: data["annotations"].clear()),
    ("error", "only_crowds", 1, lambda data: [row.update(iscrowd=1) for row in data["annotations"]]),
    *each("error", "missing_area", "annotations", "area", REMOVED),
    *each("error", "bad_area", "annotations", "area", None, -1, NAN, True),
    *each("warning", "boxes_leave_image", "annotations", "bbox", [60, 4, 6, 3]),
    *each("warning", "missing_iscrowd", "annotations", "iscrowd", REMOVED),
    *each("warning", "annotation_id_zero", "annotations", "id", 0),
    ("warning", "empty_classes", 1, lambda data: data["categories"].append({"id": 9, "name": "none"})),
    *each("warning", "duplicate_class_names", "categories", "name", "three"),
    *each("warning", "repeated_file_names", "images", "file_name", "1.png"),
    *each("warning", "dropped_by_polygons", "annotations", "segmentation", [[1, 2, 3, 4]]),
    *each("note", "absolute_file_names", "images", "file_name", "/0.png"),
]


@pytest.mark.parametrize(("level", "code", "count", "damage"), FINDINGS)
def test_every_finding(check, folder, level, code, count, damage):
    data = content()
    damage(data)
    report = check(data, images="none")
    finding, is_fatal, is_error = found(report)[code], level == "fatal", level in ("fatal", "error")
    assert (finding.severity, finding.count) == ("error" if is_error else level, count)
    assert [finding.code for finding in report.fatal] == [code] * is_fatal
    assert is_fatal or found(report).keys() <= {code, "images_without_objects", "empty_classes"}
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"] is not is_error
    assert f"{finding.severity.upper()}{' (fatal)' * is_fatal} {code}: {finding.message}" in report.to_text()
    if code == "not_loadable" or not is_fatal:
        with pytest.raises(Exception) if is_fatal else contextlib.nullcontext():
            load_coco_json(str(folder / "a.json"), str(folder))


def test_what_is_no_coco_json_is_the_only_finding(check):
    for text, code, message in (
        (b"", "not_json", "Expecting value"),
        (b'{"images": [{"id": 1}], "annotations": [{', "not_json", "char 41"),
        (b"\xff\xfe{", "not_json", "position 0"),
        (b"\xef\xbb\xbf{}", "not_json", "byte order mark"),
        (b'{"images": [' + b"[" * 100_000, "not_json", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not_json", "4300"),
        *((text, "no_coco", "images and of annotations and of categories") for text in (b"[]", b"17")),
    ):
        report = check(text)
        assert [finding.code for finding in report.findings] == [code]
        assert message in report.findings[0].message and report.to_text()


def test_duplicate_annotations_are_allowed_where_detectron2_allows_them(folder):
    data = content()
    data["annotations"][1]["id"] = 1
    for name, is_fatal in (("minival.json", False), ("mini.json", True)):
        (folder / name).write_text(json.dumps(data))
        finding = found(check_coco(folder / name, folder / "images", images="none"))["duplicate_annotation_ids"]
        assert finding.fatal == is_fatal
        with pytest.raises(AssertionError) if is_fatal else contextlib.nullcontext():
            load_coco_json(str(folder / name), str(folder))


def test_asking_detectron2_registers_nothing_and_logs_nothing(check, caplog):
    def registered():
        return list(DatasetCatalog), {name: MetadataCatalog[name].as_dict() for name in MetadataCatalog.list()}

    data, before = content(), registered()
    edit("annotations", segmentation=[[1, 2, 3, 4]])(data)
    with caplog.at_level(logging.INFO):
        assert found(check(data)).keys() == {"dropped_by_polygons"}
    assert before == registered()
    assert not caplog.records and not logging.getLogger("detectron2.data.datasets.coco").disabled


def test_what_detectron2_takes_is_fine_and_plain_polygons_cost_no_second_reading(check, monkeypatch):
    data = content()
    rows = data["annotations"]
    rows[1]["segmentation"] = {"counts": [10, 5], "size": [48, 64]}
    rows[2]["segmentation"] = {"counts": "51", "size": [48, 64]}
    rows[3].update(segmentation=[], keypoints=[], ignore=0, image_id=1.0, attributes={})
    rows[4].update(segmentation=None, keypoints=[1, 2, 2, 4.5, 5, 0], num_keypoints=1)
    for second_reading, case in ((load_coco_json, data), (None, content())):
        case["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, 5.5], [1, 2]]
        monkeypatch.setattr("focal_plugin.data.dataset_check.load_coco_json", second_reading)
        assert check(case).findings == []


@pytest.mark.filterwarnings("error")
def test_xyxy_boxes_are_suspected_and_astronomic_ones_survived(check):
    data = content()
    for row, (x, y) in zip(data["annotations"], np.random.default_rng(0).uniform((20, 15), (40, 30), (8, 2)).tolist()):
        row["bbox"] = [x, y, x + 20, y + 15]
    finding = found(check(data, images="none"))["xyxy_suspected"]
    assert finding.severity == "error" and "corners" in finding.message
    data["annotations"][0]["bbox"] = [30, 30, 5, 5]  # impossible as corners
    assert "xyxy_suspected" not in found(check(data, images="none"))
    data = content()
    for i, box in enumerate([[-1e308, -1e308, 1.7e308, 1.7e308], [1e308, 1, 1e308, 5], [1, 1, 1.7e308, 1.7e308]]):
        data["annotations"][i]["bbox"] = box
    report = check(data, images="none", cfg=get_config("retina_focal.yaml"))
    assert {"boxes_outside", "boxes_leave_image"} <= found(report).keys() and not report.fatal
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.summary["anchors"]["boxes"] < 8


def test_images_without_objects(check):
    data = content()
    data["annotations"] = data["annotations"][:4]
    data["annotations"][2]["iscrowd"] = data["annotations"][3]["iscrowd"] = 1
    for filter_empty, text in (("True", "training leaves them out"), ("False", "training uses them as background")):
        cfg = get_config("retina_focal.yaml", ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", filter_empty])
        report = check(data, images="none", cfg=cfg)
        finding = found(report)["images_without_objects"]
        assert finding.severity == "note" and finding.count == 3 and text in finding.message
        assert report.summary["images_with_objects"] == 1 and report.summary["crowds"] == 2


def test_text_out_of_the_file_cannot_write_to_the_terminal(check):
    data = content()
    data["categories"][0]["name"] = "\x1b[2J\nred"
    data["images"][0]["file_name"] = "\x1b]0;title\x07" + "x" * 10_000
    text = check(data).to_text()
    assert "\x1b" not in text and "\x07" not in text and len(text) < 3000
    for value in ("a" * 10**6, [1] * 10**6, {i: i for i in range(10**5)}, 10**5000, [10**5000], "\n\x1b", "\ud800"):
        text = printable(value)
        assert len(text) <= 60 and text.isprintable() and text.encode()


main = runpy.run_path(str(TOOL))["main"]


def test_the_tool(folder, capsys):
    path, images = folder / "a.json", str(folder / "images")
    assert os.access(TOOL, os.X_OK)
    path.write_text('{"images": [')
    assert main([str(path), images]) == 1
    out, err = capsys.readouterr()
    assert "ERROR (fatal) not_json" in out and err == ""
    data = content()
    path.write_text(json.dumps(data))
    assert main([str(path), images, "INPUT.MIN_SIZE_TRAIN", "(480,)", "--fast"]) == 0
    assert "the headers of 4 looked at" in capsys.readouterr().out
    edit("annotations", bbox=[4, 4, NAN, 20])(data)
    path.write_text(json.dumps(data))
    assert main(["--json", str(path), images, "INPUT.MIN_SIZE_TRAIN", "(480,)"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["findings"][0]["code"] == "nonfinite_boxes" and report["images_looked_at"] == 4
    assert err == ""  # no progress bar where it is no terminal
    for *arguments, message in (
        (f"{folder}/nowhere.json", images, "no file"),
        (images, images, "no file"),
        (str(path), f"{folder}/nowhere", "no folder"),
        (str(path), images, "--config-file", "nowhere.yaml", "nowhere.yaml"),
        (str(path), images, "INPUT.MIN_SIZES", "3", "INPUT.MIN_SIZES"),
    ):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and message in err and "Traceback" not in err
