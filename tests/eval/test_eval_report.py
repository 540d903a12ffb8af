"""The page on an evaluation, from made-up predictions; its numbers against pycocotools' own summary."""

import contextlib
import importlib.util
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from headless import CHROMIUM, show
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focal_plugin.eval.crops import SIDE, crop, find_image, open_image
from focal_plugin.eval.eval_report import write_eval_report
from focal_plugin.eval.evaluation import (
    METRICS,
    best_score_threshold,
    evaluate,
    find_errors,
    read_predictions,
    read_truth,
)

ROOT = Path(__file__).resolve().parents[2]


def annotation(number, image, category, bbox, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3], **more}


def result(image, category, bbox, score):
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score}


@pytest.fixture
def files(tmp_path):
    """files(annotations, results, ...): the paths of both as json, of two classes and three images by default."""

    def write(annotations, results, names=("cat", "dog"), num_images=3):
        images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 150} for i in range(num_images)]
        categories = [{"id": 7 + k, "name": name} for k, name in enumerate(names)]
        truth = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        (tmp_path / "found.json").write_text(json.dumps(results))
        return tmp_path / "found.json", tmp_path / "truth.json"

    return write


def random_case(num_classes, seed=0, crowds=True):
    """Objects of all sizes, detections near some of them and elsewhere; ids that start at 0, as some files' do."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for image in range(6):
        for _ in range(8):
            size = rng.choice([12, 50, 120])
            box = [*rng.uniform(0, 80, 2), *(size * rng.uniform(0.7, 1.3, 2))]
            category = int(7 + rng.integers(num_classes))
            crowd = int(crowds and rng.random() < 0.1)
            annotations.append(annotation(len(annotations), image, category, [float(x) for x in box], iscrowd=crowd))
            for _ in range(rng.integers(3)):
                near = [float(x + size * rng.normal(0, 0.08)) for x in box]
                wrong = int(7 + rng.integers(num_classes)) if rng.random() < 0.2 else category
                results.append(result(image, wrong, near, float(rng.random())))
        results.append(result(image, 7, [float(x) for x in rng.uniform(5, 60, 4)], float(rng.random())))
    return annotations, results


def read(paths):
    truth = read_truth(paths[1])
    return truth, read_predictions(paths[0], truth)


@pytest.mark.parametrize("num_classes", [1, 2, 5])
def test_numbers_are_those_that_pycocotools_prints(files, num_classes):
    annotations, results = random_case(num_classes)
    names = [f"class {k}" for k in range(num_classes + 1)]  # the last one has no object
    paths = files(annotations, results, names, num_images=7)
    total, classes = evaluate(*read(paths))

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(paths[1]))
        for a in truth.anns.values():
            a["id"] += 1  # or the object with the id 0 counts as missed
        truth.dataset["annotations"] = list(truth.anns.values())
        truth.createIndex()
        coco = COCOeval(truth, truth.loadRes(results), "bbox")
        coco.evaluate()
        coco.accumulate()
        coco.summarize()
    assert [total.scores[m] for m in METRICS] == pytest.approx(list(100 * coco.stats[:6]))
    assert 5 < total.scores["AP"] < 95 and len({round(v, 3) for v in total.scores.values()}) == 6

    assert [c.name for c in classes] == names
    assert classes[-1].objects == 0 and set(classes[-1].scores.values()) == {None} and not classes[-1].curves
    for metric in METRICS:
        there = [c.scores[metric] for c in classes if c.scores[metric] is not None]
        if metric in ("AP", "AP50", "AP75"):  # not every class has objects of every size
            assert np.mean(there) == pytest.approx(total.scores[metric])
    assert sum(c.objects for c in classes) == total.objects == sum(not a["iscrowd"] for a in annotations)
    assert sum(c.detections for c in classes) == total.detections == len(results)
    for r in [total, *classes[:-1]]:
        areas = [100 * curve.mean() for curve in r.curves.values()]
        assert areas == pytest.approx([r.scores["AP50"], r.scores["AP75"], r.scores["AP"]])
        assert all(curve.shape == (101,) for curve in r.curves.values())


BOX = [20.0, 20.0, 40.0, 40.0]


@pytest.mark.parametrize(
    "category, bbox, kind, other",
    [
        (7, [21.0, 21.0, 40.0, 40.0], "duplicate", "cat"),
        (8, [21.0, 21.0, 40.0, 40.0], "wrong class", "cat"),
        (7, [45.0, 20.0, 40.0, 40.0], "wrong place", "cat"),
        (8, [45.0, 20.0, 40.0, 40.0], "wrong class and place", "cat"),
        (7, [150.0, 100.0, 20.0, 20.0], "background", ""),
        (8, [59.0, 59.0, 40.0, 40.0], "background", ""),  # touches it, in .0003 of the union
    ],
)
def test_kinds_of_false_detections(files, category, bbox, kind, other):
    """Beside an object that a better detection has found."""
    paths = files([annotation(1, 0, 7, BOX)], [result(0, 7, BOX, 0.9), result(0, category, bbox, 0.8)])
    errors = find_errors(*read(paths), score_threshold=0.5)
    (error,) = errors.false_positives
    assert (error.kind, error.other_name, error.name) == (kind, other, {7: "cat", 8: "dog"}[category])
    assert errors.correct == 1 and not errors.misses and errors.kinds()[kind] == 1 == sum(errors.kinds().values())


def test_errors_are_sorted_and_from_a_score_on(files):
    boxes = [[0.0, 0.0, 10.0 * k, 10.0 * k] for k in (2, 5, 3)]
    annotations = [annotation(k, k, 7, box) for k, box in enumerate(boxes)]
    annotations.append(annotation(9, 2, 8, [100.0, 100.0, 20.0, 20.0], iscrowd=1))
    results = [result(1, 8, [100.0, 100.0, 20.0, 20.0], s) for s in (0.6, 0.9, 0.7)]
    results += [result(0, 7, boxes[0], 0.4), result(2, 8, [100.0, 100.0, 20.0, 20.0], 0.99)]  # too low; in the crowd
    errors = find_errors(*read(files(annotations, results)), score_threshold=0.5)
    assert [e.score for e in errors.false_positives] == [0.9, 0.7, 0.6]
    assert [e.box[2] for e in errors.misses] == [50, 30, 20] and errors.correct == 0
    errors = find_errors(*read(files(annotations, results)), score_threshold=0.0)
    assert [e.box[2] for e in errors.misses] == [50, 30] and errors.correct == 1
    assert find_errors(*read(files(annotations, [])), iou=0.9).misses[0].box == boxes[1]
    with pytest.raises(ValueError, match="IoU must be in"):
        find_errors(*read(files(annotations, results)), iou=1.5)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_that_of_the_highest_f1(files, seed):
    """Against trying every score; many are equal."""
    annotations, results = random_case(2, seed)
    for r in results:
        r["score"] = round(r["score"], 1)
    truth, found = read(files(annotations, results, num_images=6))

    def f1(threshold):
        errors = find_errors(truth, found, 0.5, threshold)
        right, wrong, missed = errors.correct, len(errors.false_positives), len(errors.misses)
        return 2 * right / (2 * right + wrong + missed)

    best = best_score_threshold(truth, found, 0.5)
    tried = {r["score"]: f1(r["score"]) for r in results}
    assert tried[best] == max(tried.values()) > 0 and len(set(tried.values())) > 4
    assert find_errors(truth, found).score_threshold == best
    assert best_score_threshold(truth, [], 0.5) == 0.0


@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_errors_add_up(files, iou):
    truth, found = read(files(*random_case(3), ["a", "b", "c"], 6))
    errors = find_errors(truth, found, iou, score_threshold=0.0)
    total, _ = evaluate(truth, found)
    assert errors.correct + len(errors.misses) == total.objects
    ignored = len(found) - errors.correct - len(errors.false_positives)
    assert 0 <= ignored < len(found) / 4  # in crowds
    assert errors.correct > 10 and errors.misses and len([n for n in errors.kinds().values() if n]) >= 4


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.fixture
def page(files, tmp_path):
    """The page of a random case with pictures: its HTML, and what the function returned."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):  # the sixth is not there
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (150, 200, 3), dtype=np.uint8)).save(
            folder / f"{i}.png"
        )
    (folder / "4.png").write_bytes(b"no image")

    def write(names=("a", "b", "c"), **kwargs):
        found, truth = files(*random_case(len(names)), names, 6)
        line = write_eval_report(found, truth, tmp_path / "page.html", images=folder, examples=9, **kwargs)
        return (tmp_path / "page.html").read_text(encoding="utf-8"), line

    return write


