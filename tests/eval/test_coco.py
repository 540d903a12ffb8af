"""Numbers against pycocotools' own summary, kinds of error against their definition in plain Python."""

import contextlib
import json
from collections import Counter

import numpy as np
import pytest
from cases import BOX, annotation, random_case, result, write
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from focal_plugin.eval import coco


def read(paths):
    truth = coco.read_truth(paths[1])
    return truth, coco.read_predictions(paths[0], truth)


@pytest.mark.parametrize("num_classes", [1, 5])
def test_numbers_are_those_that_pycocotools_prints(tmp_path, num_classes):
    annotations, results = random_case(num_classes)
    names = [f"class {k}" for k in range(num_classes + 1)]  # the last one has no object
    paths = write(tmp_path, annotations, results, names, num_images=7)
    table, curves = coco.evaluate(*read(paths))

    with contextlib.redirect_stdout(None):
        # Its own evaluation takes the object with the id 0 for missed.
        truth = COCO(write(tmp_path, [{**a, "id": a["id"] + 1} for a in annotations], results, names, 7)[1])
        stock = COCOeval(truth, truth.loadRes(results), "bbox")
        stock.evaluate()
        stock.accumulate()
        stock.summarize()
    total, classes = table.iloc[0], table.iloc[1:]
    assert list(total[list(coco.METRICS)]) == pytest.approx(list(100 * stock.stats[:6]))
    assert 5 < total.AP < 95 and total[list(coco.METRICS)].round(3).nunique() == 6

    assert list(classes.name) == names and classes.objects.iloc[-1] == 0 and classes.iloc[-1, 3:].isna().all()
    for metric in ("AP", "AP50", "AP75"):  # not every class has objects of every size
        assert classes[metric].mean() == pytest.approx(total[metric])
    assert classes.objects.sum() == total.objects == sum(not a["iscrowd"] for a in annotations)
    assert classes.detections.sum() == total.detections == len(results)
    for metric, curve in zip(("AP50", "AP75", "AP"), curves.values()):
        assert curve.shape == (num_classes + 2, 101)
        np.testing.assert_allclose(100 * curve.mean(1), table[metric])
    for drawn, curve in zip(coco.precision_recall_curves(*paths[::-1], [0.5, 0.75]), curves.values()):
        np.testing.assert_allclose(drawn.precision, curve[0])
        assert drawn.ap == pytest.approx(curve[0].mean())


def overlap(a, b, crowd=False):
    (ax, ay, aw, ah), (bx, by, bw, bh) = a["bbox"], b["bbox"]
    common = max(0, min(ax + aw, bx + bw) - max(ax, bx)) * max(0, min(ay + ah, by + bh) - max(ay, by))
    return common / (aw * ah if crowd else aw * ah + bw * bh - common)


def plain_errors(annotations, results, iou, threshold):
    """(kind, image, box) of each error, and how many detections are right: COCO's rules and TIDE's, word for word."""
    errors, correct = [], 0
    for image in range(6):
        objects = [a for a in annotations if a["image_id"] == image and not a["iscrowd"]]
        crowds = [a for a in annotations if a["image_id"] == image and a["iscrowd"]]
        free, false = list(objects), []
        detections = [r for r in results if r["image_id"] == image and r["score"] >= threshold]
        for d in sorted(detections, key=lambda d: -d["score"]):
            near = [o for o in free if o["category_id"] == d["category_id"] and overlap(d, o) >= iou]
            if near:
                free.remove(max(near, key=lambda o: overlap(d, o)))
                correct += 1
            elif not any(overlap(d, c, crowd=True) >= iou for c in crowds if c["category_id"] == d["category_id"]):
                false.append(d)
        for d in false:
            own = max((overlap(d, o) for o in objects if o["category_id"] == d["category_id"]), default=0)
            other = max((overlap(d, o) for o in objects if o["category_id"] != d["category_id"]), default=0)
            kind = "Localization" if own >= 0.1 else "Both" if other >= 0.1 else "Background"
            kind = "Duplicate" if own >= iou else "Classification" if other >= iou else kind
            errors.append((kind, image, *d["bbox"]))
        errors += [("Missed", image, *o["bbox"]) for o in free]
    return Counter(errors), correct


@pytest.mark.parametrize("seed, iou, threshold", [(0, 0.5, 0.0), (1, 0.5, 0.4), (2, 0.75, 0.0), (3, 0.7, 0.2)])
def test_errors_are_those_of_the_definitions(tmp_path, seed, iou, threshold):
    annotations, results = random_case(3, seed)
    truth, found = read(write(tmp_path, annotations, results, "abc", 6))
    errors = coco.find_errors(truth, found, iou, threshold)
    want, num_correct = plain_errors(annotations, results, iou, threshold)
    matches = coco.match(truth, [p for p in found if p["score"] >= threshold], iou).values()
    assert sum(len(correct) for correct, _, _ in matches) == num_correct > 3
    assert Counter((e.kind, e.entry["image_id"], *e.entry["bbox"]) for e in errors) == want
    assert len({kind for kind, *_ in want}) >= 5
    scores = [e.entry["score"] for e in errors if e.kind != "Missed"]
    sizes = [e.entry["bbox"][2] * e.entry["bbox"][3] for e in errors[len(scores) :]]
    assert scores == sorted(scores, reverse=True) and sizes == sorted(sizes, reverse=True)
    for e in errors:
        assert e.other is None if e.kind == "Background" else e.kind == "Missed" or e.overlap >= 0.1
        assert e.other is None or overlap(e.entry, e.other) == pytest.approx(e.overlap)


