from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focal_plugin import get_config
from focal_plugin.data.check_coco import check_coco
from focal_plugin.data.coco_columns import read_columns
from focal_plugin.data.findings import Finding, Tally, shown

TOOL = Path(__file__).resolve().parents[2] / "tools" / "check_dataset.py"
SIZE = 64, 48  # of every image


def content(num_images=4):
    """A data set with nothing to find: two classes, a box of each in every image."""
    boxes = [[4, 4, 20, 20], [30.5, 10, 30, 34]]
    annotations = [
        {"id": 2 * i + j + 1, "image_id": i, "category_id": 3 + 4 * j, "bbox": boxes[j], "area": 400, "iscrowd": 0}
        for i in range(num_images)
        for j in range(2)
    ]
    return {
        "info": {},
        "images": [{"id": i, "file_name": f"{i}.png", "width": SIZE[0], "height": SIZE[1]} for i in range(num_images)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
    }


@pytest.fixture
def folder(tmp_path):
    """A folder with the images of `content()`."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", SIZE, (i, 9, 9)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


@pytest.fixture
def check(folder):
    """check(data, images=..., cfg=...): the report on a json with these data, or on a file of these bytes."""

    def run(data, **kwargs):
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        (folder / "a.json").write_bytes(text)
        return check_coco(folder / "a.json", folder / "images", max_workers=2, **kwargs)

    return run


def found(report):
    return {finding.code: finding for finding in report.findings}


def test_a_good_data_set_has_no_findings(check):
    cfg = get_config("retina_focal.yaml", ["INPUT.MIN_SIZE_TRAIN", "(480,)"])
    report = check(content(), cfg=cfg)
    assert report.findings == [] and not report.errors and not report.fatal
    summary = report.summary
    assert (summary["images"], summary["annotations"], summary["categories"]) == (4, 8, 2)
    assert summary["images_with_objects"] == summary["images_looked_at"] == 4
    assert summary["classes"] == [
        {"id": 7, "name": "seven", "boxes": 4, "images": 4},
        {"id": 3, "name": "three", "boxes": 4, "images": 4},
    ]
    assert summary["box_sizes"]["min"] == pytest.approx(20)
    assert summary["anchors"]["boxes"] == 8 and summary["anchors"]["unmatched"] == 0
    text = report.to_text()
    assert "4 images (4 with objects; 4 files looked at), 8 annotations" in text and text.endswith("Nothing found.")
    assert report.to_dict()["ok"] is True


def edit(section, index, **values):
    """A function that sets keys of an element; a value of `del` removes its key."""

    def apply(data):
        element = data[section][index]
        for key, value in values.items():
            if value is del_:
                del element[key]
            else:
                element[key] = value

    return apply


del_ = object()
FATAL = [
    ("duplicate_image_ids", 1, lambda data: data["images"].extend(data["images"][:1] * 2)),
    ("duplicate_annotation_ids", 1, edit("annotations", 1, id=1)),
    ("duplicate_category_ids", 2, lambda data: data["categories"].extend(data["categories"])),
    ("unknown_image_ids", 2, lambda data: data["images"].pop()),
    ("unknown_category_ids", 4, lambda data: data["categories"].pop()),
    ("no_images", 1, lambda data: data["images"].clear()),
    ("no_categories", 1, lambda data: data["categories"].clear()),
    ("no_coco", 1, lambda data: data.update(images={})),
    ("no_coco", 2, lambda data: (data.pop("annotations"), data.pop("categories"))),
    ("nonfinite_boxes", 1, edit("annotations", 0, bbox=[1, 1, float("nan"), 2])),
    ("nonfinite_boxes", 1, edit("annotations", 0, bbox=[1, 1, float("inf"), 2])),
    ("nonfinite_boxes", 1, edit("annotations", 0, bbox=[1, 1, 10**400, 2])),
    *(("missing_key", 1, edit("images", 2, **{key: del_})) for key in ("id", "file_name", "width", "height")),
    *(("missing_key", 1, edit("annotations", 2, **{k: del_})) for k in ("id", "image_id", "category_id", "bbox")),
    *(("missing_key", 1, edit("categories", 0, **{key: del_})) for key in ("id", "name")),
    *(("wrong_type", 1, edit("images", 2, width=value)) for value in (True, "64", None, 0, -3, 2**31, 64.5, 1e300)),
    *(("wrong_type", 1, edit("images", 2, file_name=value)) for value in (None, 3, "", ["2.png"])),
    *(("wrong_type", 1, edit("annotations", 2, id=value)) for value in (True, "1", [1], 2**63, 1.5, float("nan"))),
    *(("wrong_type", 1, edit("annotations", 2, bbox=v)) for v in ([], [1, 2, 3], [1, 2, 3, True], "1234", {}, None)),
    *(("wrong_type", 1, edit("annotations", 2, iscrowd=value)) for value in ("0", None, 2, 0.5, [], {})),
    *(("wrong_type", 1, edit("annotations", 2, ignore=value)) for value in (1, None, "")),
    *(("wrong_type", 1, edit("categories", 0, id=value)) for value in (7.0, False, None)),
    ("wrong_type", 1, edit("categories", 0, name=None)),
    ("wrong_type", 1, lambda data: data["annotations"].append(["not", "an", "object"])),
    *(
        ("wrong_type", 1, edit("annotations", 2, segmentation=value))
        for value in (
            [1, 2, 3, 4, 5, 6],
            7,
            True,
            [[1, 2, 3, 4, 5, 6], None],
            {"counts": [1, 2]},
            {"size": [2, 2]},
            {"counts": [1, -2], "size": [2, 2]},
            {"counts": [1, 2**32], "size": [2, 2]},
            {"counts": [1, 2], "size": [2, 2, 2]},
            {"counts": [1, 2], "size": 4},
        )
    ),
    *(("wrong_type", 1, edit("annotations", 2, keypoints=v)) for v in ("123", {"a": 1}, 3, [1, "a", 2], [10**400] * 3)),
]


@pytest.mark.parametrize(("code", "count", "damage"), FATAL)
def test_fatal_faults(check, code, count, damage):
    data = content()
    damage(data)
    report = check(data, images="none")
    assert [finding.code for finding in report.fatal] == [code]
    finding = report.fatal[0]
    assert finding.severity == "error" and finding.count == count
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["ok"] is False
    assert f"ERROR (fatal) {code}" in report.to_text()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "not_json"),
        (b"{", "not_json"),
        (b'{"images": [{"id": 1}], "annotations": [{', "not_json"),
        (b"\xff\xfe{", "not_json"),
        (b"\xef\xbb\xbf{}", "not_json"),
        (b'{"images": [' + b"[" * 100_000, "not_json"),
        (b'{"images": [], "images": []}', "not_json"),
        (b"[]", "no_coco"),
        (b"17", "no_coco"),
    ],
)
def test_what_is_no_coco_json_is_the_first_finding(check, text, code):
    report = check(text)
    assert [finding.code for finding in report.fatal if finding.code != "missing_key"] == [code]
    assert report.fatal[0].code == code and report.to_text()


def test_duplicate_annotations_are_allowed_where_detectron2_allows_them(folder, tmp_path):
    data = content()
    data["annotations"][1]["id"] = 1
    for name, is_fatal in (("minival.json", False), ("mini.json", True)):
        (folder / name).write_text(json.dumps(data))
        finding = found(check_coco(folder / name, folder / "images", images="none"))["duplicate_annotation_ids"]
        assert finding.fatal == is_fatal
        context = pytest.raises(AssertionError) if is_fatal else contextlib.nullcontext()
        with context:
            load_coco_json(str(folder / name), str(folder))


def test_classes_are_counted_by_box_and_by_image(check):
    data = content()
    data["annotations"] = [{**data["annotations"][0], "id": i + 1, "image_id": i % 2} for i in range(5)]
    by_name = {entry["name"]: (entry["boxes"], entry["images"]) for entry in check(data).summary["classes"]}
    assert by_name == {"three": (5, 2), "seven": (0, 0)}


def test_an_unreadable_json_is_a_finding(tmp_path):
    assert [finding.code for finding in check_coco(tmp_path, tmp_path).fatal] == ["not_json"]


OTHERS = [
    ("error", "zero_boxes", edit("annotations", 0, bbox=[4, 4, 0, 3])),
    ("error", "zero_boxes", edit("annotations", 0, bbox=[4, 4, 1e-6, 3])),
    ("error", "negative_boxes", edit("annotations", 0, bbox=[14, 4, -5, 3])),
    ("error", "boxes_outside", edit("annotations", 0, bbox=[64, 4, 5, 3])),
    ("warning", "boxes_leave_image", edit("annotations", 0, bbox=[60, 4, 6, 3])),
    ("error", "no_annotations", lambda data: data["annotations"].clear()),
    ("error", "missing_area", edit("annotations", 0, area=del_)),
    ("error", "bad_area", edit("annotations", 0, area=None)),
    ("warning", "missing_iscrowd", edit("annotations", 0, iscrowd=del_)),
    ("warning", "annotation_id_zero", edit("annotations", 0, id=0)),
    ("warning", "empty_classes", lambda data: data["categories"].append({"id": 9, "name": "none"})),
    ("warning", "duplicate_class_names", edit("categories", 0, name="three")),
    ("warning", "repeated_file_names", edit("images", 0, file_name="1.png")),
    ("warning", "float_number", edit("annotations", 0, image_id=0.0)),
    ("warning", "dropped_by_polygons", edit("annotations", 0, segmentation=[[1, 2, 3, 4]])),
    *(
        ("warning", "malformed", edit("annotations", 0, segmentation=value))
        for value in ({"counts": "51"}, {"counts": None, "size": [2, 2]}, [{str(i): i for i in range(6)}])
    ),
    ("warning", "malformed", edit("annotations", 0, keypoints=[1, 2])),
    ("warning", "crowds", edit("annotations", 0, iscrowd=1)),
    ("note", "unknown_key", edit("annotations", 0, attributes={})),
    ("note", "unknown_key", lambda data: data.update(versions=[])),
    ("note", "absolute_file_names", edit("images", 0, file_name="/0.png")),
]


@pytest.mark.parametrize(("severity", "code", "damage"), OTHERS)
def test_other_faults(check, severity, code, damage):
    data = content()
    damage(data)
    report = check(data, images="none")
    assert not report.fatal
    finding = found(report)[code]
    assert (finding.severity, finding.count) == (severity, 1)
    assert bool(report.errors) == (severity == "error")
    others = found(report).keys() - {code, "images_without_objects", "empty_classes"}
    assert not others


def test_a_mistyped_key_is_recognised(check):
    data = content()
    for annotation in data["annotations"]:
        annotation["bboxes"] = annotation.pop("bbox")
    report = check(data, images="none")
    assert found(report)["missing_key"].message == 'annotations without "bbox": 8 times'
    assert "unknown key 'bboxes' of annotations, 8 times: did you mean \"bbox\"?" in report.to_text()
    data = content()
    data["category"] = data.pop("categories")
    assert 'did you mean "categories"' in check(data, images="none").to_text()


def test_many_unknown_keys_are_summed_up(check):
    data = content()
    data["images"][0].update({f"x{i}": 1 for i in range(500)})
    assert sum(finding.code == "unknown_key" for finding in check(data, images="none").findings) == 21


def test_an_unreadable_image_row_does_not_accuse_its_annotations(check):
    data = content()
    del data["images"][0]["width"]
    assert [finding.code for finding in check(data, images="none").fatal] == ["missing_key"]


def test_valid_segmentations_and_keypoints_are_fine(check, tmp_path):
    data = content()
    data["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, 5.5], [1, 2]]
    data["annotations"][1]["segmentation"] = {"counts": [10, 5], "size": [48, 64]}
    data["annotations"][2]["segmentation"] = {"counts": "51", "size": [48, 64]}
    data["annotations"][3].update(segmentation=[], keypoints=[], ignore=0)
    data["annotations"][4].update(segmentation=None, keypoints=[1, 2, 2, 4.5, 5, 0], num_keypoints=1)
    assert check(data).findings == []
    assert len(load_in_detectron2(data, tmp_path)) == 4


def test_xyxy_boxes_are_suspected(check):
    data = content()
    rng = np.random.default_rng(0)
    for annotation in data["annotations"]:
        x, y = rng.uniform(20, 40), rng.uniform(15, 30)
        annotation["bbox"] = [x, y, x + 20, y + 15]
    finding = found(check(data, images="none"))["xyxy_suspected"]
    assert finding.severity == "error" and "corners" in finding.message
    data["annotations"][0]["bbox"] = [30, 30, 5, 5]  # impossible as corners
    assert "xyxy_suspected" not in found(check(data, images="none"))


@pytest.mark.filterwarnings("error")
def test_astronomic_boxes(check):
    data = content()
    for i, box in enumerate([[-1e308, -1e308, 1.7e308, 1.7e308], [1e308, 1, 1e308, 5], [1, 1, 1.7e308, 1.7e308]]):
        data["annotations"][i]["bbox"] = box
    report = check(data, images="none", cfg=get_config("retina_focal.yaml"))
    assert {"boxes_outside", "boxes_leave_image"} <= found(report).keys() and not report.fatal
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.summary["anchors"]["boxes"] < 8


@pytest.mark.parametrize(
    ("filter_empty", "text"), [("True", "training leaves them out"), ("False", "training uses them as background")]
)
def test_images_without_objects(check, filter_empty, text):
    data = content()
    data["annotations"] = data["annotations"][:4]
    data["annotations"][2]["iscrowd"] = data["annotations"][3]["iscrowd"] = 1
    cfg = get_config("retina_focal.yaml", ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", filter_empty])
    report = check(data, images="none", cfg=cfg)
    finding = found(report)["images_without_objects"]
    assert finding.severity == "note" and finding.count == 3 and text in finding.message
    assert report.summary["images_with_objects"] == 1 and report.summary["crowds"] == 2
    assert found(report)["crowds"].severity == "warning"


def test_only_crowds_are_an_error(check):
    data = content()
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1
    assert found(check(data, images="none"))["only_crowds"].severity == "error"


def test_what_is_said_of_odd_boxes_is_what_detectron2_does():
    def mapped(box):
        annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        transforms = T.TransformList([T.ResizeTransform(48, 64, 96, 128)])
        annotation = utils.transform_instance_annotations(annotation, transforms, (96, 128))
        instances = utils.filter_empty_instances(utils.annotations_to_instances([annotation], (96, 128)))
        return instances.gt_boxes.tensor.tolist()

    assert mapped([4, 4, 0, 3]) == [] and mapped([64, 4, 5, 3]) == [] and mapped([-9, 4, 5, 3]) == []
    assert mapped([14, 4, -5, 3]) == [[18, 8, 28, 14]]  # turned over, to the left of its corner
    assert mapped([60, 4, 6, 3]) == [[120, 8, 128, 14]]


def test_an_annotation_with_id_zero_counts_as_missed_in_pycocotools():
    def ap(first_id):
        data = content(1)
        data["annotations"] = data["annotations"][:1]
        data["annotations"][0]["id"] = first_id
        truth = COCO()
        truth.dataset = data
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            result = truth.loadRes([{"image_id": 0, "category_id": 3, "bbox": [4, 4, 20, 20], "score": 1.0}])
            evaluation = COCOeval(truth, result, "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats[0]

    assert ap(1) == pytest.approx(1) and ap(0) == 0


def test_missing_and_strange_images(check, folder):
    data = content()
    names = ["nowhere.png", "a\0b.png", "\ud800.png", "folder"]
    (folder / "images" / "folder").mkdir()
    for image, name in zip(data["images"], names):
        image["file_name"] = name
    for images in ("all", "sample"):
        report = check(data, images=images)
        assert [(f.code, f.count) for f in report.fatal] == [("missing_images", 4)]
        report.to_text().encode()
    assert not check(data, images="none").fatal


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(check, folder):
    (folder / "images" / "0.png").unlink()
    os.mkfifo(folder / "images" / "0.png")
    assert found(check(content()))["missing_images"].fatal


def test_broken_and_mis_sized_images(check, folder):
    path = folder / "images" / "0.png"
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    (folder / "images" / "1.png").write_text("no image")
    Image.new("RGB", SIZE[::-1]).save(folder / "images" / "2.png")
    report = check(content())
    assert {f.code: f.count for f in report.findings} == {
        "truncated_images": 1,
        "unreadable_images": 1,
        "mis_sized_images": 1,
    }
    # Training replaces what cannot be read, up to a limit; a wrong size means that the boxes are wrong.
    assert report.errors == report.findings and [finding.code for finding in report.fatal] == ["mis_sized_images"]
    assert "'2.png': 48 x 64, in the json 64 x 48" in report.to_text()
    assert not any(str(folder / "images") in example for finding in report.findings for example in finding.examples)
    assert found(check(content(), images="sample")).keys() == {"unreadable_images", "mis_sized_images"}
    for i in range(3):  # the loader stops at each of them
        with pytest.raises((OSError, utils.SizeMismatchError)):
            image = utils.read_image(folder / "images" / f"{i}.png", "BGR")
            utils.check_image_size({"width": SIZE[0], "height": SIZE[1]}, image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_after_exif_rotation_are_detectron2s(check, folder, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    data = content()
    data["images"][0]["file_name"] = "0.jpg"
    Image.new("RGB", SIZE).save(folder / "images" / "0.jpg", exif=exif)
    turned = utils.read_image(folder / "images" / "0.jpg", "BGR").shape[:2] != SIZE[::-1]
    assert turned == (orientation >= 5)
    report = check(data)
    assert [f.code for f in report.findings] == ["mis_sized_images"] * turned
    if turned:
        assert "48 x 64, turned by its EXIF orientation" in report.findings[0].examples[0]


def test_names_that_leave_the_folder(check, folder):
    (folder / "elsewhere" / "deep").mkdir(parents=True)
    (folder / "images" / "link").symlink_to(folder / "elsewhere" / "deep")
    (folder / "images" / "sub").mkdir()
    for path in ("secret.png", "elsewhere/secret.png"):
        Image.new("RGB", SIZE).save(folder / path)
    data = content()
    for image, name in zip(data["images"], ["../secret.png", "link/../secret.png", "sub/../../secret.png", "3.png"]):
        image["file_name"] = name
    for images in ("all", "sample", "none"):
        finding = found(check(data, images=images))["escaping_file_names"]
        assert finding.fatal and finding.count == 3
    data["images"] = content()["images"]
    data["images"][0]["file_name"] = "sub/../0.png"
    data["images"][1]["file_name"] = "1..png"
    (folder / "images" / "1.png").rename(folder / "images" / "1..png")
    assert check(data).findings == []


def test_a_symlinked_or_absolute_image_is_a_note(check, folder):
    data = content()
    (folder / "images" / "0.png").rename(folder / "moved.png")
    (folder / "images" / "0.png").symlink_to(folder / "moved.png")
    data["images"][1]["file_name"] = str(folder / "images" / "1.png")
    report = check(data)
    assert {f.code: f.severity for f in report.findings} == {"symlinked_images": "note", "absolute_file_names": "note"}


def test_the_fast_form_looks_at_a_sample(check, folder):
    data = content(200)
    for i in range(4, 200):
        os.link(folder / "images" / "0.png", folder / "images" / f"{i}.png")
    report = check(data, images="sample")
    assert report.findings == [] and report.summary["images_looked_at"] == 64
    (folder / "images" / "199.png").unlink()
    assert found(check(data, images="sample")).keys() == {"missing_images"}
    with pytest.raises(ValueError, match="images='some' is none of all, sample, none"):
        check(data, images="some")


def test_names_out_of_the_file_cannot_write_to_the_terminal(check):
    data = content()
    data["categories"][0]["name"] = "\x1b[2J\nred"
    data["images"][0]["file_name"] = "\x1b]0;title\x07" + "x" * 10_000
    text = check(data).to_text()
    assert "\x1b" not in text and "\x07" not in text and len(text) < 3000


def big_file(path, num_annotations):
    rng = random.Random(0)
    with open(path, "w") as out:
        images = [{**image, "id": image["id"]} for image in content(num_annotations // 8)["images"]]
        out.write(f'{{"categories": [{{"id": 1, "name": "a"}}], "images": {json.dumps(images)}, "annotations": [')
        for i in range(num_annotations):
            polygon = [round(rng.uniform(0, 60), 2) for _ in range(30)]
            annotation = {"id": i + 1, "image_id": i // 8, "category_id": 1, "bbox": [1.5, 2, 20, 20.25]}
            annotation.update(area=400.5, iscrowd=0, segmentation=[polygon])
            out.write((", " if i else "") + json.dumps(annotation))
        out.write("]}")


def test_memory_is_a_fraction_of_json_loads(tmp_path):
    big_file(tmp_path / "big.json", 20_000)

    def peak(read):
        tracemalloc.start()
        try:
            result = read()
            return result, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    columns, ours = peak(lambda: read_columns(tmp_path / "big.json"))
    loaded, theirs = peak(lambda: json.loads((tmp_path / "big.json").read_bytes()))
    assert columns.findings == [] and len(columns.boxes) == len(loaded["annotations"]) == 20_000
    assert columns.annotation_ids.tolist() == [annotation["id"] for annotation in loaded["annotations"]]
    assert columns.boxes[-1].tolist() == loaded["annotations"][-1]["bbox"]
    assert ours < theirs / 4


def load_in_detectron2(data, folder):
    """load_coco_json on these data; raises what it raises."""
    path = folder / "loaded.json"
    path.write_text(json.dumps(data))
    try:
        return load_coco_json(str(path), str(folder), "fuzzed")
    finally:
        MetadataCatalog.pop("fuzzed", None)


ODD = [None, True, False, 0, 1, -1, 1.0, 2.5, 2**63, 10**400, float("nan"), float("inf"), "", "x", "../x", [], [1, 2]]
ODD += ["abcdef", [{str(i): i for i in range(6)}], ["abcdef"], [None], {"counts": "51"}, {"counts": None}, [1, True, 2]]
ODD += [[1] * 6, [[1] * 6], [[]], {}, {"counts": [1], "size": [2, 2]}, {"counts": [-1], "size": [2, 2]}, {"size": 1}]
KEYS = ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "ignore", "segmentation", "keypoints", "file_name"]
KEYS += ["width", "height", "name", "images", "annotations", "categories"]


def mutate(rng, data):
    """Breaks something, anywhere in the data."""
    section = rng.choice([*("images", "annotations", "categories") * 4, None])
    if section is None:
        data[rng.choice(KEYS[-3:])] = copy.deepcopy(rng.choice(ODD))
        return
    elements = data.get(section)
    if not isinstance(elements, list) or not elements:
        return
    index = rng.randrange(len(elements))
    action = rng.random()
    if action < 0.1 or not isinstance(elements[index], dict):
        elements[index] = copy.deepcopy(rng.choice([*ODD, *elements]))
    elif action < 0.2:
        elements.append(copy.deepcopy(elements[index]))
    elif action < 0.3 and elements[index]:
        elements[index].pop(rng.choice(list(elements[index])))
    else:
        elements[index][rng.choice(KEYS[:-3])] = copy.deepcopy(rng.choice(ODD))


def test_without_a_fatal_finding_detectron2_loads_the_file(check, tmp_path):
    rng, passed = random.Random(0), 0
    for _ in range(600):
        data = content(2)
        for _ in range(rng.randint(1, 2)):
            mutate(rng, data)
        report = check(data, images="none")
        report.to_text()
        json.dumps(report.to_dict(), allow_nan=False)
        if not report.fatal:
            passed += 1
            assert len(load_in_detectron2(data, tmp_path)) == len(data["images"])
    assert 60 < passed < 540


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("check_dataset", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tool(folder, tool, capsys):
    path = str(folder / "a.json")
    Path(path).write_text(json.dumps(content()))
    assert tool.main([path, str(folder / "images"), "INPUT.MIN_SIZE_TRAIN", "(480,)", "--fast"]) == 0
    assert "the headers of 4 looked at" in capsys.readouterr().out
    data = content()
    data["annotations"][0]["bbox"][2] = float("nan")
    Path(path).write_text(json.dumps(data))
    assert tool.main(["--json", path, str(folder / "images"), "INPUT.MIN_SIZE_TRAIN", "(480,)"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["findings"][0]["code"] == "nonfinite_boxes" and report["images_looked_at"] == 4
    assert err == ""  # no progress bar where it is no terminal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nowhere.json", "{folder}"], "no file"),
        (["{folder}", "{folder}"], "no file"),
        (["{tool}", "{folder}/nowhere"], "no folder"),
        (["{tool}", "{folder}", "--config-file", "nowhere.yaml"], "nowhere.yaml"),
        (["{tool}", "{folder}", "INPUT.MIN_SIZES", "3"], "INPUT.MIN_SIZES"),
    ],
)
def test_bad_usage(folder, tool, capsys, arguments, message):
    assert tool.main([argument.format(folder=folder, tool=TOOL) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and "Traceback" not in err


def test_the_tool_from_the_shell(folder):
    (folder / "a.json").write_text('{"images": [')
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(TOOL), str(folder / "a.json"), str(folder / "images")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "ERROR (fatal) not_json" in done.stdout and done.stderr == ""
    assert os.access(TOOL, os.X_OK)


def test_a_finding_is_consistent():
    with pytest.raises(ValueError, match="fatal"):
        Finding("a", "warning", "b", fatal=True)
    with pytest.raises(ValueError, match="severity"):
        Finding("a", "bad", "b")
    tally = Tally()
    for i in range(9):
        tally.add("kind", str(i))
    assert tally.items() == [("kind", 9, ["0", "1", "2", "3", "4"])]


def test_shown_is_short_and_printable():
    for value in ("a" * 10**6, [1] * 10**6, {i: i for i in range(10**5)}, 10**5000, [10**5000], "\n\x1b", "\ud800"):
        text = shown(value)
        assert len(text) <= 60 and text.isprintable() and text.encode()