def test_the_page_needs_nothing_else(page):
    html, line = page(command="tools/eval_report.py a b")
    assert line.startswith("AP ") and "objects are missed" in line
    tags = Tags(html).tags
    links = [attrs[key] for _, attrs in tags for key in ("src", "href") if key in attrs]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "script" not in {tag for tag, _ in tags}
    images = [attrs for tag, attrs in tags if tag == "img"]
    assert all(attrs["alt"] for attrs in images) and len([a for a in images if "jpeg" in a["src"]]) >= 9
    assert "no picture: the image is not there, or cannot be read" in html
    assert "tools/eval_report.py a b" in html


def test_hostile_names_stay_text(page):
    html, _ = page(names=("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "c\x1b[31m $x$"))
    assert "script" not in [tag for tag, _ in Tags(html).tags] and "\x1b" not in html
    assert not [attrs for _, attrs in Tags(html).tags if "onerror" in attrs]


def test_images_outside_of_their_folder_are_not_opened(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    assert find_image(tmp_path / "in", "a.png") is not None
    assert find_image(tmp_path / "in", "link.png") is not None  # whoever made the folder made it
    for name in ("../out.png", str(tmp_path / "out.png"), "a/../../out.png", "b.png", ".", None, 3, "a\0.png"):
        assert find_image(tmp_path / "in", name) is None, name


@pytest.mark.parametrize("box", [[10, 10, 20, 30], [-50, -50, 500, 400], [5, 5, 0, 0], [1e9, 0, 1e9, 1e9]], ids=str)
def test_crops_of_any_box(box):
    shown = np.asarray(crop(Image.new("RGB", (200, 150), "#204060"), [(box, "#E69F00"), ([0, 0, 5, 5], "#56B4E9")]))
    assert shown.shape == (SIDE, SIDE, 3)
    if box[0] == 10:
        # The box is in the middle, in its colour, with the image around it.
        assert (shown == (0xE6, 0x9F, 0x00)).all(axis=2).any() and (shown == (0x20, 0x40, 0x60)).all(axis=2).any()


@pytest.mark.parametrize("case", ["no detection", "no object", "one class"])
def test_the_ends_of_the_scale(files, tmp_path, case):
    annotations, results = random_case(1)
    annotations, results = ([] if case == "no object" else annotations), ([] if case == "no detection" else results)
    found, truth = files(annotations, results, ["cat"], 6)
    line = write_eval_report(found, truth, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert ("There is not a single detection" in html) == (case == "no detection")
    assert ("annotations have no objects" in html) == (case == "no object") and line.startswith(
        "AP –" if case == "no object" else "AP 0.0" if case == "no detection" else "AP "
    )
    assert "no pictures" in html


def load_tool():
    spec = importlib.util.spec_from_file_location("tool_eval_report", ROOT / "tools" / "eval_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOOD = [annotation(1, 0, 7, BOX)]


@pytest.mark.parametrize(
    "annotations, results, message",
    [
        (GOOD, [result(9, 7, BOX, 0.5)], "found.json: 1 of 1 results have another image_id .* such as '9'"),
        (GOOD, [result(0, 1, BOX, 0.5)], "found.json: 1 of 1 results have another category_id .* such as '1'"),
        (GOOD, [result(0, 7, [1, 2, 3], 0.5)], r"found.json: result 0: bbox \[1, 2, 3\] is not four numbers"),
        (GOOD, [result(0, 7, BOX, "high")], "found.json: result 0: score 'high' is no number"),
        (GOOD, [{"image_id": 0, "category_id": 7, "bbox": BOX}], "found.json: result 0 has no 'score'"),
        (GOOD, {"images": []}, "found.json: not a list of results .*swapped"),
        ([annotation(1, 5, 7, BOX)], [], "truth.json: annotation 1 has an image_id or category_id"),
        ([annotation(1, 0, 7, [0, 0, float("nan"), 1])], [], "truth.json: bbox .* is not four numbers"),
        ([{"id": 1}], [], "truth.json: an entry without 'bbox'"),
        ([annotation(1, 0, 7, BOX)] * 2, [], "truth.json: two annotations have one id"),
        ([{**GOOD[0], "area": None}], [], "truth.json: annotation 1 has an iscrowd or area that is no number"),
        ([annotation(1, 0, 7, BOX, iscrowd=None)], [], "truth.json: annotation 1 has an iscrowd or area"),
        ([annotation(1, 0, 7, BOX, iscrowd="x")], [], "truth.json: annotation 1 has an iscrowd or area"),
        ([{**GOOD[0], "bbox": [10**400, 0, 1, 1]}], [], "truth.json: bbox .* is not four numbers"),
        (GOOD, [result(0, 7, [10**400, 0, 1, 1], 0.5)], "found.json: result 0: bbox .* is not four numbers"),
        (GOOD, [result(0, 7, BOX, 10**400)], "found.json: result 0: score 10* is no number"),
    ],
)
def test_bad_files_are_named(files, capsys, tmp_path, annotations, results, message):
    found, truth = files(annotations, results)
    assert load_tool().main([str(found), str(truth), "--output", str(tmp_path / "x" / "page.html")]) == 2
    assert re.search("error: .*" + message, capsys.readouterr().err)
    assert not (tmp_path / "x" / "page.html").exists()


def test_results_that_name_their_images_are_matched_by_that(files, tmp_path):
    """As tools/predict.py numbers them: in the order of the files, from 0."""
    annotations, results = random_case(2)
    paths = files(annotations, results, num_images=6)
    want = evaluate(*read(paths))[0].scores
    for r in results:
        r["file_name"] = f"somewhere/{r['image_id']}.png"
        r["image_id"] = 5 - r["image_id"]
    paths = files(annotations, results, num_images=6)
    assert evaluate(*read(paths))[0].scores == want and want["AP"] > 5
    results[3]["file_name"] = "x/other.png"
    with pytest.raises(ValueError, match=r"the annotations have no image called 'other\.png'"):
        read(files(annotations, results, num_images=6))


def test_numbers_out_of_range_and_overwritten_inputs(files, tmp_path, capsys):
    found, truth = files(GOOD, [result(0, 7, BOX, 0.5)])
    before = found.read_text()
    for words in (["--score-threshold", "nan"], ["--examples", "-1"], ["--iou", "2"], ["--output", str(found)]):
        assert load_tool().main([str(found), str(truth), "--output", str(tmp_path / "p.html"), *words]) == 2
        assert "error: " in capsys.readouterr().err
    assert found.read_text() == before and not (tmp_path / "p.html").exists()
    assert load_tool().main([str(truth), str(found), "--output", str(tmp_path / "p.html")]) == 2
    assert "are the two files swapped? Predictions go first" in capsys.readouterr().err


def test_missing_files_are_named(files, capsys, tmp_path):
    found, truth = files(GOOD, [])
    out = ["--output", str(tmp_path / "page.html")]
    for words, missing in (
        ([str(tmp_path / "a.json"), str(truth)], "a.json"),
        ([str(found), str(tmp_path / "b.json")], "b.json"),
        ([str(found), str(truth), "--images", str(tmp_path / "c")], "c"),
    ):
        assert load_tool().main([*words, *out]) == 2
        assert missing in capsys.readouterr().err
    assert load_tool().main([str(found), str(truth), *out]) == 0
    assert "page.html" in capsys.readouterr().out


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_the_page_without_scrolling_sideways(page, tmp_path, width):
    html, _ = page(names=("a", "a name that is much longer than there is room for on a phone" * 2, "c"))
    shown = show(html, width, tmp_path)
    assert shown.width == width and shown.page_width <= width
    assert shown.images == shown.decoded == html.count("<img") > 12
    assert shown.errors == 0 and "CONSOLE" not in shown.log


@pytest.mark.parametrize(
    "section, entry, message",
    [
        ("categories", {"id": "x", "name": "cat"}, "ids of categories are neither all whole numbers nor all text"),
        ("categories", {"id": None, "name": "cat"}, "ids of categories are neither"),
        ("categories", {"id": 7, "name": "cat"}, "two categories have one id"),
        ("categories", {"id": 99, "name": None}, "name of category 99 is no text"),
        ("images", {"id": "x", "file_name": "x.png"}, "ids of images are neither"),
        ("images", {"id": 0, "file_name": "x.png"}, "two images have one id"),
    ],
)
def test_odd_images_and_categories_are_named(files, section, entry, message):
    _, truth = files(GOOD, [])
    content = json.loads(truth.read_text())
    content[section].append(entry)
    truth.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"truth.json: .*{message}"):
        read_truth(truth)


def test_a_crowd_is_neither_missed_nor_overlapped_nor_found(files):
    annotations = [annotation(1, 0, 7, [0, 0, 40, 40], iscrowd=1), annotation(2, 0, 7, [100, 100, 20, 20])]
    annotations.append(annotation(3, 1, 7, [0, 0, 40, 40], iscrowd=1))  # with no detection near
    results = [result(0, 7, [0, 0, 40, 40], 0.9), result(0, 8, [0, 0, 40, 40], 0.8)]
    errors = find_errors(*read(files(annotations, results)))
    assert errors.correct == 0 and [e.box for e in errors.misses] == [[100, 100, 20, 20]]
    (false,) = errors.false_positives  # the first is of the crowd's class: ignored
    assert (false.kind, false.name, false.other_box) == ("background", "dog", None)


def test_false_detections_are_sorted_over_images_and_the_threshold_counts(files):
    scores = {(0, 7): 0.5, (1, 7): 0.7, (2, 7): 0.49, (2, 8): 0.9}
    results = [result(image, category, BOX, score) for (image, category), score in scores.items()]
    errors = find_errors(*read(files([], results)), score_threshold=0.5)
    assert [e.score for e in errors.false_positives] == [0.9, 0.7, 0.5]


@pytest.mark.parametrize("examples, pictures", [(0, 0), (2, 4), (5, 6)])
def test_so_many_pictures_and_no_more(files, tmp_path, examples, pictures):
    found, truth = files([annotation(i + 1, i, 7, [50, 50, 20, 20]) for i in range(3)], [])
    found.write_text(json.dumps([result(i, 7, [0, 0, 20, 20], 0.9) for i in range(3)]))
    for i in range(3):
        Image.new("RGB", (200, 150)).save(tmp_path / f"{i}.png")
    write_eval_report(found, truth, tmp_path / "page.html", images=tmp_path, examples=examples)
    assert (tmp_path / "page.html").read_text().count('src="data:image/jpeg') == pictures
    with pytest.raises(ValueError, match="examples must be >= 0, got -1"):
        write_eval_report(found, truth, tmp_path / "page.html", examples=-1)


def test_names_that_no_file_can_have(files, tmp_path):
    found, truth = files([annotation(1, 0, 7, BOX)], [], names=("\ud800cat", "dog"))
    for name in ("\ud800.png", "x" * 5000):
        assert find_image(tmp_path, name) is None
    write_eval_report(found, truth, tmp_path / "page.html", images=tmp_path)
    assert ">cat<" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_crop_keeps_proportions_and_a_photograph_is_turned(tmp_path):
    image = Image.new("RGB", (100, 60), "#000")
    image.paste("#fff", (40, 20, 60, 40))
    shown = np.asarray(crop(image, [([40, 20, 20, 20], "#E69F00")]).convert("L")) > 250
    ys, xs = np.nonzero(shown)
    assert abs(np.ptp(xs) - np.ptp(ys)) <= 1 and abs(xs.mean() - SIDE / 2) < 2 and abs(ys.mean() - SIDE / 2) < 2
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (60, 100)