@pytest.mark.parametrize("seed", range(4))
def test_the_best_threshold_is_that_of_the_highest_f1(tmp_path, seed):
    """Against trying every score; many are equal."""
    annotations, results = random_case(2, seed)
    results = [{**r, "score": round(r["score"], 1)} for r in results]
    truth, found = read(write(tmp_path, annotations, results, num_images=6))
    tried = {}
    for score in {r["score"] for r in results}:
        errors, correct = plain_errors(annotations, results, 0.5, score)
        tried[score] = 2 * correct / (2 * correct + sum(errors.values()))
    assert tried[coco.best_threshold(truth, found)] == max(tried.values()) > 0 and len(set(tried.values())) > 4
    assert coco.best_threshold(truth, []) == 0.0


def by_predict(results, classes):
    """As tools/predict.py writes them: images numbered in the order of the files, classes from 0."""
    labels = [r["category_id"] - 7 for r in results]
    names = [{"file_name": f"somewhere/{r['image_id']}.png", "category": classes[k]} for r, k in zip(results, labels)]
    return [{**r, "image_id": 5 - r["image_id"], "category_id": k, **n} for r, k, n in zip(results, labels, names)]


def test_results_of_predict_are_matched_by_name(tmp_path):
    annotations, results = random_case(2)
    want, _ = coco.evaluate(*read(write(tmp_path, annotations, results, num_images=6)))
    named = by_predict(results, ("cat", "dog"))
    got, _ = coco.evaluate(*read(write(tmp_path, annotations, named, num_images=6)))
    assert got.equals(want) and want.AP[0] > 5
    way_out = r"; .*--classes A,B,C, .*\['cat', 'dog'\].*--register NAME=ANNOTATIONS.JSON:IMAGE_DIR"
    for given, names, message in (
        (by_predict(results, ("0", "1")), ("cat", "dog"), f"no category '[01]'{way_out}"),
        (by_predict(results, ("cat", "Dog")), ("cat", "dog"), f"no category 'Dog'{way_out}"),
        (by_predict(results, ("cat", "cat")), ("cat", "cat"), "2 category 'cat'"),
        ([{**named[3], "file_name": "x/other.png"}], ("cat", "dog"), r"no file_name 'other\.png'"),
    ):
        with pytest.raises(ValueError, match=f"the annotations have {message}"):
            read(write(tmp_path, annotations, given, names, num_images=6))


GOOD = [annotation(1, 0, 7, BOX)]
CAT, IMAGE = {"id": 7, "name": "cat"}, {"id": 0, "file_name": "x.png"}
BAD_RESULTS = [
    ([result(9, 7, BOX, 0.5)], "image_id 9 is not in the annotations"),
    ([result(0, 1, BOX, 0.5)], "category_id 1 is not in the annotations"),
    *(([result(0, 7, box, 0.5)], "'bbox': ") for box in ([1, 2, 3], [10**400, 0, 1, 1])),
    *(([result(0, 7, BOX, 0.5), result(0, 7, BOX, score)], "'score': ") for score in ("high", 10**400)),
    ([{"image_id": 0, "category_id": 7, "bbox": BOX}], "KeyError: 'score'"),
    *(([result([], 7, BOX, 0.5)], "'image_id': "), ({"images": []}, "swapped"), ([3], "COCO has it: 3 ")),
]
BAD_TRUTH = {
    "annotations": [
        *([annotation(1, 5, 7, BOX)], [annotation(1, 0, 99, BOX)], [{"id": 1}], GOOD * 2, [{**GOOD[0], "area": None}]),
        *([annotation(1, 0, 7, [0, 0, x, 1])] for x in (float("nan"), float("inf"), 10**400)),
        *([annotation(1, 0, 7, BOX, iscrowd=crowd)] for crowd in (None, "x", 2)),
    ],
    "categories": [[CAT, {"id": 99, "name": None}], *([CAT, {"id": wrong, "name": "dog"}] for wrong in ("x", None, 7))],
    "images": [[], None, [3], *([IMAGE, {**IMAGE, "id": wrong}] for wrong in ("x", 0))],
}


def test_what_the_check_before_a_training_lets_pass_is_read(tmp_path):
    """An area that is no number counts in AP of all sizes; a file's name stands for an image's id."""
    annotations, found = [annotation(1, 0, 7, BOX, area=float("nan"))], result(0, 7, BOX, 0.5, file_name="0.png")
    del found["image_id"]
    table, _ = coco.evaluate(*read(write(tmp_path, annotations, [found])))
    assert table.AP[0] == pytest.approx(100)


def test_bad_files_are_named(tmp_path):
    for results, message in BAD_RESULTS:
        with pytest.raises(ValueError, match=f"found.json: .*{message}"):
            read(write(tmp_path, GOOD, results))
    found, truth = write(tmp_path, GOOD, [])
    content = json.loads(truth.read_text())
    broken = [json.dumps({**content, section: wrong}) for section, cases in BAD_TRUTH.items() for wrong in cases]
    for text in (*broken, "", "[" * 100_000, "\xff", "[]"):
        truth.write_bytes(text.encode("latin1"))
        with pytest.raises(ValueError, match=r"truth.json: .*tools/check_dataset.py .*truth.json IMAGES says more"):
            read((found, truth))
